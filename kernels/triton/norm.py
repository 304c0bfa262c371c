"""Token embedding and RMSNorm, with the residual add before it and the FP8 quantisation after it.

Invariants: one CTA reduces one row, in an order set by the width alone, so a row's bits do not
depend on how many rows there are; the residual stream is kept in the act dtype, sums are fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.activation import GROUP, check_quantized, quantize_groups, quantize_ref
from kernels.triton.expert_sum import combine_ref
from kernels.triton.launch import Launcher
from kernels.triton.overlap import (
    await_inputs,
    overlap,
)
from kernels.triton.tiles import add_parts, ask_parts, hold_loads, num_parts, sum_parts

MAX_WIDTH = 16384  # a row is held in registers
EMBED_BLOCK = 1024
MOST_HELD = 72  # of the 128 registers that a thread has where 512 hold a row; it needs the others


@triton.jit
def _embed(
    tok_id,  # int32 [T]
    table,  # act [V, H]
    poison,  # int32 [1]
    out,  # act [T, H]
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    t = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tok_id + t).to(tl.int64)
    if token < 0:
        fill = tl.where(tl.load(poison) != 0, float("nan"), 0.0)
        tl.store(out + t * H + col, tl.zeros([BLOCK], tl.float32) + fill, mask=col < H)
        return
    value = tl.load(table + token * H + col, mask=col < H)
    tl.store(out + t * H + col, value, mask=col < H)


@triton.jit
def _norm_weight(weight, col, H: tl.constexpr):
    """[G, 128], zero past H. No step writes it, so it is loaded before `await_inputs`."""
    return tl.load(weight + col, mask=col < H, other=0.0)


@triton.jit
def _rmsnorm(value, w, eps, H: tl.constexpr):
    """act [G, 128] from value, an act row held as [G, 128] and zero past H, and its weights."""
    x = value.to(tl.float32)
    mean = tl.sum(tl.sum(x * x, axis=1), axis=0) / H
    # Rounded before the weight is applied, as the published model does.
    normed = (x * tl.rsqrt(mean + eps)).to(value.dtype).to(tl.float32)
    return (w.to(tl.float32) * normed).to(value.dtype)


@triton.jit
def _ask_rows(
    y,  # act [T*K, H]
    ids,  # int32 [T, K]
    weights,  # fp32 [T, K]
    t,
    col,
    H: tl.constexpr,
    K: tl.constexpr,
):
    """The loads of `_weighted_rows`: the token's first id, and of each choice weight and row."""
    first = tl.load(ids + t * K)
    scales, rows = tl.tuple([]), tl.tuple([])
    for k in tl.static_range(K):
        scales += (tl.load(weights + t * K + k),)
        rows += (tl.load(y + (t * K + k) * H + col, mask=col < H, other=0.0),)
    return first, scales, rows


@triton.jit
def _weighted_rows(first, scales, rows, zero, K: tl.constexpr):
    """fp32 sum over k, in order, of scales[k] * rows[k]; zeros for a padded token.

    What a padded token's rows hold, NaN perhaps, is dropped at the end.
    """
    total = tl.zeros(rows[0].shape, tl.float32) + zero
    for k in tl.static_range(K):
        total += scales[k] * rows[k].to(tl.float32)
    return tl.where(first >= 0, total, 0.0)


@triton.jit
def _add_rmsnorm(
    x,  # act [T, H], row pitch x_pitch; written if HAS_DELTA
    delta,  # act [T, H], row pitch delta_pitch; or f32 [PARTS, T, H]; act [T*K, H] if K; unused
    ids,  # int32 [T, K], or unused
    choice_weights,  # fp32 [T, K], or unused
    weight,  # act or fp32 [H]
    out,  # act [T, H], row pitch out_pitch, or unused
    out_q,  # e4m3 [T, H], row pitch q_pitch, or unused
    out_scale,  # fp32 [T, ceil(H/128)], row pitch scale_pitch, or unused
    x_pitch,
    delta_pitch,
    part_stride,
    out_pitch,
    q_pitch,
    scale_pitch,
    eps,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_Q: tl.constexpr,
    HOLDS: tl.constexpr,  # all of a row's loads are in flight together
    PDL: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    col = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    if GROUPS <= 64:  # wider rows leave no registers for it
        w = _norm_weight(weight, col, H)
    await_inputs(PDL)
    row = x + t * x_pitch + col
    value = tl.load(row, mask=col < H, other=0.0)
    if HAS_DELTA:
        if K > 0:
            first, scales, rows = _ask_rows(delta, ids, choice_weights, t, col, H, K)
        else:
            at = delta + t * delta_pitch + col
            parts = ask_parts(at, col < H, part_stride, PARTS)
        zero = 0.0
        if HOLDS:
            zero = hold_loads(PDL)
        if K > 0:
            add = _weighted_rows(first, scales, rows, zero, K).to(value.dtype)
        else:
            add = add_parts(parts, zero, PARTS, value.dtype)
        value = (value.to(tl.float32) + add.to(tl.float32)).to(value.dtype)
        tl.store(row, value, mask=col < H)
    if GROUPS > 64:
        w = _norm_weight(weight, col, H)
    y = _rmsnorm(value, w, eps, H)
    if HAS_OUT:
        tl.store(out + t * out_pitch + col, y, mask=col < H)
    if HAS_Q:
        q, scale = quantize_groups(y.to(tl.float32))
        # By 8, as y: by 16 bytes, all would be computed twice, once for each way of dealing it out.
        tl.store(out_q + t * q_pitch + tl.max_contiguous(col, [1, 8]), q, mask=col < H)
        tl.store(out_scale + t * scale_pitch + group, scale, mask=group * 128 < H)


@triton.jit
def _gather_add_rmsnorm(
    x,  # act [T, H], row pitch x_pitch
    delta,  # act [T, H], row pitch delta_pitch, or unused
    index,  # int32 [S]
    weight,  # act or fp32 [H]
    out,  # act [S, H], row pitch out_pitch
    x_pitch,
    delta_pitch,
    out_pitch,
    eps,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    PDL: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, GROUPS)[:, None] * 128 + tl.arange(0, 128)[None, :]
    w = _norm_weight(weight, col, H)
    await_inputs(PDL)
    t = tl.load(index + s).to(tl.int64)
    if t < 0:
        tl.store(out + s * out_pitch + col, tl.zeros([GROUPS, 128], tl.float32), mask=col < H)
        return
    value = tl.load(x + t * x_pitch + col, mask=col < H, other=0.0)
    if HAS_DELTA:
        add = tl.load(delta + t * delta_pitch + col, mask=col < H, other=0.0)
        value = (value.to(tl.float32) + add.to(tl.float32)).to(value.dtype)
    y = _rmsnorm(value, w, eps, H)
    tl.store(out + s * out_pitch + col, y, mask=col < H)


def embed(
    launch: Launcher,
    tok_id: torch.Tensor,
    table: torch.Tensor,
    poison: torch.Tensor,
    *,
    out: torch.Tensor,
) -> None:
    """out[t] = table[tok_id[t]]; a padded row gets 0, or NaN while poison is set.

    The poison lets a proof show that padding changes nobody's bits.

    Args:
        tok_id: int32 [T]; -1 is padding.
        table: act [V, H].
        poison: int32 [1], device; 0 or 1.
        out: act [T, H].
    Raises:
        ValueError: shapes that do not fit, or strided tensors.
    Capture-safe.
    """
    want = (tok_id.shape[0], table.shape[1])
    if tuple(out.shape) != want or not (out.is_contiguous() and table.is_contiguous()):
        raise ValueError(
            f"out must be {want} and, like table, contiguous; "
            f"got {tuple(out.shape)}, strides {out.stride()} and {table.stride()}"
        )
    launch(
        _embed,
        (want[0], triton.cdiv(want[1], EMBED_BLOCK)),
        tok_id,
        table,
        poison,
        out,
        H=want[1],
        BLOCK=EMBED_BLOCK,
        num_warps=4,
        **overlap(launch),
    )


def embed_ref(
    tok_id: torch.Tensor, table: torch.Tensor, poison: torch.Tensor, *, out: torch.Tensor
) -> None:
    """`embed` in plain torch."""
    fill = float("nan") if int(poison) else 0.0
    out.copy_(table[tok_id.clamp(min=0).long()].masked_fill((tok_id < 0)[:, None], fill))


def add_rmsnorm(
    launch: Launcher,
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    *,
    eps: float,
    choices: tuple[torch.Tensor, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
    out_q: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> None:
    """x += delta, then RMSNorm of x, written in the act dtype, quantised, or both.

    Args:
        x: act [T, H], the residual; the row pitch may exceed H. Updated in place if delta is given.
        delta: act [T, H]; or fp32 [S, T, H], parts to be added up in order and rounded; None for a
            plain norm.
        weight: act or fp32 [H].
        eps: added to the mean square.
        choices: (ids int32 [T, K], weights fp32 [T, K]): then delta is act [T*K, H], the experts'
            results, and is weighted and added up as by `expert_sum.combine`. A token has all its
            choices or, where its first id is -1, none.
        out: act [T, H].
        out_q, out_scale: e4m3 [T, H] and fp32 [T, ceil(H/128)], made from the rounded norm; both or
            neither.
    Raises:
        ValueError: no output, shapes that do not fit, or H above MAX_WIDTH.
    Capture-safe.
    Source: `DeepseekV3RMSNorm` of transformers for the order of roundings.
    """
    _check_norm(x, delta, weight, choices, out, out_q, out_scale)
    dummy = weight
    launch(
        _add_rmsnorm,
        (x.shape[0],),
        x,
        dummy if delta is None else delta,
        dummy if choices is None else choices[0],
        dummy if choices is None else choices[1],
        weight,
        dummy if out is None else out,
        dummy if out_q is None else out_q,
        dummy if out_scale is None else out_scale,
        x.stride(0),
        0 if delta is None else delta.stride(-2),
        delta.stride(0) if delta is not None and delta.ndim == 3 else 0,
        0 if out is None else out.stride(0),
        0 if out_q is None else out_q.stride(0),
        0 if out_scale is None else out_scale.stride(0),
        float(eps),
        H=x.shape[1],
        GROUPS=_num_groups(x.shape[1]),
        HAS_DELTA=delta is not None,
        PARTS=0 if delta is None else num_parts(delta),
        K=0 if choices is None else choices[0].shape[1],
        HAS_OUT=out is not None,
        HAS_Q=out_q is not None,
        HOLDS=_holds(x.shape[1], delta, choices),
        num_warps=_num_warps(x.shape[1]),
        **overlap(launch),
    )


def add_rmsnorm_ref(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    *,
    eps: float,
    choices: tuple[torch.Tensor, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
    out_q: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> None:
    """`add_rmsnorm` in plain torch."""
    _check_norm(x, delta, weight, choices, out, out_q, out_scale)
    if delta is not None and choices is not None:
        total = torch.empty_like(x)
        combine_ref(delta, *choices, None, out=total)
        x.copy_(x.float() + total.float())
    elif delta is not None:
        x.copy_(x.float() + sum_parts(delta, x.dtype).float())
    y = _rmsnorm_ref(x, weight, eps)
    if out is not None:
        out.copy_(y)
    if out_q is not None and out_scale is not None:
        quantize_ref(y, out_q=out_q, out_scale=out_scale)


def gather_add_rmsnorm(
    launch: Launcher,
    x: torch.Tensor,
    delta: torch.Tensor | None,
    index: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    out: torch.Tensor,
) -> None:
    """out[s] = RMSNorm(x[index[s]] + delta[index[s]]): the final norm, for sampling rows only.

    Args:
        x: act [T, H], not modified.
        delta: act [T, H] or None.
        index: int32 [S]; -1 is padding and gives a row of zeros.
        weight: act or fp32 [H].
        eps: added to the mean square.
        out: act [S, H].
    Raises:
        ValueError: shapes that do not fit, or H above MAX_WIDTH.
    Capture-safe.
    """
    _check_gather(x, delta, index, weight, out)
    launch(
        _gather_add_rmsnorm,
        (index.shape[0],),
        x,
        x if delta is None else delta,
        index,
        weight,
        out,
        x.stride(0),
        0 if delta is None else delta.stride(0),
        out.stride(0),
        float(eps),
        H=x.shape[1],
        GROUPS=_num_groups(x.shape[1]),
        HAS_DELTA=delta is not None,
        num_warps=_num_warps(x.shape[1]),
        **overlap(launch),
    )


def gather_add_rmsnorm_ref(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    index: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    out: torch.Tensor,
) -> None:
    """`gather_add_rmsnorm` in plain torch."""
    _check_gather(x, delta, index, weight, out)
    at = index.clamp(min=0).long()
    rows = x[at]
    if delta is not None:
        rows = (rows.float() + delta[at].float()).to(x.dtype)
    out.copy_(_rmsnorm_ref(rows, weight, eps).masked_fill((index < 0)[:, None], 0.0))


def _rmsnorm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (weight.float() * normed.float()).to(x.dtype)


def _num_groups(width: int) -> int:
    return int(triton.next_power_of_2(triton.cdiv(width, GROUP)))


def _num_warps(width: int) -> int:
    # At most 16 elements a thread at the usual sizes: a row is bound by latency, not issue.
    return min(16, max(4, _num_groups(width) // 4))


def _holds(
    width: int,
    delta: torch.Tensor | None,
    choices: tuple[torch.Tensor, torch.Tensor] | None,
) -> bool:
    """Whether registers hold what is to be added to a row, all at once."""
    if delta is None:
        return False
    rows = num_parts(delta) if choices is None else choices[0].shape[1]
    elements = _num_groups(width) * GROUP // (32 * _num_warps(width))
    return elements * max(1, rows) * delta.element_size() // 4 <= MOST_HELD


def _check_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    choices: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor | None,
    out_q: torch.Tensor | None,
    out_scale: torch.Tensor | None,
) -> None:
    if (out is None and out_q is None) or (out_q is None) != (out_scale is None):
        raise ValueError("expected out, or out_q with out_scale, or all three; pass at least one")
    plain = delta
    if delta is not None and choices is not None:
        plain = None
        want = (x.shape[0] * choices[0].shape[1], x.shape[1])
        if tuple(delta.shape) != want or not all(t.is_contiguous() for t in (delta, *choices)):
            raise ValueError(
                f"delta and choices must be contiguous, delta {want}, got {delta.shape}"
            )
    elif delta is not None and delta.ndim == 3:
        plain = delta[0]
        if delta.dtype != torch.float32:
            raise ValueError(f"delta in parts must be float32, got {delta.dtype}")
    _check_rows(x, plain, weight)
    if out is not None and out.shape != x.shape:
        raise ValueError(f"out must have x's shape {list(x.shape)}, got {list(out.shape)}")
    if out_q is not None and out_scale is not None:
        check_quantized(x.shape[0], x.shape[1], out_q, out_scale)


def _check_gather(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    index: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
) -> None:
    _check_rows(x, delta, weight)
    if tuple(out.shape) != (index.shape[0], x.shape[1]):
        raise ValueError(
            f"out must be [{index.shape[0]}, {x.shape[1]}] for this index and x, "
            f"got {list(out.shape)}"
        )


def _check_rows(x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor) -> None:
    if x.shape[1] > MAX_WIDTH:
        raise ValueError(
            f"rows of at most {MAX_WIDTH} elements fit one CTA's registers, got {x.shape[1]}; "
            "raise MAX_WIDTH only after looking at the spills"
        )
    if weight.shape != x.shape[1:] or (delta is not None and delta.shape != x.shape):
        got = (list(weight.shape), None if delta is None else list(delta.shape))
        raise ValueError(
            f"weight and delta must be [{x.shape[1]}] and {list(x.shape)}, "
            f"got {got[0]} and {got[1]}"
        )
