"""Before a step: apply the mailbox to the row state, list the step's tokens; publish the step
before it.

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
from kernels.triton.publish import store_release_sys
from kernels.triton.rows import RowState
from kernels.triton.state import (
    ADMIT_BIASES,
    ADMIT_HEADER,
    ADMIT_LIFE_MS,
    ADMIT_LIMIT,
    ADMIT_ROW,
    ADMIT_SEED,
    ADMIT_SEQUENCES,
    ADMIT_STOPS,
    DECODE,
    F_MASKED,
    FAULT_NONE,
    FAULT_TOO_MANY,
    FREE,
    IS_PENDING,
    MAX_BIASES,
    MAX_STOP_LENGTH,
    MAX_STOP_SEQUENCES,
    P_FLAGS,
    P_FORCED_LEN,
    P_PROMPT_LEN,
    PARAMS,
    PREFILL,
    RING_SLOTS,
    MailboxLayout,
)


@triton.jit
def _fill_line(
    line,  # int32 [N]
    words,  # int32 [num]
    num,
    N: tl.constexpr,
    N2: tl.constexpr,
    REST: tl.constexpr,
):
    """line = words, and REST behind them."""
    i = tl.arange(0, N2)
    tl.store(line + i, tl.load(words + i, mask=i < num, other=REST), mask=i < N)


@triton.jit
def _list_decoding(
    phase,
    seq_len,
    last_token,
    known_len,  # int32 [R], line P_FORCED_LEN
    forced_tokens,
    tok_row,
    tok_pos,
    tok_id,
    sample_tok,
    sample_row,
    sample_pos,
    forced,
    S,
    max_seq_len,
    R: tl.constexpr,
    R2: tl.constexpr,
):
    """Decoding rows bring one token each, in row order; returns how many there are."""
    r = tl.arange(0, R2)
    # All rows' lengths and tokens at once, not those of decoding rows later: one trip to memory.
    is_row = r < R
    decoding = (tl.load(phase + r, mask=is_row, other=0) == 2).to(tl.int32)
    pos = tl.load(seq_len + r, mask=is_row, other=0)
    last = tl.load(last_token + r, mask=is_row, other=0)
    known = pos + 1 < tl.load(known_len + r, mask=is_row, other=0)
    index = tl.cumsum(decoding, 0) - decoding
    m = (decoding == 1) & (index < S)
    known = known & m
    tl.store(tok_row + index, r, mask=m)
    tl.store(tok_pos + index, pos, mask=m)
    tl.store(tok_id + index, last, mask=m)
    tl.store(sample_tok + index, index, mask=m)
    tl.store(sample_row + index, r, mask=m)
    tl.store(sample_pos + index, pos + 1, mask=m)
    target = tl.load(forced_tokens + r.to(tl.int64) * max_seq_len + pos + 1, mask=known, other=-1)
    tl.store(forced + index, target, mask=m)
    tl.store(seq_len + r, pos + 1, mask=m)
    return tl.sum(decoding, 0)


@triton.jit
def _pad(
    out,
    start,
    stop,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for i in range(start, stop, BLOCK):
        at = i + tl.arange(0, BLOCK)
        tl.store(out + at, VALUE, mask=at < stop)


@triton.jit
def _publish(
    pending,
    step,
    ring,
    ring_step,
    WORDS: tl.constexpr,
    WORDS2: tl.constexpr,
    SLOTS: tl.constexpr,
    IS_PENDING: tl.constexpr,
    ON_DEVICE: tl.constexpr,
):
    """Bring the slot of the step before this one to the host, if that has been left to us."""
    is_pending = tl.load(pending + IS_PENDING)
    word = tl.arange(0, WORDS2)
    slot = tl.load(pending + word, mask=word < WORDS, other=0)
    if is_pending == 1:
        at = (step - 1) % SLOTS
        tl.store(ring + at * WORDS + word, slot, mask=word < WORDS)
        # As in `settle`: the barrier orders the CTA's stores before the release. No thread may
        # clear the flag before all have seen it.
        tl.debug_barrier()
        tl.store(pending + IS_PENDING, 0)
        if ON_DEVICE:
            store_release_sys(ring_step + at, step)
        else:
            tl.store(ring_step + at, step)


@triton.jit
def _intake(
    mailbox,  # int32 [2, WORDS], pinned host memory
    forced_tokens,  # int32 [R, max_seq_len], pinned host memory
    step_ptr,  # int64 [1]
    phase,  # int32 [R]
    seq_len,  # int32 [R]
    last_token,  # int32 [R]
    limit,  # int32 [R]
    page_table,  # int32 [R, max_pages]
    stop_ids,  # int32 [R, STOPS]
    row_params,  # int32 [PARAMS, PITCH]
    deadline_ns,  # int64 [R]
    seed,  # int32 [R, 2]
    bias_ids,  # int32 [R, BIASES]
    bias_values,  # int32 [R, BIASES], the bits of fp32
    stop_sequences,  # int32 [R, SEQ * LEN]
    tail,  # int32 [R, LEN]
    mask_step,  # int32 [R]
    tok_row,  # int32 [T]
    tok_pos,  # int32 [T]
    tok_id,  # int32 [T]
    sample_tok,  # int32 [S]
    sample_row,  # int32 [S]
    sample_pos,  # int32 [S]
    forced,  # int32 [S]
    fault,  # int32 [1]
    begin_ns,  # int64 [1]
    pending,  # int32 [RING_WORDS]
    ring,  # int32 [SLOTS, RING_WORDS], pinned host memory
    ring_step,  # int64 [SLOTS], pinned host memory
    T,
    S,
    max_pages,
    max_seq_len,
    R: tl.constexpr,
    R2: tl.constexpr,
    STOPS: tl.constexpr,
    STOPS2: tl.constexpr,
    PITCH: tl.constexpr,
    WORDS: tl.constexpr,
    CANCELS: tl.constexpr,
    ADMITS: tl.constexpr,
    PAGES: tl.constexpr,
    CHUNKS: tl.constexpr,
    MASKS: tl.constexpr,
    IDS: tl.constexpr,
    HEAD: tl.constexpr,
    SEED: tl.constexpr,
    PARAMS: tl.constexpr,
    PARAMS2: tl.constexpr,
    BIASES: tl.constexpr,
    BIASES2: tl.constexpr,
    SEQ: tl.constexpr,
    LEN: tl.constexpr,
    PROMPT_LEN: tl.constexpr,
    FORCED_LEN: tl.constexpr,
    MASKED: tl.constexpr,
    RING_WORDS: tl.constexpr,
    RING_WORDS2: tl.constexpr,
    SLOTS: tl.constexpr,
    IS_PENDING: tl.constexpr,
    BLOCK: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    step = tl.load(step_ptr)
    if tl.program_id(0) == 1:  # the CTA that publishes, while the other one waits for the mailbox
        _publish(
            *(pending, step, ring, ring_step),
            *(RING_WORDS, RING_WORDS2, SLOTS, IS_PENDING, ON_DEVICE),
        )
        return
    if ON_DEVICE:
        tl.store(begin_ns, globaltimer())
    box = mailbox + (step % 2) * WORDS
    fresh = tl.load(box) == step.to(tl.int32)
    num_admits = tl.where(fresh, tl.load(box + 1), 0)
    num_cancels = tl.where(fresh, tl.load(box + 2), 0)
    num_pages = tl.where(fresh, tl.load(box + 3), 0)
    num_chunks = tl.where(fresh, tl.load(box + 4), 0)
    num_masks = tl.where(fresh, tl.load(box + 6), 0)
    lane = tl.arange(0, BLOCK)

    # Most steps change no row: they jump, for code that is not run need not be fetched either.
    if num_cancels + num_admits + num_pages + num_masks > 0:
        for i in range(0, num_cancels, BLOCK):
            m = i + lane < num_cancels
            row = tl.load(box + CANCELS + i + lane, mask=m, other=0)
            tl.store(phase + row, 0, mask=m)
        # A row may be cancelled and taken again in one mailbox: cancels come first.
        tl.debug_barrier()
        at = box + ADMITS
        for _ in range(0, num_admits):
            # A plain record's loads come before all stores: one trip over the bus, not many.
            words, row, total = tl.load(at), tl.load(at + 1), tl.load(at + 2)
            life_ns = tl.load(at + 3).to(tl.int64) * 1000000
            stops, biases, sequences = tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)
            half = tl.arange(0, 2)
            seeds = tl.load(at + SEED + half)
            param = tl.arange(0, PARAMS2)
            values = tl.load(at + HEAD + param, mask=param < PARAMS, other=0)
            stop = tl.arange(0, STOPS2)
            lists = at + HEAD + PARAMS
            ids = tl.load(lists + stop, mask=stop < STOPS, other=-1)
            now = globaltimer() if ON_DEVICE else tl.load(begin_ns)
            tl.store(phase + row, 1)
            tl.store(seq_len + row, 0)
            tl.store(limit + row, total)
            tl.store(deadline_ns + row, tl.where(life_ns > 0, now + life_ns, 0))
            tl.store(seed + row * 2 + half, seeds)
            tl.store(row_params + param * PITCH + row, values, mask=param < PARAMS)
            tl.store(
                stop_ids + row * STOPS + stop, tl.where(stop < stops, ids, -1), mask=stop < STOPS
            )
            lists += stops
            if biases > 0:
                _fill_line(bias_ids + row * BIASES, lists, biases, BIASES, BIASES2, -1)
                _fill_line(bias_values + row * BIASES, lists + biases, biases, BIASES, BIASES2, 0)
            lists += 2 * biases
            if sequences > 0:
                line = stop_sequences + row * SEQ * LEN
                _fill_line(line, lists, sequences * LEN, SEQ * LEN, SEQ * LEN, -1)
                tl.store(tail + row * LEN + tl.arange(0, LEN), -1)
            at += words
        for i in range(0, num_pages, BLOCK):
            m = i + lane < num_pages
            entry = box + PAGES + (i + lane) * 3
            row = tl.load(entry, mask=m, other=0)
            index = tl.load(entry + 1, mask=m, other=0)
            page = tl.load(entry + 2, mask=m, other=0)
            tl.store(page_table + row * max_pages + index, page, mask=m)
        tl.debug_barrier()
        for i in range(0, num_masks, BLOCK):
            m = i + lane < num_masks
            row = tl.load(box + MASKS + (i + lane) * 2, mask=m, other=0)
            on = tl.load(box + MASKS + (i + lane) * 2 + 1, mask=m, other=0)
            flags = tl.load(row_params + row, mask=m, other=0)  # line P_FLAGS is the first
            flags = tl.where(on == 1, flags | MASKED, flags & ~MASKED)
            tl.store(row_params + row, flags, mask=m)
            tl.store(mask_step + row, step.to(tl.int32), mask=m & (on == 1))

    count = _list_decoding(
        phase,
        seq_len,
        last_token,
        row_params + FORCED_LEN * PITCH,
        forced_tokens,
        tok_row,
        tok_pos,
        tok_id,
        sample_tok,
        sample_row,
        sample_pos,
        forced,
        S,
        max_seq_len,
        R,
        R2,
    )
    bad = (count > S).to(tl.int32)
    tokens = tl.minimum(count, S)
    samples = tokens

    taken = 0
    for c in range(0, num_chunks):
        chunk = box + CHUNKS + c * 4
        row = tl.load(chunk)
        start = tl.load(chunk + 1)
        n = tl.load(chunk + 2)
        heads = tl.load(chunk + 3)
        fits = (tokens + n <= T) & (samples + heads <= S)
        bad = tl.where(fits, bad, 1)
        n_fit = tl.where(fits, n, 0)
        for i in range(0, n_fit, BLOCK):
            mc = i + lane < n_fit
            tl.store(tok_row + tokens + i + lane, row + lane * 0, mask=mc)
            tl.store(tok_pos + tokens + i + lane, start + i + lane, mask=mc)
            ids = tl.load(box + IDS + taken + i + lane, mask=mc, other=0)
            tl.store(tok_id + tokens + i + lane, ids, mask=mc)
        tokens += n_fit
        end = start + n
        # Output fed again after a preemption is the row's tail; a prompt is not.
        back = tl.arange(0, LEN)
        p = end - LEN + back
        mine = fits & (p >= start) & (p >= tl.load(row_params + PROMPT_LEN * PITCH + row))
        ids = tl.load(box + IDS + taken + n - LEN + back, mask=mine, other=-1)
        tl.store(tail + row * LEN + p % LEN, ids, mask=mine)
        taken += n
        heads_fit = tl.where(fits, heads, 0)
        forced_len = tl.load(row_params + FORCED_LEN * PITCH + row)
        for i in range(0, heads_fit, BLOCK):
            mh = i + lane < heads_fit
            at_pos = end - heads + i + lane + 1
            tl.store(sample_tok + samples + i + lane, tokens - heads + i + lane, mask=mh)
            tl.store(sample_row + samples + i + lane, row + lane * 0, mask=mh)
            tl.store(sample_pos + samples + i + lane, at_pos, mask=mh)
            place = forced_tokens + row.to(tl.int64) * max_seq_len + at_pos
            given = tl.load(place, mask=mh & (at_pos < forced_len), other=-1)
            tl.store(forced + samples + i + lane, given, mask=mh)
        samples += heads_fit
        tl.store(seq_len + row, end, mask=fits)

    if tokens < T:
        _pad(tok_row, tokens, T, -1, BLOCK)
        _pad(tok_pos, tokens, T, 0, BLOCK)
        _pad(tok_id, tokens, T, -1, BLOCK)
    if samples < S:
        _pad(sample_tok, samples, S, -1, BLOCK)
        _pad(sample_row, samples, S, -1, BLOCK)
        _pad(sample_pos, samples, S, 0, BLOCK)
        _pad(forced, samples, S, -1, BLOCK)
    tl.store(fault, bad)


def intake(
    launch: Launcher,
    mailbox: torch.Tensor,
    forced_tokens: torch.Tensor,
    step: torch.Tensor,
    rows: RowState,
    *,
    layout: MailboxLayout,
    tok_row: torch.Tensor,
    tok_pos: torch.Tensor,
    tok_id: torch.Tensor,
    sample_tok: torch.Tensor,
    sample_row: torch.Tensor,
    sample_pos: torch.Tensor,
    forced: torch.Tensor,
    fault: torch.Tensor,
    begin_ns: torch.Tensor,
    pending: torch.Tensor,
    ring: torch.Tensor,
    ring_step: torch.Tensor,
    on_device: bool = True,
) -> None:
    """Apply this step's mailbox to the row state and list the step's tokens; publish the step
    before it, if that has been left to this one.

    Args:
        mailbox: int32 [2, layout.words], pinned host memory; read only if its step number is this
            one.
        forced_tokens: int32 [max_rows, max_seq_len], pinned host memory; read where P_FORCED_LEN
            says so.
        step: int64 [1], number of the step that begins.
        rows: changed.
        tok_row, tok_pos, tok_id: int32 [T], out; padding -1, 0, -1.
        sample_tok, sample_row: int32 [S], out; index of the token whose row samples; padding -1.
        sample_pos: int32 [S], out; position of the token that is chosen or scored; padding 0.
        forced: int32 [S], out; the token if it is known (a forced one, or the next of a
            prompt whose log-probs are wanted), else -1.
        fault: int32 [1], out; FAULT_TOO_MANY if the rows or chunks do not fit the key.
        begin_ns: int64 [1], out; device time, ns.
        pending: int32 [RingLayout.words], a ring slot as `settle` has left it; word IS_PENDING says
            whether it is to be published, and is cleared.
        ring, ring_step: see `settle`.
        on_device: False in Triton's interpreter, which has no device clock and no inline PTX: it
            takes what `begin_ns` holds for the time.
    Capture-safe: no sync, no allocation.
    """
    launch(
        _intake,
        (2,),
        mailbox,
        forced_tokens,
        step,
        rows.phase,
        rows.seq_len,
        rows.last_token,
        rows.limit,
        rows.page_table,
        rows.stop_ids,
        rows.row_params,
        rows.deadline_ns,
        rows.seed,
        rows.bias_ids,
        rows.bias_values.view(torch.int32),
        rows.stop_sequences,
        rows.tail,
        rows.mask_step,
        tok_row,
        tok_pos,
        tok_id,
        sample_tok,
        sample_row,
        sample_pos,
        forced,
        fault,
        begin_ns,
        pending,
        ring,
        ring_step,
        tok_row.shape[0],
        sample_tok.shape[0],
        rows.page_table.shape[1],
        forced_tokens.shape[1],
        R=rows.phase.shape[0],
        R2=triton.next_power_of_2(rows.phase.shape[0]),
        STOPS=layout.max_stops,
        STOPS2=triton.next_power_of_2(layout.max_stops),
        PITCH=rows.row_params.shape[1],
        WORDS=layout.words,
        CANCELS=layout.cancels,
        ADMITS=layout.admits,
        PAGES=layout.pages,
        CHUNKS=layout.chunks,
        MASKS=layout.masks,
        IDS=layout.ids,
        HEAD=ADMIT_HEADER,
        SEED=ADMIT_SEED,
        PARAMS=PARAMS,
        PARAMS2=triton.next_power_of_2(PARAMS),
        BIASES=MAX_BIASES,
        BIASES2=triton.next_power_of_2(MAX_BIASES),
        SEQ=MAX_STOP_SEQUENCES,
        LEN=MAX_STOP_LENGTH,
        PROMPT_LEN=P_PROMPT_LEN,
        FORCED_LEN=P_FORCED_LEN,
        MASKED=F_MASKED,
        RING_WORDS=pending.shape[0],
        RING_WORDS2=triton.next_power_of_2(pending.shape[0]),
        SLOTS=RING_SLOTS,
        IS_PENDING=IS_PENDING,
        BLOCK=256,
        ON_DEVICE=on_device,
        num_warps=4,
        **overlap(launch),
    )


def intake_ref(
    mailbox: torch.Tensor,
    forced_tokens: torch.Tensor,
    step: torch.Tensor,
    rows: RowState,
    *,
    layout: MailboxLayout,
    tok_row: torch.Tensor,
    tok_pos: torch.Tensor,
    tok_id: torch.Tensor,
    sample_tok: torch.Tensor,
    sample_row: torch.Tensor,
    sample_pos: torch.Tensor,
    forced: torch.Tensor,
    fault: torch.Tensor,
    begin_ns: torch.Tensor,
    pending: torch.Tensor,
    ring: torch.Tensor,
    ring_step: torch.Tensor,
    on_device: bool = True,
) -> None:
    """`intake` in plain torch; `begin_ns` is the host's clock."""
    if int(pending[IS_PENDING]) == 1:
        last = (int(step) - 1) % RING_SLOTS
        ring[last] = pending
        pending[IS_PENDING] = 0
        ring_step[last] = step[0]
    begin_ns[0] = time.perf_counter_ns()
    box = mailbox[int(step) % 2]
    fresh = int(box[0]) == int(step)
    admits, cancels, pages, chunks, _, masks = box[1:7].tolist() if fresh else (0,) * 6
    rows.phase[box[layout.cancels :][:cancels].long()] = FREE
    at = layout.admits
    for _ in range(admits):
        record = box[at : at + int(box[at])]
        admit(rows, int(record[ADMIT_ROW]), record, now_ns=int(begin_ns))
        at += len(record)
    update = box[layout.pages :][: 3 * pages].view(-1, 3).long()
    rows.page_table[update[:, 0], update[:, 1]] = update[:, 2].int()
    flags = rows.param(P_FLAGS)
    for row, on in box[layout.masks :][: 2 * masks].view(-1, 2).tolist():
        flags[row] = (flags[row] | F_MASKED) if on else (flags[row] & ~F_MASKED)
        if on:
            rows.mask_step[row] = int(step)

    for out, padding in ((tok_row, -1), (tok_pos, 0), (tok_id, -1), (sample_tok, -1)):
        out.fill_(padding)
    for out, padding in ((sample_row, -1), (sample_pos, 0), (forced, -1)):
        out.fill_(padding)
    live = (rows.phase == DECODE).nonzero().flatten()
    bad = len(live) > len(sample_tok)
    live = live[: len(sample_tok)]
    tokens = samples = len(live)
    tok_row[:tokens] = live.int()
    tok_pos[:tokens] = rows.seq_len[live]
    tok_id[:tokens] = rows.last_token[live]
    rows.seq_len[live] += 1
    sample_tok[:samples] = torch.arange(samples, dtype=torch.int32)
    sample_row[:samples] = live.int()
    sample_pos[:samples] = rows.seq_len[live]
    taken = 0
    for row, start, n, heads in box[layout.chunks :][: 4 * chunks].view(-1, 4).tolist():
        ids = box[layout.ids + taken :][:n]
        taken += n
        if tokens + n > len(tok_row) or samples + heads > len(sample_tok):
            bad = True
            continue
        tok_row[tokens : tokens + n] = row
        tok_pos[tokens : tokens + n] = torch.arange(start, start + n, dtype=torch.int32)
        tok_id[tokens : tokens + n] = ids
        tokens += n
        for p in range(max(start, start + n - MAX_STOP_LENGTH, 0), start + n):
            if p >= int(rows.param(P_PROMPT_LEN)[row]):
                rows.tail[row, p % MAX_STOP_LENGTH] = ids[p - start]
        end = start + n
        lines = slice(samples, samples + heads)
        sample_tok[lines] = torch.arange(tokens - heads, tokens, dtype=torch.int32)
        sample_row[lines] = row
        sample_pos[lines] = torch.arange(end - heads + 1, end + 1, dtype=torch.int32)
        samples += heads
        rows.seq_len[row] = end
    row, pos = sample_row[:samples].long(), sample_pos[:samples].long()
    known = pos < rows.param(P_FORCED_LEN)[row]
    forced[:samples][known] = forced_tokens[row[known], pos[known]]
    fault[0] = FAULT_TOO_MANY if bad else FAULT_NONE


def admit(rows: RowState, row: int, record: torch.Tensor, *, now_ns: int | None = None) -> None:
    """Apply one admit record, in plain torch.

    Args:
        rows: changed; on any device.
        record: int32 words of an admit record, on the CPU.
        now_ns: time on the clock of the deadlines; None leaves the row without one.
    """
    words = record.tolist()
    rows.phase[row], rows.seq_len[row], rows.limit[row] = PREFILL, 0, words[ADMIT_LIMIT]
    life_ms = 0 if now_ns is None else words[ADMIT_LIFE_MS]
    rows.deadline_ns[row] = (now_ns or 0) + life_ms * 1_000_000 if life_ms > 0 else 0
    num_biases, num_sequences = words[ADMIT_BIASES], words[ADMIT_SEQUENCES]
    counts = [PARAMS, words[ADMIT_STOPS], num_biases, num_biases, num_sequences * MAX_STOP_LENGTH]
    lists = torch.split(record[ADMIT_HEADER:], counts)
    params, stops, ids, biases, sequences = lists
    rows.row_params[:, row] = params.to(rows.phase.device)
    rows.seed[row] = record[ADMIT_SEED : ADMIT_SEED + 2].to(rows.phase.device)
    _fill(rows.stop_ids[row], stops, -1)
    if len(ids):
        _fill(rows.bias_ids[row], ids, -1)
        _fill(rows.bias_values[row], biases.clone().view(torch.float32), 0)
    if len(sequences):
        _fill(rows.stop_sequences[row], sequences, -1)
        rows.tail[row] = -1


def _fill(line: torch.Tensor, values: torch.Tensor, rest: int) -> None:
    line[: len(values)] = values.to(line.device)
    line[len(values) :] = rest


@triton.jit
def _copy_masks(
    step_ptr,  # int64 [1]
    mask_step,  # int32 [R]
    masks,  # int32 [2, R, WORDS], pinned host memory
    token_mask,  # int32 [R, WORDS]
    R,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    step = tl.load(step_ptr)
    if tl.load(mask_step + row) != step.to(tl.int32):
        return
    for i in range(0, WORDS, BLOCK):
        word = i + tl.arange(0, BLOCK)
        source = masks + ((step % 2) * R + row) * WORDS + word
        allowed = tl.load(source, mask=word < WORDS, other=0)
        tl.store(token_mask + row * WORDS + word, allowed, mask=word < WORDS)


def copy_masks(
    launch: Launcher,
    step: torch.Tensor,
    mask_step: torch.Tensor,
    masks: torch.Tensor,
    *,
    token_mask: torch.Tensor,
) -> None:
    """Bring the token masks that this step's mailbox announced to the device.

    Args:
        step: int64 [1].
        mask_step: int32 [R]; a row is copied if it is this step.
        masks: int32 [2, R, mask_words(V)], pinned host memory; slot step % 2.
        token_mask: int32 [R, mask_words(V)], out; other rows keep theirs.
    Capture-safe: no sync, no allocation.
    """
    rows, words = token_mask.shape
    launch(
        _copy_masks,
        (rows,),
        step,
        mask_step,
        masks,
        token_mask,
        rows,
        WORDS=words,
        BLOCK=min(1024, triton.next_power_of_2(words)),
        num_warps=4,
        **overlap(launch),
    )


def copy_masks_ref(
    step: torch.Tensor, mask_step: torch.Tensor, masks: torch.Tensor, *, token_mask: torch.Tensor
) -> None:
    """`copy_masks` in plain torch."""
    fresh = mask_step == step.int()
    token_mask[fresh] = masks[int(step) % 2][fresh]
