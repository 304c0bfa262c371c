"""Random calls on a runtime, with a model of what it owes to whom. Any device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from runtime import OutOfPages, Runtime, StepOutput
from tests.serving import Answer, Book, Request

MOST_TOKENS = 14


class Fuzz:
    """One runtime under random calls.

    Before every launch each page that neither a row nor the prefix cache holds is filled with NaN,
    the null page among them: a token that reads one cannot come out right.

    Args:
        prompts: with the answer of `MOST_TOKENS` tokens that each has alone.
        tolerance: of log-probs against those answers; 0 demands the same bits.
        check_every: launches between checks of the device's tables, which wait for it.
    """

    def __init__(
        self,
        runtime: Runtime,
        prompts: list[tuple[Request, Answer]],
        *,
        seed: int,
        tolerance: float,
        check_every: int = 1,
    ) -> None:
        self.runtime, self.prompts = runtime, prompts
        self.tolerance, self.check_every = tolerance, check_every
        self.launches = 0
        self.rng = np.random.default_rng(seed)
        self.book = Book()
        self.wanted: dict[int, tuple[Request, Answer, Answer]] = {}  # by row: asked, got, alone
        self.seen: Counter[str] = Counter()
        self.backend = runtime.engine.graphs.backend
        self.device = runtime.engine.graphs.step.buffers

    def run(self, operations: int) -> None:
        """So many calls, then every answer to its end."""
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
        self.backend.synchronize()
        assert not self.device["phase"].any()
        assert self.runtime.pages.num_free == self.runtime.pages.capacity
        assert self.runtime.num_running == 0

    # -------------------------------------------------------------- calls

    def add(self) -> None:
        request, answer = self.prompts[self.rng.integers(len(self.prompts))]
        vocab = self.runtime.model_config.vocab_size
        stops = tuple(self.rng.integers(0, vocab, self.rng.integers(0, 4)).tolist())
        if self.rng.integers(3) == 0:
            stops = (*stops, answer.tokens[self.rng.integers(MOST_TOKENS)])
        most = int(self.rng.choice([1, 2, MOST_TOKENS, self.rng.integers(1, MOST_TOKENS + 1)]))
        request = Request(request.prompt, most, stops)
        try:
            row = self.runtime.add(request.prompt, request.params)
        except OutOfPages as refusal:
            self.seen[type(refusal).__name__] += 1
            return
        self.wanted[row] = (request, self.book.opened(row), expected(request, answer))
        self.seen["full batch"] += self.runtime.num_running == self.runtime.config.max_rows

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
        before = self.runtime.num_in_flight
        try:
            launch()
        except OutOfPages:
            self.seen["step out of pages"] += 1
            assert self.runtime.num_in_flight == before, "a refused step was launched"
            self.cancel()
            return
        self.seen[f"key {self.runtime.last_key}"] += 1
        self.launches += 1
        if self.launches % self.check_every == 0:
            self.check_device()

    def take(self, out: StepOutput) -> None:
        self.book.add(out)
        for row, finished in zip(out.rows.tolist(), out.finished.tolist(), strict=True):
            request, got, want = self.wanted[row]
            n = len(got.tokens)
            assert got.tokens == want.tokens[:n], f"{request} in row {row}"
            assert abs(got.logprobs[-1] - want.logprobs[n - 1]) <= self.tolerance, request
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
        config = self.runtime.config
        held = {page for row in range(config.max_rows) for page in self.runtime.pages.held(row)}
        held.update(self.runtime.pages.cache.idle)
        free = [page for page in range(config.num_pages) if page not in held]
        with self.backend.on_stream():
            for layer in range(self.runtime.model_config.num_layers):
                pages = self.device[f"kv.{layer}"].view(config.num_pages, config.page_size, -1)
                pages[free] = float("nan")

    def check_pool(self) -> None:
        pool, rows = self.runtime.pages, range(self.runtime.config.max_rows)
        held = [page for row in rows for page in pool.held(row)]
        shared = {page for page in held if held.count(page) > 1}
        assert all(page in pool.cache for page in shared), f"a page has two rows: {held}"
        assert all(1 <= page < pool.num_pages for page in held), f"not a page to give out: {held}"
        assert len(set(held)) + pool.num_free == pool.capacity, "a page was leaked"
        assert all(row in self.wanted for row in rows if pool.held(row))
        assert self.runtime.num_running == len(self.wanted)

    def check_device(self) -> None:
        """After a launch, once it has run, the device's tables are the host's.

        A row that has ended on the device may still live on the host, which has not collected yet.
        """
        self.backend.synchronize()
        names = ("phase", "seq_len", "page_table")
        phase, length, table = (self.device[name].tolist() for name in names)
        seen: set[int] = set()
        for row in np.flatnonzero(phase).tolist():
            assert row in self.wanted, f"row {row} lives on the device alone"
            pages = table[row][: self.runtime.pages.pages_for(length[row])]
            assert pages == self.runtime.pages.held(row)[: len(pages)], f"row {row}"
            own = {page for page in pages if page not in self.runtime.pages.cache}
            assert not seen & own, f"a page is in two tables: {pages}"
            seen |= own


def expected(request: Request, answer: Answer) -> Answer:
    """What the request must give, from its prompt's answer of `MOST_TOKENS` tokens, alone."""
    for n, token in enumerate(answer.tokens[: request.max_tokens], 1):
        if token in request.stops:
            return Answer(-1, answer.tokens[:n], answer.logprobs[:n], "stop")
    n = request.max_tokens
    return Answer(-1, answer.tokens[:n], answer.logprobs[:n], "length")


def happenings(runtime: Runtime) -> Iterator[str]:
    """What a long run must have met, or it shows nothing."""
    yield from ("stop", "length", "full batch", "ahead", "OutOfPages", "OutOfRows")
    yield from (f"key {key}" for key in runtime.ladder.keys)
    for state in ("before its first token", "decoding"):
        yield from (f"cancelled {state}, {n} in flight" for n in range(3))
