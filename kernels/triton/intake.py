"""Before a step: apply the mailbox to the row state, list the step's tokens; publish the step
before it. The first is in `intake_rows`, the second in `intake_tokens`.

Layouts and constants: `kernels.triton.state`. Invariant: row state is written by one CTA only, so
its order is program order.
"""

from __future__ import annotations

import time

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from kernels.triton.intake_rows import apply_mailbox, apply_mailbox_ref
from kernels.triton.intake_tokens import list_tokens, list_tokens_ref
from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap
from kernels.triton.publish import store_release_sys
from kernels.triton.rows import RowState
from kernels.triton.state import (
    ADMIT_HEADER,
    ADMIT_SEED,
    F_MASKED,
    FAULT_NONE,
    FAULT_TOO_MANY,
    IS_PENDING,
    MAX_BIASES,
    MAX_STOP_LENGTH,
    MAX_STOP_SEQUENCES,
    P_FORCED_LEN,
    P_PROMPT_LEN,
    PARAMS,
    RING_SLOTS,
    MailboxLayout,
)


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
        apply_mailbox(
            box, lane, step, num_cancels, num_admits, num_pages, num_masks,
            phase, seq_len, limit, page_table, stop_ids, row_params, deadline_ns, seed,
            bias_ids, bias_values, stop_sequences, tail, mask_step, begin_ns,
            max_pages, STOPS, STOPS2, PITCH, CANCELS, ADMITS, PAGES, MASKS, HEAD, SEED,
            PARAMS, PARAMS2, BIASES, BIASES2, SEQ, LEN, MASKED, BLOCK, ON_DEVICE,
        )  # fmt: skip

    bad = list_tokens(
        box, lane, num_chunks, phase, seq_len, last_token, row_params, forced_tokens, tail,
        tok_row, tok_pos, tok_id, sample_tok, sample_row, sample_pos, forced,
        T, S, max_seq_len, R, R2, PITCH, CHUNKS, IDS, LEN, PROMPT_LEN, FORCED_LEN, BLOCK,
    )  # fmt: skip
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
    counts = (cancels, admits, pages, masks)
    apply_mailbox_ref(box, int(step), counts, rows, layout=layout, now_ns=int(begin_ns))
    bad = list_tokens_ref(
        box,
        chunks,
        forced_tokens,
        rows,
        layout=layout,
        tok_row=tok_row,
        tok_pos=tok_pos,
        tok_id=tok_id,
        sample_tok=sample_tok,
        sample_row=sample_row,
        sample_pos=sample_pos,
        forced=forced,
    )
    fault[0] = FAULT_TOO_MANY if bad else FAULT_NONE
