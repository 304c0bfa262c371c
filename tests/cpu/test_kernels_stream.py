"""The plain read: every word is in a sum, once."""

from __future__ import annotations

import pytest
import torch

from kernels.triton.launch import JitLauncher
from kernels.triton.stream import BLOCK, read_words, read_words_ref


@pytest.mark.parametrize(("blocks", "programs"), [(1, 1), (7, 3), (5, 8)])
def test_every_word_is_read_once(blocks: int, programs: int) -> None:
    gen = torch.Generator().manual_seed(blocks)
    # The interpreter refuses sums that overflow; on a GPU they wrap.
    words = torch.randint(-(2**15), 2**15, (blocks * BLOCK,), generator=gen).to(torch.int32)
    got, want = (torch.empty(programs, dtype=torch.int32) for _ in range(2))
    read_words(JitLauncher(), words, out=got)
    read_words_ref(words, out=want)
    assert torch.equal(got, want)
    assert got.sum(dtype=torch.int64) == words.sum(dtype=torch.int64)


def test_the_oracle_wraps_as_the_kernel_does_on_a_gpu() -> None:
    words = torch.full((BLOCK,), 2**31 - 1, dtype=torch.int32)
    out = torch.empty(1, dtype=torch.int32)
    read_words_ref(words, out=out)
    assert int(out) == -BLOCK


@pytest.mark.parametrize(
    ("words", "out"),
    [
        (torch.zeros(BLOCK + 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)),
        (torch.zeros(BLOCK), torch.zeros(1, dtype=torch.int32)),
        (torch.zeros(BLOCK, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)),
        (torch.zeros(2 * BLOCK, dtype=torch.int32)[::2], torch.zeros(1, dtype=torch.int32)),
    ],
)
def test_other_tensors_are_refused(words: torch.Tensor, out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"words|out|contiguous"):
        read_words(JitLauncher(), words, out=out)
