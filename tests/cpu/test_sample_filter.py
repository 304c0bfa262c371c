"""The kept set of top-k, top-p and min-p, against sorting in plain numpy."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.triton.draw_filter import is_kept_ref
from tests.cpu.sample_rows import STEPS, Buffers, Row, Step, probabilities, step_buffers

BOTH = pytest.mark.parametrize("step", STEPS)


def _kept(b: Buffers, rows: list[Row]) -> list[set[int]]:
    """The sets that (keep_value, keep_id, min_p) describe."""
    y = b["processed"]
    t = torch.tensor([row.temperature for row in rows])
    z = (y - y.amax(1, keepdim=True)) / t[:, None]
    min_z = torch.tensor([row.min_p for row in rows]).log()
    kept = is_kept_ref(y, z, b["keep_value"], b["keep_id"], min_z)
    return [set(k.nonzero()[:, 0].tolist()) for k in kept]


def _want(logits: torch.Tensor, rows: list[Row]) -> list[set[int]]:
    found = (probabilities(x.numpy(), row) for x, row in zip(logits, rows, strict=True))
    return [set(np.flatnonzero(p).tolist()) for p in found]


def _rand(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab + seed)) * 3


SETTINGS = [
    Row(temperature=0.6, top_k=k, top_p=p, min_p=m)
    for k, p, m in itertools.product((0, 1, 40), (1.0, 0.9, 1e-6), (0.0, 0.02))
]


@BOTH
@pytest.mark.parametrize("vocab", [45, 2049])
def test_filters(step: Step, vocab: int) -> None:
    logits = _rand(len(SETTINGS), vocab)
    b = step_buffers(logits, SETTINGS)
    step(b)
    assert _kept(b, SETTINGS) == _want(logits, SETTINGS)


@BOTH
def test_filters_of_a_vocabulary_of_several_tiles(step: Step) -> None:
    """A tile of the search is 16384 columns."""
    rows = [
        Row(temperature=1.0, top_k=20000),
        Row(temperature=0.5, top_k=3, top_p=0.95),
        Row(temperature=0.5, top_k=3),
        Row(temperature=2.0, top_p=0.95),
    ]
    logits = _rand(len(rows), 33000)
    logits[1:3, [0, 16384, 32999]] = torch.tensor([20.0, 21.0, 19.5])
    b = step_buffers(logits, rows)
    step(b)
    assert _kept(b, rows) == _want(logits, rows)


@BOTH
@pytest.mark.parametrize("spread", [1, 3])
def test_the_lowest_ids_among_equals_are_kept(step: Step, spread: int) -> None:
    """Logits of few values: nearly every threshold cuts through equals."""
    settings = [
        Row(temperature=1.0, top_k=k, top_p=p)
        for k, p in itertools.product((0, 300, 4999), (1.0, 0.8037))
    ]
    generator = torch.Generator().manual_seed(spread)
    logits = torch.randint(-spread, spread, (len(settings), 5000), generator=generator).float()
    b = step_buffers(logits, settings)
    step(b)
    assert _kept(b, settings) == _want(logits, settings)


@BOTH
def test_top_p_counts_equals_exactly(step: Step) -> None:
    row = Row(temperature=1.0, top_p=0.5)
    rows = [row, replace(row, top_p=0.75), replace(row, top_p=0.501), replace(row, top_p=0.25)]
    logits = torch.zeros(4, 4)
    b = step_buffers(logits, rows)
    step(b)
    assert _kept(b, rows) == [{0, 1}, {0, 1, 2}, {0, 1, 2}, {0}]


@BOTH
def test_zeros_of_both_signs_are_equal(step: Step) -> None:
    rows = [Row(temperature=1.0, top_k=2)] * 2
    logits = torch.tensor([[-1.0, -0.0, 0.0, 0.0], [0.0, -1.0, -0.0, -0.0]])
    b = step_buffers(logits, rows)
    step(b)
    assert _kept(b, rows) == [{1, 2}, {0, 2}]


@BOTH
def test_masked_tokens_are_never_kept(step: Step) -> None:
    row = Row(temperature=1.0, allowed=(3, 9, 70))
    rows = [row, *(replace(row, top_k=k, top_p=p) for k in (1, 3, 50) for p in (1.0, 0.9999))]
    logits = _rand(1, 100).repeat(len(rows), 1)
    logits[:, [3, 9, 70]] = torch.tensor([1.0, 3.0, 2.0])
    b = step_buffers(logits, rows)
    step(b)
    assert _kept(b, rows) == [{3, 9, 70}, {9}, {9}, *[{3, 9, 70}] * 4]


@BOTH
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_logits_and_temperatures(step: Step, scale: float) -> None:
    """Nothing overflows: differences to the largest logit are scaled, not logits."""
    rows = [
        Row(temperature=t, top_k=k, top_p=p, seed=i)
        for i, (t, k, p) in enumerate(
            itertools.product((1e-40, 1e-6, 1e6), (0, 2), (1.0, 0.9)),
        )
    ]
    logits = _rand(1, 50).repeat(len(rows), 1) * scale
    b = step_buffers(logits, rows)
    step(b)
    assert ((b["out_token"] >= 0) & (b["out_token"] < 50)).all()
    assert b["out_logprob"].isfinite().all()
    for kept, row, token in zip(_kept(b, rows), rows, b["out_token"].tolist(), strict=True):
        assert len(kept) <= (row.top_k or 50)
        assert token in kept


@BOTH
def test_greedy_rows_are_not_filtered(step: Step) -> None:
    logits = _rand(2, 100)
    rows = [Row(top_k=1, top_p=0.1, min_p=0.5, processed_logprobs=True, top_n=20)] * 2
    b = step_buffers(logits, rows)
    step(b)
    want = logits.log_softmax(1).sort(dim=1, descending=True)
    torch.testing.assert_close(b["top_logprobs"], want.values[:, :20], rtol=1e-5, atol=1e-5)


def test_the_kept_set_is_the_rows_own() -> None:
    """The same bits whatever the other rows are."""
    logits = _rand(6, 2100, seed=5)
    rows = SETTINGS[::3]
    b = step_buffers(logits, rows)
    STEPS[0](b)
    for s in (1, 5):
        one = step_buffers(logits[s : s + 1], [rows[s]])
        STEPS[0](one)
        for name in ("keep_value", "keep_id", "out_token", "out_logprob", "draw_mass"):
            assert torch.equal(b[name][s], one[name][0]), (name, s)
