"""SwiGLU and the 1x128 FP8 quantisation of activations.

Invariants: a group of 128 along the last dimension (the last one may be shorter) is quantised from
its own values alone, with scale = max(amax, 1e-4) / 448; a row's bits do not depend on how many
rows there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap
from kernels.triton.tiles import sigmoid_rows

GROUP = 128  # elements that share an FP8 scale
FP8_MAX = 448.0  # largest finite e4m3
MIN_AMAX = 1e-4  # keeps the scale of an all-zero group away from zero
GROUPS_PER_CTA = 8

_FP8_MAX = tl.constexpr(FP8_MAX)
_MIN_AMAX = tl.constexpr(MIN_AMAX)


@triton.jit
def quantize_groups(x):
    """(e4m3 [G, 128], fp32 scales [G]) of x fp32 [G, 128]; a NaN stays NaN in its own element."""
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), axis=1), _MIN_AMAX), _FP8_MAX)
    # One division a group: a product may be an ulp off the quotient, far below e4m3's step. The
    # conversion saturates in hardware, so a product one ulp above 448 is still 448.
    return (x * tl.div_rn(1.0, scale)[:, None]).to(tl.float8e4nv), scale


@triton.jit
def _quantize(
    x,  # act [T, K], row pitch x_pitch
    out_q,  # e4m3 [T, K], row pitch q_pitch
    out_scale,  # fp32 [T, ceil(K/128)], row pitch scale_pitch
    x_pitch,
    q_pitch,
    scale_pitch,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    t = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    col = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    value = tl.load(x + t * x_pitch + col, mask=col < K, other=0.0).to(tl.float32)
    q, scale = quantize_groups(value)
    tl.store(out_q + t * q_pitch + col, q, mask=col < K)
    tl.store(out_scale + t * scale_pitch + group, scale, mask=group * 128 < K)


@triton.jit
def _silu_mul(
    gate_up,  # act [T, >= up_at + I], row pitch gate_up_pitch; gate at 0, up at up_at
    out,  # act [T, I], row pitch out_pitch, or unused
    out_q,  # e4m3 [T, I], row pitch q_pitch, or unused
    out_scale,  # fp32 [T, ceil(I/128)], row pitch scale_pitch, or unused
    gate_up_pitch,
    up_at,
    out_pitch,
    q_pitch,
    scale_pitch,
    I: tl.constexpr,  # noqa: E741
    GROUPS: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_Q: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    t = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    col = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    at = gate_up + t * gate_up_pitch + col
    gate = tl.load(at, mask=col < I, other=0.0).to(tl.float32)
    up = tl.load(at + up_at, mask=col < I, other=0.0).to(tl.float32)
    h = gate / (1.0 + tl.exp(-gate)) * up
    if HAS_OUT:
        tl.store(out + t * out_pitch + col, h, mask=col < I)
    if HAS_Q:
        q, scale = quantize_groups(h)
        tl.store(out_q + t * q_pitch + col, q, mask=col < I)
        tl.store(out_scale + t * scale_pitch + group, scale, mask=group * 128 < I)


def quantize(
    launch: Launcher, x: torch.Tensor, *, out_q: torch.Tensor, out_scale: torch.Tensor
) -> None:
    """Quantise x to FP8 in groups of 128 along its rows.

    Args:
        x: act [T, K]; the row pitch may exceed K.
        out_q: e4m3 [T, K].
        out_scale: fp32 [T, ceil(K/128)]; x is about out_q * its group's scale.
    Raises:
        ValueError: shapes that do not fit.
    Capture-safe.
    """
    check_quantized(x.shape[0], x.shape[1], out_q, out_scale)
    launch(
        _quantize,
        (x.shape[0], triton.cdiv(x.shape[1], GROUP * GROUPS_PER_CTA)),
        x,
        out_q,
        out_scale,
        x.stride(0),
        out_q.stride(0),
        out_scale.stride(0),
        K=x.shape[1],
        GROUPS=GROUPS_PER_CTA,
        num_warps=4,
        **overlap(launch),
    )


def quantize_ref(x: torch.Tensor, *, out_q: torch.Tensor, out_scale: torch.Tensor) -> None:
    """`quantize` in plain torch."""
    rows, width = x.shape
    padded = x.new_zeros(rows, triton.cdiv(width, GROUP) * GROUP, dtype=torch.float32)
    padded[:, :width] = x
    groups = padded.view(rows, -1, GROUP)
    scale = groups.abs().amax(-1).clamp(min=MIN_AMAX) / FP8_MAX
    q = (groups / scale[..., None]).clamp(-FP8_MAX, FP8_MAX)
    out_q.copy_(q.view(rows, -1)[:, :width])
    out_scale.copy_(scale)


def silu_mul(
    launch: Launcher,
    gate_up: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_q: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> None:
    """silu(gate) * up in fp32, written rounded, quantised, or both.

    The quantised form is made from the fp32 product, not from its rounding to the act dtype.

    Args:
        gate_up: act [T, 2*P]; gate is [:, :I] and up is [:, P:P+I], with I the width of the output.
        out: act [T, I].
        out_q, out_scale: e4m3 [T, I] and fp32 [T, ceil(I/128)]; both or neither.
    Raises:
        ValueError: no output, or shapes that do not fit.
    Capture-safe.
    """
    width = _silu_width(gate_up, out, out_q, out_scale)
    rows, pitch = gate_up.shape[0], gate_up.shape[1] // 2
    dummy = gate_up
    launch(
        _silu_mul,
        (rows, triton.cdiv(width, GROUP * GROUPS_PER_CTA)),
        gate_up,
        dummy if out is None else out,
        dummy if out_q is None else out_q,
        dummy if out_scale is None else out_scale,
        gate_up.stride(0),
        pitch,
        0 if out is None else out.stride(0),
        0 if out_q is None else out_q.stride(0),
        0 if out_scale is None else out_scale.stride(0),
        I=width,
        GROUPS=GROUPS_PER_CTA,
        HAS_OUT=out is not None,
        HAS_Q=out_q is not None,
        num_warps=4,
        **overlap(launch),
    )


def silu_mul_ref(
    gate_up: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_q: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> None:
    """`silu_mul` in plain torch."""
    width = _silu_width(gate_up, out, out_q, out_scale)
    pitch = gate_up.shape[1] // 2
    gate, up = gate_up[:, :width].float(), gate_up[:, pitch : pitch + width].float()
    h = gate * sigmoid_rows(gate) * up
    if out is not None:
        out.copy_(h)
    if out_q is not None and out_scale is not None:
        quantize_ref(h, out_q=out_q, out_scale=out_scale)


def check_quantized(rows: int, width: int, out_q: torch.Tensor, out_scale: torch.Tensor) -> None:
    """Raise ValueError unless out_q and out_scale can hold `rows` quantised rows of `width`."""
    want = ((rows, width), (rows, triton.cdiv(width, GROUP)))
    got = (tuple(out_q.shape), tuple(out_scale.shape))
    if got != want:
        raise ValueError(f"out_q and out_scale must be {want[0]} and {want[1]}, got {got}")
    if out_q.dtype != torch.float8_e4m3fn or out_scale.dtype != torch.float32:
        raise ValueError(
            "out_q and out_scale must be float8_e4m3fn and float32, "
            f"got {out_q.dtype} and {out_scale.dtype}"
        )


def _silu_width(
    gate_up: torch.Tensor,
    out: torch.Tensor | None,
    out_q: torch.Tensor | None,
    out_scale: torch.Tensor | None,
) -> int:
    given = out if out is not None else out_q
    if given is None or (out_q is None) != (out_scale is None):
        raise ValueError("expected out, or out_q with out_scale, or all three; pass at least one")
    rows, width = given.shape
    if rows != gate_up.shape[0] or gate_up.shape[1] % 2 or width > gate_up.shape[1] // 2:
        raise ValueError(
            f"gate_up must be [{rows}, 2*P] with P >= {width}, got {list(gate_up.shape)}"
        )
    if out_q is not None and out_scale is not None:
        check_quantized(rows, width, out_q, out_scale)
    return int(width)
