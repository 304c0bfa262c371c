"""FP8 weights with one scale per 128x128 block, as DeepSeek's checkpoints store them.

value = e4m3 * scale; blocks at the right and bottom edge may be partial.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from graphs.model_config import FP8_BLOCK

E4M3_MAX = 448.0
MIN_AMAX = 1e-4  # a block of zeros gets a finite scale


def quantise_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to e4m3 under one scale a block, max(amax, 1e-4) / 448.

    Args:
        weight: [N, K], any float dtype.
    Returns:
        float8_e4m3fn [N, K]; float32 [ceil(N/128), ceil(K/128)].
    """
    blocks = _blocks(weight.float())
    scale = blocks.abs().amax(dim=(1, 3)).clamp_min(MIN_AMAX) / E4M3_MAX
    scaled = blocks / scale[:, None, :, None]
    rounded = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return _unblocked(rounded, weight.shape), scale


def dequantise_blocks(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [N, K] of float8_e4m3fn [N, K] and float32 [ceil(N/128), ceil(K/128)]."""
    return _unblocked(_blocks(weight.float()) * scale[:, None, :, None], weight.shape)


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """[N, K] as [N/128, 128, K/128, 128], zeros added at the edges."""
    rows, cols = x.shape
    x = functional.pad(x, (0, -cols % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    return x.view(x.shape[0] // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK)


def _unblocked(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    full = blocks.view(blocks.shape[0] * FP8_BLOCK, -1)
    return full[: shape[0], : shape[1]]
