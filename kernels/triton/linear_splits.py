"""The sum of a product's K splits, in their order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap

SUM_BLOCK = 512
MANY_SPLITS, SUM_MANY_BLOCK = 8, 32  # from here on a program takes fewer results


@triton.jit
def _results(num_tokens, N: tl.constexpr, BLOCK: tl.constexpr):
    """i64 [BLOCK]: results of this program, counted through; and how many there are of all."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i, tl.cast(num_tokens, tl.int64) * N


@triton.jit
def _store_results(out, sums, i, size, N: tl.constexpr, OUT_PITCH: tl.constexpr):
    at = i
    if OUT_PITCH != N:
        at = (i // N) * OUT_PITCH + i % N
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=i < size)


@triton.jit
def _sum_splits_kernel(
    partial,  # f32 [SPLITS, T, N]
    out,  # [T, N], pitch OUT_PITCH
    num_tokens,
    N: tl.constexpr,
    OUT_PITCH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    i, size = _results(num_tokens, N, BLOCK)
    acc = tl.load(partial + i, mask=i < size, other=0.0)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(partial + split * size + i, mask=i < size, other=0.0)
    _store_results(out, acc, i, size, N, OUT_PITCH)


@triton.jit
def _sum_many_splits_kernel(
    partial,  # f32 [SPLITS, T, N]
    out,  # [T, N], pitch OUT_PITCH
    num_tokens,
    N: tl.constexpr,
    OUT_PITCH: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """All splits of a few results at once: one after the other they would take a latency each."""
    await_inputs(PDL)
    i, size = _results(num_tokens, N, BLOCK)
    split = tl.arange(0, SPLITS_POW2)[:, None]
    inside = (split < SPLITS) & (i < size)[None, :]
    parts = tl.load(partial + split * size + i[None, :], mask=inside, other=0.0)
    _store_results(out, tl.sum(parts, 0), i, size, N, OUT_PITCH)


def sum_splits(launch: Launcher, partial: torch.Tensor, *, out: torch.Tensor, splits: int) -> None:
    """out = the splits' sum.

    Args:
        partial: fp32, [splits, T, N] at its beginning.
        out: [T, N]; the row pitch may exceed N.
    Capture-safe: no sync, no allocation.
    """
    num_tokens, n = out.shape
    many = splits > MANY_SPLITS
    kernel, block = (
        (_sum_many_splits_kernel, SUM_MANY_BLOCK) if many else (_sum_splits_kernel, SUM_BLOCK)
    )
    launch(
        kernel,
        (triton.cdiv(num_tokens * n, block),),
        partial,
        out,
        num_tokens,
        N=n,
        OUT_PITCH=out.stride(0),
        SPLITS=splits,
        **({"SPLITS_POW2": triton.next_power_of_2(splits)} if many else {}),
        BLOCK=block,
        num_warps=4,
        **overlap(launch),
    )
