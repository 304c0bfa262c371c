"""The row contract on the device: each setting has its bits in any company, forced or drawn."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from runtime import Runtime, SamplingParams
from runtime.sampling import PROFILES
from tests.contract import (
    Ask,
    Got,
    add,
    ask_all,
    collect,
    everything,
    first_end,
    mask_of,
    random_calls,
    random_prompt,
)
from tests.gpu.conftest import Load
from tests.gpu.models import LADDERS

VOCAB = 2048


def prompt(n: int, seed: int = 0) -> tuple[int, ...]:
    return random_prompt(n, seed, VOCAB)


def params(**settings: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 12, "ignore_eos": True} | settings))


def one(runtime: Runtime, ask: Ask) -> Got:
    (got,) = ask_all(runtime, [ask])
    return got


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_everything_has_the_same_bits_in_any_company_ladder_and_run(name: str, load: Load) -> None:
    asks = everything(VOCAB, longest=200)
    want: list[tuple[Any, ...]] = []
    for ladder in LADDERS:
        with load(name, ladder=ladder) as runtime:
            assert runtime.model_config.vocab_size == VOCAB
            orders = {
                "alone": [one(runtime, ask) for ask in asks],
                "all": ask_all(runtime, asks),
                "reversed, ahead": ask_all(runtime, asks[::-1], ahead=2)[::-1],
                "three at a time": ask_all(runtime, asks, most=3, ahead=2),
            }
            for how, got in orders.items():
                bits = [answer.bits for answer in got]
                want = want or bits
                for ask, a, b in zip(asks, bits, want, strict=True):
                    assert a == b, f"ladder {ladder}, {how}: {ask.params}"
    assert len({repr(bits) for bits in want}) == len(asks)


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_everything_has_the_same_bits_alone_and_among_255_others(name: str, load: Load) -> None:
    asks = everything(VOCAB, longest=200)
    others = [
        Ask(prompt(1 + 7 * i % 90, 1000 + i), params(temperature=0.5 + i % 3, seed=i))
        for i in range(256 - len(asks))
    ]
    rows = {"bs": 256, "ladder": "1,8,256,256+512", "logits_rows": len(asks)}
    with load(name, **rows) as runtime:
        want = [one(runtime, ask).bits for ask in asks]
        first, last = asks[::2], asks[1::2]
        got = [answer.bits for answer in ask_all(runtime, [*first, *others, *last], ahead=2)]
    got = got[: len(first)] + got[-len(last) :]
    for ask, a, b in zip(first + last, got, want[::2] + want[1::2], strict=True):
        assert a == b, f"{ask.params}"


@pytest.mark.parametrize("seed", range(3))
def test_rows_leave_nothing_behind_for_their_next_owner(seed: int, load: Load) -> None:
    asks = everything(VOCAB, longest=100)
    with load("fp8") as runtime:
        want = [one(runtime, ask) for ask in asks]
        assert random_calls(runtime, asks, want, seed) > 20


@pytest.mark.parametrize("model", ["bf16", "fp8"])
def test_a_forced_run_has_the_bits_of_the_sampled_one(model: str, load: Load) -> None:
    """Every profile, as it is and with twenty alternatives."""
    others = [Ask(prompt(5, i), params(temperature=1.0, seed=i)) for i in range(4)]
    with load(model) as runtime:
        for name, more in itertools.product(PROFILES, ({}, {"logprobs": 20})):
            settings: dict[str, Any] = {"max_tokens": 40, "seed": 11, "ignore_eos": True} | more
            ask = Ask(prompt(65), SamplingParams.profile(name, **settings))
            sampled = one(runtime, ask)
            forced = settings | {"forced_tokens": sampled.tokens}
            again = Ask(ask.prompt, SamplingParams.profile(name, **forced))
            assert one(runtime, again).bits == sampled.bits, (name, more)
            crowd = ask_all(runtime, [*others, again], ahead=2)
            assert crowd[-1].bits == sampled.bits, (name, more)


def test_prompt_logprobs_are_those_of_forced_tokens(load: Load) -> None:
    """The same text scored as a prompt, in chunks, and as forced output: the same bits."""
    text = prompt(90, 3)
    with load("fp8") as runtime:
        scored = one(runtime, Ask(text, params(prompt_logprobs=20, max_tokens=1)))
        forced_params = params(forced_tokens=text[30:], max_tokens=60, logprobs=20)
        forced = one(runtime, Ask(text[:30], forced_params))
    assert sorted(scored.prompt) == list(range(1, 90))
    for i, token in enumerate(text[30:]):
        assert scored.prompt[30 + i] == (token, forced.logprobs[i], forced.tops[i])


def test_logprobs_are_those_of_the_returned_logits(load: Load) -> None:
    """In float64; log-probs are compared with the twin's, and so with transformers', elsewhere."""
    with load("bf16") as runtime:
        got = one(runtime, Ask(prompt(20), params(return_logits=True, logprobs=20, max_tokens=30)))
    for token, logprob, top, logits in zip(
        got.tokens, got.logprobs, got.tops, got.logits, strict=True
    ):
        x = logits.astype(np.float64)
        want = x - x.max() - np.log(np.exp(x - x.max()).sum())
        assert token == int(logits.argmax())
        assert abs(logprob - want[token]) < 1e-4
        assert np.abs(np.array(top[1]) - np.sort(want)[::-1][:20]).max() < 1e-4


def test_a_mask_that_allows_nothing_fails_its_row_alone(load: Load) -> None:
    with load("bf16") as runtime:
        neighbours = everything(VOCAB)[:6]
        want = [one(runtime, ask).bits for ask in neighbours]
        bad = Ask(prompt(6), params(temperature=1.0), mask_of([], VOCAB))
        got = ask_all(runtime, [*neighbours[:3], bad, *neighbours[3:]], ahead=2)
    failed = got.pop(3)
    assert (failed.tokens, failed.reason) == ([-1], "error")
    assert [answer.bits for answer in got] == want


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_a_request_whose_numbers_are_not_finite_fails_alone(name: str, load: Load) -> None:
    """One token's embedding is NaN, through experts and pages that others get afterwards."""
    neighbours = everything(VOCAB, longest=200)[:6]
    with load(name) as runtime:
        whole = [one(runtime, ask) for ask in neighbours]
        used = {t for ask in neighbours for t in ask.prompt} | {t for a in whole for t in a.tokens}
        poisoned = min({*range(4, VOCAB)} - used)
        runtime.engine.graphs.step.weights["embed"][poisoned] = float("nan")
        bad = Ask((1, poisoned, 2, *([3] * 140)), params(temperature=1.0, seed=1))
        for turn in (0, 3, 6):
            asks = [*neighbours[:turn], bad, *neighbours[turn:]]
            got = ask_all(runtime, asks, ahead=2)
            failed = got.pop(turn)
            assert (failed.tokens, failed.reason) == ([-1], "error")
            assert np.isnan(failed.logprobs).all()
            assert [answer.bits for answer in got] == [answer.bits for answer in whole]


def test_a_mask_can_be_rewritten_between_steps(load: Load) -> None:
    rng = np.random.default_rng(4)
    with load("bf16") as runtime:
        row = add(runtime, Ask(prompt(6), params(max_tokens=40, temperature=2.0, seed=3)))
        answers = {row: (got := Got(row))}
        allowed = [rng.choice(VOCAB, rng.integers(1, 9), replace=False).tolist() for _ in range(40)]
        for choice in allowed:
            runtime.set_token_mask(row, mask_of(choice, VOCAB))
            collect(runtime.step(), answers)
    assert all(token in choice for token, choice in zip(got.tokens, allowed, strict=True))


def test_endings(load: Load) -> None:
    with load("bf16") as runtime:
        free = one(runtime, Ask(prompt(10), params(max_tokens=30)))
        sequence = free.tokens[4:9]
        got = one(runtime, Ask(prompt(10), params(max_tokens=30, stop_sequences=[sequence])))
        end = first_end(free.tokens, sequence)
        assert (got.tokens, got.reason) == (free.tokens[:end], "stop")
        asks = [
            Ask(prompt(8), params(max_tokens=1000, deadline_ms=5)),
            Ask(prompt(10), params(max_tokens=30, deadline_ms=60_000)),
        ]
        late, whole = ask_all(runtime, asks, ahead=2)
    assert late.reason == "deadline"
    assert 1 <= len(late.tokens) < 1000
    assert whole.bits == free.bits
