"""Every setting of the row contract from the queue: preempted, from a cached prefix, recomputed.

One key for all steps, as the twin's bits hold within a key. What a request gets is compared with
what it gets alone, without a prefix cache.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import Runtime, SamplingParams
from tests.contract import Ask, Got, ask_all, collect, everything, mask_of, random_prompt
from tests.cpu.twins import VOCAB, load_micro
from tests.queued import by_request, submit_all

ONE_KEY = "6+10"
MORE = 30  # new tokens: rows outgrow the pages that they begin with


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    """Everything, with more tokens, and each penalty, end and score by itself."""
    some = [replace(a, params=replace(a.params, max_tokens=MORE)) for a in everything(VOCAB)]
    more: list[dict[str, Any]] = [
        {"repetition_penalty": 1.5},
        {"frequency_penalty": 1.0, "temperature": 1.0, "seed": 1},
        {"presence_penalty": 1.5},
        {"stop_sequences": [[1, 2], [3, 4, 5], [9]], "temperature": 3.0, "seed": 2},
        {"prompt_logprobs": 3},
        {"forced_tokens": tuple(range(20, 45)), "logprobs": 2},
    ]
    for i, settings in enumerate(more):
        params = SamplingParams(**({"max_tokens": MORE, "ignore_eos": True} | settings))
        some.append(Ask(random_prompt(35, 90 + i, VOCAB), params))
    return some


@pytest.fixture(scope="module")
def alone(checkpoint: Path, asks: list[Ask]) -> list[tuple[Any, ...]]:
    with load_micro(checkpoint, ladder=ONE_KEY, prefix_cache=False) as runtime:
        return [ask_all(runtime, [ask])[0].bits for ask in asks]


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("ahead", [1, 2])
def test_preempted_requests_have_the_bits_of_each_alone(
    ahead: int, prefix_cache: bool, checkpoint: Path, asks: list[Ask], alone: list[Any]
) -> None:
    options: dict[str, Any] = {"ladder": ONE_KEY, "reservation": "lazy", "num_pages": 8}
    preempted = set()
    with load_micro(checkpoint, prefix_cache=prefix_cache, **options) as runtime:
        preempt = runtime._scheduler._preempt

        def watched(request: Any) -> None:
            preempted.add(request.id)
            preempt(request)

        runtime._scheduler._preempt = watched  # type: ignore[method-assign]
        got = submit_all(runtime, asks, ahead=ahead)
    for ask, answer, want in zip(asks, got, alone, strict=True):
        assert answer.bits == want, ask.params
    assert len(preempted) >= 6, "too few to show anything"


def test_a_cached_prefix_changes_no_setting_s_bits(
    checkpoint: Path, asks: list[Ask], alone: list[Any]
) -> None:
    with load_micro(checkpoint, ladder=ONE_KEY) as runtime:
        for ask, want in zip(asks, alone, strict=True):
            for _ in range(2):
                assert ask_all(runtime, [ask])[0].bits == want, ask.params
        assert runtime.stats().prefix_hits > len(asks) // 2


def test_what_needs_its_tokens_fed_takes_no_cached_page(checkpoint: Path) -> None:
    prompt = random_prompt(50, 3, VOCAB)
    base: dict[str, Any] = {"max_tokens": 2, "ignore_eos": True}
    with load_micro(checkpoint, ladder=ONE_KEY) as runtime:
        ask_all(runtime, [Ask(prompt, SamplingParams(**base))])
        for settings, hits in (
            ({}, 3),
            ({"prompt_logprobs": 0}, 0),
            ({"repetition_penalty": 1.1}, 0),
            ({"presence_penalty": 0.5, "stop_sequences": [[1, 2]]}, 3),
        ):
            before = runtime.stats().prefix_hits
            ask_all(runtime, [Ask(prompt, SamplingParams(**base, **settings))])
            assert runtime.stats().prefix_hits - before == hits, settings


def test_those_that_return_logits_wait_for_room(checkpoint: Path) -> None:
    params = SamplingParams(max_tokens=4, return_logits=True, ignore_eos=True)
    asks = [Ask(random_prompt(5, i, VOCAB), params) for i in range(4)]
    with load_micro(checkpoint, ladder=ONE_KEY, logits_rows=2) as runtime:
        want = [ask_all(runtime, [ask])[0].bits for ask in asks]
        assert [got.bits for got in submit_all(runtime, asks)] == want


def test_masks_by_id_in_every_state(checkpoint: Path) -> None:
    """In the queue, in a row, after a preemption; and taken away again."""
    allowed = range(0, VOCAB, 7)
    with load_micro(
        checkpoint, ladder=ONE_KEY, num_pages=7, reservation="lazy", prefix_cache=False
    ) as runtime:
        params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0)
        ids = [runtime.submit(random_prompt(15, i, VOCAB), params) for i in range(3)]
        tokens: dict[int, list[int]] = {i: [] for i in ids}
        runtime.set_request_mask(ids[2], mask_of(allowed, VOCAB))
        for step in range(400):
            if not runtime.num_running:
                break
            if step == 5:
                runtime.set_request_mask(ids[1], mask_of(allowed, VOCAB))
            out = runtime.step()
            for request, token in zip(out.requests.tolist(), out.tokens.tolist(), strict=True):
                tokens[request].append(token)
        assert runtime.stats().preemptions
        with pytest.raises(ValueError, match=f"request {ids[0]} has ended"):
            runtime.set_request_mask(ids[0], None)
    assert [len(tokens[i]) for i in ids] == [40] * 3
    assert set(tokens[ids[2]]) <= set(allowed)
    assert set(tokens[ids[1]][8:]) <= set(allowed)
    assert not set(tokens[ids[0]]) <= set(allowed)


def test_seeds_from_the_operating_system_are_told_by_id(checkpoint: Path) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=2.0)
    with load_micro(checkpoint, ladder=ONE_KEY) as runtime:
        first, second = submit_all(runtime, [Ask((1, 2, 3), params)] * 2)
        assert first.seed != second.seed
        again = Ask((1, 2, 3), replace(params, seed=first.seed))
        assert submit_all(runtime, [again])[0].tokens == first.tokens
        assert np.array_equal(submit_all(runtime, [again])[0].logprobs, first.logprobs)
        with pytest.raises(ValueError, match="request 0 has ended"):
            runtime.seed_of_request(0)


@pytest.mark.parametrize("where", ["in the queue", "after a preemption"])
def test_a_deadline_runs_on_where_its_request_has_no_row(where: str, checkpoint: Path) -> None:
    """One token comes after it, not all that fit in as long a time again."""
    params = SamplingParams(max_tokens=40, ignore_eos=True, deadline_ms=700)
    with load_micro(checkpoint, bs=1, ladder="1,1+10") as runtime:
        ids = [runtime.submit((1, 2, 3), params)]
        runtime.step()
        runtime.step()
        if where == "in the queue":
            ids.append(runtime.submit((1, 2, 3), params))
            runtime.cancel_request(ids[0])
        else:
            runtime._scheduler._preempt(runtime._scheduler.by_id[ids[0]])
        time.sleep(0.75)
        outs = [runtime.step() for _ in range(4)]
        assert runtime.num_running == 0
    ends = [(int(o.requests[0]), str(o.finish_reasons[0])) for o in outs if len(o)]
    assert ends == [(ids[-1], "deadline")]


def preempted_at(runtime: Runtime, ask: Ask, steps: int) -> Got:
    """What a request gets that loses its row after so many steps, its pages left in the cache."""
    request = runtime.submit(ask.prompt, ask.params)
    answers = {request: Got(-1)}
    got = answers[request]
    for step in range(200):
        if step == steps:
            runtime._scheduler._preempt(runtime._scheduler.by_id[request])
        if not runtime.num_running:
            assert runtime.stats().preemptions == 1
            return got
        collect(by_request(runtime.step()), answers)
    raise AssertionError("never ends")


def test_a_stop_sequence_is_seen_across_a_preemption(checkpoint: Path) -> None:
    """Its first token lies in a page that is in the cache when the row comes back."""
    # The token at position p is p + 2; positions 0 to 31 are the two pages that are kept.
    settings: dict[str, Any] = {"max_tokens": 40, "forced_tokens": tuple(range(10, 50))}
    params = SamplingParams(**settings, stop_sequences=[[33, 34, 35, 36]], ignore_eos=True)
    with load_micro(checkpoint, ladder=ONE_KEY) as runtime:
        got = preempted_at(runtime, Ask(random_prompt(8, 1, VOCAB), params), 25)
    assert (got.tokens, got.reason) == (list(range(10, 37)), "stop")


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_a_prompt_is_scored_once_though_its_row_is_lost_halfway(
    steps: int, checkpoint: Path
) -> None:
    """Six tokens are scored a step; `collect` asserts that none comes twice."""
    params = SamplingParams(max_tokens=3, prompt_logprobs=2, ignore_eos=True)
    ask = Ask(random_prompt(40, 2, VOCAB), params)
    with load_micro(checkpoint, ladder=ONE_KEY, prefix_cache=False) as runtime:
        want = ask_all(runtime, [ask])[0].bits
    with load_micro(checkpoint, ladder=ONE_KEY) as runtime:
        got = preempted_at(runtime, ask, steps)
    assert len(got.prompt) == 39
    assert got.bits == want
