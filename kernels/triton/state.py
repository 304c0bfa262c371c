"""What happens to the row state around a step: intake, advance, settle, and device timestamps.

The host writes a mailbox slot and launches; these kernels apply it, list the step's tokens, and
publish what came of them to a ring. Invariants: row state is written by one CTA only, so its order
is program order; the ring's step number is stored last, with system-scope release.

Mailbox slot (int32; slot = step % 2), offsets in `MailboxLayout`:
  header   HEADER words: step, admits, cancels, pages, chunks, chunk tokens
  cancels  [max_rows]            row
  admits   [max_rows, 3+stops]   row, limit (total tokens), number of stop ids, stop ids
  pages    [max_tokens, 3]       row, page index, page id
  chunks   [max_rows, 4]         row, start position, tokens, 1 if the chunk ends the prompt
  ids      [max_tokens]          prompt token ids of all chunks, in chunk order

Ring slot (int32; slot = step % RING_SLOTS), offsets in `RingLayout`:
  header   HEADER words: entries, fault, begin ns (2 words), end ns (2 words), -, -
  row, token, log-prob bits, finish reason: [max_rows] each
Step numbers of the ring are int64 [RING_SLOTS], apart from the slots; a finished step s shows s +
1.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from kernels.triton.launch import Launcher

HEADER = 8
RING_SLOTS = 4
# Row phases.
FREE, PREFILL, DECODE = 0, 1, 2
# Finish reasons, in the order of `runtime`'s names.
RUNNING, STOP, LENGTH, CANCELLED, ERROR = 0, 1, 2, 3, 4
# Faults: what the host must never have asked for.
FAULT_NONE, FAULT_TOO_MANY, FAULT_NULL_PAGE = 0, 1, 2


@dataclass(frozen=True)
class MailboxLayout:
    """Word offsets of one mailbox slot.

    Attributes:
        max_rows, max_tokens: capacity of the largest key.
        max_stops: stop token ids a row may carry.
    """

    max_rows: int
    max_tokens: int
    max_stops: int

    @property
    def cancels(self) -> int:
        return HEADER

    @property
    def admits(self) -> int:
        return self.cancels + self.max_rows

    @property
    def admit_words(self) -> int:
        return 3 + self.max_stops

    @property
    def pages(self) -> int:
        return self.admits + self.max_rows * self.admit_words

    @property
    def chunks(self) -> int:
        return self.pages + 3 * self.max_tokens

    @property
    def ids(self) -> int:
        return self.chunks + 4 * self.max_rows

    @property
    def words(self) -> int:
        return -(-(self.ids + self.max_tokens) // 64) * 64


@dataclass(frozen=True)
class RingLayout:
    """Word offsets of one ring slot."""

    max_rows: int

    @property
    def words(self) -> int:
        return -(-(HEADER + 4 * self.max_rows) // 64) * 64


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
):
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
):
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


@triton.jit
def _store_release_sys(
    ptr,  # int64 scalar pointer, host or device
    value,
):
    # A plain store after a fence, not an atomic: PCIe need not offer atomics on host memory.
    tl.inline_asm_elementwise(
        "st.release.sys.global.s64 [$1], $2; mov.u32 $0, 0;",
        "=r,l,l",
        [ptr, value],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _settle(
    sample_row,  # int32 [S]
    out_token,  # int32 [S]
    out_logprob,  # fp32 [S]
    step_ptr,  # int64 [1]
    phase,  # int32 [R]
    seq_len,  # int32 [R]
    last_token,  # int32 [R]
    limit,  # int32 [R]
    stop_ids,  # int32 [R, STOPS]
    fault,  # int32 [1]
    begin_ns,  # int64 [1]
    ring,  # int32 [RING_SLOTS, WORDS], pinned host memory
    ring_step,  # int64 [RING_SLOTS], pinned host memory
    S,
    R: tl.constexpr,
    S2: tl.constexpr,
    STOPS: tl.constexpr,
    WORDS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD: tl.constexpr,
    ON_DEVICE: tl.constexpr,
):
    step = tl.load(step_ptr)
    s = tl.arange(0, S2)
    row = tl.load(sample_row + s, mask=s < S, other=-1)
    live = row >= 0
    token = tl.load(out_token + s, mask=live, other=0)
    logprob = tl.load(out_logprob + s, mask=live, other=0.0)
    total = tl.load(seq_len + row, mask=live, other=0) + 1
    reason = tl.where(total >= tl.load(limit + row, mask=live, other=0), 2, 0)
    for i in range(0, STOPS):
        stop = tl.load(stop_ids + row * STOPS + i, mask=live, other=-1)
        reason = tl.where((stop >= 0) & (stop == token), 1, reason)
    reason = tl.where(token < 0, 4, reason)
    tl.store(last_token + row, token, mask=live)
    tl.store(phase + row, tl.where(reason == 0, 2, 0), mask=live)

    out = ring + (step % SLOTS) * WORDS
    tl.store(out + HEAD + s, row, mask=live)
    tl.store(out + HEAD + R + s, token, mask=live)
    tl.store(out + HEAD + 2 * R + s, logprob.to(tl.int32, bitcast=True), mask=live)
    tl.store(out + HEAD + 3 * R + s, reason, mask=live)
    tl.store(out, tl.sum(live.to(tl.int32), 0))
    tl.store(out + 1, tl.load(fault))
    if ON_DEVICE:
        begin = tl.load(begin_ns)
        end = globaltimer()
        tl.store(out + 2, begin.to(tl.int32))
        tl.store(out + 3, (begin >> 32).to(tl.int32))
        tl.store(out + 4, end.to(tl.int32))
        tl.store(out + 5, (end >> 32).to(tl.int32))
    # The barrier orders the CTA's stores before thread 0's release; it pairs with the host's poll
    # of ring_step, which reads the slot only after it has seen step + 1.
    tl.debug_barrier()
    if ON_DEVICE:
        _store_release_sys(ring_step + step % SLOTS, step + 1)
    else:
        tl.store(ring_step + step % SLOTS, step + 1)
    tl.store(step_ptr, step + 1)


def settle(
    launch: Launcher,
    sample_row: torch.Tensor,
    out_token: torch.Tensor,
    out_logprob: torch.Tensor,
    step: torch.Tensor,
    phase: torch.Tensor,
    seq_len: torch.Tensor,
    last_token: torch.Tensor,
    limit: torch.Tensor,
    stop_ids: torch.Tensor,
    fault: torch.Tensor,
    begin_ns: torch.Tensor,
    *,
    ring: torch.Tensor,
    ring_step: torch.Tensor,
    on_device: bool = True,
) -> None:
    """Append the sampled tokens, test the endings, free ended rows and publish the step.

    Args:
        sample_row: int32 [S]; -1 is padding.
        out_token: int32 [S]; -1 on a live row means that its logits were not finite.
        out_logprob: fp32 [S], natural log.
        step: int64 [1], incremented.
        phase, seq_len, last_token, limit, stop_ids, fault, begin_ns: see `intake`.
        ring: int32 [RING_SLOTS, RingLayout.words], pinned host memory.
        ring_step: int64 [RING_SLOTS], pinned host memory; stored last.
    Capture-safe: no sync, no allocation.
    """
    launch(
        _settle,
        (1,),
        sample_row,
        out_token,
        out_logprob,
        step,
        phase,
        seq_len,
        last_token,
        limit,
        stop_ids,
        fault,
        begin_ns,
        ring,
        ring_step,
        sample_row.shape[0],
        R=phase.shape[0],
        S2=triton.next_power_of_2(sample_row.shape[0]),
        STOPS=stop_ids.shape[1],
        WORDS=ring.shape[1],
        SLOTS=ring.shape[0],
        HEAD=HEADER,
        ON_DEVICE=on_device,
        num_warps=4,
    )


def settle_ref(
    sample_row: torch.Tensor,
    out_token: torch.Tensor,
    out_logprob: torch.Tensor,
    step: torch.Tensor,
    phase: torch.Tensor,
    seq_len: torch.Tensor,
    last_token: torch.Tensor,
    limit: torch.Tensor,
    stop_ids: torch.Tensor,
    fault: torch.Tensor,
    begin_ns: torch.Tensor,
    *,
    ring: torch.Tensor,
    ring_step: torch.Tensor,
    on_device: bool = True,
) -> None:
    """`settle` in plain torch; the end time is the host's clock."""
    now = int(step)
    n = int((sample_row >= 0).sum())
    row, token = sample_row[:n].long(), out_token[:n]
    reason = torch.where(seq_len[row] + 1 >= limit[row], LENGTH, RUNNING)
    stopped = ((stop_ids[row] == token[:, None]) & (stop_ids[row] >= 0)).any(1)
    reason = torch.where(stopped, STOP, reason)
    reason = torch.where(token < 0, ERROR, reason).int()
    last_token[row] = token
    phase[row] = torch.where(reason == RUNNING, DECODE, FREE).int()
    out, rows = ring[now % RING_SLOTS], phase.shape[0]
    bits = out_logprob[:n].contiguous().view(torch.int32)
    for i, field in enumerate((row.int(), token, bits, reason)):
        out[HEADER + i * rows : HEADER + i * rows + n] = field
    out[0], out[1] = n, int(fault)
    out[2:4] = begin_ns.view(torch.int32)
    out[4:6] = torch.tensor([time.perf_counter_ns()]).view(torch.int32)
    ring_step[now % RING_SLOTS] = now + 1
    step[0] = now + 1


@triton.jit
def _stamp(
    stamps,  # int64 [N]
    index,
):
    tl.store(stamps + index, globaltimer())


def stamp(launch: Launcher, stamps: torch.Tensor, index: int) -> None:
    """Store the device time in ns into stamps[index] (int64 [N]); not available in the
    interpreter."""
    launch(_stamp, (1,), stamps, index, num_warps=1)
