"""Which tokens a row may take: masks that the host wrote, brought to the device.

The mailbox says which rows have a new one (`kernels.triton.intake_rows`); `sample` reads them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap


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
