"""Which tokens a penalised row has seen: `counts[row, id]`, kept on the device.

Bit 31 says that the token occurs in the prompt, the lower bits count it in the output. A token is
counted in the step that feeds it, so each one is counted once and before the next draw, whether it
was sampled, forced, or is fed again after a preemption. Invariant: integers only, one CTA a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap

PROMPT_BIT = tl.constexpr(-(2**31))
OUTPUT_COUNT = tl.constexpr(2**31 - 1)
BLOCK = 1024


@triton.jit
def is_penalized(repetition, presence, frequency):
    """Whether a row's penalties (scalars) change any logit."""
    return (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0)


@triton.jit
def _count_tokens(
    tok_row,  # int32 [T]
    tok_pos,  # int32 [T]
    tok_id,  # int32 [T]
    prompt_len,  # int32 [R]
    repetition,  # fp32 [R]
    presence,  # fp32 [R]
    frequency,  # fp32 [R]
    fresh,  # int32 [R]
    counts,  # int32 [R, V]
    T,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    r = tl.program_id(0).to(tl.int64)
    is_fresh = tl.load(fresh + r) != 0
    # No thread may clear the flag before all have seen it.
    tl.debug_barrier()
    if is_fresh:
        tl.store(fresh + r, 0)
    rep, pres, freq = tl.load(repetition + r), tl.load(presence + r), tl.load(frequency + r)
    if not is_penalized(rep, pres, freq):
        return
    mine = counts + r * V
    lane = tl.arange(0, BLOCK)
    if is_fresh:
        for i in range(0, V, BLOCK):
            tl.store(mine + i + lane, tl.zeros([BLOCK], tl.int32), mask=i + lane < V)
        tl.debug_barrier()
    length = tl.load(prompt_len + r)
    for i in range(0, T, BLOCK):
        at = i + lane
        here = tl.load(tok_row + at, mask=at < T, other=-1) == r
        pos = tl.load(tok_pos + at, mask=here, other=0)
        token = tl.load(tok_id + at, mask=here, other=-1)
        here = here & (token >= 0) & (token < V)
        prompt = here & (pos < length)
        output = here & (pos >= length)
        bit = tl.full([BLOCK], PROMPT_BIT, tl.int32)
        tl.atomic_or(mine + token, bit, mask=prompt, sem="relaxed")
        tl.atomic_add(mine + token, tl.full([BLOCK], 1, tl.int32), mask=output, sem="relaxed")


def count_tokens(
    launch: Launcher,
    tok_row: torch.Tensor,
    tok_pos: torch.Tensor,
    tok_id: torch.Tensor,
    *,
    prompt_len: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    fresh: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Count the step's tokens for the rows that have a penalty.

    Args:
        tok_row, tok_pos, tok_id: int32 [T]; row -1 is padding.
        prompt_len: int32 [max_rows]; a token at an earlier position is of the prompt, any other of
            the output.
        repetition, presence, frequency: fp32 [max_rows]; 1, 0 and 0 are off.
        fresh: int32 [max_rows]; not 0 for a row that was admitted since the last call, whose counts
            are zeroed first. Comes back all 0.
        counts: int32 [max_rows, V]; rows without a penalty are left alone.
    Raises:
        ValueError: counts that are not contiguous int32 [max_rows, V].
    Capture-safe.
    """
    rows, vocab = _check_counts(counts, fresh)
    launch(
        _count_tokens,
        (rows,),
        *(tok_row, tok_pos, tok_id, prompt_len, repetition, presence, frequency, fresh, counts),
        tok_row.shape[0],
        V=vocab,
        BLOCK=BLOCK,
        num_warps=4,
        **overlap(launch),
    )


def count_tokens_ref(
    tok_row: torch.Tensor,
    tok_pos: torch.Tensor,
    tok_id: torch.Tensor,
    *,
    prompt_len: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    fresh: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """`count_tokens` in plain torch."""
    _, vocab = _check_counts(counts, fresh)
    penalized = (repetition != 1) | (presence != 0) | (frequency != 0)
    if penalized.any():
        counts[penalized & (fresh != 0)] = 0
        here = (tok_row >= 0) & (tok_id >= 0) & (tok_id < vocab)
        here &= penalized[tok_row.clamp(min=0).long()]
        row, token = tok_row[here].long(), tok_id[here].long()
        prompt = tok_pos[here] < prompt_len[row]
        counts[row[prompt], token[prompt]] |= PROMPT_BIT.value
        one = torch.ones_like(tok_id[here][~prompt])
        counts.index_put_((row[~prompt], token[~prompt]), one, accumulate=True)
    fresh.zero_()


def _check_counts(counts: torch.Tensor, fresh: torch.Tensor) -> tuple[int, int]:
    rows, vocab = counts.shape
    if counts.dtype != torch.int32 or not counts.is_contiguous() or rows != fresh.shape[0]:
        raise ValueError(
            f"counts must be contiguous int32 [{fresh.shape[0]}, vocabulary], got {counts.dtype} "
            f"{tuple(counts.shape)}, strides {counts.stride()}"
        )
    return rows, vocab
