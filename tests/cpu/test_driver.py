"""The driver: what it refuses and leaves unchanged, cancelling in every state, its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphs.keys import GraphKey, Ladder, NotCaptured
from runtime import OutOfPages, OutOfRows, Runtime, SamplingParams
from tests.cpu.checkpoints import read_tensors, write_tensors
from tests.cpu.driven import assert_unchanged_by, finish, seven_requests
from tests.cpu.twins import MAX_SEQ_LEN, ROWS, VOCAB, load_micro, micro_checkpoint
from tests.serving import Answer, Request, serve


@pytest.fixture(scope="module")
def requests_(checkpoint: Path) -> list[tuple[Request, Answer]]:
    return seven_requests(checkpoint)


@pytest.fixture
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with load_micro(checkpoint) as runtime:
        yield runtime


# ------------------------------------------------------------------ what add refuses

MALFORMED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty": ([], {}, "a prompt is a non-empty list of token ids, got list \\[\\]; give at least"),
    "nested": ([[1, 2]], {}, "a prompt is a non-empty list of token ids, got shape \\(1, 2\\)"),
    "fractions": ([1.0, 2.0], {}, "token ids must be whole numbers below \\d+, got list \\[1.0"),
    "flags": ([True, False], {}, "token ids must be whole numbers below \\d+, got list \\[True"),
    "negative": ([3, -1], {}, "token id -1 at position 1 is outside the vocabulary \\[0, 64\\)"),
    "too large": ([3, 4, 64], {}, "token id 64 at position 2 is outside the vocabulary"),
    "over 32 bits": ([2**40], {}, "token id 1099511627776 at position 0"),
    "too long": ([1] * 96, {}, "exceeds max_seq_len 96; shorten it or raise --max-seq-len"),
    "too many": ([1], {"max_tokens": 96}, "1 tokens \\+ max_tokens 96 = 97 exceeds max_seq_len"),
    "stop id": ([1], {"stop_token_ids": (64,)}, "stop token id 64 is outside the vocabulary"),
    "stop ids": ([1], {"stop_token_ids": range(17)}, "17 stop token ids .*at most 16 are possible"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_refused_and_changes_nothing(name: str, runtime: Runtime) -> None:
    prompt, params, message = MALFORMED[name]
    runtime.add([1, 2, 3])
    runtime.step()
    params = SamplingParams(**({"max_tokens": 2} | params))
    got = assert_unchanged_by(runtime, lambda: runtime.add(prompt, params), ValueError)
    with pytest.raises(ValueError, match=message):
        raise ValueError(got)


@pytest.mark.parametrize("reservation", ["full", "lazy"])
def test_what_can_never_fit_the_cache_is_refused_at_once(
    checkpoint: Path, reservation: str
) -> None:
    with load_micro(checkpoint, num_pages=4, reservation=reservation) as runtime:
        params = SamplingParams(max_tokens=10)
        message = assert_unchanged_by(runtime, lambda: runtime.add([1] * 40, params), ValueError)
        assert message == (
            "the request needs 4 pages of 16 tokens and the cache has 3; "
            "shorten it or raise --num-pages"
        )
        # The last token is never fed: 39 + 10 - 1 = 48 tokens fill three pages exactly.
        runtime.add([1] * 39, params)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"max_tokens": 2.5},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -2},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 2.0},
        {"logprobs": 21},
        {"logprobs": -1},
    ],
    ids=str,
)
def test_sampling_params_out_of_range_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_no_row_free(runtime: Runtime) -> None:
    for _ in range(ROWS):
        runtime.add([1, 2])
    message = assert_unchanged_by(runtime, lambda: runtime.add([1]), OutOfRows)
    assert message == ("all 6 rows are running; wait for one to finish, cancel one, or raise --bs")


def test_no_page_free_at_add(checkpoint: Path, requests_: list[tuple[Request, Answer]]) -> None:
    (first, want), (second, want_second) = requests_[3], requests_[5]
    with load_micro(checkpoint, num_pages=6) as runtime:
        row = runtime.add(first.prompt, first.params)
        message = assert_unchanged_by(
            runtime, lambda: runtime.add(second.prompt, second.params), OutOfPages
        )
        assert "needs 4 more pages of 16 tokens and 2 of 5 are free" in message
        assert finish(runtime) == {row: want.tokens}
        row = runtime.add(second.prompt, second.params)
        assert finish(runtime) == {row: want_second.tokens}


def test_no_page_free_at_a_lazy_step(
    checkpoint: Path, requests_: list[tuple[Request, Answer]]
) -> None:
    (long, want), (short, _) = requests_[0], requests_[6]
    with load_micro(checkpoint, num_pages=4, reservation="lazy") as runtime:
        keep = runtime.add(long.prompt, SamplingParams(max_tokens=20))  # at last three pages
        drop = runtime.add(short.prompt, short.params)  # one now, two later
        with pytest.raises(OutOfPages, match="nothing was launched: cancel a row"):
            finish(runtime)
        assert runtime.num_in_flight == 0
        message = assert_unchanged_by(runtime, runtime.step, OutOfPages)
        assert message.startswith("the step needs 1 more pages and 0 of 3 are free")
        runtime.cancel(drop)
        runtime.step()
        assert finish(runtime).keys() <= {keep}
    assert want.tokens  # the fuzz test compares tokens of lazy runs


# ------------------------------------------------------------------ graphs that do not exist


def test_a_step_that_no_graph_covers_is_not_launched(
    checkpoint: Path, requests_: list[tuple[Request, Answer]]
) -> None:
    request, want = requests_[1]
    with load_micro(checkpoint) as runtime:
        rows = [runtime.add(request.prompt, request.params) for _ in range(2)]
        out = runtime.step()
        whole, runtime.ladder = runtime.ladder, Ladder([GraphKey(1, 1)])
        message = assert_unchanged_by(runtime, runtime.step, NotCaptured)
        assert message == (
            "bucket 2 (2 step tokens, 2 sampling rows) was not captured (ladder 1); "
            "add it with --ladder 1,2"
        )
        runtime.ladder = whole
        rest = finish(runtime)
    for row, token in zip(rows, out.tokens.tolist(), strict=True):
        assert [token, *rest[row]] == want.tokens


@pytest.mark.parametrize("ladder", ["6", "1,6", "6,2+16", "6,1+16,3+4", "2+1,6", "6+1,4+16"])
@pytest.mark.parametrize("ahead", [1, 2])
def test_any_ladder_that_covers_the_rows_serves_any_load(
    ladder: str, ahead: int, checkpoint: Path, requests_: list[tuple[Request, Answer]]
) -> None:
    with load_micro(checkpoint, ladder=ladder) as runtime:
        answers = serve(runtime, [request for request, _ in requests_], ahead=ahead)
    assert [a.tokens for a in answers] == [want.tokens for _, want in requests_]


# ------------------------------------------------------------------ outputs and endings


def test_output_arrays_are_parallel_and_typed(runtime: Runtime) -> None:
    rows = [runtime.add([1, 2, 3]), runtime.add([4])]
    out = runtime.step()
    assert len(out) == 2
    assert sorted(out.rows.tolist()) == sorted(rows)
    kinds = {"rows": "i4", "tokens": "i4", "logprobs": "f4", "finished": "?"}
    for name, kind in kinds.items():
        array = getattr(out, name)
        assert (array.dtype, array.shape) == (np.dtype(kind), (2,)), name
    assert out.finish_reasons.tolist() == ["", ""]
    assert (out.logprobs <= 0).all()
    assert [out.step, runtime.step().step] == [0, 1]


def test_outputs_are_copies(runtime: Runtime) -> None:
    """The ring is rewritten every fourth step; what was returned is not."""
    runtime.add([1, 2, 3], SamplingParams(max_tokens=20, ignore_eos=True))
    out = runtime.step()
    before = [out.tokens.copy(), out.logprobs.copy()]
    for _ in range(9):
        runtime.step()
    assert np.array_equal(out.tokens, before[0])
    assert np.array_equal(out.logprobs, before[1])


def test_a_step_with_nothing_to_do_is_a_step(runtime: Runtime) -> None:
    out = runtime.step()
    assert (len(out), out.step, runtime.last_key) == (0, 0, GraphKey(1, 1))
    assert runtime.step().step == 1


def test_one_token(runtime: Runtime, requests_: list[tuple[Request, Answer]]) -> None:
    for request, want in requests_:
        got = serve(runtime, [Request(request.prompt, 1)])[0]
        assert (got.tokens, got.reason) == (want.tokens[:1], "length")


def test_the_longest_request_that_fits(runtime: Runtime) -> None:
    prompt = tuple(np.random.default_rng(2).integers(0, VOCAB, MAX_SEQ_LEN - 1).tolist())
    got = serve(runtime, [Request(prompt, 1)])[0]
    assert (len(got.tokens), got.reason) == (1, "length")
    got = serve(runtime, [Request(prompt[:1], MAX_SEQ_LEN - 1)])[0]
    assert (len(got.tokens), got.reason) == (MAX_SEQ_LEN - 1, "length")


@pytest.mark.parametrize("at", [0, 3, 11])
def test_a_stop_id_ends_the_request_and_is_returned(
    at: int, runtime: Runtime, requests_: list[tuple[Request, Answer]]
) -> None:
    request, want = requests_[3]
    stop = want.tokens[at]
    unused = [t for t in range(VOCAB) if t not in want.tokens][:15]
    got = serve(runtime, [Request(request.prompt, 12, (*unused, stop))])[0]
    assert got.tokens == want.tokens[: want.tokens.index(stop) + 1]
    assert got.reason == "stop", "also where the length ends it in the same step"


def test_the_models_own_end_of_sequence(
    checkpoint: Path, tmp_path: Path, requests_: list[tuple[Request, Answer]]
) -> None:
    request, want = requests_[0]
    eos = want.tokens[4]
    path = micro_checkpoint(tmp_path, eos_token_id=eos)
    with load_micro(path) as runtime:
        row = runtime.add(request.prompt, SamplingParams(max_tokens=12))
        assert finish(runtime) == {row: want.tokens[: want.tokens.index(eos) + 1]}
        row = runtime.add(request.prompt, SamplingParams(max_tokens=12, ignore_eos=True))
        assert finish(runtime) == {row: want.tokens}


def test_logits_that_are_not_finite_end_that_request_alone(
    runtime: Runtime, requests_: list[tuple[Request, Answer]]
) -> None:
    """One token's embedding is NaN: whoever feeds it ends with `error`, and nobody else notices."""
    used = {token for r, a in requests_ for token in (*r.prompt, *a.tokens)}
    unused = min(set(range(VOCAB)) - used)
    runtime.engine.graphs.step.weights["embed"][unused] = float("nan")
    bad = Request((1, unused, 2, *([3] * 40)))
    for turn in range(3):  # later turns get the pages that hold NaN
        order = [request for request, _ in requests_]
        order.insert(turn, bad)
        answers = serve(runtime, order, ahead=2)
        failed = answers.pop(turn)
        assert (failed.tokens, failed.reason) == ([-1], "error")
        assert np.isnan(failed.logprobs).all()
        assert [a.tokens for a in answers] == [want.tokens for _, want in requests_]


def test_a_model_that_overflows_fails_its_proof_by_name(tmp_path: Path) -> None:
    path = micro_checkpoint(tmp_path)
    tensors = read_tensors(path)
    tensors["model.norm.weight"].fill_(3e38)
    write_tensors(path, tensors)
    with pytest.raises(RuntimeError, match="the eager step gave logits that are not finite"):
        load_micro(path, verify=True)


# ------------------------------------------------------------------ launch and collect


def test_two_steps_ahead_gives_the_same_answers(
    runtime: Runtime, requests_: list[tuple[Request, Answer]]
) -> None:
    answers = serve(runtime, [request for request, _ in requests_], ahead=2)
    assert [a.tokens for a in answers] == [want.tokens for _, want in requests_]


def test_at_most_two_steps_are_in_flight(runtime: Runtime) -> None:
    runtime.add([1, 2])
    assert [runtime.launch(), runtime.launch()] == [0, 1]
    for call in (runtime.launch, runtime.step):
        message = assert_unchanged_by(runtime, call, RuntimeError)
        assert message == "2 steps are in flight already; call collect() before launch()"
    assert [runtime.collect().step, runtime.collect().step] == [0, 1]


@pytest.mark.parametrize("call", ["collect", "wait"])
def test_collect_needs_a_launch(call: str, runtime: Runtime) -> None:
    message = assert_unchanged_by(runtime, getattr(runtime, call), RuntimeError)
    assert message == "no step is in flight; call launch() first"


def test_a_short_prompt_passes_a_long_one_which_keeps_half_of_each_step(runtime: Runtime) -> None:
    long, short = runtime.add([1] * 30), runtime.add([2] * 3)
    assert runtime.step().rows.tolist() == [short]  # all of it, and 13 tokens of the first
    assert runtime.step().rows.tolist() == [short]  # beside 15 more
    assert runtime.step().rows.tolist() == [short, long]


# ------------------------------------------------------------------ occupy


def test_occupied_rows_decode_like_any_other(runtime: Runtime) -> None:
    rows = runtime.occupy(4, 20, 5)
    assert runtime.num_running == 4
    runtime.engine.fill_kv(seed=0)
    tokens = finish(runtime)
    # The first of the five came with the prompt that is taken to be there.
    assert {row: len(t) for row, t in tokens.items()} == dict.fromkeys(rows, 4)
    assert runtime.pages.num_free == runtime.pages.capacity


def test_occupy_needs_an_idle_device(runtime: Runtime) -> None:
    runtime.launch()
    message = assert_unchanged_by(runtime, lambda: runtime.occupy(1, 4, 4), RuntimeError)
    assert message == "occupy() needs an idle device; call collect() first"


def test_occupy_after_a_cancel_that_the_device_has_not_heard_of(runtime: Runtime) -> None:
    runtime.add([1, 2, 3])
    runtime.step()
    runtime.cancel(runtime.config.max_rows - 6)
    rows = runtime.occupy(ROWS, 20, 5)
    assert finish(runtime).keys() == set(rows)


def test_occupying_too_much_changes_nothing(checkpoint: Path) -> None:
    with load_micro(checkpoint, num_pages=8) as runtime:
        assert_unchanged_by(runtime, lambda: runtime.occupy(3, 40, 5), OutOfPages)
