"""Greedy sampling, kernel against oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.triton import sample
from kernels.triton.launch import JitLauncher

I32 = torch.int32
NAN, INF = float("nan"), float("inf")
LAUNCH = JitLauncher()


def _kernel(*args: Any, **kwargs: Any) -> None:
    sample.greedy(LAUNCH, *args, **kwargs)


BOTH = pytest.mark.parametrize("fn", [_kernel, sample.greedy_ref])


def _greedy(
    fn: Any, logits: torch.Tensor, sample_tok: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, chunks = logits.shape[0], sample.num_chunks(logits.shape[1])
    token, logprob = torch.full((rows,), 99, dtype=I32), torch.full((rows,), 99.0)
    fn(
        logits,
        torch.arange(rows, dtype=I32) if sample_tok is None else sample_tok,
        part_max=torch.full((rows, chunks), NAN),  # scratch may hold anything
        part_arg=torch.full((rows, chunks), 1 << 30, dtype=I32),
        part_sum=torch.full((rows, chunks), NAN),
        out_token=token,
        out_logprob=logprob,
    )
    return token, logprob


def _rand(rows: int, vocab: int) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 4


@BOTH
@pytest.mark.parametrize("vocab", [1, 7, 2047, 2048, 2049, 10001])
def test_greedy(fn: Any, vocab: int) -> None:
    wide = _rand(3, vocab + 5)
    wide[:, vocab:] = NAN  # past the row
    logits = wide[:, :vocab]
    token, logprob = _greedy(fn, logits)
    want = torch.log_softmax(logits.double(), 1)
    assert token.tolist() == want.argmax(1).tolist()
    torch.testing.assert_close(logprob.double(), want.amax(1), rtol=1e-5, atol=1e-6)


@BOTH
def test_greedy_of_the_largest_vocabulary(fn: Any) -> None:
    logits = _rand(1, 163840)
    logits[0, 163839] = 60.0
    token, logprob = _greedy(fn, logits)
    assert token.item() == 163839
    assert abs(logprob.item()) < 1e-6


@BOTH
def test_padding_is_left_alone(fn: Any) -> None:
    logits = _rand(4, 3000)
    alone = _greedy(fn, logits)
    logits[[1, 3]] = NAN
    token, logprob = _greedy(fn, logits, torch.tensor([6, -1, 0, -1], dtype=I32))
    assert token[[1, 3]].tolist() == [-1, -1]
    assert logprob[[1, 3]].tolist() == [0, 0]
    assert torch.equal(token[[0, 2]], alone[0][[0, 2]])
    assert torch.equal(logprob[[0, 2]], alone[1][[0, 2]])


@BOTH
@pytest.mark.parametrize("at", [(5, 6), (100, 4000), (2047, 2048), (0, 4999)])
def test_ties_go_to_the_lower_id(fn: Any, at: tuple[int, int]) -> None:
    logits = _rand(1, 5000).clamp(max=3)
    logits[0, list(at)] = 9.0
    assert _greedy(fn, logits)[0].item() == at[0]
    assert _greedy(fn, torch.zeros(1, 5000))[0].item() == 0


@BOTH
@pytest.mark.parametrize("bad", [NAN, -NAN, INF])
@pytest.mark.parametrize("at", [0, 2047, 2048, 4999])
def test_nan_and_inf_are_errors(fn: Any, bad: float, at: int) -> None:
    logits = _rand(2, 5000)
    good = _greedy(fn, logits)
    logits[1, at] = bad
    token, logprob = _greedy(fn, logits)
    assert token[1] == -1
    assert logprob[1].isnan()
    assert (token[0], logprob[0]) == (good[0][0], good[1][0])


@BOTH
def test_minus_inf_masks_a_token_unless_all_are(fn: Any) -> None:
    logits = torch.full((4, 5000), -INF)
    logits[1, 4321] = -3.0
    logits[2] = NAN
    logits[3, 2:4] = torch.tensor([1e30, -1e30])
    token, logprob = _greedy(fn, logits)
    assert token.tolist() == [-1, 4321, -1, 2]
    assert logprob.isnan().tolist() == [True, False, True, False]
    assert logprob[[1, 3]].tolist() == [0, 0]


def test_rows_are_independent() -> None:
    logits = _rand(4, 5000)
    token, logprob = _greedy(_kernel, logits)
    for s in range(4):
        one = _greedy(_kernel, logits[s : s + 1])
        assert torch.equal(token[s : s + 1], one[0])
        assert torch.equal(logprob[s : s + 1], one[1])


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="must be float32"):
        _greedy(_kernel, torch.zeros(1, 10, dtype=torch.bfloat16))
    part = torch.empty(1, 2)
    scratch = {"part_max": part, "part_arg": part.int(), "part_sum": part}
    with pytest.raises(ValueError, match=r"part_max must be \(1, 1\)"):
        _kernel(part, part.int(), **scratch, out_token=part, out_logprob=part)
