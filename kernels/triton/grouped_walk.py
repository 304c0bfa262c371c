"""Products of the routed experts by programs that stay and walk from tile to tile.

The loop over tiles and the loop over K are one, so the weights of the next tile are in flight while
the last one is finished: no ramp and no drain between them. Invariants: those of `grouped`; a
pair's additions are in the order of its own tile, whichever program takes it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.grouped_parts import (
    chunk_at,
    gather_rows,
    num_chunks,
    store_hidden,
    store_pairs,
)
from kernels.triton.overlap import await_inputs_streaming, prefetch_rows, release_dependents
from kernels.triton.tiles import load_scale, load_tile


@triton.jit
def gate_up_walk_kernel(
    x,  # act or e4m3 [T, K], pitch X_PITCH
    x_scale,  # f32 [T, K/128]
    w,  # as x [E, 2*INTER, K]: gate rows, then up rows
    w_rows,  # w behind a plain pointer
    w_scale,  # f32 [E, 2*(INTER/128), K/128]
    offsets,  # i32 [E+1]
    pairs,  # i32 [T*TOP_K]
    out,  # act or e4m3 [T*TOP_K, INTER]
    out_scale,  # f32 [T*TOP_K, INTER/128]
    E: tl.constexpr,
    E_POW2: tl.constexpr,
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
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles: tl.constexpr = (INTER + BLOCK_N - 1) // BLOCK_N
    scale_rows: tl.constexpr = (INTER + 127) // 128
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if PREFETCH > 0:
        # Right where every expert has one chunk; else some of it is asked for in vain.
        up_end = tl.maximum(E - program // tiles, 1) * (2 * INTER)
        row = up_end - INTER + program % tiles * BLOCK_N
        prefetch_rows(w_rows, row, 0, up_end, K, K, BLOCK_N, PREFETCH * BLOCK_K)
        prefetch_rows(w_rows, row - INTER, 0, up_end - INTER, K, K, BLOCK_N, PREFETCH * BLOCK_K)
    await_inputs_streaming(PDL)
    chunks = num_chunks(offsets, E, E_POW2, BLOCK_P)
    turns = tl.maximum(chunks * tiles - program + programs - 1, 0) // programs * blocks
    expert = 0
    first = 0
    end = 0
    pair = tl.zeros([BLOCK_P], tl.int32)
    gate = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for turn in tl.range(0, turns, num_stages=STAGES):
        kb = turn % blocks
        item = program + turn // blocks * programs
        n_tile = item % tiles
        if kb == 0:
            # From the end: a shared expert is the last and has the most to do, so it goes first.
            expert, first, end = chunk_at(offsets, chunks - 1 - item // tiles, E, E_POW2, BLOCK_P)
            at = first + tl.arange(0, BLOCK_P)
            pair = tl.load(pairs + at, mask=at < end, other=0)
        live = first + tl.arange(0, BLOCK_P) < end
        token = pair // TOP_K
        k = kb * BLOCK_K
        up_begin = expert * (2 * INTER) + INTER
        row = up_begin + n_tile * BLOCK_N
        gt = load_tile(w, row - INTER, k, up_begin, K, K, BLOCK_N, BLOCK_K, W_TMA, EVEN_N, EVEN_K)
        ut = load_tile(w, row, k, up_begin + INTER, K, K, BLOCK_N, BLOCK_K, W_TMA, EVEN_N, EVEN_K)
        xt = tl.trans(gather_rows(x, token.to(tl.int64), live, k, K, X_PITCH, BLOCK_K, EVEN_K))
        if FP8:
            scale = load_scale(x_scale, token, live, kb, blocks, blocks, BLOCK_P)
            at_scale = w_scale + (expert * (2 * scale_rows) + n_tile) * blocks + kb
            gate += tl.dot(gt, xt) * scale[None, :] * tl.load(at_scale)
            up += tl.dot(ut, xt) * scale[None, :] * tl.load(at_scale + scale_rows * blocks)
        else:
            gate = tl.dot(gt, xt, gate, input_precision="ieee")
            up = tl.dot(ut, xt, up, input_precision="ieee")
        if turn == tl.maximum(turns - STAGES, 0):
            release_dependents(PDL)  # all that is left to load has been asked for
        if kb == blocks - 1:
            at = first + tl.arange(0, BLOCK_P)
            listed = tl.load(pairs + at, mask=at < end, other=0)
            store_hidden(
                out, out_scale, gate, up, listed, at < end, n_tile, INTER, BLOCK_N, FP8, EVEN_N
            )
            gate = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
            up = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)


@triton.jit
def down_walk_kernel(
    h,  # act or e4m3 [P, K], pitch H_PITCH
    h_scale,  # f32 [P, K/128]
    w,  # as h [E, N, K]
    w_rows,  # w behind a plain pointer
    w_scale,  # f32 [E, N/128, K/128]
    offsets,  # i32 [E+1]
    pairs,  # i32 [P]
    out,  # act [P, N]
    E: tl.constexpr,
    E_POW2: tl.constexpr,
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
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    scale_rows: tl.constexpr = (N + 127) // 128
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if PREFETCH > 0:
        # Right where every expert has one chunk; else some of it is asked for in vain.
        row_end = tl.maximum(E - program // tiles, 1) * N
        row = row_end - N + program % tiles * BLOCK_N
        prefetch_rows(w_rows, row, 0, row_end, K, K, BLOCK_N, PREFETCH * BLOCK_K)
    await_inputs_streaming(PDL)
    chunks = num_chunks(offsets, E, E_POW2, BLOCK_P)
    turns = tl.maximum(chunks * tiles - program + programs - 1, 0) // programs * blocks
    expert = 0
    first = 0
    end = 0
    pair = tl.zeros([BLOCK_P], tl.int32)
    acc = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for turn in tl.range(0, turns, num_stages=STAGES):
        kb = turn % blocks
        item = program + turn // blocks * programs
        n_tile = item % tiles
        if kb == 0:
            # From the end: a shared expert is the last and has the most to do, so it goes first.
            expert, first, end = chunk_at(offsets, chunks - 1 - item // tiles, E, E_POW2, BLOCK_P)
            at = first + tl.arange(0, BLOCK_P)
            pair = tl.load(pairs + at, mask=at < end, other=0)
        live = first + tl.arange(0, BLOCK_P) < end
        k = kb * BLOCK_K
        row = expert * N + n_tile * BLOCK_N
        wt = load_tile(w, row, k, expert * N + N, K, K, BLOCK_N, BLOCK_K, W_TMA, EVEN_N, EVEN_K)
        ht = tl.trans(gather_rows(h, pair.to(tl.int64), live, k, K, H_PITCH, BLOCK_K, EVEN_K))
        if FP8:
            scale = load_scale(h_scale, pair, live, kb, blocks, blocks, BLOCK_P)
            scale_row = expert * scale_rows + n_tile * BLOCK_N // 128
            scale *= tl.load(w_scale + scale_row * blocks + kb)
            acc += tl.dot(wt, ht) * scale[None, :]
        else:
            acc = tl.dot(wt, ht, acc, input_precision="ieee")
        if turn == tl.maximum(turns - STAGES, 0):
            release_dependents(PDL)  # all that is left to load has been asked for
        if kb == blocks - 1:
            at = first + tl.arange(0, BLOCK_P)
            listed = tl.load(pairs + at, mask=at < end, other=0)
            n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
            store_pairs(out, acc, listed, at < end, n, N)
            acc = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
