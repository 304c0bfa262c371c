"""Who runs: admission by pages, chunks of prompts beside decoding, preemption. Plain Python.

`plan` says what the next step does and `commit` records that it was launched. Everything that
happens at a known step (a row's token opens a page, a row samples its last token) waits in a bucket
of that step, so a step in which rows only decode costs the same for any number of rows.

Invariants: the host's count of decoding rows is never below the device's; pages are held before the
launch that writes them; pages are given to another row only after the row that held them is free on
the device or its cancel leads the mailbox of the next launch.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from capture_cache.dataclass import dataclass
from runtime.history import History
from runtime.pages import OutOfPages, OutOfRows, PagePool
from runtime.prefix_cache import PrefixCache
from runtime.requests import (
    DECODING,
    ENDED,
    ENDING,
    PREFILLING,
    QUEUED,
    WAITING,
    Request,
    WaitingQueue,
)
from runtime.shared_pages import SharedPages
from runtime.stats import Counters
from runtime.step_plan import Filling, Plan

if TYPE_CHECKING:
    from graphs.keys import Ladder

RESERVATIONS = ("full", "lazy")
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class SchedulerConfig:
    """How requests share rows, pages and steps.

    Attributes:
        reservation: "full" reserves the pages of prompt and `max_tokens` at admission, so nobody is
            ever preempted; "lazy" reserves them as rows grow.
        prefix_cache: keep full pages for later prompts that begin alike.
        prefill_budget: prompt tokens a step at most; None: as many as a key covers.
        ageing_steps: steps of waiting that are worth one level of priority.
    """

    reservation: str = "full"
    prefix_cache: bool = True
    prefill_budget: int | None = None
    ageing_steps: int = 256

    def __post_init__(self) -> None:
        if self.reservation not in RESERVATIONS:
            raise ValueError(f"reservation must be 'full' or 'lazy', got {self.reservation!r}")
        if not isinstance(self.prefix_cache, bool):
            raise TypeError(f"prefix_cache must be True or False, got {self.prefix_cache!r}")
        if self.prefill_budget is not None and not _at_least_one(self.prefill_budget):
            raise ValueError(
                f"prefill_budget must be at least 1 token a step, got {self.prefill_budget!r}; "
                "leave it out for as many as a graph key covers"
            )
        if not _at_least_one(self.ageing_steps):
            raise ValueError(f"ageing_steps must be at least 1 step, got {self.ageing_steps!r}")


class Scheduler:
    """The host's half of the row state.

    Args:
        max_words: page-table entries that one mailbox takes.
        logits_rows: requests that may return their logits at the same time.

    Attributes:
        since: int64 [max_rows], the step that admitted the row's request; `NEVER` before that.
        ids: int64 [max_rows], id of the row's request.
        seeds: int64 [max_rows], seed of the last request that was given the row; -1: none.
        past: its tokens.
        scored_to: int32 [max_rows], last position of its prompt whose log-prob has been returned.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        ladder: Ladder,
        *,
        max_rows: int,
        max_seq_len: int,
        num_pages: int,
        page_size: int,
        max_words: int,
        logits_rows: int,
    ) -> None:
        self.config, self.ladder, self._max_words = config, ladder, max_words
        self._logits_rows = logits_rows
        self.cache = PrefixCache(enabled=config.prefix_cache)
        self.pages = PagePool(num_pages, page_size, self.cache)
        self.shared = SharedPages(self.pages, self.cache)
        self.counters = Counters()
        self.rows: list[Request | None] = [None] * max_rows
        self.queue = WaitingQueue()
        self.by_id: dict[int, Request] = {}
        self.draining = False
        self.since = np.full(max_rows, NEVER, np.int64)
        self.ids = np.full(max_rows, -1, np.int64)
        self.seeds = np.full(max_rows, -1, np.int64)
        self.scored_to = np.zeros(max_rows, np.int32)
        self.past = History(max_rows, max_seq_len)
        self.free_rows = list(range(max_rows - 1, -1, -1))
        self.cancels: list[int] = []
        self._lazy = config.reservation == "lazy"
        self._prefilling: list[Request] = []  # rows with prompt left, in order
        self._num_decoding = 0
        self._crossings: dict[int, list[Request]] = {}  # step -> rows that open a page in it
        self._endings: dict[int, list[Request]] = {}  # step -> rows that sample their last token
        self._may_admit = False  # something changed since the queue's first did not fit
        self._calm = Plan(0, 0)

    # ------------------------------------------------------------------ coming and going

    def enqueue(self, request: Request) -> None:
        """Let a request wait for its turn."""
        self.by_id[request.id] = request
        self.queue.push(request)
        self._may_admit = True

    def admit_past_queue(self, request: Request, step: int) -> None:
        """Give a request a row and pages now, unless they are due to the queue's first.

        It may pass what waits as a request one level of priority up could that came in `step`:
        whoever has waited longer than that is passed no more, so a stream of these starves nobody.

        Raises:
            OutOfPages: they are not there, or are due (`OutOfRows`: no row is); nothing changed.
        """
        first = self.queue.first()
        if first is None or first.order >= (step - self.config.ageing_steps, request.id):
            self.admit(request)
            return
        self._check_rows(request)
        due = (
            f"request {first.id} has waited {step - first.arrived} steps in the queue and is next "
            f"({len(self.queue)} wait); step() on, submit() this one too, or cancel some"
        )
        spare_logits = 1 + first.params.return_logits
        if len(self.free_rows) < 2 or not self._has_logits(request, spare_logits):
            raise OutOfRows(f"the free row is due: {due}")
        pages, shared = self._room_for(first)
        shared = [*shared, *self.shared.find(request)]
        pages += self.pages.pages_for(self._tokens_to_reserve(request)) + self._lazy
        if not self.pages.has_room(pages, shared):
            raise OutOfPages(f"free pages are due: {due}")
        self.admit(request)

    def _check_rows(self, request: Request) -> None:
        """Raises OutOfRows where no row can take the request."""
        if not self.free_rows:
            raise OutOfRows(
                f"all {len(self.rows)} rows are running; wait for one to finish, cancel one, "
                "or raise --bs"
            )
        if not self._has_logits(request):
            raise OutOfRows(
                f"{self._logits_rows} requests return their logits and there is room for no more; "
                "wait for one to finish, or load with a larger logits_rows"
            )

    def admit(self, request: Request) -> None:
        """Give a request a row and pages now.

        Raises:
            OutOfPages: they are not there (`OutOfRows`: no row is); nothing changed.
        """
        self._check_rows(request)
        row, shared = self.free_rows[-1], self.shared.find(request)
        self.pages.share(row, shared)
        try:
            self.pages.grow(row, self._tokens_to_reserve(request))
        except OutOfPages:
            self.pages.release(row)
            raise
        self.free_rows.pop()
        self.by_id[request.id] = self.rows[row] = request
        request.row, request.phase = row, WAITING
        request.matched = request.named = len(shared)
        request.done, request.sent = len(shared) * self.pages.page_size, 0
        self.ids[row], self.since[row] = request.id, NEVER
        self.seeds[row] = request.admission.seed
        self.have[row], self.scored_to[row] = len(request.tokens), request.scored_to
        self.history[row, : len(request.tokens)] = request.tokens
        bisect.insort(self._prefilling, request, key=_order)

    def _has_logits(self, request: Request, more: int = 1) -> bool:
        """Whether so many more rows may return their logits, if the request wants that."""
        if not request.params.return_logits:
            return True
        return sum(q.params.return_logits for q in self.running()) + more <= self._logits_rows

    def _room_for(self, request: Request) -> tuple[int, list[int]]:
        """Pages that must be free for a request of the queue, and named ones among them.

        Rows that grow lazily will want a page each soon: without them in hand, an admission would
        be preempted at once.
        """
        running = len(self.rows) - len(self.free_rows)
        pages = self.pages.pages_for(self._tokens_to_reserve(request))
        return pages + (running if self._lazy else 0), self.shared.find(request)

    def settle_decoding(self, request: Request, length: int, step: int) -> None:
        """A row that decodes from `step` on, with `length` tokens computed and its pages sent."""
        self._prefilling.remove(request)
        request.done, request.sent = length, len(self.pages.held(request.row))
        self.since[request.row] = step
        # The device hears of the row at once: an older cancel must not reach its new owner.
        self.cancels = [row for row in self.cancels if row != request.row]
        self._start_decoding(request, step)

    def retire(self, request: Request, reason: str) -> None:
        """End a request, wherever it is; row and pages are free at once.

        A cancelled row may have steps in flight: they write only to pages past its last full one,
        and before any launch that comes now.
        """
        del self.by_id[request.id]
        self.counters.finished[reason] += 1
        if request.phase == QUEUED:
            self.queue.remove(request)
            self._may_admit = True
            return
        if reason == "cancelled" and request.phase != WAITING:
            self.cancels.append(request.row)
        if reason == "error":
            self.pages.forget(request.row)  # what made it fail must not be met again
            request.cacheable = False
        self._leave_row(request)
        request.phase = ENDED

    def _preempt(self, request: Request) -> None:
        """Send a row back to the queue. What is in flight of it is dropped and computed again."""
        if request.phase != WAITING:
            self.cancels.append(request.row)
        request.tokens = self.history[request.row, : self.have[request.row]].copy()
        request.preemptions += 1
        self.counters.preemptions += 1
        self._leave_row(request)
        self.queue.push(request)

    def _leave_row(self, request: Request) -> None:
        row = request.row
        request.scored_to = int(self.scored_to[row])
        if request.phase in (WAITING, PREFILLING):
            self._prefilling.remove(request)
            self.shared.name(request, request.done, self.history)
        else:
            self._num_decoding -= request.phase == DECODING
            # The last token's KV is not computed.
            self.shared.name(request, int(self.have[row]) - 1, self.history)
        self.rows[row], request.row = None, -1
        self.since[row], self.ids[row] = NEVER, -1
        self.past.end()
        self.pages.release(row)
        self.free_rows.append(row)
        self._may_admit = True

    def reserve_restart(self) -> dict[Request, int]:
        """Make sure that every row's tokens so far can be computed again in place.

        Returns:
            By request, the pages that it held before: what `keep_only` needs to undo this.

        Raises:
            OutOfPages: a row needs another page and there is none; nothing was changed.
        """
        held: dict[Request, int] = {}
        try:
            for request in self.running():
                held[request] = len(self.pages.held(request.row))
                self.pages.grow(request.row, int(self.have[request.row]))
        except OutOfPages:
            self.keep_only(held)
            raise
        return held

    def keep_only(self, held: Mapping[Request, int]) -> None:
        """Take back what `reserve_restart` gave, where nothing is to start again after all.

        A request that has been cancelled meanwhile has given back all, and others may have its row.
        """
        for request, count in held.items():
            if request.row >= 0:
                self.pages.shrink(request.row, count)

    def restart(self, request: Request) -> None:
        """Compute a row's KV again, in place, from its first token on; see `reserve_restart`."""
        row = request.row
        if request.phase != WAITING:
            self.cancels.append(row)
        if request.phase not in (WAITING, PREFILLING):
            self._num_decoding -= request.phase == DECODING
            bisect.insort(self._prefilling, request, key=_order)
        request.tokens = self.history[row, : self.have[row]].copy()
        request.scored_to = int(self.scored_to[row])
        request.phase, request.done, request.sent = WAITING, 0, 0
        request.matched = request.named = 0
        self.since[row] = NEVER
        self.past.end()

    @property
    def history(self) -> NDArray[np.int32]:
        """int32 [max_rows, max_seq_len], every row's tokens."""
        return self.past.tokens

    @property
    def have(self) -> NDArray[np.int64]:
        """int64 [max_rows], tokens that each row has in `history`."""
        return self.past.have

    # ------------------------------------------------------------------ the next step

    def plan(self, step: int) -> Plan:
        """What the step of that number does; only admissions and preemptions take effect already.

        Raises:
            OutOfPages: rows that may not be preempted cannot all go on (lazy reservation).
        """
        if self.is_calm(step):
            if self._calm.tokens != self._num_decoding:
                self._calm = Plan(self._num_decoding, self._num_decoding)
            return self._calm
        crossing = self._open_pages(step)
        if self._may_admit:
            self._admit_waiting(step)
        plan = Plan(self._num_decoding, self._num_decoding, crossing=crossing)
        plan.cancels = self.cancels
        filling = Filling(plan, self.ladder, self.pages, self.shared, max_words=self._max_words)
        filling.open_pages()
        filling.feed(self._prefilling, self.config.prefill_budget)
        filling.finish()
        return plan

    def is_calm(self, step: int) -> bool:
        """Whether all that the step does is to go on with the rows that decode."""
        return not (self._prefilling or self.cancels or self._may_admit or step in self._crossings)

    def _open_pages(self, step: int) -> list[Request]:
        """Decoding rows whose token of this step opens a page that the device has not heard of."""
        bucket = self._crossings.get(step)
        if not bucket:
            return []
        rows = list(dict.fromkeys(q for q in bucket if self._opens(q, step)))
        if not self._lazy:
            return rows
        self._make_room(rows, step)
        rows = [request for request in rows if request.phase == DECODING]
        for request in rows:
            self.pages.grow(request.row, request.base + step + 1)
        return rows

    def _opens(self, request: Request, step: int) -> bool:
        at = request.sent * self.pages.page_size
        return request.phase == DECODING and request.base + step == at

    def _make_room(self, rows: list[Request], step: int) -> None:
        """Preempt, the last in order first, until the decoding rows can go on."""
        if len(rows) <= self.pages.num_free:  # one page each at most
            return
        held, pages_for = self.pages.held, self.pages.pages_for
        while True:
            need = sum(
                max(0, pages_for(q.base + step + 1) - len(held(q.row)))
                for q in rows
                if q.phase == DECODING
            )
            if need <= self.pages.num_free:
                return
            victims = [q for q in self.rows if q and q.preemptable and q.phase != ENDING]
            if not victims:
                raise OutOfPages(
                    f"the step needs {need} more pages and {self.pages.num_free} of "
                    f"{self.pages.capacity} are free; nothing was launched: cancel a row, raise "
                    "--num-pages, or use reservation='full'"
                )
            self._preempt(max(victims, key=_order))

    def _admit_waiting(self, step: int) -> None:
        """Give rows to the queue, in its order; nobody passes the first, so nobody starves."""
        self._may_admit = False
        queue = self.queue
        while self.free_rows:
            request = queue.first_begun() if self.draining else queue.first()
            if request is None:
                return
            if not self.pages.has_room(*self._room_for(request)):
                return
            if not self._has_logits(request):
                return
            queue.take(request)
            self.admit(request)
            wait = step - request.arrived
            self.counters.longest_wait_steps = max(self.counters.longest_wait_steps, wait)

    def _tokens_to_reserve(self, request: Request) -> int:
        # The last token is returned but never fed, so it needs no page.
        return len(request.tokens) if self._lazy else request.limit - 1

    def commit(self, plan: Plan, step: int) -> None:
        """Record what the launched step will have done."""
        if plan is not self._calm:
            self._commit_changes(plan, step)
        for request in self._endings.pop(step, ()):
            # A row whose last token this step samples is padding from the next one on.
            if request.phase == DECODING and request.base + step + 2 >= request.limit:
                request.phase = ENDING
                self._num_decoding -= 1

    def _commit_changes(self, plan: Plan, step: int) -> None:
        self.cancels = []
        self._crossings.pop(step, None)
        for request, pages in plan.sent.items():
            request.sent = pages
        for request in plan.crossing:
            self._await_page(request, step + 1)
        counters = self.counters
        for request in plan.admits:
            request.phase = PREFILLING
            self.since[request.row] = step
            if self.shared.applies_to(request):
                pages = request.findable_tokens // self.pages.page_size
                counters.count_lookup(request.matched, pages)
        for request, n in plan.fed:
            request.done += n
            counters.tokens_prefilled += n
            self.shared.name(request, request.done, self.history)
            if request.left == 0:
                self._prefilling.remove(request)
                self._start_decoding(request, step + 1)

    def _start_decoding(self, request: Request, step: int) -> None:
        """From `step` on the row brings a token to every step, until its limit."""
        request.base = request.done - step
        last = request.limit - 2 - request.base
        if last < step:
            request.phase = ENDING
            return
        request.phase = DECODING
        self._num_decoding += 1
        self._endings.setdefault(last, []).append(request)
        self._await_page(request, step)

    def _await_page(self, request: Request, step: int) -> None:
        """Remember the step, from `step` on, whose token opens a page not sent yet."""
        position = request.sent * self.pages.page_size
        if position < request.limit - 1:
            self._crossings.setdefault(position - request.base, []).append(request)

    @property
    def has_begun(self) -> bool:
        """Whether a request has a row, or had one and is to have one again."""
        return len(self.free_rows) < len(self.rows) or self.queue.first_begun() is not None

    @property
    def num_begun(self) -> int:
        """Requests in rows, and those that had one and wait to be computed again."""
        return len(self.rows) - len(self.free_rows) + self.queue.num_begun

    def steps_to_drain(self, *, waiting: bool) -> int:
        """At least how many steps it takes until what has begun has ended; stops not foreseen.

        Args:
            waiting: what waits in the queue must end, too.
        """
        longest = max((q.limit - int(self.have[q.row]) for q in self.running()), default=0)
        more = self.has_begun or (waiting and len(self.queue) > 0)
        return max(longest, int(more))

    def look_at_queue(self) -> None:
        """Something beside rows and pages may let the queue's first in."""
        self._may_admit = True

    def running(self) -> Iterator[Request]:
        """Requests that have a row."""
        return (request for request in self.rows if request is not None)


def _at_least_one(value: object) -> bool:
    """Whether it is a whole number, and one that counts something."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _order(request: Request) -> tuple[int, int]:
    return request.order
