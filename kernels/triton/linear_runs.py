"""Dense FP8 products cut into equal runs: every program has as much of the weight to stream.

Tiles and blocks of K are counted as one row of units, tile after tile, and a program takes a run of
them that may end one tile and begin the next. Cut by tiles and splits alone, a product rarely fills
a chip evenly. Invariants: where runs end is set by (N, K, block_n, programs) alone, never by the
tokens; each part of a tile adds its blocks in order, and parts are numbered in the order of K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.overlap import await_inputs_streaming, prefetch_rows, release_dependents
from kernels.triton.tiles import FP8_GROUP, load_scale, load_tile, store_tokens_major


def run_parts(n: int, k: int, *, block_n: int, programs: int) -> int:
    """The most parts that a tile falls into: runs that have some of its blocks."""
    blocks, tiles = -(-k // FP8_GROUP), -(-n // block_n)
    units = tiles * blocks
    if not 1 <= programs <= units:
        raise ValueError(f"{n}x{k} in tiles of {block_n} has {units} units for {programs} programs")
    holder = [((u + 1) * programs - 1) // units for u in range(units)]
    return max(holder[t + blocks - 1] - holder[t] + 1 for t in range(0, units, blocks))


@triton.jit
def _holder(unit, UNITS: tl.constexpr, PROGRAMS: tl.constexpr):
    """The program p whose run [p * UNITS // PROGRAMS, (p + 1) * UNITS // PROGRAMS) has the unit."""
    return ((unit + 1) * PROGRAMS - 1) // UNITS


@triton.jit
def linear_fp8_runs_kernel(
    x,  # e4m3 [T, K], pitch X_PITCH
    x_scale,  # f32 [T, K/128], pitch SCALE_PITCH
    w,  # e4m3 [N, K], pitch W_PITCH
    w_scale,  # f32 [N/128, K/128]
    w_rows,  # w behind a plain pointer
    dst,  # f32 [SPLITS, T, N]
    num_tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    X_PITCH: tl.constexpr,
    SCALE_PITCH: tl.constexpr,
    W_PITCH: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    blocks: tl.constexpr = (K + 127) // 128
    units: tl.constexpr = ((N + BLOCK_N - 1) // BLOCK_N) * blocks
    t0 = tl.program_id(0) * BLOCK_T
    program = tl.program_id(1)
    begin = program * units // PROGRAMS
    end = (program + 1) * units // PROGRAMS
    t = t0 + tl.arange(0, BLOCK_T)
    if PREFETCH > 0:
        row = begin // blocks * BLOCK_N
        col = begin % blocks * 128
        prefetch_rows(w_rows, row, col, N, K, W_PITCH, BLOCK_N, PREFETCH * 128)
    await_inputs_streaming(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for unit in tl.range(begin, end, num_stages=STAGES):
        kb = unit % blocks
        k = kb * 128
        n0 = unit // blocks * BLOCK_N
        scale = load_scale(x_scale, t, t < num_tokens, kb, blocks, SCALE_PITCH, BLOCK_T)
        scale *= tl.load(w_scale + (n0 // 128) * blocks + kb)
        wt = load_tile(w, n0, k, N, K, W_PITCH, BLOCK_N, 128, W_TMA, EVEN_N, EVEN_K)
        xt = load_tile(x, t0, k, num_tokens, K, X_PITCH, BLOCK_T, 128, X_TMA, False, EVEN_K)
        acc += tl.dot(wt, tl.trans(xt)) * scale[None, :]
        if unit == tl.maximum(end - STAGES, begin):
            release_dependents(PDL)  # all that is left to load has been asked for
        if kb == blocks - 1 or unit == end - 1:
            n = n0 + tl.arange(0, BLOCK_N)
            part = program - _holder(unit - kb, units, PROGRAMS)
            size = tl.cast(num_tokens, tl.int64) * N
            store_tokens_major(dst + part * size, acc, n, t, num_tokens, N, N)
            acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            if kb == blocks - 1:
                # Parts that this tile does not have: the reader adds up as many of every tile.
                for missing in range(part + 1, SPLITS):
                    store_tokens_major(dst + missing * size, acc, n, t, num_tokens, N, N)
