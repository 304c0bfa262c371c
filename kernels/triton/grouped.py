"""Products of the routed experts, on activations that stay where they are.

A pair is `p = token * top_k + k`. `offsets` and `pairs`, made on the device, list the pairs of each
local expert; a program gathers the rows of its pairs and streams one tile of that expert's weights
past them. Invariants: as in `linear`, the K order is fixed by the weight's shape, and the tile
height along the pairs changes no bit, so a pair's result does not depend on T, on its place in the
list or on which other pairs the expert has. Rows of `out` whose pair is not listed are not written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.triton.grouped_parts import expert_of, gather_rows, store_hidden, store_pairs
from kernels.triton.launch import Arg, Launcher, TensorMap
from kernels.triton.overlap import (
    OFF,
    await_all,
    await_inputs_first,
    await_inputs_streaming,
    overlap,
    prefetch_rows,
    release_dependents,
    release_first,
)
from kernels.triton.tiles import (
    BLOCK_K_BYTES,
    BUDGET_BYTES,
    FP8_GROUP,
    FP32_BLOCK_N,
    check_fp8,
    check_ready,
    check_scale,
    dequantize_blocks,
    dequantize_rows,
    load_scale,
    load_tile,
    matmul_rows,
    pipeline_stages,
    sigmoid_rows,
    tile_source,
)

BLOCK_N = 128  # weight rows of a tile; one quantisation group of the experts' hidden activation
PAIR_BLOCKS = (16, 32, 64)  # pairs of a tile; an expert's own count chooses, on the device
# Of an expert's counter, the better part of a second, before its programs wait for the end of all
# of gate_up. Where kernels do not overlap, gate_up has ended: a count that is missing gives NaN.
POLLS = 1 << 20
FP8_MAX = 448.0
FP8_MIN_AMAX = 1e-4


@dataclass(frozen=True)
class GroupedPlan:
    """How the experts' products are cut; changes no bit.

    Attributes:
        block_n: weight rows of a tile: 64 or 128; FP8 gate_up takes 128, a quantisation group.
        per_sm: programs that are to share an SM; decides how deep each is pipelined.
        prefetch: blocks of K whose weights are asked for before the inputs are there: 0, 1, 2 or 4.
        chain: of down: programs of so many experts, the first ones, wait for their own expert's
            hidden activation instead of for all of gate_up, and so fill its tail; about as many
            experts as have programs on the chip at once. Of gate_up: not 0 lets down's programs
            start as soon as there is room for them. Without `ready`, and where there are fewer
            pairs than experts, all wait for all.
    """

    block_n: int = BLOCK_N
    per_sm: int = 2
    prefetch: int = 0
    chain: int = 0

    def __post_init__(self) -> None:
        if self.block_n not in (64, 128) or self.per_sm not in BUDGET_BYTES:
            raise ValueError(f"expected block_n 64 or 128 and 1 to 3 programs, got {self}")
        if self.prefetch not in (0, 1, 2, 4):
            raise ValueError(f"expected prefetch 0, 1, 2 or 4, got {self}")
        if self.chain < 0:
            raise ValueError(f"expected a number of experts to chain, 0 for none, got {self}")


# Measured on an H200 in whole steps of 8 layers: 3.75-3.78 -> 3.72 ms at 32 tokens; the experts'
# part of a layer at 64 tokens 373 -> 361 us. The programs of 5 experts of DeepSeek-V3, 56 each, are
# on the chip at once, two an SM.
GATE_UP_PLAN = GroupedPlan(chain=1)
DOWN_PLAN = GroupedPlan(prefetch=1, chain=5)


@triton.jit
def _gate_up_tiles(
    x,
    x_scale,
    w,
    w_scale,
    pairs,
    out,
    out_scale,
    expert,
    n_tile,
    first,
    end,
    TOP_K: tl.constexpr,
    INTER: tl.constexpr,
    K: tl.constexpr,
    X_PITCH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FP8: tl.constexpr,
    W_TMA: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One gate tile and one up tile of an expert against all its pairs, BLOCK_P at a time."""
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    scale_rows: tl.constexpr = (INTER + 127) // 128
    up_begin = expert * (2 * INTER) + INTER
    up_row = up_begin + n_tile * BLOCK_N
    gate_row = up_row - INTER
    gate_scale = w_scale + (expert * (2 * scale_rows) + n_tile) * blocks
    up_scale = gate_scale + scale_rows * blocks
    for p0 in range(first, end, BLOCK_P):
        at = p0 + tl.arange(0, BLOCK_P)
        live = at < end
        pair = tl.load(pairs + at, mask=live, other=0)
        token = pair // TOP_K
        row = token.to(tl.int64)
        gate = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        for kb in tl.range(0, blocks, num_stages=STAGES):
            k = kb * BLOCK_K
            gt = load_tile(w, gate_row, k, up_begin, K, K, BLOCK_N, BLOCK_K, W_TMA, EVEN_N, EVEN_K)
            ut = load_tile(
                w, up_row, k, up_begin + INTER, K, K, BLOCK_N, BLOCK_K, W_TMA, EVEN_N, EVEN_K
            )
            xt = tl.trans(gather_rows(x, row, live, k, K, X_PITCH, BLOCK_K, EVEN_K))
            if FP8:
                scale = load_scale(x_scale, token, live, kb, blocks, blocks, BLOCK_P)
                # The weights' scales stay scalars: one set of token scales serves both products.
                gate += tl.dot(gt, xt) * scale[None, :] * tl.load(gate_scale + kb)
                up += tl.dot(ut, xt) * scale[None, :] * tl.load(up_scale + kb)
            else:
                gate = tl.dot(gt, xt, gate, input_precision="ieee")
                up = tl.dot(ut, xt, up, input_precision="ieee")
        release_dependents(PDL)
        store_hidden(out, out_scale, gate, up, pair, live, n_tile, INTER, BLOCK_N, FP8, EVEN_N)


@triton.jit
def _gate_up_kernel(
    x,  # act or e4m3 [T, K], pitch X_PITCH
    x_scale,  # f32 [T, K/128]
    w,  # as x [E, 2*INTER, K]: gate rows, then up rows
    w_rows,  # w behind a plain pointer
    w_scale,  # f32 [E, 2*(INTER/128), K/128]
    offsets,  # i32 [E+1]
    pairs,  # i32 [T*TOP_K]
    out,  # act or e4m3 [T*TOP_K, INTER]
    out_scale,  # f32 [T*TOP_K, INTER/128]
    ready,  # i32 [E], or unused
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    COMPACT: tl.constexpr,
    TOP_K: tl.constexpr,
    INTER: tl.constexpr,
    K: tl.constexpr,
    X_PITCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FP8: tl.constexpr,
    W_TMA: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    HIGHEST: tl.constexpr,  # pairs of the tallest tile
    STAGES_16: tl.constexpr,
    STAGES_32: tl.constexpr,
    STAGES_64: tl.constexpr,
    PREFETCH: tl.constexpr,
    COUNTS: tl.constexpr,
    CHAIN: tl.constexpr,
    PDL: tl.constexpr,
):
    # How many pairs an expert has is known on the device only: one kernel holds several heights.
    n_tile = tl.program_id(0)
    slot = tl.program_id(1)
    if not COMPACT:
        slot = E - 1 - slot  # a shared expert is the last and has the most to do: it goes first
    if PREFETCH > 0:
        up_end = (slot + 1) * (2 * INTER)
        row = up_end - INTER + n_tile * BLOCK_N
        prefetch_rows(w_rows, row, 0, up_end, K, K, BLOCK_N, PREFETCH * BLOCK_K)
        prefetch_rows(w_rows, row - INTER, 0, up_end - INTER, K, K, BLOCK_N, PREFETCH * BLOCK_K)
    if COUNTS:
        # Whoever looks at `ready` starts after its reset, which this waits for.
        await_inputs_first(PDL, CHAIN)
    else:
        await_inputs_streaming(PDL)
    expert, first, end = expert_of(offsets, slot, E, E_POW2, COMPACT)
    if HIGHEST == 16 or end - first <= 16:
        _gate_up_tiles(
            x, x_scale, w, w_scale, pairs, out, out_scale, expert, n_tile, first, end,
            TOP_K, INTER, K, X_PITCH, 16, BLOCK_N, BLOCK_K, FP8, W_TMA, EVEN_N, EVEN_K,
            STAGES_16, PDL,
        )  # fmt: skip
    elif HIGHEST == 32 or end - first <= 32:
        _gate_up_tiles(
            x, x_scale, w, w_scale, pairs, out, out_scale, expert, n_tile, first, end,
            TOP_K, INTER, K, X_PITCH, 32, BLOCK_N, BLOCK_K, FP8, W_TMA, EVEN_N, EVEN_K,
            STAGES_32, PDL,
        )  # fmt: skip
    else:
        _gate_up_tiles(
            x, x_scale, w, w_scale, pairs, out, out_scale, expert, n_tile, first, end,
            TOP_K, INTER, K, X_PITCH, 64, BLOCK_N, BLOCK_K, FP8, W_TMA, EVEN_N, EVEN_K,
            STAGES_64, PDL,
        )  # fmt: skip
    if COUNTS:
        # Pairs with the acquire in `_await_hidden`; releases what all threads have stored.
        tl.debug_barrier()
        columns = tl.minimum(INTER - n_tile * BLOCK_N, BLOCK_N)
        tl.atomic_add(ready + expert, columns, sem="release", scope="gpu")


@triton.jit
def _await_hidden(ready, expert, K: tl.constexpr, POLLS: tl.constexpr):
    """Whether the expert's hidden activation is there; false after so many polls."""
    # Pairs with the release at the end of `_gate_up_kernel`.
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
                w, w_row, k, expert * N + N, K, K, BLOCK_N, BLOCK_K, W_TMA, EVEN_N, EVEN_K
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
        prefetch_rows(w_rows, row, 0, row_end, K, K, BLOCK_N, PREFETCH * BLOCK_K)
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
            N, K, H_PITCH, 16, BLOCK_N, BLOCK_K, FP8, W_TMA, EVEN_N, EVEN_K, STAGES_16,
            CHAIN, PDL,
        )  # fmt: skip
    elif HIGHEST == 32 or end - first <= 32:
        _down_tiles(
            h, h_scale, w, w_scale, pairs, out, expert, n_tile, first, end, there,
            N, K, H_PITCH, 32, BLOCK_N, BLOCK_K, FP8, W_TMA, EVEN_N, EVEN_K, STAGES_32,
            CHAIN, PDL,
        )  # fmt: skip
    else:
        _down_tiles(
            h, h_scale, w, w_scale, pairs, out, expert, n_tile, first, end, there,
            N, K, H_PITCH, 64, BLOCK_N, BLOCK_K, FP8, W_TMA, EVEN_N, EVEN_K, STAGES_64,
            CHAIN, PDL,
        )  # fmt: skip


def grouped_gate_up(
    launch: Launcher,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    w: torch.Tensor,
    w_scale: torch.Tensor | None,
    offsets: torch.Tensor,
    pairs: torch.Tensor,
    *,
    top_k: int,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    ready: torch.Tensor | None = None,
    plan: GroupedPlan = GATE_UP_PLAN,
) -> None:
    """out[p] = silu(x[t] @ gate.T) * (x[t] @ up.T) for every pair p of each expert, t = p // top_k.

    The products, SwiGLU and (FP8) the 1x128 quantisation are one kernel. Nothing is rounded before
    the result: gate, up and their product stay fp32.

    Args:
        x: e4m3 or act dtype [T, K]; the row pitch may exceed K.
        x_scale: fp32 [T, ceil(K/128)]; None for act dtype, and then so are the other scales.
        w: x's dtype [E, 2I, K], gate rows, then up rows.
        w_scale: fp32 [E, 2*ceil(I/128), ceil(K/128)]; gate and up have scale rows of their own.
        offsets: int32 [E+1]; expert e has pairs[offsets[e]:offsets[e+1]].
        pairs: int32 [T*top_k]; what lies past offsets[E] is not read.
        out: e4m3 or act dtype [T*top_k, I].
        out_scale: fp32 [T*top_k, ceil(I/128)].
        ready: int32 [E], zero before: gets I for each expert that is done, with or without pairs,
            unless there are fewer pairs than experts. For `grouped_down`, right behind.
        plan: for measurements and pinned choices.
    Raises:
        ValueError: shapes or dtypes that do not fit.
    Capture-safe: no sync, no allocation.
    """
    num_experts, two_inter, k = _check_weight(w, x)
    inter = two_inter // 2
    num_pairs = x.shape[0] * top_k
    _check_lists(offsets, pairs, num_experts, num_pairs)
    fp8 = x_scale is not None
    _check_out(out, (num_pairs, inter), x.dtype)
    if fp8:
        groups, rows = triton.cdiv(k, FP8_GROUP), triton.cdiv(inter, FP8_GROUP)
        check_fp8("x", x)
        check_scale("x_scale", x_scale, (x.shape[0], groups))
        check_scale("w_scale", w_scale, (num_experts, 2 * rows, groups))
        check_scale("out_scale", out_scale, (num_pairs, rows))
    check_ready(ready, num_experts)
    tiles = _Tiles.of(launch, plan, w, inter, 2, num_pairs, x.shape[0], fp8=fp8)
    launch(
        _gate_up_kernel,
        tiles.grid,
        x,
        _or(x_scale, x),
        tiles.w,
        w.view(-1, k),
        _or(w_scale, x),
        offsets,
        pairs,
        out,
        _or(out_scale, out),
        _or(ready, offsets),
        COUNTS=ready is not None and not tiles.compact,
        CHAIN=ready is not None and not tiles.compact and plan.chain > 0,
        TOP_K=top_k,
        INTER=inter,
        X_PITCH=x.stride(0),
        **tiles.constexprs,
        num_warps=tiles.num_warps,
        num_stages=tiles.stages,
        **overlap(launch),
    )


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
        w: h's dtype [E, N, I].
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
    num_experts, n, k = _check_weight(w, h)
    num_pairs = h.shape[0]
    _check_lists(offsets, pairs, num_experts, num_pairs)
    fp8 = h_scale is not None
    _check_out(out, (num_pairs, n), None if fp8 else h.dtype)
    if fp8:
        groups = triton.cdiv(k, FP8_GROUP)
        check_fp8("h", h)
        check_scale("h_scale", h_scale, (num_pairs, groups))
        check_scale("w_scale", w_scale, (num_experts, triton.cdiv(n, FP8_GROUP), groups))
    check_ready(ready, num_experts)
    tiles = _Tiles.of(launch, plan, w, n, 1, num_pairs, num_pairs // top_k, fp8=fp8)
    launch(
        _down_kernel,
        tiles.grid,
        h,
        _or(h_scale, h),
        tiles.w,
        w.view(-1, k),
        _or(w_scale, h),
        offsets,
        pairs,
        out,
        _or(ready, offsets),
        CHAIN=0 if ready is None or tiles.compact else min(plan.chain, num_experts),
        POLLS=POLLS,
        N=n,
        H_PITCH=h.stride(0),
        **tiles.constexprs,
        num_warps=tiles.num_warps,
        num_stages=tiles.stages,
        **overlap(launch),
    )


@dataclass(frozen=True)
class _Tiles:
    """How the experts' weights are cut, and how the kernel reads them."""

    w: Arg
    grid: tuple[int, int]
    compact: bool
    constexprs: dict[str, Any]
    stages: int
    num_warps: int

    @classmethod
    def of(
        cls,
        launch: Launcher,
        plan: GroupedPlan,
        w: torch.Tensor,
        rows: int,
        halves: int,
        num_pairs: int,
        most: int,
        *,
        fp8: bool,
    ) -> _Tiles:
        """Cut w [E, halves * rows, K]; a program takes the same tile of each half.

        Args:
            most: pairs that an expert has if no token chooses it twice; taller tiles would only
                take registers. (An expert with more is still right, tile after tile.)
        """
        num_experts, _, k = w.shape
        flat = w.view(-1, k)
        block_n = FP32_BLOCK_N if w.dtype == torch.float32 else plan.block_n
        if fp8 and halves == 2 and block_n != FP8_GROUP:
            raise ValueError(f"FP8 gate_up needs block_n {FP8_GROUP}, got {plan}")
        block_k = BLOCK_K_BYTES // w.element_size()
        source = flat if w.dtype == torch.float32 else tile_source(flat, (block_n, block_k))
        bulk = isinstance(source, TensorMap)
        highest = next((h for h in PAIR_BLOCKS if h >= most), PAIR_BLOCKS[-1]) if bulk else 16
        per_sm = plan.per_sm if fp8 else 2
        if fp8 and halves == 2 and highest > 32:
            per_sm = 1  # two tall fp32 accumulators and a partial product take all registers
        budget = BUDGET_BYTES[per_sm]
        stages = {
            height: max(2, pipeline_stages(halves * block_n, height, budget))
            for height in PAIR_BLOCKS
        }
        compact = num_pairs < num_experts
        constexprs = {
            "E": num_experts,
            "E_POW2": triton.next_power_of_2(num_experts),
            "COMPACT": compact,
            "K": k,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "FP8": fp8,
            "W_TMA": bulk,
            "EVEN_N": rows % block_n == 0,
            "EVEN_K": k % block_k == 0,
            "HIGHEST": highest,
            **{f"STAGES_{height}": stages[height] for height in PAIR_BLOCKS},
            # Which expert a slot of a compact grid takes is known only once the lists are there.
            "PREFETCH": plan.prefetch if bulk and not compact and launch.pdl != OFF else 0,
        }
        return cls(
            w=source,
            # No more experts can have pairs than there are pairs: idle programs cost a step, too.
            grid=(triton.cdiv(rows, block_n), min(num_experts, num_pairs)),
            compact=compact,
            constexprs=constexprs,
            stages=stages[highest],
            num_warps=max(4, block_n * halves // 32),  # a warp group for each tile of 128 rows
        )


def _or(scale: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    return stand_in if scale is None else scale


def _check_weight(w: torch.Tensor, x: torch.Tensor) -> tuple[int, int, int]:
    num_experts, rows, k = w.shape
    if x.ndim != 2 or x.shape[1] != k or x.stride(1) != 1 or x.shape[0] == 0:
        raise ValueError(
            f"activations must be [at least 1, {k}] with last stride 1 for weights {list(w.shape)},"
            f" got {list(x.shape)} with strides {list(x.stride())}"
        )
    if w.dtype != x.dtype or not w.is_contiguous():
        raise ValueError(
            f"weights must be contiguous and of the activations' {x.dtype}, got {w.dtype}"
            f" with strides {list(w.stride())}"
        )
    return num_experts, rows, k


def _check_lists(
    offsets: torch.Tensor, pairs: torch.Tensor, num_experts: int, num_pairs: int
) -> None:
    for name, tensor, size in (
        ("offsets", offsets, num_experts + 1),
        ("pairs", pairs, num_pairs),
    ):
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != (size,):
            raise ValueError(
                f"{name} must be int32 [{size}], got {tensor.dtype} {list(tensor.shape)}"
            )


def _check_out(out: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype | None) -> None:
    if tuple(out.shape) != shape or not out.is_contiguous() or dtype not in (None, out.dtype):
        raise ValueError(
            f"out must be contiguous {list(shape)} of {dtype or 'the act dtype'},"
            f" got {out.dtype} {list(out.shape)} with strides {list(out.stride())}"
        )


def grouped_gate_up_ref(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    w: torch.Tensor,
    w_scale: torch.Tensor | None,
    offsets: torch.Tensor,
    pairs: torch.Tensor,
    *,
    top_k: int,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    ready: torch.Tensor | None = None,
) -> None:
    """Oracle of `grouped_gate_up`: fp32 throughout, one rounding (or quantisation) at the end."""
    if ready is not None and pairs.shape[0] >= w.shape[0]:
        ready += w.shape[1] // 2
    for expert, listed in _busy_experts(offsets, pairs):
        rows = _widen(x, x_scale, listed // top_k)
        if w_scale is None:
            gate, up = w[expert].float().chunk(2)
        else:
            gate, up = (
                dequantize_blocks(half, scale)
                for half, scale in zip(w[expert].chunk(2), w_scale[expert].chunk(2), strict=True)
            )
        g = matmul_rows(rows, gate)
        h = g * sigmoid_rows(g) * matmul_rows(rows, up)
        if out_scale is None:
            out[listed] = h.to(out.dtype)
        else:
            quantised, out_scale[listed] = _quantize_groups(h)
            # Index assignment lacks a kernel for 8-bit floats on some devices; bytes have one.
            out.view(torch.uint8)[listed] = quantised.view(torch.uint8)


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
    for expert, listed in _busy_experts(offsets, pairs):
        if w_scale is None:
            weight = w[expert].float()
        else:
            weight = dequantize_blocks(w[expert], w_scale[expert])
        out[listed] = matmul_rows(_widen(h, h_scale, listed), weight).to(out.dtype)


def _busy_experts(offsets: torch.Tensor, pairs: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that has pairs, with their ids."""
    bounds = offsets.tolist()
    for expert, (first, end) in enumerate(pairwise(bounds)):
        if end > first:
            yield expert, pairs[first:end].long()


def _widen(x: torch.Tensor, scale: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """fp32 values of the given rows."""
    if scale is None:
        return x[rows].float()
    picked = x.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
    return dequantize_rows(picked, scale[rows])


def _quantize_groups(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values and fp32 scales of h [rows, I] by groups of 128; the last may be partial."""
    rows, width = h.shape
    padded = torch.nn.functional.pad(h, (0, -width % FP8_GROUP)).view(rows, -1, FP8_GROUP)
    scale = padded.abs().amax(-1).clamp(min=FP8_MIN_AMAX) / FP8_MAX
    quantised = (padded / scale[..., None]).view(rows, -1)[:, :width]
    return quantised.to(torch.float8_e4m3fn).contiguous(), scale
