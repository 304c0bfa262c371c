"""What a mailbox changes in the row state: cancels, admits, page-table entries, token masks.

A device function of `kernels.triton.intake`, and the same in plain torch. Layouts and constants:
`kernels.triton.state`. Invariant: row state is written by one CTA only, so its order is program
order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

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
    F_MASKED,
    FREE,
    MAX_STOP_LENGTH,
    P_FLAGS,
    PARAMS,
    PREFILL,
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
def apply_mailbox(
    box,  # int32 [WORDS]
    lane,  # int32 [BLOCK], 0 …
    step,
    num_cancels,
    num_admits,
    num_pages,
    num_masks,
    phase,
    seq_len,
    limit,
    page_table,
    stop_ids,
    row_params,
    deadline_ns,
    seed,
    bias_ids,
    bias_values,
    stop_sequences,
    tail,
    mask_step,
    begin_ns,
    max_pages,
    STOPS: tl.constexpr,
    STOPS2: tl.constexpr,
    PITCH: tl.constexpr,
    CANCELS: tl.constexpr,
    ADMITS: tl.constexpr,
    PAGES: tl.constexpr,
    MASKS: tl.constexpr,
    HEAD: tl.constexpr,
    SEED: tl.constexpr,
    PARAMS: tl.constexpr,
    PARAMS2: tl.constexpr,
    BIASES: tl.constexpr,
    BIASES2: tl.constexpr,
    SEQ: tl.constexpr,
    LEN: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    ON_DEVICE: tl.constexpr,
):
    """Cancels, admits, page-table entries, token masks, in that order; shapes as in `_intake`."""
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
        tl.store(stop_ids + row * STOPS + stop, tl.where(stop < stops, ids, -1), mask=stop < STOPS)
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


def apply_mailbox_ref(
    box: torch.Tensor,
    step: int,
    counts: tuple[int, int, int, int],
    rows: RowState,
    *,
    layout: MailboxLayout,
    now_ns: int,
) -> None:
    """`apply_mailbox` in plain torch.

    Args:
        box: int32 [layout.words], this step's.
        counts: of cancels, admits, page-table entries and masks.
        rows: changed.
        now_ns: time on the clock of the deadlines.
    """
    cancels, admits, pages, masks = counts
    rows.phase[box[layout.cancels :][:cancels].long()] = FREE
    at = layout.admits
    for _ in range(admits):
        record = box[at : at + int(box[at])]
        admit(rows, int(record[ADMIT_ROW]), record, now_ns=now_ns)
        at += len(record)
    update = box[layout.pages :][: 3 * pages].view(-1, 3).long()
    rows.page_table[update[:, 0], update[:, 1]] = update[:, 2].int()
    flags = rows.param(P_FLAGS)
    for row, on in box[layout.masks :][: 2 * masks].view(-1, 2).tolist():
        flags[row] = (flags[row] | F_MASKED) if on else (flags[row] & ~F_MASKED)
        if on:
            rows.mask_step[row] = step


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
