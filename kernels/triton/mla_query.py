"""The absorbed query of a head in one kernel: W_UQ (FP8), then W_UK and RoPE.

A program makes one head's query for a tile of tokens, rounds it to the act dtype as if it had been
stored, brings its first part into the latent space and rotates the rest. So the query never leaves
the SM, and both weights stream through it without a launch between them. Invariants: the bits are
those of `linear_fp8` followed by `absorb_q`; the order of every sum is set by the weights' shapes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher, TensorMap
from kernels.triton.linear import linear_fp8_ref
from kernels.triton.mla_absorb_q import absorb_q_ref
from kernels.triton.mla_prep import rotated
from kernels.triton.overlap import (
    OFF,
    await_inputs_streaming,
    overlap,
    prefetch_rows,
    release_dependents,
)
from kernels.triton.tiles import (
    BUDGET_BYTES,
    FP8_GROUP,
    check_fp8,
    check_scale,
    load_scale,
    load_tile,
    pipeline_stages,
    tile_source,
)

TOKEN_BLOCKS = (16, 32, 64)
# Blocks of K whose weights are asked for before the inputs are there, as `LinearPlan.prefetch`. In
# steps of DeepSeek-V3 on an H200 worth 0.3 us a layer (e4 of bench/results/h200_ask_ahead.json).
PREFETCH = 4
LATENT_BLOCK = 128  # latent columns of a tile of W_UK


@triton.jit
def _row_scale(w_scale, row, kb, BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    """f32 [ROWS]: block scales of the rows from `row` on; at most 128, so at most two blocks."""
    first = row // 128
    low = tl.load(w_scale + first * BLOCKS + kb)
    high = tl.load(w_scale + (row + ROWS - 1) // 128 * BLOCKS + kb)
    return tl.where((row + tl.arange(0, ROWS)) // 128 == first, low, high)


@triton.jit
def _rotate(x, cos, sin, PAIRS: tl.constexpr, INTERLEAVE: tl.constexpr):
    """fp32 ([T, PAIRS], [T, PAIRS]): first and second elements of the rotated pairs of x
    [T, 2*PAIRS], by their angles' cos and sin [T, PAIRS]."""
    T: tl.constexpr = x.shape[0]
    if INTERLEAVE:
        a, b = tl.split(tl.reshape(x, [T, PAIRS, 2]))
    else:
        a, b = tl.split(tl.permute(tl.reshape(x, [T, 2, PAIRS]), (0, 2, 1)))
    return rotated(a, b, cos, sin)


@triton.jit
def _latent_query(
    x,  # e4m3 [T, K], pitch X_PITCH
    x_scale,  # f32 [T, K/128], pitch SCALE_PITCH
    w_nope,  # e4m3 [H*(DN+DR), K], by tiles of DN rows
    w_rope,  # the same, by tiles of DR rows
    w_rows,  # w_nope behind a plain pointer
    w_scale,  # f32 [H*(DN+DR)/128, K/128]
    w_uk,  # act [H, DN, DC]
    tok_pos,  # int32 [T]
    tok_row,  # int32 [T]
    rope_table,  # fp32 [max_seq_len, DR]
    out,  # act [T, H, DC+DR], row pitch out_pitch
    T,
    out_pitch,
    K: tl.constexpr,
    N: tl.constexpr,
    DN: tl.constexpr,
    DR: tl.constexpr,
    DC: tl.constexpr,
    X_PITCH: tl.constexpr,
    SCALE_PITCH: tl.constexpr,
    W_PITCH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    t0 = tl.program_id(0) * BLOCK_T
    head = tl.program_id(1)
    row = head * (DN + DR)
    blocks: tl.constexpr = (K + 127) // 128
    if PREFETCH > 0:
        prefetch_rows(w_rows, row, 0, row + DN, K, W_PITCH, DN, PREFETCH * 128)
        prefetch_rows(w_rows, row + DN, 0, row + DN + DR, K, W_PITCH, DR, PREFETCH * 128)
    await_inputs_streaming(PDL)
    t = t0 + tl.arange(0, BLOCK_T)
    real = tl.load(tok_row + t, mask=t < T, other=-1) >= 0
    pos = tl.load(tok_pos + t, mask=t < T, other=0)
    nope = tl.zeros([DN, BLOCK_T], tl.float32)
    rope = tl.zeros([DR, BLOCK_T], tl.float32)
    for kb in tl.range(0, blocks, num_stages=STAGES):
        k = kb * 128
        scale = load_scale(x_scale, t, t < T, kb, blocks, SCALE_PITCH, BLOCK_T)
        nope_scale = _row_scale(w_scale, row, kb, blocks, DN)
        rope_scale = _row_scale(w_scale, row + DN, kb, blocks, DR)
        wn = load_tile(w_nope, row, k, N, K, W_PITCH, DN, 128, W_TMA, True, EVEN_K)
        wr = load_tile(w_rope, row + DN, k, N, K, W_PITCH, DR, 128, W_TMA, True, EVEN_K)
        xt = tl.trans(load_tile(x, t0, k, T, K, X_PITCH, BLOCK_T, 128, X_TMA, False, EVEN_K))
        nope += tl.dot(wn, xt) * (scale[None, :] * nope_scale[:, None])
        rope += tl.dot(wr, xt) * (scale[None, :] * rope_scale[:, None])
    release_dependents(PDL)
    # Asked for here, they come while the second product runs; after it, it would wait for them.
    pair = tl.arange(0, DR // 2)[None, :]
    angles = rope_table + tl.where(real, pos, 0).to(tl.int64)[:, None] * DR + pair
    cos, sin = tl.load(angles), tl.load(angles + DR // 2)
    # The query is rounded as if it had been stored; a padded token's is zeros.
    act = out.dtype.element_ty
    q = tl.where(real[None, :], nope, 0.0).to(act)
    out_head = out + t.to(tl.int64)[:, None] * out_pitch + head * (DC + DR)
    n = tl.arange(0, DN)
    w_at = w_uk + head.to(tl.int64) * (DN * DC) + n[:, None] * DC
    for c0 in tl.range(0, DC, BLOCK_C, num_stages=3):
        c = c0 + tl.arange(0, BLOCK_C)
        w = tl.load(w_at + c[None, :], mask=(c < DC)[None, :], other=0.0)
        y = tl.dot(tl.trans(w), q)
        mask = (t < T)[:, None] & (c < DC)[None, :]
        tl.store(out_head + c[None, :], tl.trans(y).to(act), mask=mask)
    turned = tl.trans(tl.where(real[None, :], rope, 0.0).to(act)).to(tl.float32)
    first, second = _rotate(turned, cos, sin, DR // 2, INTERLEAVE)
    tl.store(out_head + DC + pair, first.to(act), mask=(t < T)[:, None])
    tl.store(out_head + DC + DR // 2 + pair, second.to(act), mask=(t < T)[:, None])


def fuses_query(dn: int, dr: int, dc: int, *, fp8: bool, act_bytes: int) -> bool:
    """Whether `latent_query` takes these sizes; if not, `linear_fp8` and `absorb_q` do.

    Heads must be whole tiles: 64 or 128 rows are what one tensor-core instruction or two take.
    """
    return fp8 and act_bytes == 2 and dn in (64, 128) and dr in (64, 128) and dc % 32 == 0


def latent_query(
    launch: Launcher,
    xq: torch.Tensor,
    xs: torch.Tensor,
    w: torch.Tensor,
    ws: torch.Tensor,
    w_uk: torch.Tensor,
    tok_pos: torch.Tensor,
    tok_row: torch.Tensor,
    rope_table: torch.Tensor,
    *,
    interleave: bool,
    out: torch.Tensor,
) -> None:
    """q = x @ w.T by head, its first dn elements @ w_uk, the rest rotated.

    Args:
        xq: e4m3 [T, K]; the row pitch may exceed K.
        xs: fp32 [T, ceil(K/128)].
        w: e4m3 [H*(dn+dr), K].
        ws: fp32 [ceil(H*(dn+dr)/128), ceil(K/128)].
        w_uk: act [H, dn, dc].
        tok_pos: int32 [T].
        tok_row: int32 [T]; -1 is padding and gives zeros.
        rope_table: float32 [max_seq_len, dr]: cos of each pair, then sin of each.
        interleave: see `mla_prep`.
        out: act [T, H, dc+dr].
    Raises:
        ValueError: shapes that do not fit, or sizes that `fuses_query` does not allow.
    Capture-safe.
    Source: DeepSeek-V2 report, section 2.1.2 (absorption of W_UK into W_UQ).
    """
    _check(xq, xs, w, ws, w_uk, rope_table, out)
    heads, dn, dc = w_uk.shape
    dr = rope_table.shape[1]
    tokens, k = xq.shape
    block_t = next((b for b in TOKEN_BLOCKS if b >= tokens), TOKEN_BLOCKS[-1])
    x = tile_source(xq, (block_t, FP8_GROUP))
    nope, rope = (tile_source(w, (rows, FP8_GROUP)) for rows in (dn, dr))
    stages = pipeline_stages(dn + dr, block_t, BUDGET_BYTES[1])
    bulk = isinstance(nope, TensorMap)
    launch(
        _latent_query,
        (triton.cdiv(tokens, block_t), heads),
        x,
        xs,
        nope,
        rope,
        w,
        ws,
        w_uk,
        tok_pos,
        tok_row,
        rope_table,
        out,
        tokens,
        out.stride(0),
        K=k,
        N=w.shape[0],
        DN=dn,
        DR=dr,
        DC=dc,
        X_PITCH=xq.stride(0),
        SCALE_PITCH=xs.stride(0),
        W_PITCH=w.stride(0),
        BLOCK_T=block_t,
        BLOCK_C=min(LATENT_BLOCK, triton.next_power_of_2(dc)),
        X_TMA=isinstance(x, TensorMap),
        W_TMA=bulk,
        EVEN_K=k % FP8_GROUP == 0,
        INTERLEAVE=bool(interleave),
        STAGES=stages,
        PREFETCH=0 if launch.pdl == OFF else PREFETCH,
        num_warps=8,
        num_stages=stages,
        **overlap(launch),
    )


def latent_query_ref(
    xq: torch.Tensor,
    xs: torch.Tensor,
    w: torch.Tensor,
    ws: torch.Tensor,
    w_uk: torch.Tensor,
    tok_pos: torch.Tensor,
    tok_row: torch.Tensor,
    rope_table: torch.Tensor,
    *,
    interleave: bool,
    out: torch.Tensor,
) -> None:
    """`latent_query` in plain torch: the two products one after the other."""
    _check(xq, xs, w, ws, w_uk, rope_table, out)
    q = torch.empty(xq.shape[0], w.shape[0], dtype=out.dtype, device=out.device)
    linear_fp8_ref(xq, xs, w, ws, out=q)
    absorb_q_ref(q, w_uk, tok_pos, tok_row, rope_table, interleave=interleave, out=out)


def _check(
    xq: torch.Tensor,
    xs: torch.Tensor,
    w: torch.Tensor,
    ws: torch.Tensor,
    w_uk: torch.Tensor,
    rope_table: torch.Tensor,
    out: torch.Tensor,
) -> None:
    heads, dn, dc = w_uk.shape
    dr, (tokens, k) = rope_table.shape[1], xq.shape
    if not fuses_query(dn, dr, dc, fp8=True, act_bytes=out.element_size()):
        raise ValueError(
            "latent_query takes heads of 64 or 128 plain and 64 or 128 rotary elements, a latent "
            f"in multiples of 32 and a 2-byte act dtype, got {dn}, {dr}, {dc} and {out.dtype}; "
            "use linear_fp8 and absorb_q"
        )
    want = (heads * (dn + dr), k), (tokens, heads, dc + dr)
    if (tuple(w.shape), tuple(out.shape)) != want:
        raise ValueError(
            f"w and out must be {want[0]} and {want[1]}, got {list(w.shape)} and {list(out.shape)}"
        )
    check_fp8("xq", xq)
    check_fp8("w", w)
    groups = triton.cdiv(k, FP8_GROUP)
    check_scale("xs", xs, (tokens, groups), pitched=True)
    check_scale("ws", ws, (triton.cdiv(w.shape[0], FP8_GROUP), groups))
    if not w_uk.is_contiguous() or out.stride()[1:] != (dc + dr, 1) or xq.stride(1) != 1:
        raise ValueError(
            "w_uk, and the rows of xq and out, must be contiguous; "
            f"got strides {w_uk.stride()}, {xq.stride()} and {out.stride()}"
        )
