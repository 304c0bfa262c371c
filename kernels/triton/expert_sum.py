"""A token's weighted sum of what its experts return, in their order. Words: `routing`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap

COMBINE_BLOCK = 512  # 4 elements a thread: the rows of all K choices are in flight at once


@triton.jit
def _combine(
    y,  # act [T*K, H]
    ids,  # int32 [T, K]
    weights,  # fp32 [T, K]
    shared,  # act [T, H], row pitch shared_pitch, or unused
    out,  # act [T, H], row pitch out_pitch
    shared_pitch,
    out_pitch,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    t = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        pair = t * K + k
        # A row without an expert may hold anything, so it is not even read.
        real = tl.load(ids + pair) >= 0
        weight = tl.load(weights + pair, mask=real, other=0.0)
        value = tl.load(y + pair * H + col, mask=(col < H) & real, other=0.0)
        total += weight * value.to(tl.float32)
    if HAS_SHARED:
        total += tl.load(shared + t * shared_pitch + col, mask=col < H, other=0.0).to(tl.float32)
    tl.store(out + t * out_pitch + col, total, mask=col < H)


def combine(
    launch: Launcher,
    y: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    shared: torch.Tensor | None,
    *,
    out: torch.Tensor,
) -> None:
    """out[t] = sum over k, in order, of weights[t,k] * y[t*K+k], + shared[t]; fp32, rounded once.

    Args:
        y: act [T*K, H], contiguous; a row whose id is -1 is never read.
        ids: int32 [T, K].
        weights: fp32 [T, K].
        shared: act [T, H] or None.
        out: act [T, H].
    Raises:
        ValueError: shapes that do not fit, or strided ids, weights or y.
    Capture-safe.
    """
    _check_combine(y, ids, weights, shared, out)
    launch(
        _combine,
        (out.shape[0], triton.cdiv(out.shape[1], COMBINE_BLOCK)),
        y,
        ids,
        weights,
        out if shared is None else shared,
        out,
        0 if shared is None else shared.stride(0),
        out.stride(0),
        H=out.shape[1],
        K=ids.shape[1],
        BLOCK=COMBINE_BLOCK,
        HAS_SHARED=shared is not None,
        num_warps=4,
        **overlap(launch),
    )


def combine_ref(
    y: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    shared: torch.Tensor | None,
    *,
    out: torch.Tensor,
) -> None:
    """`combine` in plain torch."""
    _check_combine(y, ids, weights, shared, out)
    rows = y.view(*ids.shape, -1)
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for k in range(ids.shape[1]):
        term = weights[:, k, None] * rows[:, k].float()
        total += term.masked_fill_((ids[:, k] < 0)[:, None], 0.0)
    if shared is not None:
        total += shared.float()
    out.copy_(total)


def _check_combine(
    y: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    shared: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    rows, width = out.shape
    want = ((rows * ids.shape[1], width), (rows, ids.shape[1]), (rows, ids.shape[1]))
    got = (tuple(y.shape), tuple(ids.shape), tuple(weights.shape))
    if got != want or (shared is not None and shared.shape != out.shape):
        raise ValueError(
            f"y, ids, weights and shared must be {want} and {(rows, width)}, "
            f"got {got} and {None if shared is None else tuple(shared.shape)}"
        )
    if not (y.is_contiguous() and ids.is_contiguous() and weights.is_contiguous()):
        raise ValueError(
            "y, ids and weights must be contiguous, "
            f"got strides {y.stride()}, {ids.stride()}, {weights.stride()}"
        )
