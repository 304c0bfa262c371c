"""Small Hugging Face checkpoints for tests: made by transformers, or as others write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.utils import logging

from graphs.hf_layout import Kind, checkpoint_parts
from graphs.model_config import ModelConfig
from graphs.weights import weight_table
from kernels.triton.weight_tiles import as_rows

logging.disable_progress_bar()
logging.set_verbosity_error()

Tensors = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"

# A linear of the decoder, in the released FP8 checkpoints' sense.
_FP8_NAMES = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_FP8_MLP_NAMES = ("gate_proj", "up_proj", "down_proj")

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}


def small_config(**changes: Any) -> DeepseekV3Config:
    """A three-layer model with one dense layer and grouped experts; `changes` are HF keys."""
    fields: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "intermediate_size": 80,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "max_position_embeddings": 512,
        "num_mtp_layers": 0,
        "dtype": "float32",
    }
    return DeepseekV3Config(**(fields | changes))


def random_model(
    config: DeepseekV3Config, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> DeepseekV3ForCausalLM:
    """A model whose logits differ clearly and whose router bias matters."""
    generator = torch.Generator().manual_seed(seed)
    model = DeepseekV3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(0.1 * noise)
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.1 * noise)
            else:
                std = max(tensor.shape[-1], 1) ** -0.5
                tensor.copy_(noise * std * (4 if "lm_head" in name or "embed" in name else 1))
    # The bias of the router stays float32, as released checkpoints have it.
    return model.to(dtype)


def save_model(path: Path, model: DeepseekV3ForCausalLM, *, max_shard_size: str = "5GB") -> Path:
    """`save_pretrained`, as transformers 5 writes it."""
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


def read_tensors(path: Path) -> Tensors:
    """Every tensor of a directory, by name."""
    tensors: Tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return tensors


def write_tensors(path: Path, tensors: Tensors, *, shards: int = 1) -> Path:
    """Replace the directory's weights; with an index where there are several shards."""
    for old in [*path.glob("*.safetensors"), *path.glob(INDEX)]:
        old.unlink()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, path / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (path / INDEX).write_text(text)
    return path


def edit_config(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change `config.json` in place."""
    config = json.loads((path / "config.json").read_text())
    edit(config)
    (path / "config.json").write_text(json.dumps(config))


def as_transformers_4(config: dict[str, Any]) -> None:
    """Rewrite a config of transformers 5 in the words of 4."""
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    config |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}


def as_fp8(path: Path, *, only: str = "", shards: int = 1) -> Tensors:
    """Rewrite a directory as the released FP8 checkpoints are.

    Args:
        only: quantise just the linears with this in their name.
    Returns:
        the float32 values that the FP8 tensors stand for, and all others as they were: the state
        of a model to compare with.
    """
    stored, values = {}, {}
    for name, tensor in read_tensors(path).items():
        stored[name], values[name] = tensor, tensor
        if is_fp8_linear(name) and only in name:
            stored[name], scale = quantised(tensor)
            stored[f"{name}_scale_inv"] = scale
            values[name] = dequantised(stored[name], scale)
    write_tensors(path, stored, shards=shards)
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    edit_config(path, lambda config: config.update(quantization_config=quantization))
    return values


def is_fp8_linear(name: str) -> bool:
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return name.endswith(".weight") and module in (*_FP8_NAMES, *_FP8_MLP_NAMES)


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 and scales of each 128x128 block, block by block."""
    rows, cols = weight.shape
    weight = weight.float()
    q = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-rows // 128), -(-cols // 128))
    for i in range(0, rows, 128):
        for j in range(0, cols, 128):
            block = weight[i : i + 128, j : j + 128]
            s = block.abs().max().clamp_min(1e-4) / 448
            scale[i // 128, j // 128] = s
            q[i : i + 128, j : j + 128] = (block / s).clamp(-448, 448).to(q.dtype)
    return q, scale


def dequantised(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rows, cols = q.shape
    each = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    return q.float() * each


def empty_views(cfg: ModelConfig, *, ep_size: int = 1) -> Tensors:
    """Packed weights full of NaN, so that a row that nothing fills is seen."""
    views = {}
    for name, spec in weight_table(cfg, ep_size=ep_size).items():
        raw = torch.full((spec.nbytes,), 0xFF, dtype=torch.uint8)
        views[name] = raw.view(getattr(torch, spec.dtype)).view(spec.shape)
    return views


def unpacked(cfg: ModelConfig, views: Tensors) -> Tensors:
    """The packed weights of a one-rank run as a transformers state dict, FP8 as float32 values."""
    state: Tensors = {}
    for part in checkpoint_parts(cfg):
        if part.kind is Kind.KV_B:
            halves = (views[f"{part.target}w_uk"], views[f"{part.target}w_uv"])
            state[part.source] = torch.cat(halves, dim=1).reshape(part.shape)
            continue
        target, scale = views[part.target], views.get(f"{part.target}_scale")
        if part.expert is not None:
            target = target[part.expert]
            scale = None if scale is None else scale[part.expert]
        value = as_rows(target)[part.row : part.row + part.shape[0]]
        if scale is not None:
            blocks = scale[part.scale_row : part.scale_row + part.scale_shape[0]]
            value = dequantised(value, blocks)
        state[part.source] = value
    if cfg.tie_word_embeddings:
        state["lm_head.weight"] = views["embed"]
    return state
