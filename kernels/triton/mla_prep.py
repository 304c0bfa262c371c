"""What attention needs of the fused query/KV projection: two RMSNorms, RoPE, and the KV write.

Invariants: a token's results come from its own row alone, in an order set by the widths alone;
every token of a step is written before any attends, so a prompt chunk sees itself in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.activation import GROUP, check_quantized, quantize_groups, quantize_ref
from kernels.triton.launch import Launcher
from kernels.triton.norm import _norm_weight, _rmsnorm, _rmsnorm_ref
from kernels.triton.overlap import (
    await_inputs,
    overlap,
)
from kernels.triton.tiles import add_parts, ask_parts, hold_loads, num_parts, sum_parts


@triton.jit
def rope_pair(
    x,  # act, or f32 in parts: pointers to the start of each rotary part
    table,  # fp32: pointers to each token's row of the rope table
    pair,  # i32: indices of pairs, broadcastable with both
    mask,
    part_stride,
    HALF: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    PARTS: tl.constexpr,
    act: tl.constexpr,
):
    """fp32 elements of each rotated pair; they go to columns `pair` and `pair + HALF`."""
    a, b = ask_pair(x, pair, mask, part_stride, HALF, INTERLEAVE, PARTS)
    return turn_pair(a, b, 0.0, table, pair, mask, HALF, PARTS, act)


@triton.jit
def ask_pair(
    x,
    pair,
    mask,
    part_stride,
    HALF: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The parts of both elements of each pair, for `turn_pair`; arguments as of `rope_pair`."""
    if INTERLEAVE:
        first, second = x + 2 * pair, x + 2 * pair + 1
    else:
        first, second = x + pair, x + HALF + pair
    a = ask_parts(first, mask, part_stride, PARTS)
    return a, ask_parts(second, mask, part_stride, PARTS)


@triton.jit
def turn_pair(
    a,
    b,
    zero,
    table,
    pair,
    mask,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
    act: tl.constexpr,
):
    """What `rope_pair` gives, from the parts that `ask_pair` asked for."""
    a = add_parts(a, zero, PARTS, act).to(tl.float32)
    b = add_parts(b, zero, PARTS, act).to(tl.float32)
    cos = tl.load(table + pair, mask=mask, other=0.0)
    sin = tl.load(table + HALF + pair, mask=mask, other=0.0)
    return rotated(a, b, cos, sin)


@triton.jit
def rotated(a, b, cos, sin):
    """A pair turned by its angle, fp32.

    Which of two products is fused with their sum is said here. The compiler would choose, and it
    has been seen to choose otherwise in kernels for other numbers of tokens.
    """
    return tl.fma(a, cos, -(b * sin)), tl.fma(b, cos, a * sin)


@triton.jit
def _mla_prep(
    qkv,  # act [T, W], row pitch qkv_pitch; or f32 [PARTS, T, W]
    tok_row,  # int32 [T]
    tok_pos,  # int32 [T]
    kv_slot,  # int64 [T]
    rope_table,  # fp32 [max_seq_len, 2*HALF]
    q_norm_weight,  # act or fp32 [QW], or unused
    kv_norm_weight,  # act or fp32 [DC]
    kv_cache,  # act [num_slots, DC + 2*HALF], row pitch kv_pitch
    out,  # act [T, QW], row pitch out_pitch, or unused
    out_q,  # e4m3 [T, QW], row pitch q_pitch, or unused
    out_scale,  # fp32 [T, ceil(QW/128)], row pitch scale_pitch, or unused
    qkv_pitch,
    part_stride,
    kv_start,
    kv_pitch,
    out_pitch,
    q_pitch,
    scale_pitch,
    eps,
    QW: tl.constexpr,
    DC: tl.constexpr,
    HALF: tl.constexpr,
    Q_GROUPS: tl.constexpr,
    KV_GROUPS: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_Q: tl.constexpr,
    PDL: tl.constexpr,
):
    # No load waits for another, nor for whether the token is real: each would take a latency.
    t = tl.program_id(0).to(tl.int64)
    row = qkv + t * qkv_pitch
    act: tl.constexpr = kv_cache.dtype.element_ty
    if tl.program_id(1) == 0:
        kv_col = tl.arange(0, KV_GROUPS)[:, None] * 128 + tl.arange(0, 128)[None, :]
        kv_w = _norm_weight(kv_norm_weight, kv_col, DC)
        await_inputs(PDL)
        real = tl.load(tok_row + t) >= 0
        pos = tl.load(tok_pos + t)
        slot = kv_cache + tl.load(kv_slot + t) * kv_pitch
        at = row + kv_start + kv_col
        latent = ask_parts(at, kv_col < DC, part_stride, PARTS)
        pair = tl.arange(0, PAIRS)
        key = row + kv_start + DC
        a, b = ask_pair(key, pair, pair < HALF, part_stride, HALF, INTERLEAVE, PARTS)
        zero = hold_loads(PDL)
        angles = rope_table + tl.where(real, pos, 0).to(tl.int64) * (2 * HALF)
        first, second = turn_pair(a, b, zero, angles, pair, pair < HALF, HALF, PARTS, act)
        latent = add_parts(latent, zero, PARTS, act)
        tl.store(slot + kv_col, _rmsnorm(latent, kv_w, eps, DC), mask=(kv_col < DC) & real)
        tl.store(slot + DC + pair, first, mask=(pair < HALF) & real)
        tl.store(slot + DC + HALF + pair, second, mask=(pair < HALF) & real)
    else:
        # A padded token's row may hold anything, NaN included; its query is zeros.
        group = tl.arange(0, Q_GROUPS)
        col = group[:, None] * 128 + tl.arange(0, 128)[None, :]
        w = _norm_weight(q_norm_weight, col, QW)
        await_inputs(PDL)
        real = tl.load(tok_row + t) >= 0
        parts = ask_parts(row + col, col < QW, part_stride, PARTS)
        value = add_parts(parts, hold_loads(PDL), PARTS, act)
        value = tl.where(real, value, 0.0).to(act)
        y = _rmsnorm(value, w, eps, QW)
        if HAS_OUT:
            tl.store(out + t * out_pitch + col, y, mask=col < QW)
        if HAS_Q:
            q, scale = quantize_groups(y.to(tl.float32))
            tl.store(out_q + t * q_pitch + col, q, mask=col < QW)
            tl.store(out_scale + t * scale_pitch + group, scale, mask=group * 128 < QW)


def mla_prep(
    launch: Launcher,
    qkv: torch.Tensor,
    tok_row: torch.Tensor,
    tok_pos: torch.Tensor,
    kv_slot: torch.Tensor,
    rope_table: torch.Tensor,
    q_norm_weight: torch.Tensor | None,
    kv_norm_weight: torch.Tensor,
    *,
    eps: float,
    kv_start: int,
    interleave: bool,
    kv_cache: torch.Tensor,
    out: torch.Tensor | None = None,
    out_q: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> None:
    """Norm the compressed query, and write each token's normed latent and rotated key to its slot.

    Args:
        qkv: act [T, W]: compressed query at 0 (ignored without q_norm_weight), compressed KV [dc]
            at kv_start, rotary key [dr] after it; the row pitch may exceed W. Or fp32 [S, T, W]:
            parts to be added up in order and rounded.
        tok_row: int32 [T]; -1 is padding, which writes no KV and gives a query of zeros.
        tok_pos: int32 [T], row of the rope table.
        kv_slot: int64 [T].
        rope_table: float32 [max_seq_len, dr]: cos of each pair, then sin of each.
        q_norm_weight: act or fp32 [q_width]; None where the query is not compressed.
        kv_norm_weight: act or fp32 [dc].
        eps: added to the mean square, in both norms.
        kv_start: column where the compressed KV begins.
        interleave: pairs are (0, 1), (2, 3) … instead of (0, dr/2), (1, dr/2+1) …; either way the
            first elements of all pairs are written before the second ones.
        kv_cache: act [num_slots, dc+dr].
        out: act [T, q_width], the normed query.
        out_q, out_scale: the same quantised, e4m3 [T, q_width] and fp32 [T, ceil(q_width/128)].
    Raises:
        ValueError: outputs without q_norm_weight or the other way round, or shapes that do not fit.
    Capture-safe.
    Source: DeepSeek-V3 report, section 2.1.1; rounding as transformers' DeepseekV3Attention.
    """
    _check(
        qkv, rope_table, q_norm_weight, kv_norm_weight, kv_start, kv_cache, out, out_q, out_scale
    )
    latent, half = kv_norm_weight.shape[0], rope_table.shape[1] // 2
    width = 0 if q_norm_weight is None else q_norm_weight.shape[0]
    launch(
        _mla_prep,
        (tok_row.shape[0], 1 if q_norm_weight is None else 2),
        qkv,
        tok_row,
        tok_pos,
        kv_slot,
        rope_table,
        kv_norm_weight if q_norm_weight is None else q_norm_weight,
        kv_norm_weight,
        kv_cache,
        qkv if out is None else out,
        qkv if out_q is None else out_q,
        rope_table if out_scale is None else out_scale,
        qkv.stride(-2),
        qkv.stride(0) if qkv.ndim == 3 else 0,
        kv_start,
        kv_cache.stride(0),
        0 if out is None else out.stride(0),
        0 if out_q is None else out_q.stride(0),
        0 if out_scale is None else out_scale.stride(0),
        float(eps),
        QW=width,
        DC=latent,
        HALF=half,
        Q_GROUPS=_groups(max(width, 1)),
        KV_GROUPS=_groups(latent),
        PAIRS=triton.next_power_of_2(half),
        INTERLEAVE=bool(interleave),
        PARTS=num_parts(qkv),
        HAS_OUT=out is not None,
        HAS_Q=out_q is not None,
        num_warps=8,
        **overlap(launch),
    )


def mla_prep_ref(
    qkv: torch.Tensor,
    tok_row: torch.Tensor,
    tok_pos: torch.Tensor,
    kv_slot: torch.Tensor,
    rope_table: torch.Tensor,
    q_norm_weight: torch.Tensor | None,
    kv_norm_weight: torch.Tensor,
    *,
    eps: float,
    kv_start: int,
    interleave: bool,
    kv_cache: torch.Tensor,
    out: torch.Tensor | None = None,
    out_q: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> None:
    """`mla_prep` in plain torch."""
    _check(
        qkv, rope_table, q_norm_weight, kv_norm_weight, kv_start, kv_cache, out, out_q, out_scale
    )
    qkv = sum_parts(qkv, kv_cache.dtype)
    real = tok_row >= 0
    rows, slots = qkv[real], kv_slot[real]
    dc, dr = kv_norm_weight.shape[0], rope_table.shape[1]
    key = rows[:, kv_start + dc : kv_start + dc + dr]
    kv_cache[slots, :dc] = _rmsnorm_ref(rows[:, kv_start : kv_start + dc], kv_norm_weight, eps)
    kv_cache[slots, dc:] = rope_ref(key, rope_table[tok_pos[real].long()], interleave=interleave)
    if q_norm_weight is None:
        return
    q = qkv[:, : q_norm_weight.shape[0]].masked_fill(~real[:, None], 0.0)
    y = _rmsnorm_ref(q, q_norm_weight, eps)
    if out is not None:
        out.copy_(y)
    if out_q is not None and out_scale is not None:
        quantize_ref(y, out_q=out_q, out_scale=out_scale)


def rope_ref(x: torch.Tensor, table: torch.Tensor, *, interleave: bool) -> torch.Tensor:
    """Rotate the pairs of x [..., dr] by table [..., dr] (cos, then sin), in fp32, rounded once."""
    half = x.shape[-1] // 2
    wide = x.float()
    a, b = wide[..., :half], wide[..., half:]
    if interleave:
        a, b = wide[..., 0::2], wide[..., 1::2]
    cos, sin = table[..., :half], table[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _groups(width: int) -> int:
    return int(triton.next_power_of_2(triton.cdiv(width, GROUP)))


def _check(
    qkv: torch.Tensor,
    rope_table: torch.Tensor,
    q_norm_weight: torch.Tensor | None,
    kv_norm_weight: torch.Tensor,
    kv_start: int,
    kv_cache: torch.Tensor,
    out: torch.Tensor | None,
    out_q: torch.Tensor | None,
    out_scale: torch.Tensor | None,
) -> None:
    has_out = out is not None or out_q is not None
    if has_out != (q_norm_weight is not None) or (out_q is None) != (out_scale is None):
        raise ValueError(
            "expected out, or out_q with out_scale, exactly where q_norm_weight is given; "
            f"got q_norm_weight={q_norm_weight is not None}, out={out is not None}, "
            f"out_q={out_q is not None}, out_scale={out_scale is not None}"
        )
    latent = kv_norm_weight.shape[0] + rope_table.shape[1]
    if rope_table.shape[1] % 2 or kv_cache.shape[1] != latent or kv_start + latent > qkv.shape[-1]:
        raise ValueError(
            f"kv_cache must be [num_slots, {latent}] and qkv at least {kv_start + latent} wide, "
            f"with an even rotary part; got kv_cache {list(kv_cache.shape)}, "
            f"qkv {list(qkv.shape)}, rope_table {list(rope_table.shape)}"
        )
    if q_norm_weight is None:
        return
    want = (qkv.shape[-2], q_norm_weight.shape[0])
    if want[1] > kv_start or (out is not None and tuple(out.shape) != want):
        raise ValueError(
            f"out must be {want} and the query end before kv_start {kv_start}, "
            f"got out {None if out is None else list(out.shape)}"
        )
    if out_q is not None and out_scale is not None:
        check_quantized(*want, out_q, out_scale)
