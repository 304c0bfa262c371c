"""The per-head product by W_UV, which brings attention's results back to their value dimension.

It takes what attention has left in splits, too, and merges them. Invariants: those of `mla_absorb`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kernels.triton.activation import check_quantized, quantize_groups, quantize_ref
from kernels.triton.launch import Launcher, TensorMap
from kernels.triton.mla_absorb import MAX_TOKENS, Tile, pow2, precision, token_tile
from kernels.triton.mla_absorb_few import (
    FEW_COLUMNS,
    FEW_PARTS,
    FEW_TOKENS,
    _absorb_v_few,
    cut_few,
)
from kernels.triton.mla_decode import check_parts, merge_ref
from kernels.triton.overlap import await_inputs_with, overlap
from kernels.triton.tiles import BUDGET_BYTES, einsum_rows

MOST_PARTS = 4  # splits of attention that `absorb_v` merges; of more there would be too few loads


class Parts(NamedTuple):
    """What attention has left in splits of every token that is longer than `cut`.

    Attributes:
        o: act [T, splits, H, dc], each split normalised by its own sum; `takes_parts` says how
            many splits there may be.
        lse: float32 [T, splits, H], log2 of each split's sum of 2**score.
        cut: tokens of a split; token t has ceil(kv_len[t] / cut) of them.
    """

    o: torch.Tensor
    lse: torch.Tensor
    cut: int


@triton.jit
def _split_weights(
    lse,  # f32: pointers to the first split of each token, splits H apart
    used,  # i32 [BLOCK_T]: splits of each token
    H: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """f32 [BLOCK_T] of four splits each, and their sum; a token that has one gets 1, 0, 0 and 0."""
    none = float("-inf")
    lse_0 = tl.load(lse, mask=used > 1, other=0.0)
    lse_1 = tl.load(lse + H, mask=used > 1, other=none)
    lse_2 = tl.full(used.shape, none, tl.float32)
    lse_3 = lse_2
    if SPLITS > 2:
        lse_2 = tl.load(lse + 2 * H, mask=used > 2, other=none)
    if SPLITS > 3:
        lse_3 = tl.load(lse + 3 * H, mask=used > 3, other=none)
    high = tl.maximum(tl.maximum(lse_0, lse_1), tl.maximum(lse_2, lse_3))
    weight_0, weight_1 = tl.exp2(lse_0 - high), tl.exp2(lse_1 - high)
    weight_2, weight_3 = tl.exp2(lse_2 - high), tl.exp2(lse_3 - high)
    return weight_0, weight_1, weight_2, weight_3, weight_0 + weight_1 + weight_2 + weight_3


@triton.jit
def _plus_split(total, part, weight, mask):
    """total + part * weight, fused; said here, so that it is at every number of tokens."""
    o = tl.load(part, mask=mask, other=0.0).to(tl.float32)
    return tl.fma(o, tl.broadcast_to(weight[None, :], o.shape), total)


@triton.jit
def _product(
    w_at,
    x_at,
    c,  # i32 [BLOCK_C]
    v_mask,
    t_mask,
    DC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """fp32 [BLOCK_V, BLOCK_T] of tokens that are not in splits."""
    acc = tl.zeros([v_mask.shape[0], t_mask.shape[0]], tl.float32)
    for c0 in range(0, DC, BLOCK_C):
        w = tl.load(w_at + c0, mask=v_mask[:, None] & (c[None, :] + c0 < DC), other=0.0)
        inside = c[:, None] + c0 < DC
        x = tl.load(x_at + c0, mask=t_mask[None, :] & inside, other=0.0)
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _merged_product(
    w_at,
    x_at,
    part_o,
    part_lse,
    line,  # i64 [BLOCK_T]: of each token's first split
    used,  # i32 [BLOCK_T]: splits of each token
    c,  # i32 [BLOCK_C]
    v_mask,
    t_mask,
    H: tl.constexpr,
    DC: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `_product`, of tokens with up to four splits; with one split its bits, too."""
    w_0, w_1, w_2, w_3, sum_of_weights = _split_weights(part_lse + line, used, H, SPLITS)
    parts = part_o + line[None, :] * DC + c[:, None]
    x_at = tl.where((used > 1)[None, :], parts, x_at)
    acc = tl.zeros([v_mask.shape[0], t_mask.shape[0]], tl.float32)
    for c0 in range(0, DC, BLOCK_C):
        w = tl.load(w_at + c0, mask=v_mask[:, None] & (c[None, :] + c0 < DC), other=0.0)
        inside = c[:, None] + c0 < DC
        x = tl.load(x_at + c0, mask=t_mask[None, :] & inside, other=0.0)
        at = parts + c0
        merged = x.to(tl.float32) * w_0[None, :]
        merged = _plus_split(merged, at + H * DC, w_1, (used > 1)[None, :] & inside)
        if SPLITS > 2:
            merged = _plus_split(merged, at + 2 * H * DC, w_2, (used > 2)[None, :] & inside)
        if SPLITS > 3:
            merged = _plus_split(merged, at + 3 * H * DC, w_3, (used > 3)[None, :] & inside)
        x = (merged / sum_of_weights[None, :]).to(x.dtype)
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _absorb_v(
    o_latent,  # act [T, H, DC], row pitch o_pitch
    part_o,  # act [T, SPLITS, H, DC], or unused
    part_lse,  # f32 [T, SPLITS, H], base 2, or unused
    kv_len,  # int32 [T]
    w_uv,  # act [H, DV, DC]
    out,  # act [T, H*DV], row pitch out_pitch, or unused
    out_q,  # e4m3 [T, H*DV], row pitch out_q_pitch, or unused
    out_scale,  # fp32 [T, H*DV/128], row pitch scale_pitch, or unused
    T,
    o_pitch,
    out_pitch,
    out_q_pitch,
    scale_pitch,
    DV: tl.constexpr,
    DC: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_Q: tl.constexpr,
    PRECISION: tl.constexpr,
    H: tl.constexpr,
    SPLITS: tl.constexpr,  # 2 to 4 of tokens longer than CUT; 0: all tokens are in o_latent
    CUT: tl.constexpr,
    LOOKS: tl.constexpr,  # whether any token is in splits, before it merges
    PDL: tl.constexpr,
):
    V_TILES: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    head = tl.program_id(0) // V_TILES
    v = (tl.program_id(0) % V_TILES) * BLOCK_V + tl.arange(0, BLOCK_V)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    w_at = w_uv + head.to(tl.int64) * (DV * DC) + v[:, None] * DC + c[None, :]
    x_at = o_latent + head * DC + t.to(tl.int64)[None, :] * o_pitch + c[:, None]
    length = await_inputs_with(kv_len + t, t < T, PDL)
    v_mask, t_mask = v < DV, t < T
    if SPLITS == 0:
        acc = _product(w_at, x_at, c, v_mask, t_mask, DC, BLOCK_C, PRECISION)
    else:
        used = (length + CUT - 1) // CUT
        line = t.to(tl.int64) * (SPLITS * H) + head
        # The first is settled by the compiler, the second on the device.
        whole = False
        if LOOKS:
            whole = tl.max(used, axis=0) <= 1
        if whole:
            acc = _product(w_at, x_at, c, v_mask, t_mask, DC, BLOCK_C, PRECISION)
        else:
            acc = _merged_product(
                *(w_at, x_at, part_o, part_lse, line, used, c, v_mask, t_mask),
                *(H, DC, SPLITS, BLOCK_C, PRECISION),
            )
    # Attention may leave a padded token as it was.
    acc = tl.where((length > 0)[None, :], acc, 0.0)
    y = tl.trans(acc.to(o_latent.dtype.element_ty))
    row = t.to(tl.int64)[:, None]
    col = head * DV + v[None, :]
    mask = (t[:, None] < T) & (v[None, :] < DV)
    if HAS_OUT:
        tl.store(out + row * out_pitch + col, y, mask=mask)
    if HAS_Q:
        # BLOCK_V is the FP8 group, and DV a multiple of it: this tile is one whole group a token.
        quantized, scale = quantize_groups(y.to(tl.float32))
        tl.store(out_q + row * out_q_pitch + col, quantized, mask=mask)
        group = tl.program_id(0)
        tl.store(out_scale + t.to(tl.int64) * scale_pitch + group, scale, mask=t < T)


def absorb_v(
    launch: Launcher,
    o_latent: torch.Tensor,
    kv_len: torch.Tensor,
    w_uv: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_q: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    parts: Parts | None = None,
) -> None:
    """Bring each head's latent attention output back to its value dimension.

    Args:
        o_latent: act [T, H, dc].
        kv_len: int32 [T]; a token of 0 is padding and gives zeros, whatever o_latent holds.
        w_uv: act [H, dv, dc].
        out: act [T, H*dv]; the row pitch may exceed the width.
        out_q, out_scale: the same (after its rounding to act) quantised, e4m3 [T, H*dv] and
            fp32 [T, H*dv/128]; only where dv is a multiple of 128.
        parts: tokens longer than `parts.cut` are there and not in o_latent; they are merged in
            order, in fp32, and rounded to act.
    Raises:
        ValueError: no output, shapes that do not fit, a quantised output of another dv, or another
            number of splits.
    Capture-safe.
    Source: DeepSeek-V2 report, section 2.1.2 (absorption of W_UV into W_O).
    """
    _check_v(o_latent, w_uv, out, out_q, out_scale)
    _check_parts(o_latent, w_uv, parts)
    tokens = o_latent.shape[0]
    num_heads, dv, dc = w_uv.shape
    act_bytes = w_uv.element_size()
    tile, splits = _v_tile(dv, dc, act_bytes), 0 if parts is None else parts.o.shape[1]
    few = _is_few(tokens, dv, dc, act_bytes)
    block_t = token_tile(o_latent)
    cut = cut_few(tokens, splits) if few else _cut(tile, block_t, splits, act_bytes)
    launch(
        _absorb_v_few if few else _absorb_v,
        (num_heads * triton.cdiv(dv, tile.rows), triton.cdiv(tokens, block_t)),
        o_latent,
        o_latent if parts is None else parts.o,
        w_uv if parts is None else parts.lse,
        kv_len,
        TensorMap(w_uv.view(-1, dc), (tile.rows, dc)) if few else w_uv,
        o_latent if out is None else out,
        o_latent if out_q is None else out_q,
        o_latent if out_scale is None else out_scale,
        tokens,
        o_latent.stride(0),
        0 if out is None else out.stride(0),
        0 if out_q is None else out_q.stride(0),
        0 if out_scale is None else out_scale.stride(0),
        DV=dv,
        DC=dc,
        BLOCK_V=tile.rows,
        BLOCK_T=block_t,
        HAS_OUT=out is not None,
        HAS_Q=out_q is not None,
        PRECISION=precision(o_latent),
        H=num_heads,
        SPLITS=splits,
        CUT=1 if parts is None else parts.cut,
        **cut,
        **overlap(launch),
    )


def absorb_v_ref(
    o_latent: torch.Tensor,
    kv_len: torch.Tensor,
    w_uv: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_q: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    parts: Parts | None = None,
) -> None:
    """`absorb_v` in plain torch."""
    _check_v(o_latent, w_uv, out, out_q, out_scale)
    _check_parts(o_latent, w_uv, parts)
    o = o_latent
    if parts is not None:
        o = o.clone()
        merge_ref(kv_len, parts.o, parts.lse, cut=parts.cut, out=o)
    o = o.masked_fill((kv_len == 0)[:, None, None], 0.0)
    y = einsum_rows("thc,hvc->thv", o.float(), w_uv.float()).to(o.dtype)
    flat = y.reshape(y.shape[0], -1)
    if out is not None:
        out.copy_(flat)
    if out_q is not None and out_scale is not None:
        quantize_ref(flat, out_q=out_q, out_scale=out_scale)


def takes_parts(tokens: int, splits: int, *, dv: int, dc: int, act_bytes: int) -> bool:
    """Whether `absorb_v` merges so many splits of so many tokens itself.

    Where it does not, `merge` comes before it: a token's bits are the same.
    """
    return 1 < splits <= _most_parts(tokens, dv, dc, act_bytes)


def _most_parts(tokens: int, dv: int, dc: int, act_bytes: int) -> int:
    return FEW_PARTS if _is_few(tokens, dv, dc, act_bytes) else MOST_PARTS


def _is_few(tokens: int, dv: int, dc: int, act_bytes: int) -> bool:
    """Whether programs take few tokens, and all of their weight at once, by bulk copies.

    Not of fp32: its products are chains of additions, whose order would be another.
    """
    whole = dc % 64 == 0 and dc == pow2(dc) and dv % _v_tile(dv, dc, act_bytes).rows == 0
    return tokens <= FEW_TOKENS and act_bytes == 2 and whole and dc <= FEW_COLUMNS


def _v_tile(dv: int, dc: int, act_bytes: int) -> Tile:
    rows, steps = min(128, pow2(dv)), min(128, pow2(dc))
    return Tile(rows, steps if act_bytes == 2 else min(steps, 32))


def _cut(tile: Tile, block_t: int, splits: int, act_bytes: int) -> dict[str, Any]:
    """How `_absorb_v` walks along the columns."""
    step_bytes = (tile.rows + block_t * max(1, splits)) * tile.steps * act_bytes
    return {
        "BLOCK_C": tile.steps,
        # Where rows may have two splits, most often none has.
        "LOOKS": splits == 2 and block_t == MAX_TOKENS,
        "num_warps": 4,
        # Deep enough that one head's whole weight is in flight, where there is room.
        "num_stages": min(4, BUDGET_BYTES[1] // step_bytes),
    }


def _check_v(
    o_latent: torch.Tensor,
    w_uv: torch.Tensor,
    out: torch.Tensor | None,
    out_q: torch.Tensor | None,
    out_scale: torch.Tensor | None,
) -> None:
    if (out is None and out_q is None) or (out_q is None) != (out_scale is None):
        raise ValueError("expected out, or out_q with out_scale, or all three; pass at least one")
    num_heads, dv, dc = w_uv.shape
    tokens = o_latent.shape[0]
    if tuple(o_latent.shape[1:]) != (num_heads, dc):
        raise ValueError(
            f"o_latent must be [T, {num_heads}, {dc}] to fit w_uv {list(w_uv.shape)}, "
            f"got {list(o_latent.shape)}"
        )
    if out is not None and tuple(out.shape) != (tokens, num_heads * dv):
        raise ValueError(f"out must be {(tokens, num_heads * dv)}, got {list(out.shape)}")
    if not w_uv.is_contiguous() or o_latent.stride()[1:] != (dc, 1):
        raise ValueError(
            "w_uv and the rows of o_latent must be contiguous; "
            f"got strides {w_uv.stride()} and {o_latent.stride()}"
        )
    if out_q is not None and out_scale is not None:
        if dv % 128:
            raise ValueError(
                f"a quantised output needs v_head_dim in multiples of 128, got {dv}; "
                "write `out` and quantise it apart"
            )
        check_quantized(tokens, num_heads * dv, out_q, out_scale)


def _check_parts(o_latent: torch.Tensor, w_uv: torch.Tensor, parts: Parts | None) -> None:
    if parts is None:
        return
    check_parts(parts.o, parts.lse, o_latent)
    (tokens, splits), (_, dv, dc) = parts.o.shape[:2], w_uv.shape
    most = _most_parts(tokens, dv, dc, o_latent.element_size())
    if not 1 < splits <= most or parts.o.dtype != o_latent.dtype:
        raise ValueError(
            f"parts of {tokens} tokens must be 2 to {most} splits of {o_latent.dtype}, got "
            f"{splits} of {parts.o.dtype}; merge them before"
        )
