"""Weights that lie in tiles: what a program loads at once lies side by side in memory.

A matrix [R, K] in tiles is [R/128, K/C, 128, C], contiguous, C elements being 128 bytes: each
[128, C] block is 16 KiB in one piece, and the blocks of the same rows follow each other. In plain
rows such a block is 128 pieces of 128 bytes, K apart, and HBM gives a few per cent less. The bytes
of 128 rows are the same either way, only in another order: rows can be exchanged in such groups.

A tensor's rank says which it is: 2 or, with a leading dimension of experts, 3 for rows; 4 or 5 for
tiles. No torch is imported here: layouts are computed without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TILE_ROWS = 128
TILE_BYTES = 128  # of one row of a tile


def tiled_shape(rows: int, cols: int, item_bytes: int) -> tuple[int, int, int, int]:
    """The shape of a [rows, cols] matrix in tiles.

    Raises:
        ValueError: it is not of whole tiles.
    """
    tile_cols = TILE_BYTES // item_bytes
    if rows % TILE_ROWS or cols % tile_cols:
        raise ValueError(
            f"expected whole tiles of {TILE_ROWS}x{tile_cols}, got a matrix of {rows}x{cols}; keep "
            "it in rows"
        )
    return rows // TILE_ROWS, cols // tile_cols, TILE_ROWS, tile_cols


def in_tiles(weight: torch.Tensor) -> bool:
    """Whether a matrix, or one for each expert, lies in tiles."""
    return weight.ndim >= 4


def check_tiles(weight: torch.Tensor) -> None:
    """Refuse other tiles than those of this module; rows are fine."""
    if not in_tiles(weight):
        return
    size = weight.element_size()
    ours = size <= 2 and weight.shape[-2:] == (TILE_ROWS, TILE_BYTES // size)
    if not ours or not weight.is_contiguous():
        raise ValueError(
            f"tiles must be {TILE_ROWS} rows of {TILE_BYTES} bytes, 1 or 2 bytes an element, and "
            f"contiguous, got weights {list(weight.shape)} of {weight.dtype} with strides "
            f"{list(weight.stride())}"
        )


def extents(shape: tuple[int, ...]) -> tuple[int, ...]:
    """([experts,] rows, cols) of a weight of this shape, however it lies."""
    if len(shape) < 4:
        return tuple(shape)
    *lead, row_tiles, col_tiles, tile_rows, tile_cols = shape
    return (*lead, row_tiles * tile_rows, col_tiles * tile_cols)


def as_rows(weight: torch.Tensor) -> torch.Tensor:
    """[…, R, K]: the weight itself, or a copy of one that lies in tiles."""
    if not in_tiles(weight):
        return weight
    return weight.transpose(-3, -2).reshape(extents(tuple(weight.shape)))


def put_rows(target: torch.Tensor, begin: int, rows: torch.Tensor) -> None:
    """Write `rows` [n, K] to the matrix `target`, from row `begin` on.

    Raises:
        ValueError: of a matrix in tiles, what are not whole tiles.
    """
    count = rows.shape[0]
    if not in_tiles(target):
        target[begin : begin + count].copy_(rows)
        return
    _, col_tiles, tile_rows, tile_cols = target.shape
    if begin % tile_rows or count % tile_rows:
        raise ValueError(
            f"a weight in tiles is written {tile_rows} rows at a time, got rows {begin} to "
            f"{begin + count}"
        )
    tiles = rows.reshape(-1, tile_rows, col_tiles, tile_cols).transpose(1, 2)
    target[begin // tile_rows : (begin + count) // tile_rows].copy_(tiles)


def group_of_rows(target: torch.Tensor, begin: int, count: int) -> torch.Tensor:
    """The memory of `count` rows from `begin` on: contiguous, in the order in which they lie.

    Raises:
        ValueError: of a matrix in tiles, what are not whole tiles.
    """
    if not in_tiles(target):
        return target[begin : begin + count]
    if begin % TILE_ROWS or count % TILE_ROWS:
        raise ValueError(
            f"a weight in tiles has groups of {TILE_ROWS} rows, got rows {begin} to {begin + count}"
        )
    return target[begin // TILE_ROWS : (begin + count) // TILE_ROWS]
