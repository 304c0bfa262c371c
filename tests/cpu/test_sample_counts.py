"""Counting of the tokens that a penalised row has seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.triton import logits_counts
from kernels.triton.launch import JitLauncher

I32 = torch.int32
PROMPT = -(2**31)
VOCAB = 1100


def _kernel(*args: Any, **kwargs: Any) -> None:
    logits_counts.count_tokens(JitLauncher(), *args, **kwargs)


Count = Callable[..., None]
BOTH = pytest.mark.parametrize("count", [_kernel, logits_counts.count_tokens_ref])


def _state(rows: int = 3) -> dict[str, torch.Tensor]:
    """Row 0 has no penalty, row 1 one of each kind, row 2 repetition only."""
    return {
        "prompt_len": torch.tensor([2, 4, 1], dtype=I32),
        "repetition": torch.tensor([1.0, 1.0, 0.9]),
        "presence": torch.tensor([0.0, 0.5, 0.0]),
        "frequency": torch.tensor([0.0, -0.5, 0.0]),
        "fresh": torch.zeros(rows, dtype=I32),
        "counts": torch.zeros(rows, VOCAB, dtype=I32),
    }


def _step(count: Count, state: dict[str, torch.Tensor], tokens: list[tuple[int, int, int]]) -> None:
    """A step over (row, position, id), padded."""
    padded = [*tokens, (-1, 0, -1), (-1, 0, -1)]
    columns = [torch.tensor(column, dtype=I32) for column in zip(*padded, strict=True)]
    count(*columns, **state)


@BOTH
def test_prompts_set_a_bit_and_outputs_are_counted(count: Count) -> None:
    state = _state()
    prompt = [(1, 0, 7), (1, 1, 7), (1, 2, 1099), (1, 3, 0)]
    _step(count, state, [(0, 0, 7), *prompt, (2, 0, 5)])
    _step(count, state, [(0, 1, 7), (1, 4, 9), (2, 1, 5)])
    _step(count, state, [(1, 5, 7), (1, 6, 8), (2, 2, 6)])
    counts = state["counts"]
    assert not counts[0].any()
    found = {i: counts[1, i].item() for i in counts[1].nonzero()[:, 0].tolist()}
    assert found == {0: PROMPT, 7: PROMPT + 1, 8: 1, 9: 1, 1099: PROMPT}
    found = {i: counts[2, i].item() for i in counts[2].nonzero()[:, 0].tolist()}
    assert found == {5: PROMPT + 1, 6: 1}


@BOTH
def test_a_fresh_row_starts_from_nothing(count: Count) -> None:
    state = _state()
    state["counts"][:] = 9
    state["fresh"][:2] = 1
    _step(count, state, [(1, 0, 3), (1, 4, 3), (2, 0, 3)])
    assert state["fresh"].tolist() == [0, 0, 0]
    assert (state["counts"][0] == 9).all()  # without a penalty: never read
    assert state["counts"][1].nonzero()[:, 0].tolist() == [3]
    assert state["counts"][1, 3] == PROMPT + 1
    assert state["counts"][2, 3] == PROMPT + 9
    assert state["counts"][2, 4] == 9


@BOTH
def test_counts_do_not_depend_on_how_tokens_came(count: Count) -> None:
    """One long chunk, as after a preemption, or token by token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (2100,), generator=generator).tolist()
    tokens = [(1, i, token) for i, token in enumerate(ids)]
    whole, parts = _state(), _state()
    whole["prompt_len"][1] = parts["prompt_len"][1] = 600
    _step(count, whole, tokens)
    for start in range(0, 2100, 700):
        _step(count, parts, tokens[start : start + 700])
    assert torch.equal(whole["counts"], parts["counts"])
    assert (whole["counts"][1] & 0x7FFFFFFF).sum() == 1500
    for token in set(ids[:600]):
        assert whole["counts"][1, token] < 0


@BOTH
def test_ids_outside_the_vocabulary_are_left_out(count: Count) -> None:
    state = _state()
    _step(count, state, [(1, 9, VOCAB), (1, 9, -1), (0, 9, 3)])
    assert not state["counts"].any()


def test_wrong_counts_are_named() -> None:
    state = _state()
    state["counts"] = state["counts"][:2]
    with pytest.raises(ValueError, match=r"int32 \[3, vocabulary\]"):
        _step(_kernel, state, [])
