"""The first product of the routed experts: gate and up, SwiGLU and quantisation in one kernel.

Words and invariants: `grouped_parts`. Each expert's part is counted when it is done, so that
`grouped_down` may start on it before the rest is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.grouped_parts import busy_experts, expert_of, gather_rows, store_hidden, widen
from kernels.triton.grouped_plan import (
    GATE_UP_PLAN,
    GroupedPlan,
    Tiles,
    check_lists,
    check_operands,
    check_out,
    or_stand_in,
)
from kernels.triton.launch import Launcher
from kernels.triton.overlap import (
    await_inputs_first,
    await_inputs_streaming,
    release_dependents,
)
from kernels.triton.tiles import (
    FP8_GROUP,
    check_ready,
    check_scale,
    dequantize_blocks,
    load_scale,
    load_tile,
    matmul_rows,
    prefetch_weight,
    sigmoid_rows,
)
from kernels.triton.weight_tiles import as_rows, extents

FP8_MAX = 448.0
FP8_MIN_AMAX = 1e-4


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
    TILED: tl.constexpr,
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
            gt = load_tile(
                w, gate_row, k, up_begin, K, K, BLOCK_N, BLOCK_K, W_TMA, EVEN_N, EVEN_K, TILED
            )
            ut = load_tile(
                w, up_row, k, up_begin + INTER, K, K, BLOCK_N, BLOCK_K, W_TMA, EVEN_N, EVEN_K, TILED
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
    TILED: tl.constexpr,  # w lies in tiles: `weight_tiles`
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
        span: tl.constexpr = PREFETCH * BLOCK_K
        prefetch_weight(w_rows, row, 0, up_end, K, K, BLOCK_N, span, BLOCK_K, TILED)
        prefetch_weight(w_rows, row - INTER, 0, up_end - INTER, K, K, BLOCK_N, span, BLOCK_K, TILED)
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
            TILED, STAGES_16, PDL,
        )  # fmt: skip
    elif HIGHEST == 32 or end - first <= 32:
        _gate_up_tiles(
            x, x_scale, w, w_scale, pairs, out, out_scale, expert, n_tile, first, end,
            TOP_K, INTER, K, X_PITCH, 32, BLOCK_N, BLOCK_K, FP8, W_TMA, EVEN_N, EVEN_K,
            TILED, STAGES_32, PDL,
        )  # fmt: skip
    else:
        _gate_up_tiles(
            x, x_scale, w, w_scale, pairs, out, out_scale, expert, n_tile, first, end,
            TOP_K, INTER, K, X_PITCH, 64, BLOCK_N, BLOCK_K, FP8, W_TMA, EVEN_N, EVEN_K,
            TILED, STAGES_64, PDL,
        )  # fmt: skip
    if COUNTS:
        # Pairs with the acquire in `grouped_down`; releases what all threads have stored.
        tl.debug_barrier()
        columns = tl.minimum(INTER - n_tile * BLOCK_N, BLOCK_N)
        tl.atomic_add(ready + expert, columns, sem="release", scope="gpu")


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
        w: x's dtype [E, 2I, K], gate rows, then up rows; or in tiles (`weight_tiles`),
            where I is a multiple of 128.
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
    num_experts, inter = check_operands("x", x, x_scale, w, w_scale, 2)
    num_pairs, fp8 = x.shape[0] * top_k, x_scale is not None
    check_lists(offsets, pairs, num_experts, num_pairs)
    check_out(out, (num_pairs, inter), x.dtype)
    if fp8:
        check_scale("out_scale", out_scale, (num_pairs, triton.cdiv(inter, FP8_GROUP)))
    check_ready(ready, num_experts)
    tiles = Tiles.of(launch, plan, w, inter, 2, num_pairs, x.shape[0], fp8=fp8)
    counts = ready is not None and not tiles.compact
    launch(
        _gate_up_kernel,
        tiles.grid,
        x,
        or_stand_in(x_scale, x),
        tiles.w,
        tiles.lines,
        or_stand_in(w_scale, x),
        offsets,
        pairs,
        out,
        or_stand_in(out_scale, out),
        or_stand_in(ready, offsets),
        COUNTS=counts,
        CHAIN=counts and plan.chain > 0,
        TOP_K=top_k,
        INTER=inter,
        X_PITCH=x.stride(0),
        **tiles.options,
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
        ready += extents(tuple(w.shape))[1] // 2
    for expert, listed in busy_experts(offsets, pairs):
        rows = widen(x, x_scale, listed // top_k)
        if w_scale is None:
            gate, up = as_rows(w[expert]).float().chunk(2)
        else:
            halves = zip(as_rows(w[expert]).chunk(2), w_scale[expert].chunk(2), strict=True)
            gate, up = (dequantize_blocks(half, scale) for half, scale in halves)
        g = matmul_rows(rows, gate)
        h = g * sigmoid_rows(g) * matmul_rows(rows, up)
        if out_scale is None:
            out[listed] = h.to(out.dtype)
        else:
            quantised, out_scale[listed] = _quantize_groups(h)
            # Index assignment lacks a kernel for 8-bit floats on some devices; bytes have one.
            out.view(torch.uint8)[listed] = quantised.view(torch.uint8)


def _quantize_groups(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values and fp32 scales of h [rows, I] by groups of 128; the last may be partial."""
    rows, width = h.shape
    padded = torch.nn.functional.pad(h, (0, -width % FP8_GROUP)).view(rows, -1, FP8_GROUP)
    scale = padded.abs().amax(-1).clamp(min=FP8_MIN_AMAX) / FP8_MAX
    quantised = (padded / scale[..., None]).view(rows, -1)[:, :width]
    return quantised.to(torch.float8_e4m3fn).contiguous(), scale
