"""Cancelling in every state: row and pages come back, and neighbours notice nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime import Runtime, SamplingParams
from tests.cpu.driven import finish, host_state, seven_requests
from tests.cpu.twins import ROWS, load_micro
from tests.serving import Answer, Book, Request


@pytest.fixture(scope="module")
def requests_(checkpoint: Path) -> list[tuple[Request, Answer]]:
    return seven_requests(checkpoint)


@pytest.fixture
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with load_micro(checkpoint) as runtime:
        yield runtime


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
