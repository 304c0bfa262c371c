"""The second product of the routed experts, on the hidden activation of each pair.

Words and invariants: `grouped_parts`. Its first programs may wait for their own expert's part of
`grouped_gate_up` instead of for all of it, and so fill its tail.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.grouped_parts import busy_experts, expert_of, gather_rows, store_pairs, widen
from kernels.triton.grouped_plan import (
    DOWN_PLAN,
    GroupedPlan,
    Tiles,
    check_lists,
    check_operands,
    check_out,
    or_stand_in,
)
from kernels.triton.launch import Launcher
from kernels.triton.overlap import (
    await_all,
    await_inputs_streaming,
    release_dependents,
    release_first,
)
from kernels.triton.tiles import (
    check_ready,
    dequantize_blocks,
    load_scale,
    load_tile,
    matmul_rows,
    prefetch_weight,
)
from kernels.triton.weight_tiles import as_rows

# Of an expert's counter, the better part of a second, before its programs wait for the end of all
# of gate_up. Where kernels do not overlap, gate_up has ended: a count that is missing gives NaN.
POLLS = 1 << 20


@triton.jit
def _await_hidden(ready, expert, K: tl.constexpr, POLLS: tl.constexpr):
    """Whether the expert's hidden activation is there; false after so many polls."""
    # Pairs with the release at the end of `grouped_gate_up._gate_up_kernel`.
    columns = tl.atomic_add(ready + expert, 0, sem="acquire", scope="gpu")
    polls = 0
    while (columns < K) & (polls < POLLS):
        columns = tl.atomic_add(ready + expert, 0, sem="acquire", scope="gpu")
        polls += 1
    return columns >= K


@triton.jit
def _down_tiles(
    h,
    h_scale,
    w,
    w_scale,
    pairs,
    out,
    expert,
    n_tile,
    first,
    end,
    there,
    N: tl.constexpr,
    K: tl.constexpr,
    H_PITCH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FP8: tl.constexpr,
    W_TMA: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILED: tl.constexpr,
    STAGES: tl.constexpr,
    CHAIN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One weight tile of an expert against all its pairs, BLOCK_P at a time."""
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    scale_rows: tl.constexpr = (N + 127) // 128
    w_row = expert * N + n_tile * BLOCK_N
    tile_scale = w_scale + (expert * scale_rows + n_tile * BLOCK_N // 128) * blocks
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    for p0 in range(first, end, BLOCK_P):
        at = p0 + tl.arange(0, BLOCK_P)
        live = at < end
        pair = tl.load(pairs + at, mask=live, other=0)
        row = pair.to(tl.int64)
        acc = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        for kb in tl.range(0, blocks, num_stages=STAGES):
            k = kb * BLOCK_K
            wt = load_tile(
                w, w_row, k, expert * N + N, K, K, BLOCK_N, BLOCK_K, W_TMA, EVEN_N, EVEN_K, TILED
            )
            ht = tl.trans(gather_rows(h, row, live, k, K, H_PITCH, BLOCK_K, EVEN_K))
            if FP8:
                scale = load_scale(h_scale, pair, live, kb, blocks, blocks, BLOCK_P)
                scale *= tl.load(tile_scale + kb)
                acc += tl.dot(wt, ht) * scale[None, :]
            else:
                acc = tl.dot(wt, ht, acc, input_precision="ieee")
        release_dependents(PDL)
        if CHAIN > 0:
            acc = tl.where(there, acc, float("nan"))
        store_pairs(out, acc, pair, live, n, N)


@triton.jit
def _down_kernel(
    h,  # act or e4m3 [P, K], pitch H_PITCH
    h_scale,  # f32 [P, K/128]
    w,  # as h [E, N, K]
    w_rows,  # w behind a plain pointer
    w_scale,  # f32 [E, N/128, K/128]
    offsets,  # i32 [E+1]
    pairs,  # i32 [P]
    out,  # act [P, N]
    ready,  # i32 [E], or unused
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    COMPACT: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H_PITCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FP8: tl.constexpr,
    W_TMA: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILED: tl.constexpr,  # w lies in tiles: `weight_tiles`
    HIGHEST: tl.constexpr,  # pairs of the tallest tile
    STAGES_16: tl.constexpr,
    STAGES_32: tl.constexpr,
    STAGES_64: tl.constexpr,
    PREFETCH: tl.constexpr,
    CHAIN: tl.constexpr,  # slots of the grid that wait for their own expert only
    POLLS: tl.constexpr,
    PDL: tl.constexpr,
):
    # How many pairs an expert has is known on the device only: one kernel holds several heights.
    n_tile = tl.program_id(0)
    slot = tl.program_id(1)
    if not COMPACT:
        slot = E - 1 - slot  # a shared expert is the last and has the most to do: it goes first
    if PREFETCH > 0:
        row_end = (slot + 1) * N
        row = row_end - N + n_tile * BLOCK_N
        span: tl.constexpr = PREFETCH * BLOCK_K
        prefetch_weight(w_rows, row, 0, row_end, K, K, BLOCK_N, span, BLOCK_K, TILED)
    there = slot >= 0
    if CHAIN > 0 and tl.program_id(1) < CHAIN:
        release_first(PDL)
        there = _await_hidden(ready, slot, K, POLLS)
        if PDL != 0:
            if there == 0:
                await_all()  # gate_up was held up for that long: its end makes the result right
            there = slot >= 0
    else:
        await_inputs_streaming(PDL)
    expert, first, end = expert_of(offsets, slot, E, E_POW2, COMPACT)
    if HIGHEST == 16 or end - first <= 16:
        _down_tiles(
            h, h_scale, w, w_scale, pairs, out, expert, n_tile, first, end, there,
            N, K, H_PITCH, 16, BLOCK_N, BLOCK_K, FP8, W_TMA, EVEN_N, EVEN_K, TILED, STAGES_16,
            CHAIN, PDL,
        )  # fmt: skip
    elif HIGHEST == 32 or end - first <= 32:
        _down_tiles(
            h, h_scale, w, w_scale, pairs, out, expert, n_tile, first, end, there,
            N, K, H_PITCH, 32, BLOCK_N, BLOCK_K, FP8, W_TMA, EVEN_N, EVEN_K, TILED, STAGES_32,
            CHAIN, PDL,
        )  # fmt: skip
    else:
        _down_tiles(
            h, h_scale, w, w_scale, pairs, out, expert, n_tile, first, end, there,
            N, K, H_PITCH, 64, BLOCK_N, BLOCK_K, FP8, W_TMA, EVEN_N, EVEN_K, TILED, STAGES_64,
            CHAIN, PDL,
        )  # fmt: skip


def grouped_down(
    launch: Launcher,
    h: torch.Tensor,
    h_scale: torch.Tensor | None,
    w: torch.Tensor,
    w_scale: torch.Tensor | None,
    offsets: torch.Tensor,
    pairs: torch.Tensor,
    *,
    top_k: int = 1,
    out: torch.Tensor,
    ready: torch.Tensor | None = None,
    plan: GroupedPlan = DOWN_PLAN,
) -> None:
    """out[p] = h[p] @ w[e].T for every pair p of each expert e.

    Args:
        h: e4m3 or act dtype [P, I]; the row pitch may exceed I.
        h_scale: fp32 [P, ceil(I/128)]; None for act dtype, and then so is `w_scale`.
        w: h's dtype [E, N, I], or in tiles (`weight_tiles`).
        w_scale: fp32 [E, ceil(N/128), ceil(I/128)].
        offsets: int32 [E+1]; expert e has pairs[offsets[e]:offsets[e+1]].
        pairs: int32 [P]; what lies past offsets[E] is not read.
        top_k: choices of a token, for the height of tiles.
        out: act dtype [P, N].
        ready: int32 [E], what `grouped_gate_up`, the launch right before, counts in; a plan that
            chains goes by it, and an expert that is not ready in time gets NaN. None: no chain.
        plan: for measurements and pinned choices.
    Raises:
        ValueError: shapes or dtypes that do not fit.
    Capture-safe: no sync, no allocation.
    """
    num_experts, n = check_operands("h", h, h_scale, w, w_scale)
    num_pairs, fp8 = h.shape[0], h_scale is not None
    check_lists(offsets, pairs, num_experts, num_pairs)
    check_out(out, (num_pairs, n), None if fp8 else h.dtype)
    check_ready(ready, num_experts)
    tiles = Tiles.of(launch, plan, w, n, 1, num_pairs, num_pairs // top_k, fp8=fp8)
    launch(
        _down_kernel,
        tiles.grid,
        h,
        or_stand_in(h_scale, h),
        tiles.w,
        tiles.lines,
        or_stand_in(w_scale, h),
        offsets,
        pairs,
        out,
        or_stand_in(ready, offsets),
        CHAIN=0 if ready is None or tiles.compact else min(plan.chain, num_experts),
        POLLS=POLLS,
        N=n,
        H_PITCH=h.stride(0),
        **tiles.options,
    )


def grouped_down_ref(
    h: torch.Tensor,
    h_scale: torch.Tensor | None,
    w: torch.Tensor,
    w_scale: torch.Tensor | None,
    offsets: torch.Tensor,
    pairs: torch.Tensor,
    *,
    top_k: int = 1,
    out: torch.Tensor,
    ready: torch.Tensor | None = None,
) -> None:
    """Oracle of `grouped_down`: fp32 throughout, one rounding."""
    for expert, listed in busy_experts(offsets, pairs):
        if w_scale is None:
            weight = as_rows(w[expert]).float()
        else:
            weight = dequantize_blocks(as_rows(w[expert]), w_scale[expert])
        out[listed] = matmul_rows(widen(h, h_scale, listed), weight).to(out.dtype)
