"""The row contract on the CPU twin: what a request asks for is what it gets, whoever is beside it.

Bits of the twin hold within one key, so tests of bits run on ladders of one key.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime import OutOfRows, Runtime, SamplingParams
from runtime.row_params import resolve_seed
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
from tests.cpu.twins import ROWS, VOCAB, load_micro

ONE_KEY = "6+10"
LADDERS = ("1,2,4,6,6+10", "6+10", "1,6+3", "3,6,2+17,6+40")


@pytest.fixture(scope="module")
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    """One key, shared: every test leaves it empty."""
    with load_micro(checkpoint, ladder=ONE_KEY, max_seq_len=96) as runtime:
        yield runtime
        assert runtime.num_running == runtime.num_in_flight == 0


def prompt(n: int, seed: int = 0) -> tuple[int, ...]:
    return random_prompt(n, seed, VOCAB)


def params(**settings: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 12, "ignore_eos": True} | settings))


def one(runtime: Runtime, ask: Ask) -> Got:
    (got,) = ask_all(runtime, [ask])
    return got


# ------------------------------------------------------------------ same bits in any company


@pytest.mark.parametrize("ahead", [1, 2])
def test_everything_at_once_has_the_bits_of_each_alone(runtime: Runtime, ahead: int) -> None:
    asks = everything(VOCAB)
    alone = [one(runtime, ask).bits for ask in asks]
    for order in (asks, asks[::-1]):
        together = ask_all(runtime, order, ahead=ahead)
        got = dict(zip(map(id, order), together, strict=True))
        for ask, want in zip(asks, alone, strict=True):
            assert got[id(ask)].bits == want, ask.params
    assert len({repr(bits) for bits in alone}) == len(asks)


@pytest.mark.parametrize("more", [{}, {"logprobs": 20}], ids=["", "top-n"])
@pytest.mark.parametrize("name", PROFILES)
def test_a_forced_run_has_the_bits_of_the_sampled_one(
    name: str, more: dict[str, Any], runtime: Runtime
) -> None:
    settings: dict[str, Any] = {"max_tokens": 20, "seed": 11, "ignore_eos": True} | more
    settings |= {"stop_sequences": [[prompt(3, 77)[0]]], "min_tokens": 3}
    ask = Ask(prompt(13), SamplingParams.profile(name, **settings))
    sampled = one(runtime, ask)
    n = len(sampled.tokens)
    forced_settings = settings | {"forced_tokens": sampled.tokens}
    forced = Ask(ask.prompt, SamplingParams.profile(name, **forced_settings))
    others = [Ask(prompt(5, i), params(temperature=1.0, seed=i)) for i in range(4)]
    assert one(runtime, forced).bits == sampled.bits
    assert ask_all(runtime, [*others, forced])[-1].bits == sampled.bits
    # Forcing a part of it goes on as the sampled run does, and another seed only changes the rest.
    part = settings | {"forced_tokens": sampled.tokens[: n // 2]}
    assert one(runtime, Ask(ask.prompt, SamplingParams.profile(name, **part))).bits == sampled.bits


def test_forced_tokens_are_appended_whatever_the_model_says(runtime: Runtime) -> None:
    wanted = prompt(12, 3)
    got = one(runtime, Ask(prompt(4), params(forced_tokens=wanted, logprobs=3)))
    assert (got.tokens, got.reason) == (list(wanted), "length")
    free = one(runtime, Ask(prompt(4), params(logprobs=3)))
    assert free.tokens != got.tokens
    # The first token's distribution does not know yet that it is forced.
    assert got.tops[0] == free.tops[0]
    assert got.logprobs[0] < free.logprobs[0]
    # Forced tokens feed the model: as a prompt they give the same log-probs.
    scored = one(runtime, Ask((*prompt(4), *wanted), params(prompt_logprobs=3, max_tokens=1)))
    for i, logprob in enumerate(got.logprobs):
        token, other, top = scored.prompt[4 + i]
        assert (token, other, top) == (wanted[i], logprob, got.tops[i])


@pytest.mark.parametrize("seed", range(3))
def test_rows_leave_nothing_behind_for_their_next_owner(seed: int, runtime: Runtime) -> None:
    print("seed", seed)
    asks = everything(VOCAB)
    want = [one(runtime, ask) for ask in asks]
    assert random_calls(runtime, asks, want, seed) > 20
    assert runtime.pages.num_free == runtime.pages.capacity


def test_a_seeded_request_gives_the_same_tokens_wherever_it_runs(checkpoint: Path) -> None:
    asks = everything(VOCAB)
    want: list[list[int]] = []
    for ladder in LADDERS:
        for run in range(2):
            with load_micro(checkpoint, ladder=ladder) as runtime:
                got = ask_all(runtime, asks[run:] + asks[:run], ahead=1 + run)
                got = got[-run:] + got[:-run] if run else got
                tokens = [answer.tokens for answer in got]
                want = want or tokens
                assert tokens == want, ladder
                lone = [one(runtime, ask).tokens for ask in asks[1:5]]
                assert lone == want[1:5]


@pytest.mark.slow
def test_a_seeded_request_gives_the_same_bits_alone_and_among_255_others(checkpoint: Path) -> None:
    """One key for every step: the twin's bits hold within a key."""
    mine = Ask(prompt(30), params(temperature=1.0, seed=5, top_p=0.9, logprobs=3))
    others = [
        Ask(prompt(1 + i % 9, 1000 + i), params(temperature=1.0, seed=i, max_tokens=1 + i % 12))
        for i in range(255)
    ]
    with load_micro(checkpoint, bs=256, ladder="256+600", max_seq_len=64) as runtime:
        lone = one(runtime, mine).bits
        got = ask_all(runtime, [*others[:100], mine, *others[100:]], ahead=2)
    assert got[100].bits == lone


def test_seeds(runtime: Runtime) -> None:
    free = Ask(prompt(6), params(temperature=1.5, max_tokens=20))
    first, second = ask_all(runtime, [free, free])
    assert first.seed != second.seed
    assert first.tokens != second.tokens
    again = Ask(free.prompt, params(temperature=1.5, max_tokens=20, seed=second.seed))
    assert one(runtime, again).bits == second.bits
    for seed in (0, 1, 2**32, 2**63 - 1):
        asked = Ask(free.prompt, params(temperature=1.5, max_tokens=20, seed=seed))
        got = one(runtime, asked)
        assert got.seed == seed
        assert got.tokens not in (first.tokens, second.tokens)


def test_seeds_come_from_the_operating_system() -> None:
    """From no generator that a user may have seeded; a seed asked for is kept."""
    drawn = []
    for _ in range(3):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        drawn.append(resolve_seed(params(temperature=1.0)))
    assert len({*drawn}) == 3
    assert all(0 <= seed < 2**63 for seed in drawn)
    assert max(drawn) > 2**48, "few of its bits are drawn"
    assert resolve_seed(params(seed=7)) == 7


def test_another_process_gives_the_same_bits(checkpoint: Path, tmp_path: Path) -> None:
    """Any settings, on every key, in two processes that hash differently."""
    options = {"model": str(checkpoint), "bs": ROWS, "max_seq_len": 96, "page_size": 16}
    options |= {"ladder": "1,6,6+10", "store": str(tmp_path), "device": "cpu", "verify": False}
    command = [sys.executable, "-m", "tests.restore_program", json.dumps(options), "60"]
    digests = []
    for hash_seed in "12":
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
        digests.append(json.loads(line.removeprefix("RESULT "))["digests"])
    assert digests[0] == digests[1]
    assert len({*digests[0]}) > 30


# ------------------------------------------------------------------ endings


@pytest.fixture(scope="module")
def greedy(runtime: Runtime) -> Got:
    return one(runtime, Ask(prompt(10), params(max_tokens=30)))


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16])
@pytest.mark.parametrize("ahead", [1, 2])
def test_a_stop_sequence_ends_the_request_across_steps(
    length: int, ahead: int, runtime: Runtime, greedy: Got
) -> None:
    for start in (0, 4, 11):
        sequence = greedy.tokens[start : start + length]
        others = [[(t + 1) % VOCAB, *sequence[1:], 63] for t in sequence[:1]] * 3
        others = [o[:16] for o in others if o[:16] != sequence]
        ask = Ask(prompt(10), params(max_tokens=30, stop_sequences=[*others, sequence]))
        got = ask_all(runtime, [Ask(prompt(3, 9), params()), ask], ahead=ahead)[1]
        end = first_end(greedy.tokens, sequence)
        assert (got.tokens, got.reason) == (greedy.tokens[:end], "stop")


def test_a_stop_sequence_counts_own_output_only(runtime: Runtime, greedy: Got) -> None:
    over = [prompt(10)[-1], greedy.tokens[0]]
    got = one(runtime, Ask(prompt(10), params(max_tokens=30, stop_sequences=[over])))
    assert got.tokens == greedy.tokens[: len(got.tokens)]
    assert len(got.tokens) > 1
    # A row's last owner leaves nothing behind that could complete a sequence.
    tail = [greedy.tokens[-1], greedy.tokens[0]]
    got = one(runtime, Ask(prompt(10), params(max_tokens=5, stop_sequences=[tail])))
    assert (got.tokens, got.reason) == (greedy.tokens[:5], "length")


@pytest.mark.parametrize("least", [1, 4, 9])
def test_min_tokens_holds_off_every_stop(least: int, runtime: Runtime, greedy: Got) -> None:
    stops = tuple(dict.fromkeys(greedy.tokens))[:16]
    got = one(
        runtime, Ask(prompt(10), params(min_tokens=least, stop_token_ids=stops, max_tokens=30))
    )
    assert len(got.tokens) > least
    assert not set(got.tokens[:least]) & set(stops)
    # Banning them gives the same tokens until then.
    bans = dict.fromkeys(stops, float("-inf"))
    banned = one(runtime, Ask(prompt(10), params(logit_bias=bans, max_tokens=least)))
    assert got.tokens[:least] == banned.tokens
    sequence = [greedy.tokens[0]]
    ask = Ask(prompt(10), params(min_tokens=least, stop_sequences=[sequence], max_tokens=30))
    got = one(runtime, ask)
    later = [i + 1 for i, t in enumerate(greedy.tokens) if t == sequence[0] and i >= least]
    assert len(got.tokens) == (later[0] if later else 30)


def test_a_deadline_ends_its_request_alone(runtime: Runtime) -> None:
    neighbour = Ask(prompt(8), params(max_tokens=40))
    want = one(runtime, neighbour)
    hurried = Ask(prompt(5), params(max_tokens=60, deadline_ms=1))
    patient = Ask(prompt(5), params(max_tokens=60, deadline_ms=10_000_000))
    got, late, whole = ask_all(runtime, [neighbour, hurried, patient])
    assert got.bits == want.bits
    assert late.reason == "deadline"
    assert 1 <= len(late.tokens) < 60
    assert late.tokens == whole.tokens[: len(late.tokens)]
    assert (len(whole.tokens), whole.reason) == (60, "length")


# ------------------------------------------------------------------ token masks


def test_a_mask_that_allows_nothing_fails_its_row_alone(runtime: Runtime) -> None:
    neighbours = [a for a in everything(VOCAB) if a.params.deadline_ms is None][:5]
    want = [one(runtime, ask).bits for ask in neighbours]
    for settings in ({}, {"temperature": 1.0}, {"logprobs": 3, "logprobs_mode": "processed"}):
        bad = Ask(prompt(6), params(**settings), mask_of([], VOCAB))
        got = ask_all(runtime, [*neighbours[:2], bad, *neighbours[2:]])
        failed = got.pop(2)
        assert (failed.tokens, failed.reason) == ([-1], "error")
        assert np.isnan(failed.logprobs).all()
        assert [answer.bits for answer in got] == want


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "seed": 3}])
def test_a_mask_can_be_rewritten_between_steps(settings: dict[str, Any], runtime: Runtime) -> None:
    rng = np.random.default_rng(4)
    others = [Ask(prompt(4, 1), params(max_tokens=20)), Ask(prompt(5, 2), params(max_tokens=20))]
    want = [one(runtime, ask).bits for ask in others]
    answers = {row: Got(row) for row in (add(runtime, ask) for ask in others)}
    kept = list(answers.values())
    row = add(runtime, Ask(prompt(6), params(max_tokens=20, **settings)))
    answers[row] = got = Got(row)
    allowed: list[list[int]] = []
    for _ in range(20):
        allowed.append(rng.choice(VOCAB, rng.integers(1, 9), replace=False).tolist())
        runtime.set_token_mask(row, mask_of(allowed[-1], VOCAB))
        collect(runtime.step(), answers)
    assert [token in choice for token, choice in zip(got.tokens, allowed, strict=True)] == [
        True
    ] * 20
    assert [answer.bits for answer in kept] == want


def test_a_mask_does_not_reach_a_step_in_flight_and_ends_with_none(runtime: Runtime) -> None:
    free = one(runtime, Ask(prompt(6), params()))
    row = add(runtime, Ask(prompt(6), params()))
    answers = {row: (got := Got(row))}
    banned = [t for t in range(VOCAB) if t not in free.tokens]
    runtime.launch()
    runtime.set_token_mask(row, mask_of(banned, VOCAB))
    collect(runtime.collect(), answers)
    assert got.tokens == free.tokens[:1]
    runtime.launch()
    runtime.launch()
    runtime.set_token_mask(row, None)
    for _ in range(2):
        collect(runtime.collect(), answers)
    assert set(got.tokens[1:3]) <= set(banned)
    words = mask_of([7], VOCAB)
    runtime.set_token_mask(row, words)
    words[:] = 0  # it was copied
    collect(runtime.step(), answers)
    assert got.tokens[3] == 7
    runtime.set_token_mask(row, None)
    while answers:
        collect(runtime.step(), answers)
    assert len(got.tokens) == 12
    # The next owner of the row has no mask.
    assert one(runtime, Ask(prompt(6), params())).bits == free.bits


@pytest.mark.parametrize("settings", [{}, {"temperature": 5.0, "seed": 3}])
def test_xgrammar_fills_the_mask(settings: dict[str, Any], runtime: Runtime) -> None:
    """Its words as they are, renewed before every step."""
    xgrammar = pytest.importorskip("xgrammar")
    others = [Ask(prompt(4, 1), params(max_tokens=20)), Ask(prompt(5, 2), params(max_tokens=20))]
    want = [one(runtime, ask).bits for ask in others]
    words = [chr(ord("A") + i) if i < 26 else f"<{i}>" for i in range(VOCAB)]
    end = VOCAB - 1
    names = xgrammar.TokenizerInfo(words, vocab_size=VOCAB, stop_token_ids=[end])
    compiler = xgrammar.GrammarCompiler(names, max_threads=1)
    grammar = xgrammar.GrammarMatcher(compiler.compile_grammar('root ::= ("AB" | "CD"){6} "Z"'))
    answers = {row: Got(row) for row in (add(runtime, ask) for ask in others)}
    kept = list(answers.values())
    row = add(runtime, Ask(prompt(6), params(max_tokens=20, stop_token_ids=(end,), **settings)))
    answers[row] = got = Got(row)
    mask = xgrammar.allocate_token_bitmask(1, VOCAB)
    while row in answers:
        grammar.fill_next_token_bitmask(mask, 0)
        runtime.set_token_mask(row, mask)
        collect(runtime.step(), answers)
        assert grammar.accept_token(got.tokens[-1])
    while answers:
        collect(runtime.step(), answers)
    assert re.fullmatch("(AB|CD){6}Z", "".join(words[t] for t in got.tokens[:-1]))
    assert (got.tokens[-1], got.reason) == (end, "stop")
    assert [answer.bits for answer in kept] == want


# ------------------------------------------------------------------ outputs


def test_outputs_that_nobody_asked_for_are_not_there(runtime: Runtime) -> None:
    row = runtime.add(prompt(3), params(max_tokens=2))
    asking = runtime.add(prompt(30), params(max_tokens=2, logprobs=2, return_logits=True))
    out = runtime.step()
    assert out.rows.tolist() == [row]
    assert (out.top, out.prompt, dict(out.logits)) == (None, None, {})
    while asking not in (out := runtime.step()).rows.tolist():
        pass
    assert out.top is not None
    i = out.rows.tolist().index(asking)
    assert out.top.counts.tolist() == [2 * (r == asking) for r in out.rows.tolist()]
    assert (out.top.ids.shape, out.top.logprobs.dtype) == ((len(out), 2), np.float32)
    assert out.top.ids[i, 0] == out.tokens[i]
    assert out.logits.keys() == {asking}
    assert out.logits[asking].shape == (VOCAB,)
    assert int(out.logits[asking].argmax()) == out.tokens[i]
    runtime.cancel(row)
    runtime.cancel(asking)
    runtime.step()


@pytest.mark.parametrize("ladder", ["6+10", "1,6", "1,2,3,6,2+16"])
@pytest.mark.parametrize("ahead", [1, 2])
def test_prompt_logprobs_come_once_for_every_token_but_the_first(
    ladder: str, ahead: int, checkpoint: Path
) -> None:
    with load_micro(checkpoint, ladder=ladder) as runtime:
        asks = [Ask(prompt(n, n), params(prompt_logprobs=3)) for n in (1, 2, 7, 33)]
        asks.insert(1, Ask(prompt(20, 8), params(prompt_logprobs=True, logprobs=2)))
        asks.insert(3, Ask(prompt(25, 9), params(max_tokens=20)))
        plain = [one(runtime, Ask(a.prompt, params(max_tokens=a.params.max_tokens))) for a in asks]
        for ask, got, want in zip(asks, ask_all(runtime, asks, ahead=ahead), plain, strict=True):
            assert got.tokens == want.tokens
            scored = ask.params.prompt_logprobs is not None
            assert sorted(got.prompt) == (list(range(1, len(ask.prompt))) if scored else [])
            for pos, (token, logprob, (ids, tops)) in got.prompt.items():
                assert token == ask.prompt[pos]
                assert len(ids) == ask.params.prompt_logprobs
                assert tops == sorted(tops, reverse=True)
                if token in ids:
                    assert tops[ids.index(token)] == logprob
                assert logprob <= 0.0
            counts = {len(ids) for ids, _ in got.tops}
            assert counts == {ask.params.logprobs}


def test_no_setting_of_the_output_touches_the_scores_of_the_prompt(runtime: Runtime) -> None:
    text = prompt(30, 2)
    plain = one(runtime, Ask(text, params(prompt_logprobs=4)))
    settings: dict[str, Any] = {"temperature": 0.5, "seed": 1, "repetition_penalty": 2.0}
    settings |= {"logit_bias": {text[5]: 9.0}, "logprobs_mode": "processed", "top_k": 2}
    for mask in (None, mask_of([3], VOCAB), mask_of([], VOCAB)):
        got = one(runtime, Ask(text, params(prompt_logprobs=4, logprobs=1, **settings), mask))
        assert got.prompt == plain.prompt
        assert got.logprobs != plain.logprobs


def test_a_cancelled_prompt_returns_no_more_of_its_scores(runtime: Runtime) -> None:
    row = runtime.add(prompt(40), params(prompt_logprobs=0))
    out = runtime.step()
    assert out.prompt is not None
    runtime.launch()
    runtime.cancel(row)
    gone = runtime.collect()
    assert len(gone) == 0
    assert gone.prompt is None or len(gone.prompt.rows) == 0
    runtime.step()


def test_only_so_many_requests_return_logits_at_a_time(checkpoint: Path) -> None:
    with load_micro(checkpoint, logits_rows=2) as runtime:
        ask = Ask(prompt(3), params(return_logits=True, max_tokens=3))
        rows = [add(runtime, ask) for _ in range(2)]
        with pytest.raises(OutOfRows, match="2 requests return their logits and there is room for"):
            add(runtime, ask)
        assert runtime.num_running == 2
        add(runtime, Ask(prompt(3), params(max_tokens=1)))
        out = runtime.step()
        assert out.logits.keys() == set(rows)
        runtime.cancel(rows[0])
        add(runtime, ask)
        assert len(runtime.step().logits) == 2


def test_the_ledger_tells_what_the_contract_holds(runtime: Runtime) -> None:
    assert runtime.engine.ledger is not None
    held = runtime.engine.ledger.contract_bytes
    assert held["counts"] == ROWS * VOCAB * 4
    assert held["forced_tokens"] == ROWS * 96 * 4
    assert held["masks"] == 2 * ROWS * VOCAB // 8
    assert held["ring_logits"] == 2 * ROWS * VOCAB * 4


# ------------------------------------------------------------------ what is refused

NO_NUMBER: Any = "4"
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
    ({"max_tokens": 2**40}, ValueError, "at most 2147483647"),
    ({"temperature": 10**400}, ValueError, "temperature must be 0.0 or in"),
    ({"max_tokens": NO_NUMBER}, TypeError, "max_tokens must be a whole number"),
    ({"max_tokens": True}, TypeError, "max_tokens must be a whole number"),
    ({"min_tokens": 13}, ValueError, "min_tokens must be 0 to max_tokens, got 13"),
    ({"min_tokens": -1}, ValueError, "min_tokens"),
    ({"temperature": -0.1}, ValueError, r"temperature must be 0.0 or in \[1e-5, 100\]"),
    ({"temperature": 1e-9}, ValueError, "temperature"),
    ({"temperature": float("inf")}, ValueError, "temperature"),
    ({"temperature": float("nan")}, ValueError, "temperature"),
    ({"temperature": NO_NUMBER}, TypeError, "temperature must be a number"),
    ({"top_k": -2}, ValueError, r"top_k must be 0 \(off\) or more"),
    ({"top_k": 2.5}, ValueError, "top_k must be a whole number"),
    ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\]"),
    ({"top_p": 1.01}, ValueError, "top_p"),
    ({"min_p": -0.1}, ValueError, r"min_p must be in \[0, 1\]"),
    ({"min_p": None}, TypeError, "min_p must be a number"),
    ({"seed": -1}, ValueError, r"seed must be None or in \[0, 2\*\*63\)"),
    ({"seed": 2**63}, ValueError, "seed"),
    ({"seed": 1.5}, ValueError, "seed must be a whole number"),
    ({"repetition_penalty": 0.0}, ValueError, r"repetition_penalty must be in \[0.01, 100\]"),
    ({"presence_penalty": 2.1}, ValueError, r"presence_penalty must be in \[-2, 2\]"),
    ({"frequency_penalty": float("nan")}, ValueError, "frequency_penalty"),
    ({"logit_bias": [1, 2]}, TypeError, "logit_bias must map token ids to numbers"),
    ({"logit_bias": {"a": 1.0}}, TypeError, "logit_bias must hold whole numbers, got 'a'"),
    ({"logit_bias": {1: "x"}}, TypeError, r"logit_bias\[1\] must be a number"),
    ({"logit_bias": {1: float("inf")}}, ValueError, r"logit_bias\[1\] must be -inf or in"),
    ({"logit_bias": {1: float("nan")}}, ValueError, r"logit_bias\[1\]"),
    ({"logit_bias": dict.fromkeys(range(321), 0.0)}, ValueError, "at most 320 tokens, got 321"),
    ({"stop_token_ids": 5}, TypeError, "stop_token_ids must be a list of token ids, got 5"),
    ({"stop_token_ids": "ab"}, TypeError, "stop_token_ids must be a list of token ids"),
    ({"stop_token_ids": (1.5,)}, TypeError, "stop_token_ids must hold whole numbers, got 1.5"),
    ({"stop_token_ids": (-1,)}, ValueError, "stop_token_ids must hold token ids of 0 or more"),
    ({"stop_sequences": [1, 2]}, TypeError, "a stop sequence must be a list of token ids, got 1"),
    ({"stop_sequences": 3}, TypeError, "stop_sequences must be a list of lists"),
    ({"stop_sequences": [[]]}, ValueError, "a stop sequence must hold 1 to 16 tokens, got 0"),
    ({"stop_sequences": [[1] * 17]}, ValueError, "1 to 16 tokens, got 17"),
    ({"stop_sequences": [[1]] * 9}, ValueError, "at most 8 sequences, got 9"),
    ({"logprobs": 21}, ValueError, r"logprobs must be in \[0, 20\], got 21"),
    ({"prompt_logprobs": 21}, ValueError, r"prompt_logprobs must be in \[0, 20\]"),
    ({"logprobs_mode": "both"}, ValueError, "logprobs_mode must be one of raw, processed"),
    ({"return_logits": 1}, TypeError, "return_logits must be True or False"),
    ({"ignore_eos": "no"}, TypeError, "ignore_eos must be True or False"),
    ({"forced_tokens": ()}, ValueError, "forced_tokens must hold 1 to max_tokens"),
    ({"forced_tokens": [1] * 13}, ValueError, "got 13; set max_tokens=13 or leave them out"),
    ({"forced_tokens": 7}, TypeError, "forced_tokens must be a list of token ids"),
    ({"deadline_ms": 0}, ValueError, r"deadline_ms must be in \[1, 86400000\], got 0"),
    ({"deadline_ms": "soon"}, TypeError, "deadline_ms must be a whole number"),
]


@pytest.mark.parametrize(("bad", "error", "message"), REFUSED, ids=str)
def test_impossible_settings_are_refused_with_their_range(
    bad: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SamplingParams(**({"max_tokens": 12} | bad))


def test_profiles_are_settings_and_nothing_else() -> None:
    assert {*PROFILES} == {
        *("production_generate", "rl_sample", "eval_exact", "online_distill", "offline_distill")
    }
    for name, settings in PROFILES.items():
        assert SamplingParams.profile(name) == SamplingParams(**settings)
    changed = SamplingParams.profile("online_distill", logprobs=3, max_tokens=5)
    assert (changed.logprobs, changed.max_tokens, changed.temperature) == (3, 5, 1.0)
    with pytest.raises(ValueError, match="profile must be one of production_generate, rl_sample"):
        SamplingParams.profile("fast")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_bias": {64: 1.0}}, r"logit_bias token 64 is outside the vocabulary \[0, 64\)"),
        ({"forced_tokens": (64,)}, "forced token 64 is outside the vocabulary"),
        ({"stop_sequences": [[1, 64]]}, "stop sequence token 64 is outside the vocabulary"),
        ({"stop_token_ids": (64,)}, "stop token id 64 is outside the vocabulary"),
    ],
)
def test_tokens_that_the_model_has_not_are_refused(
    settings: dict[str, Any], message: str, runtime: Runtime
) -> None:
    with pytest.raises(ValueError, match=message):
        runtime.add([1, 2], params(**settings))
    assert runtime.num_running == 0


def test_masks_and_rows_that_cannot_be(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match="row 0 has no request to mask; add one first"):
        runtime.set_token_mask(0, mask_of([1], VOCAB))
    for call in (runtime.seed_of, lambda row: runtime.set_token_mask(row, None)):
        for row in (-1, ROWS):
            with pytest.raises(ValueError, match=r"row must be in \[0, 6\)"):
                call(row)
    row = runtime.add([1], params())
    bad: list[tuple[Any, type[Exception], str]] = [
        (np.zeros(3, np.int32), ValueError, r"64 tokens has 2 words of 32 bits, got shape \(3,\)"),
        (np.zeros(2, np.float32), TypeError, "int32 .or uint32. words, got float32"),
        ([1, 2], TypeError, "int32 .or uint32. words, got int64"),
        ("ab", TypeError, "int32 .or uint32. words"),
        (
            [[1], [2, 3]],
            TypeError,
            "one array of 2 int32 words on the host, got list",
        ),
    ]
    for words, error, message in bad:
        with pytest.raises(error, match=message):
            runtime.set_token_mask(row, words)
    runtime.set_token_mask(row, np.full((1, 2), -1, np.int32))  # one line of xgrammar's
    runtime.set_token_mask(row, np.full(2, 2**32 - 1, np.uint32))
    runtime.set_token_mask(row, torch.full((1, 2), -1, dtype=torch.int32))  # as it makes them
    runtime.cancel(row)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ladder": 6}, "ladder must be text, got 6"),
        ({"bs": "6"}, "bs must be a whole number, got '6'"),
        ({"bs": 6.0}, "bs must be a whole number, got 6.0"),
        ({"bs": None}, "bs must be a whole number, got None"),
        ({"verify": 1}, "verify must be True or False, got 1"),
        ({"deadline_s": "10"}, "deadline_s must be a number, got '10'"),
        ({"device": 0}, "device must be text, got 0"),
    ],
    ids=str,
)
def test_options_of_a_wrong_type_are_named(
    options: dict[str, Any], message: str, checkpoint: Path
) -> None:
    with pytest.raises(TypeError, match=message):
        load_micro(checkpoint, **options)


def test_the_seed_of_a_submitted_request_is_told_by_its_row(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_seq_len": 64, "device": "cpu", "ladder": "1,2", "verify": False}
    with Runtime.load("tiny", bs=2, store=str(tmp_path), **options) as rt:
        rt.add([1], SamplingParams(max_tokens=1, temperature=1.0, seed=3))
        rt.step()
        request = rt.submit([1, 2], SamplingParams(max_tokens=2, temperature=1.0))
        row = int(rt.step().rows[0])
        seed = rt.seed_of_request(request)
        assert rt.seed_of(row) == seed != 3
        rt.step()
        assert rt.num_running == 0
        assert rt.seed_of(row) == seed
