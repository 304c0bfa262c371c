"""Bias, penalties, minimum length and token masks, against plain numpy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.triton.draw_pipeline import _pick
from kernels.triton.logits_process import process_logits
from tests.cpu.sample_rows import LAUNCH, STEPS, Buffers, Row, Step, processed_logits, step_buffers

BOTH = pytest.mark.parametrize("step", STEPS)


def _rand(rows: int, vocab: int) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 4


def _rows(vocab: int) -> list[Row]:
    last = vocab - 1
    penalties = {"repetition": 1.3, "presence": 0.4, "frequency": 0.2}
    seen = {"prompt": (1, 5, last), "output": (0, 5, 5, last)}
    stops = {"stops": (3, last), "min_len": 11}
    return [
        Row(),
        Row(temperature=0.7),
        Row(bias={0: 5.0, last: -100.0, 7: 0.5}),
        Row(repetition=1.3, **seen),
        Row(repetition=0.8, **seen),
        Row(presence=-0.4, **seen),
        Row(frequency=1.5, **seen),
        Row(**penalties, **seen),
        Row(**stops),
        Row(allowed=(0, 2, 31 % vocab, last)),
        Row(bias={5: 9.0, 2: -3.0}, **penalties, **seen, **stops, allowed=range(1, vocab)),
    ]


@BOTH
@pytest.mark.parametrize("vocab", [31, 2047, 2048, 2049, 4100])
def test_processed_logits(step: Step, vocab: int) -> None:
    rows, wide = _rows(vocab), _rand(len(_rows(vocab)), vocab + 5)
    wide[:, vocab:] = float("nan")  # past the row
    b = step_buffers(wide[:, :vocab], rows)
    step(b)
    assert b["active"].tolist() == [0] + [1] * (len(rows) - 1)
    for s, row in enumerate(rows[1:], 1):
        want = torch.from_numpy(processed_logits(wide[s, :vocab], row))
        torch.testing.assert_close(b["processed"][s], want, rtol=1e-6, atol=1e-6)
        assert b["proc_max"][s].amax() == b["processed"][s].amax()
        assert b["out_token"][s] == want.argmax() or row.temperature > 0


@BOTH
def test_stops_are_allowed_from_min_len_on(step: Step) -> None:
    logits = torch.zeros(3, 40)
    logits[:, 6] = 9.0
    row = {"stops": (6,), "min_len": 20}
    b = step_buffers(logits, [Row(position=p, **row) for p in (19, 20, 21)])
    step(b)
    assert b["out_token"].tolist() == [0, 6, 6]
    assert b["active"].tolist() == [1, 0, 0]


@BOTH
def test_the_prompts_own_tokens_are_plain(step: Step) -> None:
    """A forced prompt token has the model's log-prob, whatever the request asks for its output."""
    logits = _rand(3, 100)
    row = Row(temperature=0.5, top_k=2, bias={1: 50.0}, processed_logprobs=True, prompt_len=10)
    rows = [replace(row, forced=7, position=p) for p in (9, 10)] + [Row(forced=7)]
    b = step_buffers(logits[:1].repeat(3, 1), rows)
    step(b)
    assert b["active"].tolist() == [0, 1, 0]
    assert b["out_token"].tolist() == [7, 7, 7]
    assert b["out_logprob"][0] == b["out_logprob"][2]
    assert b["out_logprob"][1] == float("-inf")


@BOTH
def test_a_row_that_asks_for_nothing_is_not_processed(step: Step) -> None:
    """Plain greedy rows read no row tensors but the scalars, and write no logits."""
    b = step_buffers(_rand(3, 100), [Row(), Row(temperature=1.0)], order=(0, -1, 1))
    step(b)
    assert b["processed"][:2].isnan().all()  # as before
    assert not b["processed"][2].isnan().any()
    assert b["active"].tolist() == [0, 0, 1]


@BOTH
def test_all_masked_and_nan_rows_end_alone(step: Step) -> None:
    rows = [
        Row(temperature=1.0, seed=1, top_n=2),
        Row(allowed=(), top_n=2),
        Row(temperature=1.0, allowed=(), top_p=0.5, top_k=3, top_n=2, processed_logprobs=True),
        Row(temperature=1.0, top_p=0.9, top_n=2),
        Row(top_n=2),
        Row(temperature=1.0, top_k=5, top_n=2, forced=3),
        Row(temperature=1.0, seed=2, top_p=0.8, top_n=2),
        Row(forced=3000),
    ]
    logits = _rand(len(rows), 3000)
    alone = step_buffers(logits[[0, 6]], [rows[0], rows[6]])
    step(alone)
    logits[3, 2999] = logits[4, 5] = logits[5, 0] = float("nan")
    b = step_buffers(logits, rows)
    step(b)
    for s in (1, 2, 3, 4, 5, 7):
        assert b["out_token"][s] == -1
        assert b["out_logprob"][s].isnan()
        assert set(b["top_ids"][s].tolist()) == {-1}
        assert b["top_logprobs"][s, : rows[s].top_n].isnan().all()
    for s, one in ((0, 0), (6, 1)):
        for name in ("out_token", "out_logprob", "top_ids", "top_logprobs"):
            assert torch.equal(b[name][s], alone[name][one])


@BOTH
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_token_that_is_masked_may_not_hide_a_broken_row(step: Step, bad: float) -> None:
    logits = _rand(1, 100)
    logits[0, 50] = bad
    b = step_buffers(logits, [Row(allowed=(1, 2, 3))])
    step(b)
    assert b["out_token"].item() == -1


def test_wrong_shapes_are_named() -> None:
    b = step_buffers(_rand(2, 100), [Row(), Row()])

    def wrong(name: str, value: torch.Tensor) -> Buffers:
        return {**b, name: value}

    for name, value in (
        ("token_mask", b["token_mask"][:, :3]),
        ("counts", b["counts"].long()),
        ("processed", torch.empty(2, 128)[:, :100]),
        ("logits", b["logits"].double()),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be torch\."):
            process_logits(LAUNCH, **_pick(process_logits, wrong(name, value)))
