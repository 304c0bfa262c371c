"""Before a step: apply the mailbox to the row state, list the step's tokens, find their KV slots.

Layouts and constants: `kernels.triton.state`. Invariant: row state is written by one CTA only, so
its order is program order.
"""

from __future__ import annotations

import time

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap
from kernels.triton.state import (
    DECODE,
    FAULT_NONE,
    FAULT_NULL_PAGE,
    FAULT_TOO_MANY,
    FREE,
    PREFILL,
    MailboxLayout,
)


@triton.jit
def _intake(
    mailbox,  # int32 [2, WORDS], pinned host memory
    step_ptr,  # int64 [1]
    phase,  # int32 [R]
    seq_len,  # int32 [R]
    last_token,  # int32 [R]
    limit,  # int32 [R]
    stop_ids,  # int32 [R, STOPS]
    page_table,  # int32 [R, P]
    tok_row,  # int32 [T]
    tok_pos,  # int32 [T]
    tok_id,  # int32 [T]
    sample_tok,  # int32 [S]
    sample_row,  # int32 [S]
    fault,  # int32 [1]
    begin_ns,  # int64 [1]
    T,
    S,
    max_pages,
    R: tl.constexpr,
    R2: tl.constexpr,
    STOPS: tl.constexpr,
    STOPS2: tl.constexpr,
    WORDS: tl.constexpr,
    CANCELS: tl.constexpr,
    ADMITS: tl.constexpr,
    PAGES: tl.constexpr,
    CHUNKS: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    if ON_DEVICE:
        tl.store(begin_ns, globaltimer())
    step = tl.load(step_ptr)
    box = mailbox + (step % 2) * WORDS
    fresh = tl.load(box) == step.to(tl.int32)
    num_admits = tl.where(fresh, tl.load(box + 1), 0)
    num_cancels = tl.where(fresh, tl.load(box + 2), 0)
    num_pages = tl.where(fresh, tl.load(box + 3), 0)
    num_chunks = tl.where(fresh, tl.load(box + 4), 0)
    lane = tl.arange(0, BLOCK)

    for i in range(0, num_cancels, BLOCK):
        m = i + lane < num_cancels
        row = tl.load(box + CANCELS + i + lane, mask=m, other=0)
        tl.store(phase + row, 0, mask=m)
    # A row may be cancelled and taken again in one mailbox: cancels come first.
    tl.debug_barrier()
    stop = tl.arange(0, STOPS2)
    for i in range(0, num_admits):
        at = box + ADMITS + i * (3 + STOPS)
        row = tl.load(at)
        tl.store(phase + row, 1)
        tl.store(seq_len + row, 0)
        tl.store(limit + row, tl.load(at + 1))
        ids = tl.load(at + 3 + stop, mask=stop < tl.load(at + 2), other=-1)
        tl.store(stop_ids + row * STOPS + stop, ids, mask=stop < STOPS)
    for i in range(0, num_pages, BLOCK):
        m = i + lane < num_pages
        at = box + PAGES + (i + lane) * 3
        row = tl.load(at, mask=m, other=0)
        index = tl.load(at + 1, mask=m, other=0)
        tl.store(page_table + row * max_pages + index, tl.load(at + 2, mask=m, other=0), mask=m)
    tl.debug_barrier()

    # Decoding rows bring one token each, in row order.
    r = tl.arange(0, R2)
    decoding = (tl.load(phase + r, mask=r < R, other=0) == 2).to(tl.int32)
    index = tl.cumsum(decoding, 0) - decoding
    count = tl.sum(decoding, 0)
    one_token = (decoding == 1) & (index < S)
    pos = tl.load(seq_len + r, mask=one_token, other=0)
    tl.store(tok_row + index, r, mask=one_token)
    tl.store(tok_pos + index, pos, mask=one_token)
    tl.store(tok_id + index, tl.load(last_token + r, mask=one_token, other=0), mask=one_token)
    tl.store(sample_tok + index, index, mask=one_token)
    tl.store(sample_row + index, r, mask=one_token)
    tl.store(seq_len + r, pos + 1, mask=one_token)
    bad = (count > S).to(tl.int32)
    tokens = tl.minimum(count, S)
    samples = tokens

    taken = 0
    for c in range(0, num_chunks):
        at = box + CHUNKS + c * 4
        row = tl.load(at)
        start = tl.load(at + 1)
        n = tl.load(at + 2)
        ends = tl.load(at + 3)
        fits = (tokens + n <= T) & (samples + ends <= S)
        bad = tl.where(fits, bad, 1)
        n_fit = tl.where(fits, n, 0)
        for i in range(0, n_fit, BLOCK):
            mc = i + lane < n_fit
            tl.store(tok_row + tokens + i + lane, row + lane * 0, mask=mc)
            tl.store(tok_pos + tokens + i + lane, start + i + lane, mask=mc)
            ids = tl.load(box + IDS + taken + i + lane, mask=mc, other=0)
            tl.store(tok_id + tokens + i + lane, ids, mask=mc)
        tokens += n_fit
        taken += n
        one = fits & (ends == 1)
        tl.store(sample_tok + samples, tokens - 1, mask=one)
        tl.store(sample_row + samples, row, mask=one)
        samples += one.to(tl.int32)
        tl.store(seq_len + row, start + n, mask=fits)

    for i in range(0, T, BLOCK):
        m = (i + lane >= tokens) & (i + lane < T)
        tl.store(tok_row + i + lane, -1, mask=m)
        tl.store(tok_pos + i + lane, 0, mask=m)
        tl.store(tok_id + i + lane, -1, mask=m)
    for i in range(0, S, BLOCK):
        m = (i + lane >= samples) & (i + lane < S)
        tl.store(sample_tok + i + lane, -1, mask=m)
        tl.store(sample_row + i + lane, -1, mask=m)
    tl.store(fault, bad)


def intake(
    launch: Launcher,
    mailbox: torch.Tensor,
    step: torch.Tensor,
    phase: torch.Tensor,
    seq_len: torch.Tensor,
    last_token: torch.Tensor,
    limit: torch.Tensor,
    stop_ids: torch.Tensor,
    page_table: torch.Tensor,
    *,
    layout: MailboxLayout,
    tok_row: torch.Tensor,
    tok_pos: torch.Tensor,
    tok_id: torch.Tensor,
    sample_tok: torch.Tensor,
    sample_row: torch.Tensor,
    fault: torch.Tensor,
    begin_ns: torch.Tensor,
    on_device: bool = True,
) -> None:
    """Apply this step's mailbox to the row state and list the step's tokens.

    Args:
        mailbox: int32 [2, layout.words], pinned host memory; read only if its step number is this
        one. step: int64 [1], number of the step that begins.
        phase, seq_len, last_token, limit: int32 [max_rows]; free/prefill/decode, tokens in the KV
            cache, the token to feed next, total tokens at which the row ends.
        stop_ids: int32 [max_rows, max_stops], -1 where unused.
        page_table: int32 [max_rows, max_pages].
        tok_row, tok_pos, tok_id: int32 [T], out; padding -1, 0, -1.
        sample_tok, sample_row: int32 [S], out; index of the token whose row samples; padding -1.
        fault: int32 [1], out; FAULT_TOO_MANY if the rows or chunks do not fit the key.
        begin_ns: int64 [1], out; device time, ns.
        on_device: False in Triton's interpreter, which has no device clock and no inline PTX.
    Capture-safe: no sync, no allocation.
    """
    launch(
        _intake,
        (1,),
        mailbox,
        step,
        phase,
        seq_len,
        last_token,
        limit,
        stop_ids,
        page_table,
        tok_row,
        tok_pos,
        tok_id,
        sample_tok,
        sample_row,
        fault,
        begin_ns,
        tok_row.shape[0],
        sample_tok.shape[0],
        page_table.shape[1],
        R=phase.shape[0],
        R2=triton.next_power_of_2(phase.shape[0]),
        STOPS=layout.max_stops,
        STOPS2=triton.next_power_of_2(layout.max_stops),
        WORDS=layout.words,
        CANCELS=layout.cancels,
        ADMITS=layout.admits,
        PAGES=layout.pages,
        CHUNKS=layout.chunks,
        IDS=layout.ids,
        BLOCK=256,
        ON_DEVICE=on_device,
        num_warps=4,
        **overlap(launch),
    )


def intake_ref(
    mailbox: torch.Tensor,
    step: torch.Tensor,
    phase: torch.Tensor,
    seq_len: torch.Tensor,
    last_token: torch.Tensor,
    limit: torch.Tensor,
    stop_ids: torch.Tensor,
    page_table: torch.Tensor,
    *,
    layout: MailboxLayout,
    tok_row: torch.Tensor,
    tok_pos: torch.Tensor,
    tok_id: torch.Tensor,
    sample_tok: torch.Tensor,
    sample_row: torch.Tensor,
    fault: torch.Tensor,
    begin_ns: torch.Tensor,
    on_device: bool = True,
) -> None:
    """`intake` in plain torch; `begin_ns` is the host's clock."""
    begin_ns[0] = time.perf_counter_ns()
    box = mailbox[int(step) % 2]
    fresh = int(box[0]) == int(step)
    admits, cancels, pages, chunks = box[1:5].tolist() if fresh else (0, 0, 0, 0)
    phase[box[layout.cancels :][:cancels].long()] = FREE
    for words in box[layout.admits : layout.pages].view(-1, layout.admit_words)[:admits]:
        row, total, stops = words[:3].tolist()
        phase[row], seq_len[row], limit[row] = PREFILL, 0, total
        stop_ids[row] = -1
        stop_ids[row, :stops] = words[3 : 3 + stops]
    update = box[layout.pages :][: 3 * pages].view(-1, 3).long()
    page_table[update[:, 0], update[:, 1]] = update[:, 2].int()

    for out, padding in ((tok_row, -1), (tok_pos, 0), (tok_id, -1), (sample_tok, -1)):
        out.fill_(padding)
    sample_row.fill_(-1)
    rows = (phase == DECODE).nonzero().flatten()
    bad = len(rows) > len(sample_tok)
    rows = rows[: len(sample_tok)]
    tokens = samples = len(rows)
    tok_row[:tokens] = rows.int()
    tok_pos[:tokens] = seq_len[rows]
    tok_id[:tokens] = last_token[rows]
    sample_tok[:samples] = torch.arange(samples, dtype=torch.int32)
    sample_row[:samples] = rows.int()
    seq_len[rows] += 1
    taken = 0
    for row, start, n, ends in box[layout.chunks :][: 4 * chunks].view(-1, 4).tolist():
        if tokens + n > len(tok_row) or samples + ends > len(sample_tok):
            bad = True
        else:
            tok_row[tokens : tokens + n] = row
            tok_pos[tokens : tokens + n] = torch.arange(start, start + n, dtype=torch.int32)
            tok_id[tokens : tokens + n] = box[layout.ids + taken :][:n]
            tokens += n
            if ends:
                sample_tok[samples], sample_row[samples] = tokens - 1, row
                samples += 1
            seq_len[row] = start + n
        taken += n
    fault[0] = FAULT_TOO_MANY if bad else FAULT_NONE


@triton.jit
def _advance(
    tok_row,  # int32 [T]
    tok_pos,  # int32 [T]
    page_table,  # int32 [R, P]
    kv_slot,  # int64 [T]
    kv_len,  # int32 [T]
    fault,  # int32 [1]
    T,
    max_pages,
    page_size,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(tok_row + t, mask=t < T, other=-1)
    pos = tl.load(tok_pos + t, mask=t < T, other=0)
    live = row >= 0
    page = tl.load(page_table + row * max_pages + pos // page_size, mask=live, other=0)
    slot = page.to(tl.int64) * page_size + pos % page_size
    tl.store(kv_slot + t, tl.where(live, slot, 0), mask=t < T)
    tl.store(kv_len + t, tl.where(live & (page > 0), pos + 1, 0), mask=t < T)
    # A live token without a page: the step is void, and the host is told.
    tl.store(fault + t * 0, 2, mask=live & (page <= 0))


def advance(
    launch: Launcher,
    tok_row: torch.Tensor,
    tok_pos: torch.Tensor,
    page_table: torch.Tensor,
    *,
    page_size: int,
    kv_slot: torch.Tensor,
    kv_len: torch.Tensor,
    fault: torch.Tensor,
) -> None:
    """Where each token's KV goes and how much KV it attends over.

    Args:
        tok_row, tok_pos: int32 [T].
        page_table: int32 [max_rows, max_pages]; 0 is the null page.
        kv_slot: int64 [T], out; padding 0.
        kv_len: int32 [T], out; position + 1, padding 0.
        fault: int32 [1]; FAULT_NULL_PAGE if a live token has no page.
    Capture-safe: no sync, no allocation.
    """
    tokens = tok_row.shape[0]
    launch(
        _advance,
        (triton.cdiv(tokens, 128),),
        tok_row,
        tok_pos,
        page_table,
        kv_slot,
        kv_len,
        fault,
        tokens,
        page_table.shape[1],
        page_size,
        BLOCK=128,
        **overlap(launch),
    )


def advance_ref(
    tok_row: torch.Tensor,
    tok_pos: torch.Tensor,
    page_table: torch.Tensor,
    *,
    page_size: int,
    kv_slot: torch.Tensor,
    kv_len: torch.Tensor,
    fault: torch.Tensor,
) -> None:
    """`advance` in plain torch."""
    live = tok_row >= 0
    page = page_table[tok_row.clamp(min=0).long(), (tok_pos // page_size).long()]
    page = torch.where(live, page, 0)
    kv_slot.copy_(torch.where(live, page.long() * page_size + tok_pos % page_size, 0))
    kv_len.copy_(torch.where(page > 0, tok_pos + 1, 0))
    if bool((live & (page <= 0)).any()):
        fault[0] = FAULT_NULL_PAGE
