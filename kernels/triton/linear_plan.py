"""How dense products are cut: tiles, splits of K, what is asked for ahead; and what was measured.

Invariant: the number of K splits, the one choice that changes bits, is a function of (N, K, number
format) only.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from kernels.triton.tiles import BUDGET_BYTES, FP32_BLOCK_N

# The plan must be the same on every chip, so it counts on a fixed number of SMs.
MIN_PROGRAMS = 120
UNSPLIT_PROGRAMS = 112
SHORT_PRODUCT_BYTES = 32 << 20  # below it a second launch costs more than narrow tiles


@dataclass(frozen=True)
class LinearPlan:
    """How a product is cut; the number of tokens has no say in it.

    Attributes:
        block_n: weight rows of a tile: 64 or 128; of fp32 weights 32 or 64.
        splits: parts that K is cut into, added up in order. The one choice that changes bits.
        unroll: blocks of K that one turn of the loop takes (FP8 only).
        per_sm: programs that are to share an SM; decides how deep each is pipelined.
        prefetch: blocks of K whose weights are asked for before the inputs are there.
    """

    block_n: int
    splits: int
    unroll: int = 1
    per_sm: int = 2
    prefetch: int = 4

    def __post_init__(self) -> None:
        if self.block_n not in (32, 64, 128) or min(self.splits, self.unroll) < 1:
            raise ValueError(
                "expected block_n 32 (fp32 weights), 64 or 128 and at least one split and block, "
                f"got {self}"
            )
        if self.per_sm not in BUDGET_BYTES:
            raise ValueError(f"expected 1 to 3 programs an SM, got {self}")
        if self.prefetch & (self.prefetch - 1):
            raise ValueError(f"prefetch must be 0 or a power of two, got {self.prefetch}")


def linear_plan(n: int, k: int, *, elem_bytes: int, tokens: int | None = None) -> LinearPlan:
    """The plan for a weight's shape and format.

    Wide weights fill the chip by themselves. Narrow ones are cut along K, unless tiles of half the
    height are enough and the product is so short that a second launch would cost more. fp32 weights
    have no tensor cores: they are cut until twice the chip is busy.

    Args:
        elem_bytes: of the weight: 1 (e4m3), 2 or 4.
        tokens: if they are known, tiles may suit them; they have no say in the splits.
    """
    if elem_bytes == 1 and tokens is not None and tokens <= FEW_TOKENS and (n, k) in MEASURED_FEW:
        return MEASURED_FEW[n, k]
    if elem_bytes == 1 and (n, k) in MEASURED:
        return MEASURED[n, k]
    if elem_bytes == 4:
        block_n = FP32_BLOCK_N if n > FP32_BLOCK_N // 2 else FP32_BLOCK_N // 2
        tall = triton.cdiv(n, block_n)
        splits = min(triton.cdiv(2 * MIN_PROGRAMS, tall), max(1, k // 64))
        return LinearPlan(block_n, splits, prefetch=2)
    min_split_k = 512 // elem_bytes
    wide = triton.cdiv(n, 128)
    if wide >= UNSPLIT_PROGRAMS:
        return LinearPlan(128, 1)
    if triton.cdiv(n, 64) >= UNSPLIT_PROGRAMS and n * k * elem_bytes <= SHORT_PRODUCT_BYTES:
        return LinearPlan(64, 1)
    splits = min(triton.cdiv(MIN_PROGRAMS, wide), max(1, k // min_split_k))
    return LinearPlan(128, splits) if splits > 1 else LinearPlan(64, 1)


def linear_workspace_elems(num_tokens: int, n: int, k: int, *, elem_bytes: int) -> int:
    """fp32 elements of workspace that one product needs: 0 where K is not split."""
    splits = linear_plan(n, k, elem_bytes=elem_bytes).splits
    return splits * num_tokens * n if splits > 1 else 0


# FP8 products whose best cut was measured on an H200, by (N, K): h200_plan_sweep.json of
# bench/results. The first one's is of whole steps: its programs ask for all that they read before
# they wait, which is worth 0.9 us a layer at 1 row (aP of h200_ask_ahead.json), though the product
# alone becomes slower (h200_ops_quick.json).
MEASURED = {
    (2112, 7168): LinearPlan(64, 8, prefetch=8),
    (7168, 16384): LinearPlan(64, 2, unroll=2),
    (4096, 7168): LinearPlan(64, 4, unroll=2),
    (7168, 2048): LinearPlan(64, 1, per_sm=1),
    (36864, 7168): LinearPlan(64, 1, unroll=2),
    (7168, 18432): LinearPlan(64, 2, unroll=2),
}
# The same where tiles of at most so many tokens are enough.
FEW_TOKENS = 32
MEASURED_FEW = {(36864, 7168): LinearPlan(128, 1, per_sm=3)}
