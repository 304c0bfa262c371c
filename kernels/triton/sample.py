"""Sampling: from a row of logits to a token and its log-prob, on the device.

Two stages over chunks of the vocabulary whose size never depends on the number of rows, so a row's
bits do not either. Invariant: a row that holds NaN or +inf, or nothing above -inf, gives token -1
and log-prob NaN, never a token that looks valid.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap

CHUNK = 2048  # enough CTAs to fill the device with one row, little to merge with many


def num_chunks(vocab: int) -> int:
    """Columns of the `part_*` scratch for a vocabulary."""
    return int(triton.cdiv(vocab, CHUNK))


@triton.jit
def _greedy_chunk(
    logits,  # fp32 [S, V], row pitch logits_pitch
    sample_tok,  # int32 [S]
    part_max,  # fp32 [S, C]
    part_arg,  # int32 [S, C]
    part_sum,  # fp32 [S, C]
    logits_pitch,
    V: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    s = tl.program_id(1).to(tl.int64)
    if tl.load(sample_tok + s) < 0:
        return
    c = tl.program_id(0)
    col = c * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + s * logits_pitch + col, mask=col < V, other=float("-inf"))
    top = tl.max(x, axis=0)
    arg = tl.min(tl.where(x == top, col, V), axis=0)
    # NaN and +inf both make the sum NaN; a chunk of -inf adds nothing.
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(x - base), axis=0)
    at = s * C + c
    tl.store(part_max + at, top)
    tl.store(part_arg + at, arg)
    tl.store(part_sum + at, total)


@triton.jit
def _greedy_merge(
    sample_tok,  # int32 [S]
    part_max,  # fp32 [S, C]
    part_arg,  # int32 [S, C]
    part_sum,  # fp32 [S, C]
    out_token,  # int32 [S]
    out_logprob,  # fp32 [S]
    V: tl.constexpr,
    C: tl.constexpr,
    C2: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    s = tl.program_id(0).to(tl.int64)
    if tl.load(sample_tok + s) < 0:
        tl.store(out_token + s, -1)
        tl.store(out_logprob + s, 0.0)
        return
    c = tl.arange(0, C2)
    tops = tl.load(part_max + s * C + c, mask=c < C, other=float("-inf"))
    args = tl.load(part_arg + s * C + c, mask=c < C, other=V)
    sums = tl.load(part_sum + s * C + c, mask=c < C, other=0.0)
    top = tl.max(tops, axis=0)
    token = tl.min(tl.where(tops == top, args, V), axis=0)
    total = tl.sum(sums * tl.exp(tops - top), axis=0)
    # Not total > 0 holds for NaN as well; all -inf makes tops - top NaN.
    good = total > 0.0
    tl.store(out_token + s, tl.where(good, token, -1))
    # top - (top + log(total)) without the rounding of the sum.
    tl.store(out_logprob + s, tl.where(good, -tl.log(total), float("nan")))


def max_and_sum(
    launch: Launcher,
    logits: torch.Tensor,
    sample_tok: torch.Tensor,
    *,
    part_max: torch.Tensor,
    part_arg: torch.Tensor,
    part_sum: torch.Tensor,
) -> None:
    """Of each chunk of each row: the largest logit, its lowest id, sum(exp(logit - largest)).

    Args, Raises: as `greedy`; padded rows are left alone.
    Capture-safe.
    """
    chunks = _check_greedy(logits, part_max, part_arg, part_sum)
    rows, vocab = logits.shape
    launch(
        _greedy_chunk,
        (chunks, rows),
        *(logits, sample_tok, part_max, part_arg, part_sum),
        logits.stride(0),
        V=vocab,
        C=chunks,
        CHUNK=CHUNK,
        num_warps=4,
        **overlap(launch),
    )


def greedy(
    launch: Launcher,
    logits: torch.Tensor,
    sample_tok: torch.Tensor,
    *,
    part_max: torch.Tensor,
    part_arg: torch.Tensor,
    part_sum: torch.Tensor,
    out_token: torch.Tensor,
    out_logprob: torch.Tensor,
) -> None:
    """The most probable token of each row (the lowest id among equals) and its log-prob.

    Args:
        logits: fp32 [S, V]; the row pitch may exceed V.
        sample_tok: int32 [S]; -1 is padding and gets token -1, log-prob 0.
        part_max, part_sum: fp32 [S, num_chunks(V)], scratch.
        part_arg: int32 [S, num_chunks(V)], scratch.
        out_token: int32 [S]; -1 for a row with NaN, +inf, or only -inf.
        out_logprob: fp32 [S]; NaN for such a row.
    Raises:
        ValueError: logits that are not fp32, or scratch of a wrong shape.
    Capture-safe.
    """
    chunks = _check_greedy(logits, part_max, part_arg, part_sum)
    rows, vocab = logits.shape
    parts = (part_max, part_arg, part_sum)
    max_and_sum(launch, logits, sample_tok, part_max=part_max, part_arg=part_arg, part_sum=part_sum)
    launch(
        _greedy_merge,
        (rows,),
        sample_tok,
        *parts,
        out_token,
        out_logprob,
        V=vocab,
        C=chunks,
        C2=triton.next_power_of_2(chunks),
        num_warps=1,
        **overlap(launch),
    )


def greedy_ref(
    logits: torch.Tensor,
    sample_tok: torch.Tensor,
    *,
    part_max: torch.Tensor,
    part_arg: torch.Tensor,
    part_sum: torch.Tensor,
    out_token: torch.Tensor,
    out_logprob: torch.Tensor,
) -> None:
    """`greedy` in plain torch; leaves the scratch alone."""
    _check_greedy(logits, part_max, part_arg, part_sum)
    top, token = logits.max(dim=1)  # the first of equals; NaN wins
    logprob = -(logits - top[:, None]).exp_().sum(1).log_()
    bad, padded = ~top.isfinite(), sample_tok < 0
    out_token.copy_(token.masked_fill(bad | padded, -1))
    out_logprob.copy_(logprob.masked_fill(bad, float("nan")).masked_fill(padded, 0.0))


def _check_greedy(
    logits: torch.Tensor, part_max: torch.Tensor, part_arg: torch.Tensor, part_sum: torch.Tensor
) -> int:
    rows, vocab = logits.shape
    if logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32, got {logits.dtype}; write the head in fp32")
    want = (rows, num_chunks(vocab))
    for name, t in (("part_max", part_max), ("part_arg", part_arg), ("part_sum", part_sum)):
        if tuple(t.shape) != want or not t.is_contiguous():
            raise ValueError(
                f"{name} must be {want} and contiguous (num_chunks({vocab}) columns), "
                f"got {tuple(t.shape)}, strides {t.stride()}"
            )
    return want[1]
