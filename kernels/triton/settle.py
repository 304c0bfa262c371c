"""After a step: append the sampled tokens, test the endings, publish to the ring; device
timestamps.

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
from kernels.triton.state import DECODE, ERROR, FREE, HEADER, LENGTH, RING_SLOTS, RUNNING, STOP


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
    PDL: tl.constexpr,
):
    await_inputs(PDL)
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
        **overlap(launch),
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
