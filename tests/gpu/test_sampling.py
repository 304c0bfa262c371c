"""Sampling on the device at a real vocabulary: against its oracle, in any company, in a graph."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.triton import sample
from kernels.triton.draw_pipeline import sample_step, sample_step_ref
from kernels.triton.launch import Launcher
from tests.cpu.sample_rows import (
    DRAWN,
    LOGITS,
    ONE_IS_LEFT,
    Buffers,
    Row,
    check_frequencies,
    step_buffers,
)

VOCAB = 129280
I32 = torch.int32
OUTPUTS = ("out_token", "out_logprob", "top_ids", "top_logprobs")
SEEN = {"prompt": (1, 5, 129279), "output": (0, 5, 5, 129279)}
ROWS = [
    Row(),
    Row(top_n=20),
    Row(temperature=0.8, seed=1, top_n=3),
    Row(temperature=1.0, top_k=50, seed=2),
    Row(temperature=1.0, top_k=100000, seed=3, top_n=5),
    Row(temperature=0.6, top_p=0.95, seed=4, processed_logprobs=True, top_n=20),
    Row(temperature=1.5, top_k=1000, top_p=0.9, min_p=0.01, seed=2**63 + 1, position=131071),
    Row(temperature=1.0, min_p=0.05, seed=6, processed_logprobs=True, top_n=20),
    Row(repetition=1.3, presence=0.4, frequency=0.2, **SEEN),
    Row(temperature=0.9, seed=7, allowed=range(3, VOCAB, 11), top_p=0.8),
    Row(bias={5: 9.0, 129279: -3.0}, stops=(3, 129279), min_len=11, processed_logprobs=True),
    Row(temperature=1.0, top_k=1, seed=8, forced=77, processed_logprobs=True),
]


def _logits(rows: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows)) * 3


def _on_device(logits: torch.Tensor, rows: Sequence[Row], order: Sequence[int]) -> Buffers:
    return {k: v.cuda() for k, v in step_buffers(logits, rows, order=order).items()}


def _run(
    launcher: Launcher, logits: torch.Tensor, rows: Sequence[Row], order: Sequence[int]
) -> Buffers:
    b = _on_device(logits, rows, order)
    sample_step(launcher, b)
    return {name: tensor.cpu() for name, tensor in b.items()}


def test_against_the_oracle(launcher: Launcher) -> None:
    logits, order = _logits(len(ROWS)), range(len(ROWS))
    got = _run(launcher, logits, ROWS, order)
    want = step_buffers(logits, ROWS, order=order)
    sample_step_ref(want)
    assert got["out_token"].tolist() == want["out_token"].tolist()
    assert torch.equal(got["top_ids"], want["top_ids"])
    for name in ("out_logprob", "top_logprobs"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=2e-5)
    # The top token's log-prob and the token's own are the same bits where they are the same.
    same = got["top_ids"] == got["out_token"][:, None]
    assert same.any()
    own = got["out_logprob"][:, None].expand_as(same)
    assert torch.equal(got["top_logprobs"][same], own[same])


def test_filters_keep_what_sorting_keeps(launcher: Launcher) -> None:
    grid = itertools.product((0, 1, 2, 50, 64, 65, 5000), (1.0, 0.97, 0.5037, 1e-6), (0.0, 0.02))
    rows = [Row(temperature=0.7, top_k=k, top_p=p, min_p=m) for k, p, m in grid]
    logits = _logits(len(rows), 40000)
    logits[1::2] = (logits[1::2] * 4).round() / 4  # equals nearly everywhere
    got = _run(launcher, logits, rows, range(len(rows)))
    want = step_buffers(logits, rows)
    sample_step_ref(want)
    for s, row in enumerate(rows):
        # A threshold between two logits is as good as the lower one of those it keeps.
        one, two = (_kept(b, s) for b in (got, want))
        # The oracle adds in fp64: where thousands are kept, top-p may end one token apart.
        apart = int((one != two).sum())
        assert apart <= (int(two.sum()) // 1000 if row.top_p < 1 else 0), (row, apart)
    assert got["out_token"].tolist() == want["out_token"].tolist()


def _kept(b: Buffers, s: int) -> torch.Tensor:
    y = b["processed"][s]
    ids = torch.arange(len(y))
    return (y > b["keep_value"][s]) | ((y == b["keep_value"][s]) & (ids <= b["keep_id"][s]))


def test_a_rows_bits_are_its_own(launcher: Launcher) -> None:
    logits = _logits(len(ROWS))
    together = _run(launcher, logits, ROWS, range(len(ROWS)))
    for s in range(len(ROWS)):
        alone = _run(launcher, logits[s : s + 1], ROWS, [s])
        crowd = _run(launcher, logits[[0, 0, s, 3]], ROWS, [4, -1, s, 9])
        for name in OUTPUTS:
            assert torch.equal(together[name][s].view(I32), alone[name][0].view(I32)), (name, s)
            assert torch.equal(together[name][s].view(I32), crowd[name][2].view(I32)), (name, s)


def test_forced_is_sampled_and_greedy_is_greedy(launcher: Launcher) -> None:
    logits, order = _logits(len(ROWS)), range(len(ROWS))
    drawn = _run(launcher, logits, ROWS, order)
    forced = [
        replace(row, forced=token)
        for row, token in zip(ROWS, drawn["out_token"].tolist(), strict=True)
    ]
    again = _run(launcher, logits, forced, order)
    for name in OUTPUTS:
        assert torch.equal(drawn[name].view(I32), again[name].view(I32)), name
    b = _on_device(logits, ROWS, order)
    names = ("part_max", "part_arg", "part_sum", "out_token", "out_logprob")
    sample.greedy(launcher, b["logits"], b["sample_tok"], **{n: b[n] for n in names})
    for name in ("out_token", "out_logprob"):
        assert torch.equal(b[name][:2].cpu().view(I32), drawn[name][:2].view(I32))


def test_bad_rows_end_alone(launcher: Launcher) -> None:
    logits, order = _logits(len(ROWS)), range(len(ROWS))
    good = _run(launcher, logits, ROWS, order)
    for s in range(0, len(ROWS), 3):
        logits[s, VOCAB - 1 - s] = float("nan")
    rows = [replace(row, allowed=()) if s % 3 == 1 else row for s, row in enumerate(ROWS)]
    bad = _run(launcher, logits, rows, order)
    for s in range(len(ROWS)):
        if s % 3 == 2:
            assert all(torch.equal(good[n][s], bad[n][s]) for n in OUTPUTS)
        else:
            assert bad["out_token"][s] == -1
            assert bad["out_logprob"][s].isnan()


def _draws(launcher: Launcher, row: Row, rounds: int) -> np.ndarray:
    """2000 draws a round, each at a position of its own."""
    draws, seen = 2000, []
    b = _on_device(LOGITS.repeat(draws, 1), [row], [0] * draws)
    for i in range(rounds):
        b["tok_pos"][2:] = torch.arange(i * draws, (i + 1) * draws, dtype=I32)
        sample_step(launcher, b)
        seen.append(b["out_token"].cpu().numpy())
    return np.concatenate(seen)


@pytest.mark.parametrize("row", DRAWN, ids=str)
def test_frequencies_match_the_probabilities(launcher: Launcher, row: Row) -> None:
    drawn = _draws(launcher, row, 50)
    assert len(drawn) == 100_000
    check_frequencies(drawn, row)


@pytest.mark.parametrize(("row", "left"), ONE_IS_LEFT, ids=str)
def test_corners_that_leave_one_token(launcher: Launcher, row: Row, left: set[int]) -> None:
    assert set(_draws(launcher, row, 1).tolist()) == left


def test_replay_follows_its_inputs(launcher: Launcher) -> None:
    logits, order = _logits(len(ROWS)), range(len(ROWS))
    b = _on_device(logits, ROWS, order)
    sample_step(launcher, b)  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_step(launcher, b)
    other = _on_device(logits.flip(0), ROWS[::-1], order)
    for name, tensor in other.items():
        b[name].copy_(tensor)
    graph.replay()
    want = _run(launcher, logits, ROWS, order)
    for name in OUTPUTS:
        assert torch.equal(b[name].cpu().flip(0).view(I32), want[name].view(I32)), name
