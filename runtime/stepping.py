"""Stepping: pick a graph, launch it, read the ring; nothing else per step.

Who runs when is `runtime.scheduler`'s to say. Invariants: the host decides only what it must (which
rows join, whose prompt is fed, which pages); the device decides which rows live.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from threading import get_ident
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.mailbox import Int32, Mailbox, Ring, RingEntry
from runtime.requests import DECODING, ENDING, PREFILLING, Request
from runtime.row_params import plain_output, step_output
from runtime.sampling import StepOutput
from runtime.scheduler import Scheduler, SchedulerConfig
from runtime.turns import StepFailed, Turns, stepping_call

if TYPE_CHECKING:
    from graphs.keys import GraphKey
    from runtime.replayer import Replayer

MAX_IN_FLIGHT = 2  # the mailbox has two slots
# With peers: a device's wait for one begins after ours for the step, and its word names who is
# late. Ours has to be the longer one, or it is a race which of them is reported.
GRACE_S = 0.5
# What a wait does beside polling, every so many polls of about 0.1 us.
REHEARSE_SPINS, CHECK_SPINS = 256, 4096
FAULTS = {
    1: "more rows or prompt tokens were asked for than the graph holds",
    2: "a live token had no KV page",
}


class Stepping(Turns):
    """The part of `runtime.driver.Runtime` that steps, and that knows whether it still may.

    Args:
        engine: captured graphs with their mailbox, ring and ladder.
        scheduling: how requests share rows, pages and steps.
    """

    def __init__(self, engine: Replayer, scheduling: SchedulerConfig | None = None) -> None:
        super().__init__()
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
        self._drain_until = 0  # the step before which ranks that drain do not meet again
        self._drained: list[StepOutput] = []  # by a drain that has not come to its end
        self._closed = False
        self._owes_step = False  # step() has launched, and was interrupted while it waited
        self.last_entry: RingEntry | None = None
        self.last_key: GraphKey | None = None

    @property
    def num_in_flight(self) -> int:
        """Steps launched and not yet collected."""
        return len(self._in_flight)

    @stepping_call
    def step(self) -> StepOutput:
        """Launch one step and wait for it; after a wait that was interrupted, wait for that one.

        Raises:
            OutOfPages: only with lazy reservation and requests of `add`; nothing was launched.
            NotCaptured: no graph covers the step; nothing was launched.
            BarrierTimeout, StepMismatch: other ranks did not come to the step; names them.
            StepFailed: the device reported a fault or went silent, or an interrupt (Ctrl-C) came
                between the launch's begin and its end.
        """
        if not self._owes_step:
            self._launch()
            self._owes_step = True
        return self._collect()

    def _launch(self) -> int:
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
        self._amid = "launch()"
        with self.lock:
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
            try:
                self.engine.replay(key)  # the twin meets other ranks in here
            except Exception as error:
                self._end_with(error)
                raise
            self._mailbox.tell_launched(step)
            self.last_key = key
            scheduler.commit(plan, step)
            self._new_masks.clear()  # requests that wait for a row bring theirs with them
            self._in_flight.append(step)
            self._next_step = step + 1
            self._counters.steps_by_key[key] += 1
            self._counters.host_ns += time.perf_counter_ns() - began
        self._amid = ""
        return step

    launch = stepping_call(_launch)

    def _masks(self, admits: Sequence[Request]) -> dict[int, Int32 | None]:
        """Token masks that the device has to hear of: of rows on it, and of those that join."""
        on_device = (PREFILLING, DECODING, ENDING)
        masks = {q.row: q.mask for q in self._new_masks if q.phase in on_device}
        return masks | {q.row: q.mask for q in admits if q.mask is not None}

    def _collect(self) -> StepOutput:
        """Wait for the oldest step in flight and return its tokens.

        Raises:
            RuntimeError: nothing is in flight.
            StepFailed: the device reported a fault, or nothing within the deadline.
        """
        self._wait()  # an interrupt in here leaves all as it is
        began = time.perf_counter_ns()
        step = self._in_flight[0]
        self._amid = "collect()"
        with self.lock:
            entry, out = self._look(step)
            self.last_entry = entry
            self._in_flight.popleft()
            self._owes_step = False
            if entry.fault:
                named = FAULTS.get(entry.fault, f"unknown fault {entry.fault}")
                raise self._fail(f"step {step}: {named}; close this runtime and report it")
            if out is None:
                out = self._sort(step, entry)
            else:
                self._scheduler.past.append_again(out.tokens)
                self._counters.tokens_decoded += len(out.rows)
            self._counters.host_ns += time.perf_counter_ns() - began
        return out  # `_amid` stays until the caller has it: an interrupt cannot lose it unnoticed

    collect = stepping_call(_collect)

    def _look(self, step: int) -> tuple[RingEntry, StepOutput | None]:
        """What a finished step published; and what came of it, if that is known without looking
        whose each entry is. Changes nothing."""
        entry, past = self._ring.read(step), self._scheduler.past
        if entry.is_plain and past.steady_rows == entry.rows.tobytes():
            return entry, plain_output(step, entry, past.steady_requests.copy())
        return entry, None

    def _sort(self, step: int, entry: RingEntry) -> StepOutput:
        """Find out whose each entry is, record it, and end whoever has ended."""
        scheduler, past = self._scheduler, self._scheduler.past
        rows = entry.rows.astype(np.intp)
        # A cancelled row may have been in flight, and may have a new owner already.
        ours = scheduler.since[rows] <= step
        if entry.num_prompt:  # a preempted row is scored again, and tells nothing twice
            ours &= ~entry.is_prompt | (entry.positions > scheduler.scored_to[rows])
        out = step_output(step, entry, ours, scheduler.ids[rows])
        whole = len(out) == len(rows)
        past.append(rows if whole else out.rows.astype(np.intp), out.tokens)
        scheduler.counters.tokens_decoded += len(out)
        if entry.is_plain and whole:
            past.watch(entry.rows.tobytes(), rows, out.requests)
        else:
            past.end()
        if out.prompt is not None:
            np.maximum.at(scheduler.scored_to, out.prompt.rows, out.prompt.positions)
        if not entry.is_plain and np.count_nonzero(out.finished):
            self._retire(out)
        return out

    def _retire(self, out: StepOutput) -> None:
        ended = out.finished
        for row, reason in zip(
            out.rows[ended].tolist(), out.finish_reasons[ended].tolist(), strict=True
        ):
            request = self._scheduler.rows[row]
            assert request is not None
            self._scheduler.retire(request, reason)

    def _wait(self) -> None:
        """Wait until `collect` would return at once; an interrupted wait can be begun again.

        Raises:
            RuntimeError: nothing is in flight.
            StepFailed: nothing within the deadline.
            BarrierTimeout, StepMismatch: other ranks did not come to the step; names them.
        """
        self._check_open()
        if not self._in_flight:
            raise RuntimeError("no step is in flight; call launch() first")
        if not self._ring.ready(self._in_flight[0]):
            self._poll(self._in_flight[0])
        # A device that gave up waiting for a peer finishes the step with whatever is there.
        try:
            self.engine.check_ranks()
        except Exception as error:
            self._end_with(error)
            raise

    wait = stepping_call(_wait)

    def _poll(self, step: int) -> None:
        ready = self._ring.ready
        limit_s = self.engine.deadline_s + (GRACE_S if self.config.ep_size > 1 else 0.0)
        deadline = time.monotonic() + limit_s
        spins = 0
        while not ready(step):
            spins += 1
            if spins % REHEARSE_SPINS == 0:
                self._rehearse(step)
            if spins % CHECK_SPINS == 0:
                try:
                    self.engine.check_alive()
                except Exception as error:
                    self._end_with(error)
                    raise
                if time.monotonic() > deadline:
                    raise self._fail(
                        f"step {step} did not finish within {limit_s} s; close this runtime"
                    )

    def _rehearse(self, awaited: int) -> None:
        """Spend a moment of the wait on what can be done, or tried, before the step ends.

        A wait of milliseconds leaves the processor's caches to whoever else uses them, and the
        first pass through code and data that are not in them takes ten times as long. So what
        `collect` is going to do with the awaited step is done with the one before it, and the next
        step is planned, for nothing. All of it bears an interrupt.
        """
        scheduler = self._scheduler
        with self.lock:
            scheduler.past.write_up()
            if scheduler.past.steady_rows is not None:  # then there was a step before, much like it
                self._look(awaited - 1)
            if scheduler.is_calm(self._next_step):  # else planning it would begin what is to change
                plan = scheduler.plan(self._next_step)
                scheduler.ladder.select(plan.tokens, plan.samples)

    # ------------------------------------------------------------------ end

    def _end_with(self, error: Exception) -> None:
        """An exception of the engine's is the end of this runtime."""
        self._failure = f"{type(error).__name__}: {error}"

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
        """Release graphs and memory. Idempotent.

        Raises:
            RuntimeError: another thread is in a call that steps.
        """
        me = get_ident()
        # No thread gets its turn between this look and the store: who begins to step later finds
        # the runtime closed.
        stepper = self._stepper
        if stepper not in (0, me):
            raise self._taken("close()", stepper)
        if not self._closed:
            self._closed = True
            self.engine.close()
