"""The driver: what it refuses and leaves unchanged, cancelling in every state, its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from barriers.errors import BarrierTimeout
from graphs.keys import GraphKey, Ladder, NotCaptured
from kernels.triton.state import (
    HEADER,
    MAX_TOP,
    RING_SLOTS,
    MailboxLayout,
    RingLayout,
    mask_words,
)
from runtime import OutOfPages, OutOfRows, Runtime, SamplingParams, StepFailed
from tests.cpu.checkpoints import edit_config, read_tensors, write_tensors
from tests.cpu.twins import (
    MAX_SEQ_LEN,
    PAGE,
    ROWS,
    VOCAB,
    device_state,
    load_micro,
    micro_checkpoint,
)
from tests.serving import Answer, Book, Request, alone, make_requests, serve


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_checkpoint(tmp_path_factory.mktemp("micro"))


@pytest.fixture(scope="module")
def requests_(checkpoint: Path) -> list[tuple[Request, Answer]]:
    """Seven requests of one to three pages, and the answer of each alone."""
    requests = make_requests(np.random.default_rng(1), (20, 1, 16, 33, 5, 40, 15), VOCAB, (12,))
    with load_micro(checkpoint) as runtime:
        return list(zip(requests, alone(runtime, requests), strict=True))


@pytest.fixture
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with load_micro(checkpoint) as runtime:
        yield runtime


def host_state(runtime: Runtime) -> dict[str, Any]:
    pages = runtime.pages
    return {
        "held": {row: list(pages.held(row)) for row in range(ROWS)},
        "free": pages.num_free,
        "running": runtime.num_running,
        "in flight": runtime.num_in_flight,
        "key": runtime.last_key,
    }


def assert_unchanged_by(
    runtime: Runtime, call: Callable[[], object], error: type[Exception]
) -> str:
    """`call` raises `error` and leaves host and device as they were; returns the message."""
    before, device = host_state(runtime), device_state(runtime)
    with pytest.raises(error) as refusal:
        call()
    assert host_state(runtime) == before
    for name, tensor in device_state(runtime).items():
        assert torch.equal(tensor.view(torch.uint8), device[name].view(torch.uint8)), name
    return str(refusal.value)


def finish(runtime: Runtime) -> dict[int, list[int]]:
    """Step until nothing runs; tokens by row, of requests that keep theirs."""
    tokens: dict[int, list[int]] = {}
    for _ in range(200):
        if not runtime.num_running and not runtime.num_in_flight:
            return tokens
        if not runtime.num_in_flight:
            runtime.launch()
        out = runtime.collect()
        for row, token in zip(out.rows.tolist(), out.tokens.tolist(), strict=True):
            tokens.setdefault(row, []).append(token)
    raise AssertionError(f"{runtime.num_running} requests never end")


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
        {"top_k": -1},
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


# ------------------------------------------------------------------ cancelling


def nothing(runtime: Runtime) -> None:
    """Waiting: not launched yet."""


def one_chunk(runtime: Runtime) -> None:
    """Prefilling: a part of the prompt is in the cache."""
    assert len(runtime.step()) == 0


def decoding(runtime: Runtime) -> None:
    for _ in range(6):
        runtime.step()


def one_in_flight(runtime: Runtime) -> None:
    decoding(runtime)
    runtime.launch()


def two_in_flight(runtime: Runtime) -> None:
    one_in_flight(runtime)
    runtime.launch()


def first_chunk_in_flight(runtime: Runtime) -> None:
    runtime.launch()


def last_token_in_flight(runtime: Runtime) -> None:
    for _ in range(13):  # three chunks, and all but one of twelve tokens
        runtime.step()
    runtime.launch()
    runtime.launch()


STATES = (
    *(nothing, one_chunk, first_chunk_in_flight, decoding),
    *(one_in_flight, two_in_flight, last_token_in_flight),
)


@pytest.mark.parametrize("state", STATES, ids=lambda f: f.__name__)
def test_cancel_frees_row_and_pages_and_nothing_more_is_returned(
    state: Callable[[Runtime], None], runtime: Runtime, requests_: list[tuple[Request, Answer]]
) -> None:
    (request, _), (next_request, want) = requests_[5], requests_[3]
    row = runtime.add(request.prompt, request.params)  # 40 tokens: chunks of 16, 16 and 8
    state(runtime)
    runtime.cancel(row)
    assert runtime.pages.held(row) == []
    assert runtime.num_running == 0
    runtime.cancel(row)
    # The next owner of the row, and of its pages, joins before the device has heard of it.
    assert runtime.add(next_request.prompt, next_request.params) == row
    assert finish(runtime) == {row: want.tokens}
    assert runtime.pages.num_free == runtime.pages.capacity


@pytest.mark.parametrize("state", STATES, ids=lambda f: f.__name__)
def test_a_cancelled_request_leaves_its_neighbours_alone(
    state: Callable[[Runtime], None], runtime: Runtime, requests_: list[tuple[Request, Answer]]
) -> None:
    (request, _), (other, want) = requests_[5], requests_[0]
    row = runtime.add(request.prompt, request.params)
    state(runtime)
    kept, got = runtime.add(other.prompt, other.params), Book()
    answer = got.opened(kept)
    runtime.cancel(row)
    while runtime.num_running or runtime.num_in_flight:
        if not runtime.num_in_flight:
            runtime.launch()
        got.add(runtime.collect())
    assert answer.tokens == want.tokens


def test_cancel_and_add_again_and_again(
    runtime: Runtime, requests_: list[tuple[Request, Answer]]
) -> None:
    """Within one pair of steps in flight the row changes hands three times."""
    request, want = requests_[0]
    row = runtime.add([7] * 3, SamplingParams(max_tokens=50, ignore_eos=True))
    runtime.step()
    runtime.launch()
    for prompt in ([8] * 20, [9]):
        runtime.cancel(row)
        assert runtime.add(prompt, SamplingParams(max_tokens=50, ignore_eos=True)) == row
    runtime.launch()
    runtime.cancel(row)
    assert runtime.add(request.prompt, request.params) == row
    assert len(runtime.collect()) == len(runtime.collect()) == 0, "tokens of a former owner"
    assert finish(runtime) == {row: want.tokens}


def test_cancel_of_no_row_or_an_ended_one(
    runtime: Runtime, requests_: list[tuple[Request, Answer]]
) -> None:
    for row in (-1, ROWS, 99):
        with pytest.raises(ValueError, match=rf"row must be in \[0, {ROWS}\), got {row}"):
            runtime.cancel(row)
    request, want = requests_[1]
    row = runtime.add(request.prompt, request.params)
    assert finish(runtime) == {row: want.tokens}
    before = host_state(runtime)
    for row in range(ROWS):
        runtime.cancel(row)
    assert host_state(runtime) == before


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


# ------------------------------------------------------------------ the end


CALLS: dict[str, Callable[[Runtime], object]] = {
    "add": lambda r: r.add([1]),
    "cancel": lambda r: r.cancel(0),
    "occupy": lambda r: r.occupy(1, 4, 4),
    "step": lambda r: r.step(),
    "launch": lambda r: r.launch(),
    "collect": lambda r: r.collect(),
    "wait": lambda r: r.wait(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("in_flight", [False, True])
def test_a_closed_runtime_says_so(call: str, in_flight: bool, checkpoint: Path) -> None:
    runtime = load_micro(checkpoint)
    runtime.add([1, 2])
    if in_flight:
        runtime.launch()
    runtime.close()
    runtime.close()
    with pytest.raises(RuntimeError, match="this runtime is closed; make a new one"):
        CALLS[call](runtime)


def test_the_context_manager_closes_after_an_error_too(checkpoint: Path) -> None:
    with pytest.raises(KeyError), load_micro(checkpoint) as runtime:  # noqa: PT012
        runtime.add([1])
        runtime.launch()
        raise KeyError
    with pytest.raises(RuntimeError, match="closed"):
        runtime.step()


def test_an_unknown_reservation_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="reservation must be 'full' or 'lazy', got 'greedy'"):
        load_micro(checkpoint, reservation="greedy")


# ------------------------------------------------------------------ options of load


@pytest.mark.parametrize("alias", ["max_batch_size", "max_model_len", "cuda_graph_bs"])
def test_load_takes_the_spellings_of_other_engines(alias: str, checkpoint: Path) -> None:
    ours = {"max_batch_size": "bs", "max_model_len": "max_seq_len", "cuda_graph_bs": "ladder"}
    options: dict[str, Any] = {"bs": 2, "max_seq_len": 64, "ladder": "1,2"}
    options[alias] = options.pop(ours[alias])
    store = str(checkpoint / "store")
    common = {"page_size": PAGE, "verify": False, "device": "cpu", "store": store}
    with Runtime.load(str(checkpoint), **common, **options) as runtime:
        assert (runtime.config.max_rows, runtime.config.max_seq_len) == (2, 64)
        assert str(runtime.ladder) == "1,2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 4}, "unknown option 'batch'; known: "),
        ({"ladder": "6", "cuda_graph_bs": "6"}, "another spelling of 'ladder', which is given"),
        ({"cuda_graph_bs": "6", "ladder": "6"}, "another spelling of 'ladder', which is given"),
        ({"device": "tpu"}, "device must be one of auto, cuda, cpu"),
        ({"attention": "flashinfer"}, "attention flashinfer needs a CUDA device"),
        ({"bs": 0}, "bs must be at least 1, got 0"),
        ({"bs": 7, "ep_size": 2}, "bs 7 is global and must divide by ep_size 2; use --bs 8"),
        ({"num_pages": 0}, "num_pages must be at least"),
        ({"num_pages": 1}, "num_pages must be at least"),
        ({"page_size": 24}, "page_size must be a power of two"),
        ({"page_size": 8}, "page_size must be"),
        ({"max_seq_len": 4096}, "max_seq_len 4096 exceeds the model's 512 positions"),
        ({"ladder": ""}, "the ladder is empty"),
        ({"ladder": "1,2"}, "the largest entry must be 6"),
        ({"layers": 0}, "layers"),
        ({"layers": 3}, "layers: expected 1 … 2"),
        ({"overrides": {"n_experts": 4}}, "n_experts"),
        ({"proof_replays": 0, "verify": True}, "at least one replay"),
        ({"deadline_s": 0.0}, "deadline_s"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_with_the_reason(
    options: dict[str, Any], message: str, checkpoint: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load_micro(checkpoint, **options).close()


def test_an_end_of_sequence_id_outside_the_vocabulary_is_refused_at_load(tmp_path: Path) -> None:
    path = micro_checkpoint(tmp_path)
    edit_config(path, lambda config: config.update(eos_token_id=VOCAB + 5))
    (path / "generation_config.json").unlink()
    with pytest.raises(ValueError, match=f"eos_token_id.*{VOCAB + 5}"):
        load_micro(path).close()


# ------------------------------------------------------------------ a device that fails


@dataclass
class FakeConfig:
    max_rows: int = 4
    num_pages: int = 9
    page_size: int = 16
    max_seq_len: int = 32
    logits_rows: int = 1
    ep_size: int = 1


@dataclass
class FakeModel:
    vocab_size: int = 10
    eos_token_ids: tuple[int, ...] = ()


@dataclass
class FakeEngine:
    """A device that publishes what the test says: nothing at all, a fault, or a token.

    Attributes:
        answers: False never publishes.
        fault: of every step.
        dead: raised by `check_alive`.
        late: raised by `check_ranks`.
    """

    answers: bool = True
    fault: int = 0
    dead: Exception | None = None
    late: Exception | None = None
    deadline_s: float = 0.05
    closed: int = 0
    config: FakeConfig = field(default_factory=FakeConfig)
    model_config: FakeModel = field(default_factory=FakeModel)
    ring_header: int = HEADER

    def __post_init__(self) -> None:
        self.ladder = Ladder.parse("1,4", self.config.max_rows)
        self.mailbox_layout = MailboxLayout(self.config.max_rows, 4, 16)
        self.mailbox = np.zeros((2, self.mailbox_layout.words), np.int32)
        self.ring = np.zeros((RING_SLOTS, RingLayout(self.config.max_rows).words), np.int32)
        self.ring_step = np.zeros(RING_SLOTS, np.int64)
        rows, vocab = self.config.max_rows, self.model_config.vocab_size
        self.ring_top = np.zeros((RING_SLOTS, rows, 2, MAX_TOP), np.int32)
        self.ring_logits = np.zeros((2, 1, vocab), np.float32)
        self.forced_tokens = np.zeros((rows, self.config.max_seq_len), np.int32)
        self.masks = np.zeros((2, rows, mask_words(vocab)), np.int32)
        self.step = 0

    def replay(self, key: GraphKey) -> None:
        slot = self.step % RING_SLOTS
        self.ring[slot, :2] = 0, self.fault
        if self.answers:
            self.ring_step[slot] = self.step + 1
        self.step += 1

    def check_alive(self) -> None:
        if self.dead:
            raise self.dead

    def check_ranks(self) -> None:
        if self.late:
            raise self.late

    def close(self) -> None:
        self.closed += 1


def fake(**options: Any) -> tuple[Runtime, FakeEngine]:
    engine = FakeEngine(**options)
    return Runtime(engine), engine  # type: ignore[arg-type]


def test_a_silent_device_is_given_up_after_the_deadline() -> None:
    runtime, _ = fake(answers=False)
    runtime.add([1])
    with pytest.raises(StepFailed, match="step 0 did not finish within 0.05 s; close this runtime"):
        runtime.step()


def test_a_late_peer_is_named_by_the_device_that_began_to_wait_for_it_after_the_host() -> None:
    """The device's deadline is the same, but runs from its own wait, in the midst of the step."""
    runtime, engine = fake(answers=False, config=FakeConfig(ep_size=2))
    named = time.monotonic() + 3 * engine.deadline_s

    def check_alive() -> None:
        if time.monotonic() > named:
            raise BarrierTimeout("rank 1 is late", (1,))

    engine.check_alive = check_alive  # type: ignore[method-assign]
    runtime.add([1])
    with pytest.raises(BarrierTimeout, match="rank 1 is late"):
        runtime.step()


def test_a_step_that_a_peer_missed_gives_no_tokens() -> None:
    """The device gives up its wait and finishes the step; what it published is worth nothing."""
    runtime, engine = fake(answers=True)
    runtime.add([1])
    runtime.step()
    engine.late = BarrierTimeout("rank 1 is late", (1,))
    with pytest.raises(BarrierTimeout, match="rank 1 is late"):
        runtime.step()
    with pytest.raises(StepFailed, match="BarrierTimeout: rank 1 is late"):
        runtime.launch()


def test_a_device_error_is_raised_instead_of_waiting_for_the_deadline() -> None:
    runtime, _ = fake(answers=False, dead=MemoryError("an illegal address"), deadline_s=60.0)
    with pytest.raises(MemoryError, match="an illegal address"):
        runtime.step()
    with pytest.raises(StepFailed, match="MemoryError: an illegal address"):
        runtime.launch()


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (1, "more rows or prompt tokens were asked for than the graph holds"),
        (2, "a live token had no KV page"),
        (77, "77"),
    ],
)
def test_a_fault_is_named(fault: int, sentence: str) -> None:
    runtime, _ = fake(fault=fault)
    with pytest.raises(StepFailed, match=f"step 0: .*{sentence}"):
        runtime.step()


@pytest.mark.parametrize("how", [{"fault": 2}, {"answers": False}], ids=["fault", "silence"])
def test_after_a_failure_nothing_but_close_is_possible(how: dict[str, Any]) -> None:
    runtime, engine = fake(**how)
    runtime.add([1])
    with pytest.raises(StepFailed):
        runtime.step()
    engine.fault, engine.answers, steps = 0, True, engine.step
    for call in ("add", "step", "launch", "collect"):
        with pytest.raises(StepFailed, match="close"):
            CALLS[call](runtime)
    assert engine.step == steps, "a step was launched on a device that had failed"
    runtime.close()
    assert engine.closed == 1


def test_a_real_step_reports_a_page_that_is_missing(runtime: Runtime) -> None:
    runtime.add([1, 2, 3])
    runtime.step()
    runtime.engine.graphs.step.buffers["page_table"].zero_()
    with pytest.raises(StepFailed, match="step 1: a live token had no KV page"):
        runtime.step()


def test_an_old_ring_entry_is_not_taken_for_a_new_one() -> None:
    """Step 4 shares its slot with step 0, which has been published and collected."""
    runtime, engine = fake()
    for _ in range(RING_SLOTS):
        runtime.step()
    engine.answers = False
    with pytest.raises(StepFailed, match=f"step {RING_SLOTS} did not finish"):
        runtime.step()
