"""An expert's tokens: the pairs of each local expert, listed. Words and invariants: `routing`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap
from kernels.triton.tiles import check_ready

ALIGN_BLOCK = 2048
IDS_PER_WARP = 128  # four a lane, which are one load


@triton.jit
def _align(
    ids,  # int32 [N]
    offsets,  # int32 [E+1]
    pairs,  # int32 [N]
    ready,  # int32 [E], or unused
    N,
    expert_start,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    RESETS: tl.constexpr,
    PDL: tl.constexpr,
):
    """CTA e reads all ids, so that it needs nothing from its neighbours."""
    await_inputs(PDL)
    e = tl.program_id(0)
    if RESETS:
        tl.store(ready + e, 0)
    if NUM_BLOCKS == 1:
        _list_block(ids, offsets, pairs, N, expert_start, e, BLOCK)
    else:
        _list_blocks(ids, offsets, pairs, N, expert_start, e, BLOCK, NUM_BLOCKS)


@triton.jit
def _list_block(ids, offsets, pairs, N, expert_start, e, BLOCK: tl.constexpr):
    """`_align` of ids that one block holds: one scan counts this expert's pairs, in the upper half
    of a word, and those of the experts before it, in the lower."""
    pair = tl.arange(0, BLOCK)
    local = tl.load(ids + pair, mask=pair < N, other=-1) - expert_start
    counted = ((local >= 0) & (local < e)).to(tl.int32) + ((local == e).to(tl.int32) << 16)
    total = tl.sum(counted, axis=0)
    at = total & 0xFFFF
    rank = tl.cumsum(counted, axis=0) >> 16
    tl.store(offsets + e, at)
    if e == tl.num_programs(0) - 1:
        tl.store(offsets + e + 1, at + (total >> 16))
    tl.store(pairs + at + rank - 1, pair, mask=local == e)


@triton.jit
def _list_blocks(
    ids, offsets, pairs, N, expert_start, e, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr
):
    """`_align` of many ids, which are read twice."""
    lane = tl.arange(0, BLOCK)
    lower = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for i in range(NUM_BLOCKS):
        pair = i * BLOCK + lane
        local = tl.load(ids + pair, mask=pair < N, other=-1) - expert_start
        lower += ((local >= 0) & (local < e)).to(tl.int32)
        equal += (local == e).to(tl.int32)
    at = tl.sum(lower, axis=0)
    count = tl.sum(equal, axis=0)
    tl.store(offsets + e, at)
    if e == tl.num_programs(0) - 1:
        tl.store(offsets + e + 1, at + count)
    if count == 0:
        return
    for i in range(NUM_BLOCKS):
        pair = i * BLOCK + lane
        found = (tl.load(ids + pair, mask=pair < N, other=-1) - expert_start) == e
        rank = tl.cumsum(found.to(tl.int32), axis=0)
        tl.store(pairs + at + rank - 1, pair, mask=found)
        at += tl.sum(found.to(tl.int32), axis=0)


def align(
    launch: Launcher,
    ids: torch.Tensor,
    *,
    expert_start: int,
    offsets: torch.Tensor,
    pairs: torch.Tensor,
    ready: torch.Tensor | None = None,
) -> None:
    """List the pairs of each local expert: pairs[offsets[e]:offsets[e+1]], ascending.

    Args:
        ids: int32 [T, K], contiguous; other ranks' experts and -1 are left out.
        expert_start: id of local expert 0.
        offsets: int32 [E_local+1].
        pairs: int32 [T*K]; pair ids t*K + k. Entries from offsets[E_local] on are not written.
        ready: int32 [E_local], is set to zero, for the experts' products; may be left out.
    Raises:
        ValueError: ids strided, or pairs too short.
    Capture-safe.
    """
    _check_align(ids, pairs)
    check_ready(ready, offsets.shape[0] - 1)
    num_pairs = ids.numel()
    block = min(ALIGN_BLOCK, max(128, triton.next_power_of_2(num_pairs)))
    launch(
        _align,
        (offsets.shape[0] - 1,),
        ids,
        offsets,
        pairs,
        ids if ready is None else ready,
        num_pairs,
        expert_start,
        BLOCK=block,
        NUM_BLOCKS=triton.cdiv(num_pairs, block),
        RESETS=ready is not None,
        num_warps=max(1, min(8, block // IDS_PER_WARP)),
        **overlap(launch),
    )


def align_ref(
    ids: torch.Tensor,
    *,
    expert_start: int,
    offsets: torch.Tensor,
    pairs: torch.Tensor,
    ready: torch.Tensor | None = None,
) -> None:
    """`align` in plain torch."""
    _check_align(ids, pairs)
    if ready is not None:
        ready.zero_()
    num_local = offsets.shape[0] - 1
    local = ids.flatten().long() - expert_start
    local = torch.where((local < 0) | (local >= num_local), num_local, local)
    ends = torch.bincount(local, minlength=num_local + 1).cumsum(0)[:num_local]
    offsets[0] = 0
    offsets[1:] = ends
    num_listed = int(ends[-1])
    pairs[:num_listed] = local.argsort(stable=True)[:num_listed]


def _check_align(ids: torch.Tensor, pairs: torch.Tensor) -> None:
    if not ids.is_contiguous() or pairs.numel() < ids.numel():
        raise ValueError(
            f"ids must be contiguous and pairs hold {ids.numel()} entries, "
            f"got strides {ids.stride()} and {pairs.numel()} entries"
        )
