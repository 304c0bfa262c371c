"""What both per-head products of latent attention share: `mla_absorb_q` and `mla_absorb_v`.

Both have the weight as the left operand and tokens as the narrow side: each weight element is read
once for up to 64 tokens, and the time is that of reading the weights. Invariants: the order of a
sum is set by the weight's shape; the token tile only widens an instruction, so bits do not depend
on T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

MIN_TOKENS, MAX_TOKENS = 16, 64  # of one tile; the narrow side of a tensor-core instruction


class Tile(NamedTuple):
    """Weight rows and reduction steps of a tile; functions of the weight's shape and dtype only."""

    rows: int
    steps: int


def token_tile(x: torch.Tensor) -> int:
    """Tokens of a tile: as many as there are, within what one instruction takes."""
    if x.dtype.itemsize != 2:
        return MIN_TOKENS
    return min(MAX_TOKENS, max(MIN_TOKENS, int(triton.next_power_of_2(x.shape[0]))))


def precision(x: torch.Tensor) -> str:
    """How `tl.dot` takes operands of the dtype of `x`."""
    return "ieee" if x.dtype == torch.float32 else "tf32"  # 16-bit products are exact either way


def pow2(size: int) -> int:
    """The next power of two that an instruction takes."""
    return max(16, int(triton.next_power_of_2(size)))
