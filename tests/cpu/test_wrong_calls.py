"""Wrong arguments to any call: one sentence with what was expected, what came and what to do."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

import barriers.errors
import capture_cache.errors
import runtime
from kernels.triton.state import mask_words
from runtime import Runtime, SamplingParams, replay_bench
from runtime.config import ALIASES, RuntimeConfig
from runtime.other_engines import ELSEWHERE, ENGINES, unknown_arguments
from runtime.scheduler import SchedulerConfig
from tests.fake_device import FakeConfig, FakeDevice, FakeModel

WORDS = mask_words(FakeModel.vocab_size)
FLAT = "a prompt is a non-empty list of token ids, got"
IDS = "token ids must be whole numbers below 97, got"
ROW = r"a row is a whole number, got .*; add\(\) returns it"
ID = r"a request's id is a whole number, got .*; submit\(\) returns it"
WEIGHTS = r"expected \(name, array\) pairs, got .*; pass state_dict.items\(\) or a checkpoint"
Call = Callable[[Any], Any]

WRONG: dict[str, tuple[Call, type[Exception], str]] = {
    "ragged prompt": (
        lambda rt: rt.submit([[1], [2, 3]]),
        ValueError,
        rf"{FLAT} list \[\[1\], \[2, 3\]\]; give several prompts one by one",
    ),
    "two prompts": (lambda rt: rt.submit(np.ones((2, 3), int)), ValueError, rf"{FLAT} shape \(2, "),
    "no prompt": (lambda rt: rt.add(None), ValueError, f"{FLAT} NoneType None; give at least one"),
    "a number": (lambda rt: rt.add(5), ValueError, f"{FLAT} int 5"),
    "text": (lambda rt: rt.submit("abc"), ValueError, f"{FLAT} text; tokenise it"),
    "a set": (lambda rt: rt.submit({1, 2}), ValueError, FLAT),
    "texts": (lambda rt: rt.submit(["a"]), ValueError, IDS),
    "a hole": (lambda rt: rt.submit([1, None]), ValueError, rf"{IDS} list \[1, None\]"),
    "a huge id": (lambda rt: rt.submit([2**70]), ValueError, IDS),
    "a negative id": (lambda rt: rt.submit([3, -1]), ValueError, "token id -1 at position 1"),
    "cancel: text": (lambda rt: rt.cancel("x"), TypeError, ROW),
    "cancel: none": (lambda rt: rt.cancel(None), TypeError, ROW),
    "cancel: beyond": (lambda rt: rt.cancel(8), ValueError, r"row must be in \[0, 8\), got 8; req"),
    "cancel by id: text": (lambda rt: rt.cancel_request("x"), TypeError, ID),
    "cancel by id: later": (
        lambda rt: rt.cancel_request(9),
        ValueError,
        "9 has never been taken",
    ),
    "id of: text": (lambda rt: rt.request_id("x"), TypeError, ROW),
    "seed: below": (lambda rt: rt.seed_of(-1), ValueError, r"row must be in \[0, 8\), got -1"),
    "seed: never taken": (lambda rt: rt.seed_of(7), ValueError, "row 7 has had no request"),
    "seed by id: list": (lambda rt: rt.seed_of_request([1]), TypeError, ID),
    "seed by id: real": (lambda rt: rt.seed_of_request(0.0), TypeError, ID),
    "seed by id: later": (lambda rt: rt.seed_of_request(9), ValueError, r"\(ids so far: below 1\)"),
    "mask: ragged": (
        lambda rt: rt.set_token_mask(0, [[1], [2, 3]]),
        TypeError,
        f"one array of {WORDS} int32 words on the host, got list; xgrammar's allocate",
    ),
    "mask: list": (lambda rt: rt.set_token_mask(0, [1] * WORDS), TypeError, "words, got int64; xg"),
    "mask: text": (lambda rt: rt.set_token_mask(0, "x"), TypeError, "words, got <U1; xgrammar"),
    "mask: short": (
        lambda rt: rt.set_token_mask(0, np.zeros(WORDS - 1, np.int32)),
        ValueError,
        rf"has {WORDS} words of 32 bits, got shape \({WORDS - 1},\); xgrammar",
    ),
    "mask by id: text": (lambda rt: rt.set_request_mask("x", None), TypeError, ID),
    "drain": (lambda rt: rt.drain(waiting=3), TypeError, "waiting must be True or False, got 3"),
    "occupy: text": (lambda rt: rt.occupy("x", 3, 3), TypeError, "num_rows must be a whole"),
    "occupy: below": (lambda rt: rt.occupy(-1, 3, 3), ValueError, "num_rows must be at least 0"),
    "occupy: two limits": (
        lambda rt: rt.occupy(1, 3, 3, SamplingParams(max_tokens=5)),
        ValueError,
        "max_tokens is 3 and that of params 5",
    ),
    "ladder": (lambda rt: setattr(rt, "ladder", "1,2"), TypeError, "a ladder is a graphs.keys"),
    "profile": (
        lambda _: SamplingParams.profile(["x"]),
        ValueError,
        "profile must be one of production_generate",
    ),
    "profile's setting": (
        lambda _: SamplingParams.profile("rl_sample", warmth=1),
        TypeError,
        "SamplingParams has no .warmth.: leave it out; it has max_tokens, temperature",
    ),
    "ageing": (lambda _: SchedulerConfig(ageing_steps="x"), ValueError, "at least 1 step, got 'x'"),
    "budget": (
        lambda _: SchedulerConfig(prefill_budget="x"),
        ValueError,
        "token a step, got 'x'",
    ),
    "cache": (lambda _: SchedulerConfig(prefix_cache="no"), TypeError, "True or False, got 'no'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_told_so_and_changes_nothing(name: str) -> None:
    call, error, message = WRONG[name]
    runtime = Runtime(FakeDevice(FakeConfig(), "1,2,4,8,8+16"))
    runtime.add([1, 2, 3], SamplingParams(max_tokens=5))
    before = runtime.stats()
    with pytest.raises(error, match=message):
        call(runtime)
    assert runtime.stats() == before
    while runtime.num_running:
        assert len(runtime.step()) == 1


@pytest.mark.parametrize("source", [None, 5, b"x", {"model.norm.weight": 1}, [("a",)], [None]])
def test_what_is_no_list_of_weights(source: Any) -> None:
    from graphs.weight_update import _named_tensors

    with pytest.raises(ValueError, match=WEIGHTS):
        _named_tensors(source)


def test_every_error_that_is_promised_can_be_caught_by_its_name_from_runtime() -> None:
    for module in (barriers.errors, capture_cache.errors):
        for name, kind in vars(module).items():
            # Of arena layouts and of graphs that cannot be stored nobody outside hears.
            ours = isinstance(kind, type) and kind.__module__ == module.__name__
            if ours and name not in ("LayoutError", "NotRestorable"):
                assert getattr(runtime, name) is kind
                assert name in runtime.__all__
    assert runtime.__all__ == sorted(runtime._HOME)
    for name in runtime.__all__:
        assert getattr(runtime, name).__name__ == name


def test_an_opening_of_another_type_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(
        ValueError, match=r"opening: expected a runtime\.opening\.Opening or None, got"
    ):
        Runtime.load("tiny", bs=1, device="cpu", opening=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("n", "submit the prompt several times"),
        ("best_of", "submit the prompt several times"),
        ("stop", "give them as stop_sequences"),
        ("max_new_tokens", "give it as max_tokens"),
        ("stop_strs", "give them as stop_sequences"),
        ("length_penalty", "there is no beam search"),
        ("temprature", r"did you mean temperature\?"),
        ("qzx", "leave it out"),
    ],
)
def test_a_setting_of_another_engine_is_answered_with_what_does_the_same(
    setting: str, remedy: str
) -> None:
    with pytest.raises(TypeError, match=f"has no '{setting}': .*{remedy}.*; it has max_tokens, "):
        SamplingParams(**{setting: 2})


def test_other_spellings_of_none_and_all_are_taken_as_that() -> None:
    params = SamplingParams(logprobs=None, top_k=-1)
    assert params == SamplingParams()
    assert (params.logprobs, params.top_k) == (0, 0)


@pytest.mark.parametrize(
    ("keyword", "remedy"),
    [
        ("max_num_seqs", "there is no option 'max_num_seqs' here: give bs=, rows of all ranks"),
        ("gpu_memory_utilization", "give num_pages=, pages of KV cache"),
        ("enforce_eager", r"nothing runs that was not captured; .*\(device='cpu'\)"),
        ("tensor_parallel_size", "start with torchrun --nproc-per-node N, and bs= is for all"),
        ("kv_cache_dtype", "there is no FP8 KV cache"),
        ("max_seq_length", r"unknown option 'max_seq_length'; did you mean max_seq_len\?$"),
        ("frobnicate", "unknown option 'frobnicate'; known: .*bs, "),
    ],
)
def test_a_keyword_of_another_engine_is_answered_with_what_does_the_same(
    keyword: str, remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        Runtime.load("tiny", device="cpu", **{keyword: 2})


@pytest.mark.parametrize(
    ("argv", "remedy"),
    [
        (["--max-num-seqs", "8"], "there is no --max-num-seqs here: give --bs, rows of all ranks"),
        (["--max-running-requests=8"], "there is no --max-running-requests here: give --bs"),
        (["--max_batch_size", "8"], "--max_batch_size is spelled --max-batch-size here"),
        (["--max_seq_len", "8"], "--max_seq_len is spelled --max-seq-len here"),
        (["--gpu-memory-utilization", ".9"], "give --num-pages, pages of KV cache"),
        (["--mem-fraction-static", ".9"], "give --num-pages, pages of KV cache"),
        (["--enforce-eager"], "to debug, take the CPU twin (--device cpu)"),
        (["--disable-cuda-graph"], "to debug, take the CPU twin (--device cpu)"),
        (["--max-num-batched-tokens", "8"], "give --ladder keys with so many prompt tokens"),
        (["--chunked-prefill-size", "8"], "and --prefill-budget to have fewer of them"),
        (["--enable-prefix-caching"], "the prefix cache is on; --no-prefix-cache ends it"),
        (["--tp", "8"], "start with torchrun --nproc-per-node N"),
        (["--modle", "tiny"], "unrecognized arguments: --modle tiny (--modle: did you mean --mod"),
        (["stray"], "unrecognized arguments: stray; see"),
    ],
)
def test_an_option_of_another_engine_is_answered_with_what_does_the_same(
    argv: list[str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        replay_bench.main(argv)
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert remedy in told
    assert told.count("\n") == 1


def test_what_is_told_of_other_engines_options_is_true() -> None:
    """None of them is ours, and what they are sent to is: as a keyword and as an option."""
    ours = {f.name for f in fields(RuntimeConfig)} | ALIASES.keys()
    assert not ours & ENGINES.keys()
    options = set(replay_bench.parser()._option_string_actions)
    for name, remedy in ENGINES.items():
        for _, field, _, _ in string.Formatter().parse(remedy):
            assert field is None or field in ours, remedy
        told = unknown_arguments([f"--{name.replace('_', '-')}"], sorted(options))
        for option in re.findall(r"--[a-z-]+", told.partition(" here: ")[2]):
            assert option in options | {"--nproc-per-node"}, told


def test_what_is_told_of_other_engines_settings_is_true() -> None:
    """None of them is ours, and what they are sent to is."""
    ours = {f.name for f in fields(SamplingParams)}
    assert not ours & ELSEWHERE.keys()
    for remedy in ELSEWHERE.values():
        for name in re.findall(r"(?:as|in) (\w+_\w+)", remedy):
            assert name in ours, remedy
        for name in re.findall(r"Runtime\.(\w+)", remedy):
            assert hasattr(Runtime, name), remedy
