"""Thousands of random calls: no page leaked or shared, no free page read, every answer as if alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from runtime import OutOfPages, Runtime, StepOutput
from tests.cpu.twins import MAX_SEQ_LEN, PAGE, ROWS, VOCAB, load_micro, micro_checkpoint
from tests.serving import Answer, Book, Request, alone, make_requests

OPERATIONS = 2000
MOST_TOKENS = 14
NUM_PROMPTS = 20
NUM_PAGES = 17  # sixteen to give out, and six rows may want thirty


class Fuzz:
    """One runtime under random calls, with a model of what it owes to whom.

    Before every launch each page that no row holds is filled with NaN, the null page among them: a
    token that reads one cannot come out right.
    """

    def __init__(self, runtime: Runtime, prompts: list[tuple[Request, Answer]], seed: int) -> None:
        self.runtime, self.prompts = runtime, prompts
        self.rng = np.random.default_rng(seed)
        self.book = Book()
        self.wanted: dict[int, tuple[Request, Answer, Answer]] = {}  # by row: asked, got, alone
        self.seen: Counter[str] = Counter()
        self.device = runtime.engine.graphs.step.buffers

    def run(self, operations: int) -> None:
        calls = {"add": 5, "launch": 6, "collect": 6, "step": 3, "cancel": 1}
        weights = np.array(list(calls.values())) / sum(calls.values())
        for _ in range(operations):
            getattr(self, str(self.rng.choice(list(calls), p=weights)))()
            self.check_pool()
        while self.wanted or self.runtime.num_in_flight:
            if not self.runtime.num_in_flight:
                self.launch()
            self.collect()
        self.runtime.step()  # carries the last cancels to the device
        assert (self.device["phase"] == 0).all()
        assert self.runtime.pages.num_free == self.runtime.pages.capacity
        assert self.runtime.num_running == 0

    # -------------------------------------------------------------- calls

    def add(self) -> None:
        request, answer = self.prompts[self.rng.integers(len(self.prompts))]
        stops = tuple(self.rng.integers(0, VOCAB, self.rng.integers(0, 4)).tolist())
        most = int(self.rng.choice([1, 2, MOST_TOKENS, self.rng.integers(1, MOST_TOKENS + 1)]))
        request = Request(request.prompt, most, stops)
        try:
            row = self.runtime.add(request.prompt, request.params)
        except OutOfPages as refusal:
            self.seen[type(refusal).__name__] += 1
            return
        self.wanted[row] = (request, self.book.opened(row), expected(request, answer))
        self.seen["full batch"] += self.runtime.num_running == ROWS

    def launch(self) -> None:
        if self.runtime.num_in_flight == 2:
            self.seen["ahead"] += 1
            return
        self.attempt(self.runtime.launch)

    def step(self) -> None:
        if self.runtime.num_in_flight < 2:
            self.attempt(lambda: self.take(self.runtime.step()))

    def collect(self) -> None:
        if self.runtime.num_in_flight:
            self.take(self.runtime.collect())

    def attempt(self, launch: Callable[[], object]) -> None:
        self.poison()
        before = int(self.device["step"])
        try:
            launch()
        except OutOfPages:
            self.seen["step out of pages"] += 1
            assert int(self.device["step"]) == before, "a refused step was launched"
            self.cancel()
            return
        self.seen[f"key {self.runtime.last_key}"] += 1
        self.check_device()

    def take(self, out: StepOutput) -> None:
        self.book.add(out)
        for row, finished in zip(out.rows.tolist(), out.finished.tolist(), strict=True):
            request, got, want = self.wanted[row]
            n = len(got.tokens)
            assert got.tokens == want.tokens[:n], f"{request} in row {row}"
            np.testing.assert_allclose(got.logprobs[-1], want.logprobs[n - 1], atol=1e-4)
            if finished:
                assert (n, got.reason) == (len(want.tokens), want.reason), request
                self.seen[got.reason] += 1
                del self.wanted[row]

    def cancel(self) -> None:
        if not self.wanted:
            return
        row = int(self.rng.choice(list(self.wanted)))
        state = "before its first token" if not self.wanted[row][1].tokens else "decoding"
        self.seen[f"cancelled {state}, {self.runtime.num_in_flight} in flight"] += 1
        self.runtime.cancel(row)
        self.book.dropped(row)
        del self.wanted[row]

    # -------------------------------------------------------------- invariants

    def poison(self) -> None:
        held = {page for row in range(ROWS) for page in self.runtime.pages.held(row)}
        free = [page for page in range(NUM_PAGES) if page not in held]
        for layer in range(self.runtime.model_config.num_layers):
            pages = self.device[f"kv.{layer}"].view(NUM_PAGES, PAGE, -1)
            pages[free] = float("nan")

    def check_pool(self) -> None:
        pool = self.runtime.pages
        held = [page for row in range(ROWS) for page in pool.held(row)]
        assert len(set(held)) == len(held), f"a page has two rows: {held}"
        assert all(1 <= page < NUM_PAGES for page in held), f"the null page was given out: {held}"
        assert len(held) + pool.num_free == pool.capacity, "a page was leaked"
        assert all(row in self.wanted for row in range(ROWS) if pool.held(row))
        assert self.runtime.num_running == len(self.wanted)

    def check_device(self) -> None:
        """Right after a launch, which on the twin has run, the device agrees with the host."""
        b, seen = self.device, set()
        for row in b["phase"].nonzero().flatten().tolist():
            assert row in self.wanted, f"row {row} lives on the device alone"
            used = self.runtime.pages.pages_for(int(b["seq_len"][row]))
            pages = b["page_table"][row, :used].tolist()
            assert pages == self.runtime.pages.held(row)[:used], f"row {row}"
            assert not seen.intersection(pages), f"a page is in two tables: {pages}"
            seen.update(pages)


def expected(request: Request, answer: Answer) -> Answer:
    """What the request must give, from its prompt's answer of `MOST_TOKENS` tokens, alone."""
    for n, token in enumerate(answer.tokens[: request.max_tokens], 1):
        if token in request.stops:
            return Answer(-1, answer.tokens[:n], answer.logprobs[:n], "stop")
    n = request.max_tokens
    return Answer(-1, answer.tokens[:n], answer.logprobs[:n], "length")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_checkpoint(tmp_path_factory.mktemp("micro"))


@pytest.fixture(scope="module")
def prompts(checkpoint: Path) -> list[tuple[Request, Answer]]:
    """Prompts of one token to four pages, and their answers, each computed alone."""
    rng = np.random.default_rng(0)
    lengths = [1, PAGE - 1, PAGE, PAGE + 1, *rng.integers(1, 4 * PAGE, NUM_PROMPTS - 4).tolist()]
    requests = make_requests(rng, lengths, VOCAB, (MOST_TOKENS,))
    with load_micro(checkpoint) as runtime:
        return list(zip(requests, alone(runtime, requests), strict=True))


def happenings(runtime: Runtime) -> Iterator[str]:
    """What 2,000 calls must have met, or they show nothing."""
    yield from ("stop", "length", "full batch", "ahead", "OutOfPages", "OutOfRows")
    yield from (f"key {key}" for key in runtime.ladder.keys)
    for state in ("before its first token", "decoding"):
        yield from (f"cancelled {state}, {n} in flight" for n in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("reservation", ["full", "lazy"])
@pytest.mark.parametrize("seed", [0])
def test_random_calls(
    seed: int, reservation: str, checkpoint: Path, prompts: list[tuple[Request, Answer]]
) -> None:
    print(f"seed {seed}")
    assert max(len(request.prompt) for request, _ in prompts) + MOST_TOKENS <= MAX_SEQ_LEN
    with load_micro(checkpoint, num_pages=NUM_PAGES, reservation=reservation) as runtime:
        fuzz = Fuzz(runtime, prompts, seed)
        fuzz.run(OPERATIONS)
        print(dict(sorted(fuzz.seen.items())))
        for what in happenings(runtime):
            assert fuzz.seen[what], f"never happened: {what}"
        assert bool(fuzz.seen["step out of pages"]) == (reservation == "lazy")
