"""Top-n log-probs."""

from __future__ import annotations

import pytest
import torch

from kernels.triton import topn
from tests.cpu.sample_rows import LAUNCH, STEPS, Row, Step, probabilities, step_buffers

BOTH = pytest.mark.parametrize("step", STEPS)
INF = float("inf")


def _rand(rows: int, vocab: int) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 4


@BOTH
@pytest.mark.parametrize("vocab", [5, 2048, 4200])
def test_top_n_of_the_model(step: Step, vocab: int) -> None:
    """Of the raw logits, whatever the request does to them."""
    rows = [Row(top_n=n) for n in (0, 1, 20)] + [Row(temperature=2.0, top_k=3, top_n=7, seed=1)]
    logits = _rand(len(rows), vocab)
    b = step_buffers(logits, rows)
    step(b)
    value, ids = logits.double().log_softmax(1).sort(dim=1, descending=True)
    for s, row in enumerate(rows):
        n = min(row.top_n, vocab)
        assert b["top_ids"][s].tolist() == ids[s, :n].tolist() + [-1] * (20 - n)
        got = b["top_logprobs"][s]
        torch.testing.assert_close(got[:n].double(), value[s, :n], rtol=1e-5, atol=1e-5)
        assert got[n:].tolist() == [-INF] * (20 - n)
    assert b["top_logprobs"][1, 0] == b["out_logprob"][1]


@BOTH
def test_top_n_of_what_is_drawn_from(step: Step) -> None:
    row = Row(temperature=0.7, top_k=4, min_p=0.01, top_n=6, processed_logprobs=True)
    logits = _rand(1, 3000)
    b = step_buffers(logits, [row])
    step(b)
    p = torch.from_numpy(probabilities(logits[0].numpy(), row))
    value, ids = p.log().sort(descending=True, stable=True)
    n = int((p > 0).sum())
    assert 1 < n <= 4
    assert b["top_ids"][0].tolist() == ids[:n].tolist() + [-1] * (20 - n)
    got = b["top_logprobs"][0]
    torch.testing.assert_close(got[:n].double(), value[:n], rtol=1e-5, atol=1e-5)
    assert got[n:].tolist() == [-INF] * (20 - n)
    at = b["top_ids"][0].tolist().index(b["out_token"].item())
    assert got[at] == b["out_logprob"][0]


@BOTH
def test_equals_come_in_the_order_of_their_ids(step: Step) -> None:
    logits = torch.full((1, 5000), -3.0)
    logits[0, [4999, 17, 2048, 3]] = torch.tensor([5.0, 5.0, 5.0, 7.0])
    logits[0, [100, 50]] = torch.tensor([0.0, -0.0])
    b = step_buffers(logits, [Row(top_n=8)])
    step(b)
    assert b["top_ids"][0, :8].tolist() == [3, 17, 2048, 4999, 50, 100, 0, 1]


@BOTH
def test_tokens_without_probability_are_no_answer(step: Step) -> None:
    logits = torch.full((1, 100), -INF)
    logits[0, [40, 60]] = 1.0
    b = step_buffers(logits, [Row(top_n=4)])
    step(b)
    assert b["top_ids"][0, :4].tolist() == [40, 60, -1, -1]
    assert b["top_logprobs"][0, 2:].tolist() == [-INF] * 18


def test_wrong_top_n_buffers_are_named() -> None:
    b = step_buffers(_rand(1, 100), [Row()])
    names = (
        "logits",
        "processed",
        "sample_tok",
        "sample_row",
        "draw_norm",
        "keep_value",
        "keep_id",
    )
    names += ("temperature", "min_p", "top_n", "top_part", "top_logprobs")
    with pytest.raises(ValueError, match=r"top_ids must be \(1, 20\)"):
        topn.top_tokens(LAUNCH, top_ids=b["top_ids"][:, :5], **{n: b[n] for n in names})
