"""Weights in tiles, for tests."""

from __future__ import annotations

import torch

from kernels.triton.weight_tiles import put_rows, tiled_shape


def as_tiles(rows: torch.Tensor) -> torch.Tensor:
    """A copy of [[E,] R, K] that lies in tiles."""
    *lead, n, k = rows.shape
    tiles = rows.new_empty(*lead, *tiled_shape(n, k, rows.element_size()))
    for target, matrix in zip(tiles.view(-1, *tiles.shape[-4:]), rows.view(-1, n, k), strict=True):
        put_rows(target, 0, matrix)
    return tiles
