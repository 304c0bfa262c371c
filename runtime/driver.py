"""The driver: admits requests, picks a graph, launches it, reads the ring; nothing else per step.

    add ──► waiting ──► prefilling ──► decoding ──► ended
                 └────────── cancel ──────┴──────────┘

Invariants: the host decides only what it must (which rows join, whose prompt is fed, which pages);
the device decides which rows live. The host's count of decoding rows is never below the device's.
Pages are reserved before the launch that writes them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.mailbox import Chunk, Mailbox, Ring, RingEntry
from runtime.pages import OutOfPages, OutOfRows, PagePool
from runtime.sampling import FINISH_REASONS, SamplingParams, StepOutput, as_token_ids

if TYPE_CHECKING:
    from graphs.keys import GraphKey
    from runtime.engine import Engine

MAX_IN_FLIGHT = 2  # the mailbox has two slots
WAITING, PREFILLING, DECODING = 1, 2, 3
FAULTS = {
    1: "more rows or prompt tokens were asked for than the graph holds",
    2: "a live token had no KV page",
}


class StepFailed(RuntimeError):
    """The device could not do a step as asked; the runtime must be closed."""


@dataclass
class _Request:
    """Host record of the request in a row."""

    prompt: NDArray[np.int32]
    params: SamplingParams
    limit: int
    stops: tuple[int, ...]


@dataclass(frozen=True)
class _Plan:
    """One step as the host wants it, before anything is written."""

    tokens: int
    samples: int
    chunks: list[Chunk]
    admits: list[int]


class Runtime:
    """Continuous batching over captured decode graphs.

    Use `Runtime.load`; the constructor takes an engine that is ready to replay.

    Args:
        engine: captured graphs with their mailbox, ring and ladder.
        reservation: "full" reserves the pages of prompt and `max_tokens` at `add`, so that a step
            never runs short; "lazy" reserves them as rows grow, and then `step` may raise
            `OutOfPages`.
    """

    def __init__(self, engine: Engine, *, reservation: str = "full") -> None:
        if reservation not in ("full", "lazy"):
            raise ValueError(f"reservation must be 'full' or 'lazy', got {reservation!r}")
        self.engine = engine
        self.ladder = engine.ladder
        self.config = engine.config
        self.model_config = engine.model_config
        self._lazy = reservation == "lazy"
        rows = self.config.max_rows
        self.pages = PagePool(self.config.num_pages, self.config.page_size)
        self._mailbox = Mailbox(engine.mailbox, engine.mailbox_layout)
        self._ring = Ring(engine.ring, engine.ring_step, header=engine.ring_header, max_rows=rows)
        self._requests: list[_Request | None] = [None] * rows
        self._free_rows = list(range(rows - 1, -1, -1))
        self._phase = np.zeros(rows, np.int8)
        self._done = np.zeros(rows, np.int32)  # tokens in the KV cache once all launches are done
        self._limit = np.zeros(rows, np.int32)
        self._sent_pages = np.zeros(rows, np.int32)
        self._taken = np.zeros(rows, bool)
        self._since = np.zeros(rows, np.int64)
        self._queue: deque[int] = deque()  # rows with prompt left, in order of arrival
        self._cancels: list[int] = []
        self._in_flight: deque[int] = deque()
        self._next_step = 0
        self._closed = False
        self._failure = ""
        self.last_entry: RingEntry | None = None
        self.last_key: GraphKey | None = None

    @classmethod
    def load(
        cls,
        model: str,
        bs: int = 256,
        max_seq_len: int = 4096,
        num_pages: int | None = None,
        device: str = "auto",
        store: str | None = None,
        **config: Any,
    ) -> Runtime:
        """Load a model, capture its graphs (or take what the store holds), and be ready to step.

        Args:
            model: Hugging Face directory (config.json + safetensors) or a preset name.
            bs: global decode batch; rows of a rank are `bs / ep_size`.
            max_seq_len: tokens of prompt and output together.
            num_pages: KV pages of 64 tokens; default: what the rows can use, or what memory allows.
            device: "auto", "cuda" or "cpu" (the CPU twin: for correctness only).
            store: directory of compiled kernels and manifests.
            **config: see `runtime.config.RuntimeConfig`.
        Raises:
            ValueError: an option, the model's config or its weights are not usable; says which.
        """
        from runtime.build import build
        from runtime.config import RuntimeConfig

        reservation = config.pop("reservation", "full")
        named: dict[str, Any] = {"bs": bs, "max_seq_len": max_seq_len, "num_pages": num_pages}
        named |= {"device": device, "store": store}
        options = RuntimeConfig.of(model=model, defaults=named, **config)
        return cls(build(options), reservation=reservation)

    # ------------------------------------------------------------------ requests

    @property
    def num_in_flight(self) -> int:
        """Steps launched and not yet collected."""
        return len(self._in_flight)

    @property
    def num_running(self) -> int:
        """Requests that have been added and have not ended."""
        return self.config.max_rows - len(self._free_rows)

    def add(
        self,
        prompt_ids: Sequence[int] | NDArray[np.integer[Any]],
        params: SamplingParams | None = None,
    ) -> int:
        """Take a request; its tokens come out of later steps. No device work.

        Returns:
            The request's row, valid until it ends.
        Raises:
            ValueError: the request can never fit or is malformed.
            OutOfPages: it cannot fit now (`OutOfRows` if every row is taken).
        """
        self._check_open()
        params = params or SamplingParams()
        prompt = as_token_ids(prompt_ids, self.model_config.vocab_size)
        limit = len(prompt) + params.max_tokens
        if limit > self.config.max_seq_len:
            raise ValueError(
                f"prompt of {len(prompt)} tokens + max_tokens {params.max_tokens} = {limit} "
                f"exceeds "
                f"max_seq_len {self.config.max_seq_len}; shorten it or raise --max-seq-len"
            )
        # The last token is returned but never fed, so it needs no page.
        whole = self.pages.pages_for(limit - 1)
        if whole > self.pages.capacity:
            raise ValueError(
                f"the request needs {whole} pages of {self.config.page_size} tokens and the cache "
                f"has "
                f"{self.pages.capacity}; shorten it or raise --num-pages"
            )
        stops = self._stops(params)
        if not self._free_rows:
            raise OutOfRows(
                f"all {self.config.max_rows} rows are running; wait for one to finish, cancel one, "
                "or raise --bs"
            )
        row = self._free_rows[-1]
        self.pages.grow(row, len(prompt) if self._lazy else limit - 1)
        self._free_rows.pop()
        self._requests[row] = _Request(prompt, params, limit, stops)
        self._phase[row], self._done[row], self._limit[row] = WAITING, 0, limit
        self._sent_pages[row], self._since[row] = 0, self._next_step
        self._taken[row] = True
        self._queue.append(row)
        return row

    def _stops(self, params: SamplingParams) -> tuple[int, ...]:
        eos = () if params.ignore_eos else tuple(self.model_config.eos_token_ids)
        stops = tuple(dict.fromkeys((*params.stop_token_ids, *eos)))
        vocab, most = self.model_config.vocab_size, self.engine.mailbox_layout.max_stops
        for token in stops:
            if not 0 <= token < vocab:
                raise ValueError(f"stop token id {token} is outside the vocabulary [0, {vocab})")
        if len(stops) > most:
            raise ValueError(
                f"{len(stops)} stop token ids (the model's own included), at most {most} are "
                f"possible"
            )
        return stops

    def cancel(self, row: int) -> None:
        """End the request in `row` now; no further token of it is returned. Idempotent."""
        self._check_open()
        if not 0 <= row < self.config.max_rows:
            raise ValueError(f"row must be in [0, {self.config.max_rows}), got {row}")
        if self._requests[row] is None:
            return
        if self._phase[row] != WAITING:
            # Applied before the admissions of the next launch, so row and pages are free at once:
            # a step in flight can only touch them before their next owner does.
            self._cancels.append(row)
        self._retire(row)

    def _retire(self, row: int) -> None:
        if self._phase[row] in (WAITING, PREFILLING):
            self._queue.remove(row)
        self._requests[row] = None
        self._taken[row] = False
        self._phase[row] = 0
        self.pages.release(row)
        self._free_rows.append(row)

    def occupy(self, num_rows: int, ctx_len: int, max_tokens: int) -> list[int]:
        """Take rows as if prompts of `ctx_len` tokens had just been prefilled, computing nothing.

        For benchmarks: the rows attend over whatever the KV cache holds.

        Raises:
            ValueError, OutOfPages, OutOfRows: as `add`.
        """
        self._check_open()
        if self._in_flight:
            raise RuntimeError("occupy() needs an idle device; call collect() first")
        prompt = np.zeros(ctx_len, np.int32)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        rows: list[int] = []
        try:
            for _ in range(num_rows):
                rows.append(self.add(prompt, params))
                self.pages.grow(rows[-1], ctx_len)
        except BaseException:
            for row in reversed(rows):
                self._retire(row)
            raise
        for row in rows:
            self._queue.remove(row)
        # The device hears of these rows at once: an older cancel must not reach their new owner.
        self._cancels = [row for row in self._cancels if row not in rows]
        self._phase[rows], self._done[rows] = DECODING, ctx_len
        self._sent_pages[rows] = self.pages.pages_for(ctx_len)
        self.engine.adopt(
            rows, ctx_len, ctx_len + max_tokens, [self.pages.held(row) for row in rows]
        )
        return rows

    # ------------------------------------------------------------------ steps

    def step(self) -> StepOutput:
        """Launch one step and wait for it.

        Raises:
            OutOfPages: only with lazy reservation; nothing was launched.
            NotCaptured: no graph covers the step; nothing was launched.
            StepFailed: the device reported a fault or went silent.
        """
        self.launch()
        return self.collect()

    def launch(self) -> int:
        """Launch the next step without waiting; up to two may be in flight.

        Returns:
            The step's number.
        """
        self._check_open()
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            raise RuntimeError(
                f"{MAX_IN_FLIGHT} steps are in flight already; call collect() before launch()"
            )
        plan = self._plan()
        key = self.ladder.select(plan.tokens, plan.samples)
        pages = self._reserve(plan)
        step = self._next_step
        changes = plan.admits or self._cancels or plan.chunks or len(pages)
        if changes:
            requests = [(r, self._request(r)) for r in plan.admits]
            self._mailbox.write(
                step,
                cancels=self._cancels,
                admits=[(r, q.limit, q.stops) for r, q in requests],
                pages=pages,
                chunks=plan.chunks,
            )
        self._check(partial(self.engine.replay, key))  # the twin meets other ranks in here
        self.last_key = key
        self._commit(plan, step)
        return step

    def _plan(self) -> _Plan:
        """Every decoding row, and as much prompt, in order of arrival, as some key still covers."""
        decoding = int(np.count_nonzero(self._phase == DECODING))
        tokens = samples = decoding
        chunks: list[Chunk] = []
        admits: list[int] = []
        for row in self._queue:
            request = self._request(row)
            start = int(self._done[row])
            left = len(request.prompt) - start
            # The chunk that ends a prompt samples, which takes a row of the key.
            if left <= self.ladder.most_tokens(samples + 1) - tokens:
                n = left
            else:
                n = min(left - 1, self.ladder.most_tokens(samples) - tokens)
            if n <= 0:
                break
            chunks.append(Chunk(row, start, request.prompt[start : start + n], n == left))
            if self._phase[row] == WAITING:
                admits.append(row)
            tokens += n
            samples += n == left
        return _Plan(tokens, samples, chunks, admits)

    def _reserve(self, plan: _Plan) -> NDArray[np.int32]:
        """Pages that the step writes for the first time, as mailbox words [n, 3]."""
        size = self.config.page_size
        decoding = np.flatnonzero(self._phase == DECODING)
        crossing = decoding[self._done[decoding] // size >= self._sent_pages[decoding]]
        ends = [(int(r), int(self._done[r]) + 1) for r in crossing]
        ends += [(c.row, c.start + len(c.ids)) for c in plan.chunks]
        if self._lazy:
            need = sum(
                max(0, self.pages.pages_for(end) - len(self.pages.held(row))) for row, end in ends
            )
            if need > self.pages.num_free:
                raise OutOfPages(
                    f"the step needs {need} more pages and {self.pages.num_free} of "
                    f"{self.pages.capacity} are free; nothing was launched: cancel a row, raise "
                    "--num-pages, or use reservation='full'"
                )
            for row, end in ends:
                self.pages.grow(row, end)
        words = []
        for row, end in ends:
            held = self.pages.held(row)
            for index in range(int(self._sent_pages[row]), self.pages.pages_for(end)):
                words.append((row, index, held[index]))
        return np.array(words, np.int32).reshape(-1, 3)

    def _commit(self, plan: _Plan, step: int) -> None:
        """Record what the launched step will have done."""
        size = self.config.page_size
        decoding = self._phase == DECODING
        self._done[decoding] += 1
        for chunk in plan.chunks:
            self._done[chunk.row] += len(chunk.ids)
            self._phase[chunk.row] = DECODING if chunk.ends else PREFILLING
            if chunk.ends:
                self._queue.remove(chunk.row)
        for row in plan.admits:
            self._since[row] = step
        active = self._phase >= PREFILLING
        self._sent_pages[active] = -(-self._done[active] // size)
        # A row whose last token this step samples is padding from the next one on.
        last = (self._phase == DECODING) & (self._done + 1 >= self._limit)
        self._phase[last] = 0
        self._cancels = []
        self._in_flight.append(step)
        self._next_step = step + 1

    def collect(self) -> StepOutput:
        """Wait for the oldest step in flight and return its tokens.

        Raises:
            RuntimeError: nothing is in flight.
            StepFailed: the device reported a fault, or nothing within the deadline.
        """
        self.wait()
        step = self._in_flight[0]
        entry = self.last_entry = self._ring.read(step)
        self._in_flight.popleft()
        if entry.fault:
            named = FAULTS.get(entry.fault, f"unknown fault {entry.fault}")
            raise self._fail(f"step {step}: {named}; close this runtime and report it")
        # A cancelled row may have been in flight, and may have a new owner already.
        ours = self._taken[entry.rows] & (self._since[entry.rows] <= step)
        rows, tokens, reasons = entry.rows[ours], entry.tokens[ours], entry.reasons[ours]
        ended = reasons != 0
        for row in rows[ended]:
            self._retire(int(row))
        return StepOutput(
            step=step,
            rows=rows,
            tokens=tokens,
            logprobs=entry.logprobs[ours],
            finished=ended,
            finish_reasons=np.array(FINISH_REASONS)[reasons],
        )

    def wait(self) -> None:
        """Wait until `collect` would return at once.

        Raises:
            RuntimeError: nothing is in flight.
            StepFailed: nothing within the deadline.
            BarrierTimeout, StepMismatch: other ranks did not come to the step; names them.
        """
        self._check_open()
        if not self._in_flight:
            raise RuntimeError("no step is in flight; call launch() first")
        step = self._in_flight[0]
        deadline = time.monotonic() + self.engine.deadline_s
        spins = 0
        while not self._ring.ready(step):
            spins += 1
            if spins % 4096 == 0:
                self._check(self.engine.check_alive)
                if time.monotonic() > deadline:
                    raise self._fail(
                        f"step {step} did not finish within {self.engine.deadline_s} s; "
                        "close this runtime"
                    )
        # A device that gave up waiting for a peer finishes the step with whatever is there.
        self._check(self.engine.check_ranks)

    def _request(self, row: int) -> _Request:
        request = self._requests[row]
        assert request is not None
        return request

    # ------------------------------------------------------------------ end

    def _check(self, check: Callable[[], None]) -> None:
        try:
            check()
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise

    def _fail(self, message: str) -> StepFailed:
        """Remember the failure: from now on nothing but `close` is possible."""
        self._failure = message
        return StepFailed(message)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this runtime is closed; make a new one with Runtime.load")
        if self._failure:
            raise StepFailed(f"this runtime has failed, close it; the failure was: {self._failure}")

    def close(self) -> None:
        """Release graphs and memory. Idempotent."""
        if not self._closed:
            self._closed = True
            self.engine.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
