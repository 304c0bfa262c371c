"""A plain read of much memory, with which a device's read bandwidth is measured.

Every word goes into a sum, so that none can be left out and the sums can be checked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher

BLOCK = 4096  # words; with 4 warps eight loads of 16 bytes a thread are on their way
PER_SM = 8  # programs


@triton.jit
def _read_kernel(
    words,  # i32 [num_blocks * BLOCK]
    sums,  # i32 [programs]
    num_blocks,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.int32)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(words + at, eviction_policy="evict_first")
    tl.store(sums + tl.program_id(0), tl.sum(total))


def read_words(launch: Launcher, words: torch.Tensor, *, out: torch.Tensor) -> None:
    """Read all words, each once.

    Args:
        words: int32 [n], contiguous, n a multiple of BLOCK.
        out: int32 [programs]; all of them together are the sum of the words, modulo 2**32.
    Raises:
        ValueError: other shapes or dtypes.
    Capture-safe: no sync, no allocation.
    """
    _check(words, out)
    launch(
        _read_kernel, (out.numel(),), words, out, words.numel() // BLOCK, BLOCK=BLOCK, num_warps=4
    )


def read_words_ref(words: torch.Tensor, *, out: torch.Tensor) -> None:
    """Oracle of `read_words`."""
    _check(words, out)
    programs = out.numel()
    blocks = words.view(-1, BLOCK)
    for program in range(programs):
        total = int(blocks[program::programs].sum(dtype=torch.int64)) & 0xFFFFFFFF
        out[program] = total - (1 << 32) if total >> 31 else total


def _check(words: torch.Tensor, out: torch.Tensor) -> None:
    if words.dtype != torch.int32 or words.dim() != 1 or words.numel() % BLOCK:
        raise ValueError(
            f"words: expected int32 [n] with n a multiple of {BLOCK}, got {words.dtype} "
            f"{list(words.shape)}"
        )
    if not words.is_contiguous() or not out.is_contiguous():
        raise ValueError("read_words takes contiguous tensors")
    if out.dtype != torch.int32 or out.dim() != 1 or not out.numel():
        raise ValueError(f"out: expected int32 [programs], got {out.dtype} {list(out.shape)}")
