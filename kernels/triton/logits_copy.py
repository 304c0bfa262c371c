"""Whole rows of logits, handed out to requests that ask for them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher

BLOCK = 4096


@triton.jit
def _copy_logits(
    logits,  # fp32 [S, V], row pitch logits_pitch
    sample_tok,  # int32 [S]
    sample_row,  # int32 [S]
    logits_slot,  # int32 [R]
    step,  # int64 [1]
    logits_out,  # fp32 [D, L, V], pinned host memory
    logits_pitch,
    V: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(1).to(tl.int64)
    if tl.load(sample_tok + s) < 0:
        return
    slot = tl.load(logits_slot + tl.load(sample_row + s))
    if (slot < 0) | (slot >= L):
        return
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + s * logits_pitch + col, mask=col < V)
    out = logits_out + ((tl.load(step) % D) * L + slot) * V
    tl.store(out + col, x, mask=col < V)


def copy_logits(
    launch: Launcher,
    logits: torch.Tensor,
    sample_tok: torch.Tensor,
    sample_row: torch.Tensor,
    *,
    logits_slot: torch.Tensor,
    step: torch.Tensor,
    logits_out: torch.Tensor,
) -> None:
    """Copy the raw logits of rows that have a slot.

    Args:
        logits: fp32 [S, V]; the row pitch may exceed V.
        sample_tok: int32 [S]; -1 is padding.
        sample_row: int32 [S], request row.
        logits_slot: int32 [max_rows]; -1 is none, and so is a slot that does not exist.
        step: int64 [1], number of the step.
        logits_out: fp32 [D, L, V], device or pinned host memory; step % D is written.
    Raises:
        ValueError: logits_out of another width or dtype.
    Capture-safe.
    """
    _check_copy(logits, logits_out)
    vocab = logits.shape[1]
    launch(
        _copy_logits,
        (triton.cdiv(vocab, BLOCK), logits.shape[0]),
        *(logits, sample_tok, sample_row, logits_slot, step, logits_out),
        logits.stride(0),
        V=vocab,
        D=logits_out.shape[0],
        L=logits_out.shape[1],
        BLOCK=BLOCK,
        num_warps=4,
    )


def copy_logits_ref(
    logits: torch.Tensor,
    sample_tok: torch.Tensor,
    sample_row: torch.Tensor,
    *,
    logits_slot: torch.Tensor,
    step: torch.Tensor,
    logits_out: torch.Tensor,
) -> None:
    """`copy_logits` in plain torch."""
    _check_copy(logits, logits_out)
    slot = torch.where(sample_tok >= 0, logits_slot[sample_row.clamp(min=0).long()], -1)
    at = ((slot >= 0) & (slot < logits_out.shape[1])).nonzero()[:, 0]
    logits_out[int(step) % len(logits_out), slot[at].long()] = logits[at]


def _check_copy(logits: torch.Tensor, logits_out: torch.Tensor) -> None:
    vocab = logits.shape[1]
    wrong = logits_out.dtype != torch.float32 or not logits_out.is_contiguous()
    if wrong or logits_out.ndim != 3 or logits_out.shape[2] != vocab:
        raise ValueError(
            f"logits_out must be contiguous float32 [copies, slots, {vocab}], got "
            f"{logits_out.dtype} {tuple(logits_out.shape)}"
        )
