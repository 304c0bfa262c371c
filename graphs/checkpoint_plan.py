"""A checkpoint judged against a model: what will be read, what is left out, what is wrong."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from graphs.hf_layout import Kind, Part, checkpoint_parts, fused_blocks_fit
from graphs.model_config import ModelConfig
from graphs.safetensors_dir import CheckpointDir, CheckpointError, Stored

FLOATS = ("bfloat16", "float16", "float32")
FP8 = "float8_e4m3fn"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# What a next-token-prediction layer has and a decoder layer has not.
_NEXT_TOKEN_ONLY = ("eh_proj.", "enorm.", "hnorm.", "shared_head.")


@dataclass(frozen=True)
class LoadPlan:
    """What to read.

    Attributes:
        parts: each with the tensor that holds it.
        left_out: reason -> names of the tensors that are not read.
        quantised: names of unquantised tensors that an FP8 model quantises while loading.
    """

    parts: tuple[tuple[Part, Stored], ...]
    left_out: dict[str, tuple[str, ...]]
    quantised: tuple[str, ...]


def plan_load(checkpoint: CheckpointDir, cfg: ModelConfig, *, whole: bool = True) -> LoadPlan:
    """Match every tensor of the directory with the model.

    Args:
        whole: every tensor of the model must be there; else those that are there are read.
    Raises:
        CheckpointError: naming each tensor that is missing, extra, or of a wrong shape or type.
    """
    stored = checkpoint.tensors
    parts: list[tuple[Part, Stored]] = []
    problems: list[str] = []
    known: set[str] = set()
    for part in checkpoint_parts(cfg, fused=stored):
        tensor = stored.get(part.source)
        if tensor is None and not whole:
            continue
        if part.source not in known:
            known.add(part.source)
            if tensor is None or tensor.dtype == FP8:
                known.add(part.scale_source)
            problems += _part_problems(part, checkpoint, cfg)
        if tensor is not None:
            parts.append((part, tensor))
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    next_token = _next_token_layers(checkpoint, cfg)
    for name in stored.keys() - known:
        reason = _why_left_out(name, stored[name], cfg, next_token)
        if reason:
            left_out[reason].append(name)
        else:
            problems.append(_described(stored[name], name, "no such tensor in this model"))
    if problems:
        remedy = (
            "use the config.json that was saved with these weights, and no --override against it"
        )
        raise CheckpointError(checkpoint.path, sorted(problems), remedy)
    quantised = dict.fromkeys(
        part.source
        for part, tensor in parts
        if cfg.is_fp8 and part.kind is Kind.LINEAR and tensor.dtype != FP8
    )
    reasons = {reason: tuple(sorted(left_out[reason])) for reason in sorted(left_out)}
    return LoadPlan(tuple(parts), reasons, tuple(quantised))


def _part_problems(part: Part, checkpoint: CheckpointDir, cfg: ModelConfig) -> Iterator[str]:
    tensor = checkpoint.tensors.get(part.source)
    if tensor is None:
        expected = _floats(part.source_shape)
        yield f"{checkpoint.listing}: {part.source}: expected {expected}, got no such tensor"
        return
    may_be_fp8 = part.kind is not Kind.CAST
    if tensor.shape != part.source_shape:
        yield _described(tensor, part.source, f"shape {list(part.source_shape)}")
    if tensor.dtype == FP8 and may_be_fp8:
        if not cfg.is_fp8:
            expected = (
                f"{'|'.join(FLOATS)} as config.json has no quantization_config "
                "(or add --override quantization=fp8)"
            )
            yield _described(tensor, part.source, expected)
        if part.num_fused and not fused_blocks_fit(cfg):
            expected = (
                f"experts one by one, as 128-row scale blocks do not divide "
                f"moe_intermediate_size {cfg.moe_intermediate_size}"
            )
            yield _described(tensor, part.source, expected)
        yield from _scale_problems(part, checkpoint)
    elif tensor.dtype not in FLOATS:
        yield _described(tensor, part.source, "|".join((*FLOATS, *([FP8] * may_be_fp8))))


def _scale_problems(part: Part, checkpoint: CheckpointDir) -> Iterator[str]:
    name, shape = part.scale_source, part.scale_source_shape
    scale = checkpoint.tensors.get(name)
    if scale is None:
        expected = f"{_floats(shape)} beside FP8 {part.source}"
        yield f"{checkpoint.listing}: {name}: expected {expected}, got no such tensor"
    elif scale.shape != shape or scale.dtype not in FLOATS:
        yield _described(scale, name, _floats(shape))


def _floats(shape: tuple[int, ...]) -> str:
    return f"{list(shape)} {'|'.join(FLOATS)}"


def _described(tensor: Stored, name: str, expected: str) -> str:
    return f"{tensor.file}: {name}: expected {expected}, got {list(tensor.shape)} {tensor.dtype}"


def _next_token_layers(checkpoint: CheckpointDir, cfg: ModelConfig) -> set[int]:
    """Layers past the model's own that predict a further token, known by what only they have."""
    found: set[int] = set()
    for name in checkpoint.tensors:
        match = _LAYER.match(name)
        if match and match[2].startswith(_NEXT_TOKEN_ONLY):
            found.add(int(match[1]))
    return {layer for layer in found if layer >= cfg.num_hidden_layers}


def _why_left_out(name: str, tensor: Stored, cfg: ModelConfig, next_token: set[int]) -> str | None:
    if name.endswith("rotary_emb.inv_freq"):
        return "rotary frequencies, computed from config.json"
    if name == "lm_head.weight" and cfg.tie_word_embeddings:
        return "lm_head, the same as the embedding"
    match = _LAYER.match(name)
    if not match:
        return None
    layer = int(match[1])
    if layer in next_token:
        return f"next-token-prediction layer model.layers.{layer}"
    if cfg.num_layers <= layer < cfg.num_hidden_layers:
        return f"layers past the first {cfg.num_layers}"
    if not cfg.num_shared_experts and ".shared_experts." in name and 0 in tensor.shape:
        return "shared experts of width 0"
    return None
