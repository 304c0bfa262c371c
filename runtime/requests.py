"""The host's record of a request, and the queue of those that have no row yet.

    queued ──► waiting ──► prefilling ──► decoding ──► ending ──► ended
      ▲           │             │             │ (its last token is in flight)
      └───────────┴─ preempted ─┴─────────────┘        cancel: any state ──► ended

One order decides everything that must be decided: `Request.order`, smaller first. A priority level
is worth `ageing_steps` steps of waiting, so a request is passed by a higher one only if that came
soon enough after it: everybody's wait is bounded.
"""

from __future__ import annotations

import heapq
from dataclasses import field

import numpy as np
from numpy.typing import NDArray

from capture_cache.dataclass import dataclass
from runtime.mailbox import Int32
from runtime.prefix_cache import DigestChain
from runtime.row_params import Admission
from runtime.sampling import SamplingParams

QUEUED, WAITING, PREFILLING, DECODING, ENDING, ENDED = range(6)
MAX_PRIORITY = 1000


@dataclass(slots=True, eq=False)
class Request:
    """One request.

    Attributes:
        id: unique, never used again.
        prompt: int32, as it came.
        admission: what the device is told when it takes a row.
        mask: its token mask, if it has one.
        order: (step of arrival less the priority's worth, id).
        chain: names of its full pages.
        preemptable: its pages may be taken; it goes back to the queue and is computed again.
        cacheable: its pages hold what its tokens say.
        tokens: int32, what it prefills: the prompt, and after a preemption what it has been given.
        row: -1 in the queue.
        done: tokens in the KV cache once all launches are done, while it prefills.
        base: the same less the number of the next step, while it decodes.
        sent: pages that the device's table has.
        matched, named: leading pages taken from the prefix cache; found there by others.
        scored_to: last position of its prompt whose log-prob has been returned; 0: none.
        arrived: number of the next step when it came.
    """

    id: int
    prompt: NDArray[np.int32]
    params: SamplingParams
    admission: Admission
    order: tuple[int, int]
    chain: DigestChain
    preemptable: bool
    cacheable: bool
    arrived: int
    tokens: NDArray[np.int32]
    phase: int = QUEUED
    row: int = -1
    done: int = 0
    base: int = 0
    sent: int = 0
    matched: int = 0
    named: int = 0
    preemptions: int = 0
    scored_to: int = 0
    mask: Int32 | None = None

    @property
    def limit(self) -> int:
        """Tokens at which it ends, prompt included."""
        return self.admission.limit

    @property
    def is_scored(self) -> bool:
        """Whether log-probs of its prompt are still to be returned."""
        return self.params.prompt_logprobs is not None and self.scored_to < len(self.prompt) - 1

    @property
    def findable_tokens(self) -> int:
        """Tokens, from the first on, that the prefix cache may stand for.

        What a token leaves beside its KV is not in a page, so whoever needs it feeds the token: the
        head's log-probs of a scored prompt, the counts of penalties, the tail that stop sequences
        are compared with. The last token is fed always; it gives the next one.
        """
        params = self.params
        if self.is_scored or params.repetition_penalty != 1.0:
            return 0
        end = len(self.tokens) - 1
        if params.presence_penalty or params.frequency_penalty or params.stop_sequences:
            end = min(end, len(self.prompt))
        return end

    @property
    def left(self) -> int:
        """Tokens still to prefill."""
        return len(self.tokens) - self.done


def check_priority(priority: int) -> None:
    """
    Raises:
        ValueError: not a whole number in range.
    """
    whole = isinstance(priority, int | np.integer) and not isinstance(priority, bool)
    if not whole or not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise ValueError(
            f"priority must be a whole number in [-{MAX_PRIORITY}, {MAX_PRIORITY}], higher first, "
            f"got {priority!r}"
        )


@dataclass
class WaitingQueue:
    """Requests without a row, the next one first. Those that ended in it are dropped when met."""

    _heap: list[tuple[tuple[int, int], Request]] = field(default_factory=list)
    _size: int = 0

    def __len__(self) -> int:
        return self._size

    def push(self, request: Request) -> None:
        request.phase = QUEUED
        heapq.heappush(self._heap, (request.order, request))
        self._size += 1

    def first(self) -> Request | None:
        """The request that is next, still in the queue."""
        while self._heap and self._heap[0][1].phase != QUEUED:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def first_begun(self) -> Request | None:
        """The next among those that have had a row before."""
        begun = [entry for entry in self._heap if entry[1].phase == QUEUED and entry[1].preemptions]
        return min(begun)[1] if begun else None

    @property
    def num_begun(self) -> int:
        """Requests that have had a row before."""
        return sum(q.phase == QUEUED and q.preemptions > 0 for _, q in self._heap)

    def take(self, request: Request) -> None:
        """Take out what `first` or `first_begun` returned."""
        self._size -= 1
        if self._heap[0][1] is request:
            heapq.heappop(self._heap)
        else:  # it may come back, so no mark can stand for its absence
            self._heap.remove((request.order, request))
            heapq.heapify(self._heap)

    def remove(self, request: Request) -> None:
        """A request that waits has ended."""
        request.phase = ENDED
        self._size -= 1
