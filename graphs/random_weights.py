"""Seeded random weights for presets, made on the device, as if a checkpoint had held them.

Every checkpoint tensor has its own stream of numbers, keyed by (seed, its Hugging Face name), so a
rank's experts are the ones that a run on one rank has, and CPU and GPU get the same bits. Sizes
keep activations of order one through any depth and spread the logits enough for a clear best token.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch

from graphs.fp8_blocks import E4M3_MAX
from graphs.hf_layout import Kind, Part, checkpoint_parts, padded_rows
from graphs.model_config import ModelConfig
from graphs.weights import check_views, is_per_rank, local_experts
from kernels.triton.launch import Launcher
from kernels.triton.random_init import fill_random, fill_random_ref
from kernels.triton.weight_tiles import group_of_rows

_SQRT3 = math.sqrt(3.0)  # half-width of a uniform distribution of unit deviation
_LOGIT_STD = 4.0
_BIAS_RANGE = 0.02
_NORM_RANGE = 0.1

# (out, name, half-width, mean, elements of the tensor before out)
Fill = tuple[torch.Tensor, str, float, float, int]


def random_weights(
    cfg: ModelConfig,
    views: Mapping[str, torch.Tensor],
    *,
    seed: int,
    launch: Launcher | None = None,
    ep_rank: int = 0,
    ep_size: int = 1,
    replicated: bool = True,
    zeroed: bool = False,
) -> None:
    """Fill the packed tensors with numbers that `seed` decides.

    Args:
        views: every tensor of `weight_table(cfg, ep_size=ep_size)`, all on one device.
        launch: how to run kernels; required where the tensors are on a GPU, unused otherwise.
        replicated: fill what every rank holds, too; else this rank's experts alone.
        zeroed: the padding rows are zero already.
    Raises:
        ValueError: views or ranks that do not fit `cfg`, or a GPU without `launch`.
    """
    num_local = local_experts(cfg, ep_size)
    if not 0 <= ep_rank < ep_size:
        raise ValueError(f"ep_rank: expected 0 … {ep_size - 1}, got {ep_rank}")
    check_views(cfg, views, ep_size=ep_size)
    fill = _filler(views["embed"].device, launch)
    for name, begin, end in padded_rows(cfg) if replicated and not zeroed else ():
        views[name][begin:end].view(torch.uint8).zero_()
    first = ep_rank * num_local
    for part in checkpoint_parts(cfg):
        if part.expert is None:
            mine = replicated or is_per_rank(cfg, part.target)
        else:
            mine = first <= part.expert < first + num_local
        if mine:
            for out, name, half_width, mean, before in _fills(cfg, views, part, first, ep_rank):
                fill(out, seed=_stream(seed, name), scale=half_width, mean=mean, offset=before)


def _filler(device: torch.device, launch: Launcher | None) -> Callable[..., None]:
    if device.type == "cpu":
        return fill_random_ref
    if launch is None:
        raise ValueError(f"random weights on {device}: expected a launcher, got None")
    return functools.partial(fill_random, launch)


def _stream(seed: int, name: str) -> int:
    """The 64-bit seed of one tensor."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


def _fills(
    cfg: ModelConfig, views: Mapping[str, torch.Tensor], part: Part, first: int, rank: int
) -> Iterator[Fill]:
    if part.expert is None and is_per_rank(cfg, part.target):
        # Rows past the vocabulary get numbers as if it went on.
        before = cfg.head_range(rank).start * cfg.hidden_size
        yield views[part.target], part.source, *_distribution(cfg, part), before
        return
    if part.kind is Kind.KV_B:
        width = _SQRT3 / math.sqrt(part.shape[1])
        for half in ("w_uk", "w_uv"):
            yield views[part.target + half], f"{part.source}.{half}", width, 0.0, 0
        return
    target = group_of_rows(_slab(views, part.target, part, first), part.row, part.shape[0])
    width, mean = _distribution(cfg, part)
    if part.kind is not Kind.LINEAR or not cfg.is_fp8:
        yield target, part.source, width, mean, 0
        return
    # Uniform over e4m3's range; the scales bring it to size and differ from block to block.
    scale = _slab(views, f"{part.target}_scale", part, first)
    scale = scale[part.scale_row : part.scale_row + part.scale_shape[0]]
    yield target, part.source, E4M3_MAX, 0.0, 0
    yield scale, part.scale_source, 0.25 * width / E4M3_MAX, width / E4M3_MAX, 0


def _slab(views: Mapping[str, torch.Tensor], name: str, part: Part, first: int) -> torch.Tensor:
    return views[name] if part.expert is None else views[name][part.expert - first]


def _distribution(cfg: ModelConfig, part: Part) -> tuple[float, float]:
    """Half-width and mean of the values."""
    if part.target.endswith("router_bias"):
        return _BIAS_RANGE, 0.0
    if len(part.shape) == 1:
        return _NORM_RANGE, 1.0
    std = 1.0 / math.sqrt(part.shape[1])
    if part.target == "head" or (part.target == "embed" and cfg.tie_word_embeddings):
        std *= _LOGIT_STD
    elif part.target == "embed":
        std = 1.0
    return _SQRT3 * std, 0.0
