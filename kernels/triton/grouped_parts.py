"""What both products of the routed experts share: whose pairs a program takes, how it gathers and
stores their rows; for the oracles, which experts have pairs at all.

A pair is `p = token * top_k + k`. `offsets` and `pairs`, made on the device, list the pairs of each
local expert; a program gathers the rows of its pairs, which stay where they are, and streams one
tile of that expert's weights past them. Invariants: as in `linear`, the K order is fixed by the
weight's shape, and the tile height along the pairs changes no bit, so a pair's result does not
depend on T, on its place in the list or on which other pairs the expert has. Rows of `out` whose
pair is not listed are not written.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import triton
import triton.language as tl

from kernels.triton.tiles import dequantize_rows


@triton.jit
def expert_of(offsets, slot, E: tl.constexpr, E_POW2: tl.constexpr, COMPACT: tl.constexpr):
    """Expert of a grid slot, and the bounds of its pairs; first == end leaves nothing to do."""
    if COMPACT:
        # The grid is as high as experts can be busy: slot j takes the j-th expert that has pairs.
        ids = tl.arange(0, E_POW2)
        begins = tl.load(offsets + ids, mask=ids < E, other=0)
        ends = tl.load(offsets + ids + 1, mask=ids < E, other=0)
        busy = (ends > begins).to(tl.int32)
        mine = (tl.cumsum(busy, 0) == slot + 1) & (busy == 1)
        expert = tl.sum(tl.where(mine, ids, 0), 0)
        first = tl.sum(tl.where(mine, begins, 0), 0)
        end = tl.sum(tl.where(mine, ends, 0), 0)
    else:
        expert = slot
        first = tl.load(offsets + slot)
        end = tl.load(offsets + slot + 1)
    return expert, first, end


@triton.jit
def gather_rows(
    x,  # [rows, K], pitch X_PITCH
    rows,  # i64 [BLOCK_P]
    live,  # bool [BLOCK_P]
    k,
    K: tl.constexpr,
    X_PITCH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """The [BLOCK_P, BLOCK_K] tile of scattered rows at column k, zero outside."""
    c = k + tl.arange(0, BLOCK_K)
    inside = live[:, None]
    if not EVEN_K:
        inside = inside & (c < K)[None, :]
    return tl.load(x + rows[:, None] * X_PITCH + c[None, :], mask=inside, other=0.0)


@triton.jit
def store_pairs(out, acc, pair, live, n, N: tl.constexpr):
    """Write acc [BLOCK_N, BLOCK_P] to out[pair, n], the part inside the matrix."""
    at = out + pair.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, tl.trans(acc).to(out.dtype.element_ty), mask=live[:, None] & (n < N)[None, :])


@triton.jit
def store_hidden(
    out,  # act or e4m3 [P, INTER]
    out_scale,  # f32 [P, INTER/128]
    gate,  # f32 [BLOCK_N, BLOCK_P]
    up,  # as gate
    pair,  # i32 [BLOCK_P]
    live,  # bool [BLOCK_P]
    n_tile,
    INTER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP8: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """SwiGLU and (FP8) the quantisation of one group of each pair's hidden activation."""
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    h = gate / (1.0 + tl.exp(-gate)) * up
    if FP8:
        if not EVEN_N:
            h = tl.where((n < INTER)[:, None], h, 0.0)
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(h), 0), 1e-4), 448.0)
        h = h / scale[None, :]
        tl.store(out_scale + pair * ((INTER + 127) // 128) + n_tile, scale, mask=live)
    store_pairs(out, h, pair, live, n, INTER)


def busy_experts(offsets: torch.Tensor, pairs: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that has pairs, with their ids."""
    bounds = offsets.tolist()
    for expert, (first, end) in enumerate(pairwise(bounds)):
        if end > first:
            yield expert, pairs[first:end].long()


def widen(x: torch.Tensor, scale: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """fp32 values of the given rows."""
    if scale is None:
        return x[rows].float()
    picked = x.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
    return dequantize_rows(picked, scale[rows])
