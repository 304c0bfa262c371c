"""After a step: append the sampled tokens, test the endings, publish to the ring, or leave that to
the next step; device timestamps.

Layouts and constants: `kernels.triton.state`. Invariant: the ring's step number is stored last,
with system-scope release.
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
    DEADLINE,
    DECODE,
    ERROR,
    FREE,
    HEADER,
    IS_PENDING,
    LAUNCHED,
    LENGTH,
    MAX_STOP_LENGTH,
    MAX_STOP_SEQUENCES,
    MAX_TOP,
    P_LOGITS,
    P_MIN_LEN,
    P_PROMPT_LEN,
    P_PROMPT_TOP,
    P_SEQUENCES,
    P_TOP,
    PROMPT_ENTRY,
    RING_SLOTS,
    RUNNING,
    STOP,
)


@triton.jit
def _settle(
    sample_row,  # int32 [S]
    sample_pos,  # int32 [S]
    out_token,  # int32 [S]
    out_logprob,  # fp32 [S]
    step_ptr,  # int64 [1]
    phase,  # int32 [R]
    last_token,  # int32 [R]
    limit,  # int32 [R]
    stop_ids,  # int32 [R, STOPS]
    row_params,  # int32 [PARAMS, PITCH]
    deadline_ns,  # int64 [R]
    stop_sequences,  # int32 [R, SEQ * LEN]
    tail,  # int32 [R, LEN]
    fault,  # int32 [1]
    begin_ns,  # int64 [1]
    mailbox,  # int32 [2, …], pinned host memory
    pending,  # int32 [WORDS]
    ring,  # int32 [RING_SLOTS, WORDS], pinned host memory
    ring_step,  # int64 [RING_SLOTS], pinned host memory
    S,
    R: tl.constexpr,
    S2: tl.constexpr,
    STOPS: tl.constexpr,
    SEQ: tl.constexpr,
    LEN: tl.constexpr,
    PITCH: tl.constexpr,
    WORDS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD: tl.constexpr,
    LAUNCHED: tl.constexpr,
    IS_PENDING: tl.constexpr,
    PROMPT_LEN: tl.constexpr,
    MIN_LEN: tl.constexpr,
    SEQUENCES: tl.constexpr,
    TOP: tl.constexpr,
    PROMPT_TOP: tl.constexpr,
    LOGITS: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    # Loads that do not need each other come first and together: each trip to memory is half a
    # microsecond, one to the host's a whole one, in which nothing else of the step runs.
    s = tl.arange(0, S2)
    # By one thread: the host writes it at any time, and warps that saw different numbers would
    # leave half of a slot here and half there.
    launched = tl.load(mailbox + LAUNCHED + s, mask=s == 0, other=0)
    step = tl.load(step_ptr)
    bad, begin = tl.load(fault), tl.load(begin_ns)
    row = tl.load(sample_row + s, mask=s < S, other=-1)
    token = tl.load(out_token + s, mask=s < S, other=0)
    pos = tl.load(sample_pos + s, mask=s < S, other=0)
    logprob = tl.load(out_logprob + s, mask=s < S, other=0.0)
    tl.debug_barrier()  # else the compiler puts off those whose results are needed last
    live = row >= 0
    params = row_params + row
    output_from = tl.load(params + PROMPT_LEN * PITCH, mask=live, other=0)
    stops_from = tl.load(params + MIN_LEN * PITCH, mask=live, other=0)
    sequences = tl.load(params + SEQUENCES * PITCH, mask=live, other=0)
    new_top = tl.load(params + TOP * PITCH, mask=live, other=0)
    prompt_top = tl.load(params + PROMPT_TOP * PITCH, mask=live, other=0)
    wants_logits = tl.load(params + LOGITS * PITCH, mask=live, other=0)
    until = tl.load(deadline_ns + row, mask=live, other=0)
    most_tokens = tl.load(limit + row, mask=live, other=0)
    stopped = s < 0
    for i in tl.static_range(STOPS):
        stop = tl.load(stop_ids + row * STOPS + i, mask=live, other=-1)
        stopped = stopped | ((stop >= 0) & (stop == token))
    # A scored prompt token changes nothing about its row.
    new = live & (pos >= output_from)
    prompt = live & (pos < output_from)

    now = globaltimer() if ON_DEVICE else begin
    reason = tl.where((until > 0) & (now >= until), 5, 0)
    reason = tl.where(pos + 1 >= most_tokens, 2, reason)
    may_stop = new & (pos >= stops_from)
    reason = tl.where(may_stop & stopped, 1, reason)
    sequences = tl.where(new, sequences, 0)
    most = tl.max(sequences, 0)
    if most > 0:
        kept = new & (sequences > 0)
        back = tl.arange(0, LEN)[None, :]
        at = (row * LEN)[:, None] + (pos[:, None] + 1 + back) % LEN
        # The token itself is the last of the tail, and takes the place of the oldest.
        seen = tl.load(tail + at, mask=kept[:, None] & (back < LEN - 1), other=-1)
        seen = tl.where(back == LEN - 1, token[:, None], seen)
        for j in range(0, most):
            mine = may_stop & (j < sequences)
            want = tl.load(
                stop_sequences + (row * SEQ * LEN + j * LEN)[:, None] + back,
                mask=mine[:, None],
                other=0,
            )
            differ = tl.sum(((want >= 0) & (want != seen)).to(tl.int32), 1)
            reason = tl.where(mine & (differ == 0), 1, reason)
        tl.store(tail + row * LEN + pos % LEN, token, mask=kept)
    reason = tl.where(token < 0, 4, reason)
    reason = tl.where(prompt, 256, reason)
    tl.store(last_token + row, token, mask=new)
    tl.store(phase + row, tl.where(reason == 0, 2, 0), mask=new)

    wants = new & (wants_logits == 1)
    line = tl.cumsum(wants.to(tl.int32), 0)
    count = tl.where(new, new_top, prompt_top)
    answers = count + tl.where(wants, 256 * line, 0)
    # At most three steps apart, so the difference is right where the numbers' low words wrap.
    follows = tl.sum(launched, 0) - (step + 2).to(tl.int32) >= 0
    if follows:
        out = pending
    else:
        out = ring + (step % SLOTS) * WORDS
    tl.store(out + HEAD + s, row, mask=live)
    tl.store(out + HEAD + R + s, token, mask=live)
    tl.store(out + HEAD + 2 * R + s, logprob.to(tl.int32, bitcast=True), mask=live)
    tl.store(out + HEAD + 3 * R + s, reason, mask=live)
    tl.store(out + HEAD + 4 * R + s, pos, mask=live)
    tl.store(out + HEAD + 5 * R + s, answers, mask=live)
    word = tl.arange(0, 8)
    header = tl.where(word == 0, tl.sum(live.to(tl.int32), 0), bad)
    header = tl.where(word == IS_PENDING, follows.to(tl.int32), header)
    if ON_DEVICE:
        end = globaltimer()
        header = tl.where(word == 2, begin.to(tl.int32), header)
        header = tl.where(word == 3, (begin >> 32).to(tl.int32), header)
        header = tl.where(word == 4, end.to(tl.int32), header)
        header = tl.where(word == 5, (end >> 32).to(tl.int32), header)
    has_time = (word >= 2) & (word < 6)
    tl.store(out + word, header, mask=(word <= IS_PENDING) & (ON_DEVICE | ~has_time))
    # The barrier orders the CTA's stores before thread 0's release; it pairs with the host's poll
    # of ring_step, which reads the slot only after it has seen step + 1.
    tl.debug_barrier()
    tl.store(step_ptr, step + 1)
    if not follows:
        if ON_DEVICE:
            store_release_sys(ring_step + step % SLOTS, step + 1)
        else:
            tl.store(ring_step + step % SLOTS, step + 1)


def settle(
    launch: Launcher,
    sample_row: torch.Tensor,
    sample_pos: torch.Tensor,
    out_token: torch.Tensor,
    out_logprob: torch.Tensor,
    step: torch.Tensor,
    rows: RowState,
    fault: torch.Tensor,
    begin_ns: torch.Tensor,
    *,
    mailbox: torch.Tensor,
    pending: torch.Tensor,
    ring: torch.Tensor,
    ring_step: torch.Tensor,
    on_device: bool = True,
) -> None:
    """Append the sampled tokens, test the endings, free ended rows and publish the step, or leave
    that to the next one, if its launch is known of.

    A row ends, in this order of precedence: with an error, by a stop id or stop sequence at or past
    its P_MIN_LEN, at its limit, past its deadline. Entries below their row's P_PROMPT_LEN are
    scored prompt tokens: published, and nothing else.

    Args:
        sample_row: int32 [S]; -1 is padding.
        sample_pos: int32 [S], position of the entry's token.
        out_token: int32 [S]; -1 on a live row means that its logits were not finite.
        out_logprob: fp32 [S], natural log.
        step: int64 [1], incremented.
        rows, fault, begin_ns: see `intake`; `rows` is changed.
        mailbox: int32 [2, words], pinned host memory; of it, word LAUNCHED.
        pending: int32 [RingLayout.words], takes the slot that the next step is to publish.
        ring: int32 [RING_SLOTS, RingLayout.words], pinned host memory.
        ring_step: int64 [RING_SLOTS], pinned host memory; stored last.
        on_device: see `intake`.
    Capture-safe: no sync, no allocation.
    """
    entries = triton.next_power_of_2(sample_row.shape[0])
    launch(
        _settle,
        (1,),
        sample_row,
        sample_pos,
        out_token,
        out_logprob,
        step,
        rows.phase,
        rows.last_token,
        rows.limit,
        rows.stop_ids,
        rows.row_params,
        rows.deadline_ns,
        rows.stop_sequences,
        rows.tail,
        fault,
        begin_ns,
        mailbox,
        pending,
        ring,
        ring_step,
        sample_row.shape[0],
        R=rows.phase.shape[0],
        S2=entries,
        STOPS=rows.stop_ids.shape[1],
        SEQ=MAX_STOP_SEQUENCES,
        LEN=MAX_STOP_LENGTH,
        PITCH=rows.row_params.shape[1],
        WORDS=ring.shape[1],
        SLOTS=ring.shape[0],
        HEAD=HEADER,
        LAUNCHED=mailbox.numel() + LAUNCHED,
        IS_PENDING=IS_PENDING,
        PROMPT_LEN=P_PROMPT_LEN,
        MIN_LEN=P_MIN_LEN,
        SEQUENCES=P_SEQUENCES,
        TOP=P_TOP,
        PROMPT_TOP=P_PROMPT_TOP,
        LOGITS=P_LOGITS,
        ON_DEVICE=on_device,
        num_warps=min(4, max(1, entries // 32)),
        **overlap(launch),
    )


def settle_ref(
    sample_row: torch.Tensor,
    sample_pos: torch.Tensor,
    out_token: torch.Tensor,
    out_logprob: torch.Tensor,
    step: torch.Tensor,
    rows: RowState,
    fault: torch.Tensor,
    begin_ns: torch.Tensor,
    *,
    mailbox: torch.Tensor,
    pending: torch.Tensor,
    ring: torch.Tensor,
    ring_step: torch.Tensor,
    on_device: bool = True,
) -> None:
    """`settle` in plain torch; the time is the host's clock."""
    now, now_ns = int(step), time.perf_counter_ns()
    n = int((sample_row >= 0).sum())
    row, token, pos = sample_row[:n].long(), out_token[:n], sample_pos[:n]
    new = pos >= rows.param(P_PROMPT_LEN)[row]
    until = rows.deadline_ns[row]
    reason = torch.where((until > 0) & (now_ns >= until), DEADLINE, RUNNING)
    reason = torch.where(pos + 1 >= rows.limit[row], LENGTH, reason)
    stopped = ((rows.stop_ids[row] == token[:, None]) & (rows.stop_ids[row] >= 0)).any(1)
    for i in (new & (rows.param(P_SEQUENCES)[row] > 0)).nonzero().flatten().tolist():
        stopped[i] |= _ends_with_a_stop_sequence(rows, int(row[i]), int(pos[i]), int(token[i]))
    reason = torch.where(stopped & (pos >= rows.param(P_MIN_LEN)[row]), STOP, reason)
    reason = torch.where(token < 0, ERROR, reason).int()
    rows.last_token[row[new]] = token[new]
    rows.phase[row[new]] = torch.where(reason == RUNNING, DECODE, FREE).int()[new]
    wants = new & (rows.param(P_LOGITS)[row] == 1)
    count = torch.where(new, rows.param(P_TOP)[row], rows.param(P_PROMPT_TOP)[row])
    answers = (count + wants * wants.cumsum(0) * 256).int()
    reason = torch.where(new, reason, PROMPT_ENTRY)
    ahead = (int(mailbox[-1, LAUNCHED]) - now - 2) % 2**32
    follows, width = ahead < 2**31, rows.phase.shape[0]
    out = pending if follows else ring[now % RING_SLOTS]
    bits = out_logprob[:n].contiguous().view(torch.int32)
    for i, field in enumerate((row.int(), token, bits, reason, pos, answers)):
        out[HEADER + i * width : HEADER + i * width + n] = field
    out[0], out[1], out[IS_PENDING] = n, int(fault), int(follows)
    out[2:4] = begin_ns.view(torch.int32)
    out[4:6] = torch.tensor([time.perf_counter_ns()]).view(torch.int32)
    if not follows:
        ring_step[now % RING_SLOTS] = now + 1
    step[0] = now + 1


def _ends_with_a_stop_sequence(rows: RowState, row: int, pos: int, token: int) -> bool:
    """Append `token` to the row's tail and compare the tail with the row's stop sequences."""
    rows.tail[row, pos % MAX_STOP_LENGTH] = token
    tail = rows.tail[row].roll(-(pos + 1) % MAX_STOP_LENGTH)
    count = int(rows.param(P_SEQUENCES)[row])
    want = rows.stop_sequences[row].view(-1, MAX_STOP_LENGTH)[:count]
    return bool(((want < 0) | (want == tail)).all(1).any())


@triton.jit
def _answer(
    sample_row,  # int32 [S]
    sample_pos,  # int32 [S]
    row_params,  # int32 [PARAMS, PITCH]
    step_ptr,  # int64 [1]
    top_ids,  # int32 [S, TOPS]
    top_logprobs,  # int32 [S, TOPS], the bits of fp32
    logits,  # fp32 [S, V]
    ring_top,  # int32 [RING_SLOTS, R, 2, TOPS], pinned host memory
    ring_logits,  # fp32 [2, LINES, V], pinned host memory
    S,
    logits_pitch,
    R: tl.constexpr,
    S2: tl.constexpr,
    V: tl.constexpr,
    LINES: tl.constexpr,
    PITCH: tl.constexpr,
    SLOTS: tl.constexpr,
    TOPS: tl.constexpr,
    PROMPT_LEN: tl.constexpr,
    TOP: tl.constexpr,
    PROMPT_TOP: tl.constexpr,
    LOGITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    s = tl.program_id(0).to(tl.int64)
    row = tl.load(sample_row + s)
    if row < 0:
        return
    step = tl.load(step_ptr)
    prompt = tl.load(sample_pos + s) < tl.load(row_params + PROMPT_LEN * PITCH + row)
    if tl.program_id(1) == 0:
        count = tl.load(row_params + tl.where(prompt, PROMPT_TOP, TOP) * PITCH + row)
        i = tl.arange(0, 32)
        out = ring_top + ((step % SLOTS) * R + s) * 2 * TOPS
        ids = tl.load(top_ids + s * TOPS + i, mask=i < count, other=-1)
        tl.store(out + i, ids, mask=i < count)
        bits = tl.load(top_logprobs + s * TOPS + i, mask=i < count, other=0)
        tl.store(out + TOPS + i, bits, mask=i < count)
    if prompt | (tl.load(row_params + LOGITS * PITCH + row) == 0):
        return
    # Lines are dealt out in the order of the entries, as `settle` tells the host.
    other = tl.arange(0, S2)
    rows = tl.load(sample_row + other, mask=other < s, other=-1)
    at = tl.load(sample_pos + other, mask=rows >= 0, other=0)
    first = tl.load(row_params + PROMPT_LEN * PITCH + rows, mask=rows >= 0, other=0)
    wants = tl.load(row_params + LOGITS * PITCH + rows, mask=rows >= 0, other=0) == 1
    line = tl.sum((wants & (at >= first)).to(tl.int64), 0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = (col < V) & (line < LINES)
    x = tl.load(logits + s * logits_pitch + col, mask=m, other=0.0)
    tl.store(ring_logits + ((step % 2) * LINES + line) * V + col, x, mask=m)


def answer(
    launch: Launcher,
    sample_row: torch.Tensor,
    sample_pos: torch.Tensor,
    row_params: torch.Tensor,
    step: torch.Tensor,
    top_ids: torch.Tensor,
    top_logprobs: torch.Tensor,
    logits: torch.Tensor,
    *,
    ring_top: torch.Tensor,
    ring_logits: torch.Tensor,
) -> None:
    """Copy alternatives and logits of the entries that asked for them to the host.

    Runs before `settle`: the release of whoever publishes the step, it or the next step's intake,
    publishes these stores too.

    Args:
        sample_row, sample_pos: int32 [S].
        row_params: int32 [PARAMS, pitch].
        step: int64 [1].
        top_ids, top_logprobs: int32, fp32 [S, MAX_TOP].
        logits: fp32 [S, V]; the row pitch may exceed V.
        ring_top: int32 [RING_SLOTS, R, 2, MAX_TOP], pinned host memory.
        ring_logits: fp32 [2, lines, V], pinned host memory; the host never lets more than `lines`
            rows ask.
    Capture-safe: no sync, no allocation.
    """
    entries, vocab = logits.shape
    launch(
        _answer,
        (entries, triton.cdiv(vocab, 4096)),
        sample_row,
        sample_pos,
        row_params,
        step,
        top_ids,
        top_logprobs.view(torch.int32),
        logits,
        ring_top,
        ring_logits,
        entries,
        logits.stride(0),
        R=ring_top.shape[1],
        S2=triton.next_power_of_2(entries),
        V=vocab,
        LINES=ring_logits.shape[1],
        PITCH=row_params.shape[1],
        SLOTS=RING_SLOTS,
        TOPS=MAX_TOP,
        PROMPT_LEN=P_PROMPT_LEN,
        TOP=P_TOP,
        PROMPT_TOP=P_PROMPT_TOP,
        LOGITS=P_LOGITS,
        BLOCK=4096,
        num_warps=4,
        **overlap(launch),
    )


def answer_ref(
    sample_row: torch.Tensor,
    sample_pos: torch.Tensor,
    row_params: torch.Tensor,
    step: torch.Tensor,
    top_ids: torch.Tensor,
    top_logprobs: torch.Tensor,
    logits: torch.Tensor,
    *,
    ring_top: torch.Tensor,
    ring_logits: torch.Tensor,
) -> None:
    """`answer` in plain torch."""
    slot, line = int(step) % RING_SLOTS, 0
    for s in (sample_row >= 0).nonzero().flatten().tolist():
        row = int(sample_row[s])
        prompt = int(sample_pos[s]) < int(row_params[P_PROMPT_LEN, row])
        count = int(row_params[P_PROMPT_TOP if prompt else P_TOP, row])
        ring_top[slot, s, 0, :count] = top_ids[s, :count]
        ring_top[slot, s, 1, :count] = top_logprobs[s, :count].view(torch.int32)
        if not prompt and int(row_params[P_LOGITS, row]):
            ring_logits[int(step) % 2, line] = logits[s]
            line += 1


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
