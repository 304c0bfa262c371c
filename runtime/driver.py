"""The driver: takes requests, picks a graph, launches it, reads the ring; nothing else per step.

Who runs when is `runtime.scheduler`'s to say. Invariants: the host decides only what it must (which
rows join, whose prompt is fed, which pages); the device decides which rows live.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.mailbox import Int32, Mailbox, Ring, RingEntry
from runtime.prefix_cache import DigestChain
from runtime.requests import (
    DECODING,
    ENDING,
    PREFILLING,
    Request,
    check_priority,
)
from runtime.row_params import (
    admission,
    as_token_mask,
    check_for_model,
    resolve_seed,
    step_output,
)
from runtime.sampling import SamplingParams, StepOutput, as_token_ids
from runtime.scheduler import Scheduler, SchedulerConfig
from runtime.stats import RuntimeStats

if TYPE_CHECKING:
    from graphs.keys import GraphKey, Ladder
    from runtime.opening import Opening
    from runtime.replayer import Replayer

MAX_IN_FLIGHT = 2  # the mailbox has two slots
FAULTS = {
    1: "more rows or prompt tokens were asked for than the graph holds",
    2: "a live token had no KV page",
}
RUNNING_ROWS = ("refuse", "keep", "recompute")


class StepFailed(RuntimeError):
    """The device could not do a step as asked; the runtime must be closed."""


class Runtime:
    """Continuous batching over captured decode graphs.

    Use `Runtime.load`; the constructor takes an engine that is ready to replay.

    Args:
        engine: captured graphs with their mailbox, ring and ladder.
        scheduling: how requests share rows, pages and steps. With `reservation` "lazy" a step may
            run short of pages: requests of `submit` are then preempted, and where only those of
            `add` are left, `launch` raises `OutOfPages`.
    """

    def __init__(self, engine: Replayer, scheduling: SchedulerConfig | None = None) -> None:
        self.engine: Any = engine  # benchmarks and tests know which kind they gave
        self.config = engine.config
        self.model_config = engine.model_config
        rows = self.config.max_rows
        self._scheduler = Scheduler(
            scheduling or SchedulerConfig(),
            engine.ladder,
            max_rows=rows,
            max_seq_len=self.config.max_seq_len,
            num_pages=self.config.num_pages,
            page_size=self.config.page_size,
            max_words=engine.mailbox_layout.max_tokens,
            logits_rows=self.config.logits_rows,
        )
        self.pages = self._scheduler.pages
        self._counters = self._scheduler.counters
        self._mailbox = Mailbox(
            engine.mailbox, engine.mailbox_layout, engine.forced_tokens, engine.masks
        )
        self._ring = Ring(
            engine.ring,
            engine.ring_step,
            header=engine.ring_header,
            max_rows=rows,
            top=engine.ring_top,
            logits=engine.ring_logits,
        )
        self._new_masks: set[Request] = set()  # whose token mask the device has not got
        self._next_id = 0
        self._in_flight: deque[int] = deque()
        self._next_step = 0
        self._paused = False
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
        opening: Opening | None = None,
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
            opening: the device as it is being opened: begin with `runtime.opening.Opening()` before
                other imports to have the first step sooner.
            **config: see `runtime.config.RuntimeConfig`.
        Raises:
            ValueError: an option, the model's config or its weights are not usable; says which.

        A valid bundle is restored, without torch; else the graphs are captured, and stored.
        `loaded_from` says which it was, and `load_reason` why.
        """
        from runtime.config import RuntimeConfig
        from runtime.load import load_engine

        named: dict[str, Any] = {"bs": bs, "max_seq_len": max_seq_len, "num_pages": num_pages}
        named |= {"device": device, "store": store}
        options = RuntimeConfig.of(model=model, defaults=named, **config)
        return cls(load_engine(options, opening=opening), options.scheduling)

    @property
    def loaded_from(self) -> str:
        """ "bundle" or "capture"."""
        return str(self.engine.loaded_from)

    @property
    def load_reason(self) -> str:
        """Why it was loaded from there, as a sentence."""
        return str(self.engine.load_reason)

    # ------------------------------------------------------------------ requests

    @property
    def num_in_flight(self) -> int:
        """Steps launched and not yet collected."""
        return len(self._in_flight)

    @property
    def ladder(self) -> Ladder:
        """The keys that steps choose from."""
        return self._scheduler.ladder

    @ladder.setter
    def ladder(self, ladder: Ladder) -> None:
        self._scheduler.ladder = ladder

    @property
    def num_running(self) -> int:
        """Requests that have been taken and have not ended, those in the queue among them."""
        return len(self._scheduler.by_id)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, preempted ones among them."""
        return len(self._scheduler.queue)

    def add(
        self,
        prompt_ids: Sequence[int] | NDArray[np.integer[Any]],
        params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
    ) -> int:
        """Take a request into a row now, past the queue; its tokens come out of later steps.

        No device work. Such a request is never preempted. It passes the queue only as one of
        priority 1 could: a row or pages that are due to a request of the queue are refused to it.

        Args:
            cache_salt: the prefix cache is shared only between requests of the same salt.
        Returns:
            The request's row, valid until it ends; `request_id` tells its id.
        Raises:
            ValueError: the request can never fit or is malformed.
            OutOfPages: it cannot fit now, or who waits in the queue is due (`OutOfRows` if it is
                a row that is missing); names whom.
        """
        request = self._request(prompt_ids, params, 0, cache_salt, preemptable=False)
        self._scheduler.admit_past_queue(request, self._next_step)
        self._accept(request)
        return request.row

    def submit(
        self,
        prompt_ids: Sequence[int] | NDArray[np.integer[Any]],
        params: SamplingParams | None = None,
        priority: int = 0,
        *,
        cache_salt: str = "",
    ) -> int:
        """Take a request into the queue; it gets a row as soon as rows and pages allow.

        Args:
            priority: higher first, then in order of arrival; `ageing_steps` steps of waiting are
                worth one level, so that everybody's turn comes.
            cache_salt: the prefix cache is shared only between requests of the same salt.
        Returns:
            The request's id, by which `StepOutput.requests` names it; never used again.
        Raises:
            ValueError: the request can never fit or is malformed.
        """
        check_priority(priority)
        request = self._request(prompt_ids, params, priority, cache_salt, preemptable=True)
        self._scheduler.enqueue(request)
        return self._accept(request)

    def _accept(self, request: Request) -> int:
        self._next_id += 1
        self._counters.submitted += 1
        return request.id

    def _request(
        self,
        prompt_ids: Sequence[int] | NDArray[np.integer[Any]],
        params: SamplingParams | None,
        priority: int,
        cache_salt: str,
        *,
        preemptable: bool,
    ) -> Request:
        """A request that can fit some time, not taken yet."""
        self._check_open()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params must be SamplingParams or None, got {type(params).__name__}")
        if not isinstance(cache_salt, str):
            raise TypeError(f"cache_salt must be text, got {cache_salt!r}")
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
        check_for_model(params, self.model_config.vocab_size)
        ageing = self._scheduler.config.ageing_steps
        return Request(
            id=self._next_id,
            prompt=prompt,
            params=params,
            admission=admission(params, prompt, stops, resolve_seed(params)),
            order=(self._next_step - int(priority) * ageing, self._next_id),
            chain=DigestChain(cache_salt.encode(errors="surrogatepass")),
            preemptable=preemptable,
            cacheable=True,
            arrived=self._next_step,
            tokens=prompt,
        )

    def request_id(self, row: int) -> int:
        """The id of the request in `row`.

        Raises:
            ValueError: no such row, or nobody has it.
        """
        request = self._in_row(row)
        if request is None:
            raise ValueError(f"row {row} has no request; its last one has ended")
        return request.id

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
        """End the request in `row` now; no further token of it is returned. Idempotent.

        A request of `submit` may lose its row: cancel it with `cancel_request`.
        """
        self._check_open()
        request = self._in_row(row)
        if request is not None:
            self._scheduler.retire(request, "cancelled")

    def cancel_request(self, request_id: int) -> None:
        """End that request now, wherever it is; no further token of it is returned. Idempotent.

        Raises:
            ValueError: no request has had this id.
        """
        self._check_open()
        if isinstance(request_id, bool) or not isinstance(request_id, int | np.integer):
            raise TypeError(f"a request's id is a whole number, got {request_id!r}")
        if not 0 <= request_id < self._next_id:
            raise ValueError(
                f"request {request_id} has never been taken (ids so far: below {self._next_id})"
            )
        request = self._scheduler.by_id.get(request_id)
        if request is not None:
            self._scheduler.retire(request, "cancelled")

    def _in_row(self, row: int) -> Request | None:
        if isinstance(row, bool) or not isinstance(row, int | np.integer):
            raise TypeError(f"a row is a whole number, got {row!r}")
        if not 0 <= row < self.config.max_rows:
            raise ValueError(f"row must be in [0, {self.config.max_rows}), got {row}")
        return self._scheduler.rows[row]

    def seed_of(self, row: int) -> int:
        """Seed of the last request in `row`, also once it has ended: its own, or the operating
        system's.

        Whoever adds the same request with this seed gets the same tokens.
        """
        self._in_row(row)
        return int(self._scheduler.seeds[row])

    def seed_of_request(self, request_id: int) -> int:
        """Seed of a request that has not ended.

        Raises:
            ValueError: it has ended, or there never was one.
        """
        return self._alive(request_id).admission.seed

    def set_token_mask(self, row: int, words: NDArray[np.int32] | None) -> None:
        """Let the request in `row` sample only the tokens of a mask, from the next launch on.

        Steps in flight keep the mask that they were launched with: to choose each mask by the token
        before it, collect a step before launching the next. A mask stays until it is replaced.

        Args:
            words: int32 or uint32 [ceil(vocab / 32)], copied; token t is allowed if bit t % 32 of
                word t // 32 is set (xgrammar's layout). None allows every token again.
        Raises:
            TypeError, ValueError: not such an array, or no request in `row`.
        """
        self._check_open()
        request = self._in_row(row)
        if request is None:
            raise ValueError(f"row {row} has no request to mask; add one first")
        self._mask(request, words)

    def set_request_mask(self, request_id: int, words: NDArray[np.int32] | None) -> None:
        """`set_token_mask` by a request's id, wherever it is.

        Raises:
            TypeError, ValueError: not such an array, or the request has ended.
        """
        self._check_open()
        self._mask(self._alive(request_id), words)

    def _mask(self, request: Request, words: NDArray[np.int32] | None) -> None:
        vocab = self.model_config.vocab_size
        request.mask = None if words is None else as_token_mask(words, vocab)
        self._new_masks.add(request)

    def _alive(self, request_id: int) -> Request:
        request = self._scheduler.by_id.get(request_id)
        if request is None:
            raise ValueError(f"request {request_id} has ended, or there never was one")
        return request

    def occupy(
        self,
        num_rows: int,
        ctx_len: int,
        max_tokens: int,
        params: SamplingParams | None = None,
    ) -> list[int]:
        """Take rows as if prompts of `ctx_len` tokens had just been prefilled, computing nothing.

        For benchmarks: the rows attend over whatever the KV cache holds.

        Args:
            params: of every row; its max_tokens must be this one's.
        Raises:
            ValueError, OutOfPages, OutOfRows: as `add`.
        """
        self._check_open()
        if self._in_flight:
            raise RuntimeError("occupy() needs an idle device; call collect() first")
        prompt = np.zeros(ctx_len, np.int32)
        params = params or SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        taken: list[Request] = []
        try:
            for _ in range(num_rows):
                request = self._request(prompt, params, 0, "", preemptable=False)
                request.cacheable = False  # its pages do not hold what its prompt says
                self._scheduler.admit(request)
                self._accept(request)
                taken.append(request)
                self.pages.grow(request.row, ctx_len)
        except BaseException:
            for request in reversed(taken):
                self._scheduler.retire(request, "cancelled")
            raise
        for request in taken:
            self._scheduler.settle_decoding(request, ctx_len, self._next_step)
        self.engine.adopt(ctx_len, {q.row: (q.admission, self.pages.held(q.row)) for q in taken})
        return [request.row for request in taken]

    # ------------------------------------------------------------------ pause, drain, weights

    def pause(self) -> None:
        """No further step is launched until `resume`; those in flight are still to be collected.

        Requests may come and go meanwhile. Idempotent.
        """
        self._check_open()
        self._paused = True

    def resume(self) -> None:
        """Launch again. Idempotent."""
        self._check_open()
        self._paused = False

    def drain(self) -> list[StepOutput]:
        """Step until every request that has begun has ended; the queue waits meanwhile.

        Returns:
            What those steps gave, the ones in flight before among them.
        Raises:
            RuntimeError: paused, or several ranks, which must step together.
            OutOfPages: as `launch`.
        """
        self._check_launch()
        if self.engine.config.ep_size > 1:
            raise RuntimeError(
                "drain() steps this rank alone and the others would be waited for; call step() on "
                "every rank until all of them have num_running 0"
            )
        scheduler = self._scheduler
        outputs: list[StepOutput] = []
        scheduler.look_at_queue()
        scheduler.draining = True
        try:
            while self._in_flight or scheduler.has_begun:
                if len(self._in_flight) < MAX_IN_FLIGHT and scheduler.has_begun:
                    self.launch()
                if len(self._in_flight) == MAX_IN_FLIGHT or not scheduler.has_begun:
                    outputs.append(self.collect())
        finally:
            scheduler.draining = False
            scheduler.look_at_queue()
        return outputs

    def update_weights(
        self, source: str | Path | Iterable[tuple[str, Any]], *, running: str = "refuse"
    ) -> None:
        """Replace weights in place: every address stays, so every captured graph stays valid.

        All of it is checked before the first byte is written. The prefix cache is emptied.

        Args:
            source: a checkpoint directory, or (Hugging Face name, array or tensor) pairs; pairs
                may be some of the model's tensors, the rest stays as it is.
            running: what becomes of requests in rows: "refuse" them, "keep" them with the KV that
                they have, or "recompute" their KV with the new weights, tokens so far included.
        Raises:
            ValueError: not this model's tensors, or not finite; nothing was changed.
            RuntimeError: steps are in flight, or requests are running and `running` is "refuse".
            OutOfPages: recomputing needs more pages than there are; nothing was changed.
        """
        self._check_open()
        if running not in RUNNING_ROWS:
            raise ValueError(f"running must be one of {', '.join(RUNNING_ROWS)}, got {running!r}")
        if self._in_flight:
            raise RuntimeError(
                f"{len(self._in_flight)} steps are in flight; collect() them before "
                "update_weights()"
            )
        requests = list(self._scheduler.running())
        if self._scheduler.has_begun and running == "refuse":
            raise RuntimeError(
                f"{self._scheduler.num_begun} requests are running on the old weights; drain() "
                "first, or say running='keep' or running='recompute'"
            )
        if running == "recompute":
            self._scheduler.reserve_restart()
        self.engine.update_weights(source)
        self.pages.forget_all()
        for request in requests:
            if running == "recompute":
                self._scheduler.restart(request)
            else:
                request.cacheable = False  # its KV is of the old weights

    # ------------------------------------------------------------------ steps

    def step(self) -> StepOutput:
        """Launch one step and wait for it.

        Raises:
            OutOfPages: only with lazy reservation and requests of `add`; nothing was launched.
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
        began = time.perf_counter_ns()
        self._check_launch()
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            raise RuntimeError(
                f"{MAX_IN_FLIGHT} steps are in flight already; call collect() before launch()"
            )
        step, scheduler = self._next_step, self._scheduler
        plan = scheduler.plan(step)
        key = scheduler.ladder.select(plan.tokens, plan.samples)
        masks = self._masks(plan.admits) if plan.admits or self._new_masks else None
        if plan.changes or masks:
            self._mailbox.write(
                step,
                cancels=plan.cancels,
                admits=[(q.row, q.admission) for q in plan.admits],
                pages=plan.pages,
                chunks=plan.chunks,
                masks=masks,
            )
        self._check(self.engine.replay, key)  # the twin meets other ranks in here
        self.last_key = key
        scheduler.commit(plan, step)
        self._new_masks.clear()  # requests that wait for a row bring theirs with them
        self._in_flight.append(step)
        self._next_step = step + 1
        self._counters.steps_by_key[key] += 1
        self._counters.host_ns += time.perf_counter_ns() - began
        return step

    def _masks(self, admits: Sequence[Request]) -> dict[int, Int32 | None]:
        """Token masks that the device has to hear of: of rows on it, and of those that join."""
        on_device = (PREFILLING, DECODING, ENDING)
        masks = {q.row: q.mask for q in self._new_masks if q.phase in on_device}
        return masks | {q.row: q.mask for q in admits if q.mask is not None}

    def collect(self) -> StepOutput:
        """Wait for the oldest step in flight and return its tokens.

        Raises:
            RuntimeError: nothing is in flight.
            StepFailed: the device reported a fault, or nothing within the deadline.
        """
        self.wait()
        began = time.perf_counter_ns()
        scheduler = self._scheduler
        step = self._in_flight[0]
        entry = self.last_entry = self._ring.read(step)
        self._in_flight.popleft()
        if entry.fault:
            named = FAULTS.get(entry.fault, f"unknown fault {entry.fault}")
            raise self._fail(f"step {step}: {named}; close this runtime and report it")
        # A cancelled row may have been in flight, and may have a new owner already.
        ours = scheduler.since[entry.rows] <= step
        if entry.num_prompt:  # a preempted row is scored again, and tells nothing twice
            ours &= ~entry.is_prompt | (entry.positions > scheduler.scored_to[entry.rows])
        out = step_output(step, entry, ours, scheduler.ids)
        scheduler.deliver(out.rows, out.tokens)
        if out.prompt is not None:
            np.maximum.at(scheduler.scored_to, out.prompt.rows, out.prompt.positions)
        if np.count_nonzero(out.finished):
            self._retire(out)
        self._counters.host_ns += time.perf_counter_ns() - began
        return out

    def _retire(self, out: StepOutput) -> None:
        ended = out.finished
        for row, reason in zip(
            out.rows[ended].tolist(), out.finish_reasons[ended].tolist(), strict=True
        ):
            request = self._scheduler.rows[row]
            assert request is not None
            self._scheduler.retire(request, reason)

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

    def stats(self) -> RuntimeStats:
        """What has been done so far and what is held now; free of device work."""
        counters, pool = self._counters, self.pages
        waiting, running = self.num_waiting, self.num_running - self.num_waiting
        return RuntimeStats(
            submitted=counters.submitted,
            waiting=waiting,
            running=running,
            finished=dict(counters.finished),
            in_flight=len(self._in_flight),
            pages_total=pool.capacity,
            pages_used=pool.capacity - pool.num_free,
            pages_cached=pool.num_cached,
            pages_free=pool.num_free - pool.num_cached,
            prefix_hits=counters.prefix_hits,
            prefix_misses=counters.prefix_misses,
            prefix_evictions=pool.cache.evictions,
            preemptions=counters.preemptions,
            tokens_prefilled=counters.tokens_prefilled,
            tokens_decoded=counters.tokens_decoded,
            longest_wait_steps=counters.longest_wait_steps,
            steps=self._next_step,
            steps_by_key={str(key): n for key, n in sorted(counters.steps_by_key.items())},
            host_us_per_step=counters.host_ns / 1e3 / max(1, self._next_step),
        )

    # ------------------------------------------------------------------ end

    def _check(self, call: Callable[..., None], *args: Any) -> None:
        """Call it; an exception is the end of this runtime."""
        try:
            call(*args)
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise

    def _fail(self, message: str) -> StepFailed:
        """Remember the failure: from now on nothing but `close` is possible."""
        self._failure = message
        return StepFailed(message)

    def _check_launch(self) -> None:
        self._check_open()
        if self._paused:
            raise RuntimeError("this runtime is paused; call resume() before stepping")

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
