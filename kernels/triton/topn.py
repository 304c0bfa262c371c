"""The most probable tokens of a row, with their log-probs.

Invariants: sorted by value, the lower id first among equals; only rows that ask are read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.draw import log_of_min_p, log_prob
from kernels.triton.draw_filter import (
    inverse_temperature_ref,
    is_kept,
    is_kept_ref,
    order_key,
    order_value,
)
from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap
from kernels.triton.sample import CHUNK, num_chunks

MAX_TOP = 20  # tokens a row may ask for
NOTHING = tl.constexpr(-(2**63))
LOW_WORD = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _top_chunk(
    logits,  # fp32 [S, V], row pitch logits_pitch
    processed,  # fp32 [S, V]
    sample_tok,  # int32 [S]
    sample_row,  # int32 [S]
    draw_norm,  # fp32 [S, 4]
    keep_value,  # fp32 [S]
    keep_id,  # int32 [S]
    temperature,  # fp32 [R]
    min_p,  # fp32 [R]
    top_n,  # int32 [R]
    top_part,  # int64 [S, C, TOP]
    logits_pitch,
    V: tl.constexpr,
    C: tl.constexpr,
    TOP: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    s = tl.program_id(1).to(tl.int64)
    if tl.load(sample_tok + s) < 0:
        return
    r = tl.load(sample_row + s).to(tl.int64)
    n = tl.load(top_n + r)
    if n <= 0:
        return
    c = tl.program_id(0)
    col = c * CHUNK + tl.arange(0, CHUNK)
    if tl.load(draw_norm + s * 4 + 3) != 0.0:
        value = tl.load(processed + s * V + col, mask=col < V, other=float("-inf"))
        z = (value - tl.load(draw_norm + s * 4)) * tl.load(draw_norm + s * 4 + 2)
        min_z = log_of_min_p(tl.load(min_p + r), tl.load(temperature + r))
        kept = is_kept(value, col, z, tl.load(keep_value + s), tl.load(keep_id + s), min_z)
        value = tl.where(kept, value, float("-inf"))
    else:
        value = tl.load(logits + s * logits_pitch + col, mask=col < V, other=float("-inf"))
    # One integer orders by value, then by falling id.
    key = (order_key(value).to(tl.int64) << 32) | (~col & LOW_WORD).to(tl.int64)
    key = tl.where(value > float("-inf"), key, NOTHING)
    for i in range(0, tl.minimum(n, TOP)):
        best = tl.max(key, axis=0)
        tl.store(top_part + (s * C + c) * TOP + i, best)
        key = tl.where(key == best, NOTHING, key)


@triton.jit
def _top_merge(
    sample_tok,  # int32 [S]
    sample_row,  # int32 [S]
    draw_norm,  # fp32 [S, 4]
    top_n,  # int32 [R]
    top_part,  # int64 [S, C, TOP]
    top_ids,  # int32 [S, TOP]
    top_logprobs,  # fp32 [S, TOP]
    C: tl.constexpr,
    C2: tl.constexpr,
    TOP: tl.constexpr,
    TOP2: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    s = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TOP2)
    ids = tl.full([TOP2], -1, tl.int32)
    keys = tl.full([TOP2], NOTHING, tl.int64)
    n = 0
    if tl.load(sample_tok + s) >= 0:
        n = tl.minimum(tl.load(top_n + tl.load(sample_row + s)), TOP)
    if n > 0:
        at = tl.arange(0, C2 * TOP2)
        c, i = at // TOP2, at % TOP2
        part = top_part + (s * C + c) * TOP + i
        key = tl.load(part, mask=(c < C) & (i < n), other=NOTHING)
        for j in range(0, n):
            best = tl.max(key, axis=0)
            keys = tl.where(lane == j, best, keys)
            key = tl.where(key == best, NOTHING, key)
    found = keys != NOTHING
    value = order_value((keys >> 32).to(tl.int32))
    top, log_total = tl.load(draw_norm + s * 4), tl.load(draw_norm + s * 4 + 1)
    logprob = log_prob(value, top, log_total, tl.load(draw_norm + s * 4 + 2))
    totals = tl.zeros([TOP2], tl.float32) + log_total
    good = totals == totals
    ids = tl.where(found & good, ~keys.to(tl.int32) & LOW_WORD, ids)
    other = tl.where(good | (lane >= n), float("-inf"), float("nan"))
    logprob = tl.where(found & good, logprob, other)
    tl.store(top_ids + s * TOP + lane, ids, mask=lane < TOP)
    tl.store(top_logprobs + s * TOP + lane, logprob, mask=lane < TOP)


def top_tokens(
    launch: Launcher,
    logits: torch.Tensor,
    processed: torch.Tensor,
    sample_tok: torch.Tensor,
    sample_row: torch.Tensor,
    *,
    draw_norm: torch.Tensor,
    keep_value: torch.Tensor,
    keep_id: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    top_n: torch.Tensor,
    top_part: torch.Tensor,
    top_ids: torch.Tensor,
    top_logprobs: torch.Tensor,
) -> None:
    """The top_n most probable tokens of each row, of the distribution that `draw_norm` names.

    Args:
        logits: fp32 [S, V]; the row pitch may exceed V.
        processed: of `process_logits`.
        sample_tok: int32 [S]; -1 is padding.
        sample_row: int32 [S], request row.
        draw_norm: of `choose_tokens`.
        keep_value, keep_id: of `filter_tokens`.
        temperature, min_p: fp32 [max_rows].
        top_n: int32 [max_rows], 0 to MAX_TOP.
        top_part: int64 [S, num_chunks(V), MAX_TOP], scratch.
        top_ids: int32 [S, MAX_TOP]; -1 past top_n, and where no token has a probability.
        top_logprobs: fp32 [S, MAX_TOP]; -inf there, NaN in the first top_n places of a bad row.
    Raises:
        ValueError: a buffer of a wrong shape.
    Capture-safe.
    """
    rows, vocab = logits.shape
    chunks = num_chunks(vocab)
    _check_top(rows, chunks, top_part, top_ids, top_logprobs)
    launch(
        _top_chunk,
        (chunks, rows),
        *(logits, processed, sample_tok, sample_row, draw_norm, keep_value, keep_id),
        *(temperature, min_p, top_n, top_part),
        logits.stride(0),
        V=vocab,
        C=chunks,
        TOP=MAX_TOP,
        CHUNK=CHUNK,
        num_warps=4,
        **overlap(launch),
    )
    launch(
        _top_merge,
        (rows,),
        *(sample_tok, sample_row, draw_norm, top_n, top_part, top_ids, top_logprobs),
        C=chunks,
        C2=triton.next_power_of_2(chunks),
        TOP=MAX_TOP,
        TOP2=triton.next_power_of_2(MAX_TOP),
        num_warps=8,
        **overlap(launch),
    )


def top_tokens_ref(
    logits: torch.Tensor,
    processed: torch.Tensor,
    sample_tok: torch.Tensor,
    sample_row: torch.Tensor,
    *,
    draw_norm: torch.Tensor,
    keep_value: torch.Tensor,
    keep_id: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    top_n: torch.Tensor,
    top_part: torch.Tensor,
    top_ids: torch.Tensor,
    top_logprobs: torch.Tensor,
) -> None:
    """`top_tokens` in plain torch, by sorting; leaves the scratch alone."""
    rows, vocab = logits.shape
    _check_top(rows, num_chunks(vocab), top_part, top_ids, top_logprobs)
    top_ids.fill_(-1)
    top_logprobs.fill_(-torch.inf)
    row = sample_row.clamp(min=0).long()
    at = ((sample_tok >= 0) & (top_n[row] > 0)).nonzero()[:, 0]
    if not len(at):
        return
    row = row[at]
    top, log_total, scale, from_processed = (x[:, None] for x in draw_norm[at].unbind(1))
    y, t = processed[at], temperature[row]
    z = (y - y.amax(1, keepdim=True)) * inverse_temperature_ref(t)[:, None]
    min_z = torch.where((t > 0) & (min_p[row] > 0), min_p[row].log(), -torch.inf)
    kept = is_kept_ref(y, z, keep_value[at], keep_id[at], min_z)
    x = torch.where(from_processed != 0, y.masked_fill(~kept, -torch.inf), logits[at])
    value, ids = x.sort(dim=1, descending=True, stable=True)
    size = min(MAX_TOP, vocab)
    value, ids = value[:, :size], ids[:, :size].int()
    logprob = -(log_total - (value - top) * scale)
    wanted = torch.arange(size) < top_n[row, None]
    bad = log_total.isnan()
    found = wanted & ~bad & (value > -torch.inf)
    top_ids[at, :size] = ids.masked_fill(~found, -1)
    logprob = logprob.masked_fill(~found, -torch.inf)
    top_logprobs[at, :size] = logprob
    asked = torch.arange(MAX_TOP) < top_n[row, None]
    top_logprobs[at] = top_logprobs[at].masked_fill(bad & asked, torch.nan)


def _check_top(
    rows: int, chunks: int, part: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor
) -> None:
    for name, t, want in (
        ("top_part", part, (rows, chunks, MAX_TOP)),
        ("top_ids", ids, (rows, MAX_TOP)),
        ("top_logprobs", logprobs, (rows, MAX_TOP)),
    ):
        if tuple(t.shape) != want or not t.is_contiguous():
            raise ValueError(
                f"{name} must be {want} and contiguous, got {tuple(t.shape)}, strides {t.stride()}"
            )
