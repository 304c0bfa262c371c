"""Where each token of a step finds its KV: the slot that it writes, and the length it attends over.

Layouts and constants: `kernels.triton.state`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap
from kernels.triton.state import FAULT_NULL_PAGE


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
