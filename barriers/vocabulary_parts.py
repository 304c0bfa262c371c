"""Which tokens' rows of a head each rank holds where ranks share it; known without torch."""

from __future__ import annotations

from kernels.triton.weight_tiles import TILE_ROWS


def part_rows(vocab: int, world: int) -> int:
    """Rows of every rank's part, padding included: whole tiles."""
    return -(-vocab // (world * TILE_ROWS)) * TILE_ROWS


def part_of(vocab: int, world: int, rank: int) -> range:
    """The tokens of `rank`, without padding; the last ranks of a small vocabulary may have none."""
    rows = part_rows(vocab, world)
    return range(min(rank * rows, vocab), min((rank + 1) * rows, vocab))
