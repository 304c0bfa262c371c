"""Barriers between CPU ranks: the device's protocols on shared memory, with deadlines and names.

Python has no atomic addition on shared memory, so the tag barrier keeps its one signed word as two
with one writer each: what this rank is owed (`owed`, its own) and what a peer has paid (`paid`, the
peer's). The difference is the device's word. Invariant: every word here has one writer.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import time
from collections.abc import Callable

from barriers.config import MAX_RANKS
from barriers.errors import RankError
from barriers.symmetric import HostMemory
from barriers.watch import (
    DEADLINE,
    DEFAULT_DEADLINE_MS,
    NO_LAYER,
    STEP_MISMATCH,
    Late,
    rank_of_slot,
)

TAG = 1024
KINDS = ("tag", "epoch")
# Words of a control block, int64, each [MAX_RANKS] by slot.
_OWED, _PAID, _EPOCH = 0, MAX_RANKS, 2 * MAX_RANKS
_STEPS = 3 * MAX_RANKS
_YIELDS = 200  # polls that only give way to other processes, before polls that sleep
_NAP_S = 0.0002


class HostBarrier:
    """One kind of barrier between CPU ranks.

    Args:
        kind: one of `KINDS`.
        deadline_ms: of every wait.

    Two barriers on one memory at a time would pair the wrong arrivals: one per memory.
    """

    def __init__(
        self, memory: HostMemory, kind: str = "tag", *, deadline_ms: int = DEFAULT_DEADLINE_MS
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"a barrier must be one of {', '.join(KINDS)}, got {kind!r}")
        if deadline_ms < 1:
            raise ValueError(f"a deadline must be at least 1 ms, got {deadline_ms}")
        self.kind, self._deadline_s = kind, deadline_ms / 1000
        self._group = memory.group
        self._rank, self._world = memory.group.rank, memory.group.world
        ranks = [rank_of_slot(self._rank, k, self._world) for k in range(self._world)]
        self._slots = [memory.control(r).data for r in ranks]  # by slot; an index is a word
        self._fence = _full_fence()
        self._failure: RankError | None = None

    def wait(
        self,
        *,
        step: int = 0,
        layer: int = NO_LAYER,
        operation: str = "barrier",
        opens_step: bool = False,
    ) -> None:
        """Wait for all ranks; what each wrote to shared memory before is visible to all after.

        Args:
            step, layer, operation: where this rank is, for messages.
            opens_step: the first barrier of a step: ranks compare `step` in it. There must be at
                least one more barrier in a step.

        Raises:
            BarrierTimeout: the deadline passed; names the ranks that are late. Every later call
                raises it again, at once.
            StepMismatch: a rank is in another step.
        """
        if self._failure is not None:
            raise self._failure
        own, peers = self._slots[0], range(1, self._world)
        if opens_step:
            for k in peers:
                self._slots[k][_STEPS + self._world - k] = step
        self._fence()  # release: pairs with the fence after the peers' waits
        arrived = self._signal_tag() if self.kind == "tag" else self._signal_epoch()
        began, polls = time.monotonic(), 0
        late = [k for k in peers if not arrived(k)]
        while late:
            waited = time.monotonic() - began
            if waited > self._deadline_s:
                self._fail(DEADLINE, late, waited, step, layer, operation)
            polls += 1
            if polls < _YIELDS:
                os.sched_yield()
            else:
                time.sleep(_NAP_S)
            late = [k for k in late if not arrived(k)]
        self._fence()  # acquire
        if self.kind == "epoch":
            own[_EPOCH] += 1
        if opens_step:
            self._check_step(step, layer, operation)

    def _signal_tag(self) -> Callable[[int], bool]:
        own = self._slots[0]
        for k in range(1, self._world):
            self._slots[k][_PAID + self._world - k] += TAG
            own[_OWED + k] += TAG
        # `<= 0`: a fast peer may have paid for the next barrier already.
        return lambda k: own[_OWED + k] - own[_PAID + k] <= 0

    def _signal_epoch(self) -> Callable[[int], bool]:
        own = self._slots[0]
        count = own[_EPOCH] + 1
        for k in range(1, self._world):
            self._slots[k][_EPOCH + self._world - k] = count
        return lambda k: own[_EPOCH + k] - count >= 0

    def _check_step(self, step: int, layer: int, operation: str) -> None:
        own = self._slots[0]
        wrong = [k for k in range(1, self._world) if own[_STEPS + k] != step]
        if wrong:
            seen = own[_STEPS + wrong[0]]
            self._fail(STEP_MISMATCH, wrong, 0.0, step, layer, operation, seen)

    def _fail(
        self,
        stop: int,
        slots: list[int],
        waited_s: float,
        step: int,
        layer: int,
        operation: str,
        peer_step: int = 0,
    ) -> None:
        ranks = tuple(sorted(rank_of_slot(self._rank, k, self._world) for k in slots))
        late = Late(stop, self._rank, step, layer, operation, ranks, waited_s, peer_step)
        self._failure = late.failure(self._group.describe)
        raise self._failure


def _full_fence() -> Callable[[], None]:
    """Orders this processor's reads and writes before and after.

    Raises:
        RuntimeError: a processor that reorders, without the library that can forbid it.
    """
    if platform.machine() in ("x86_64", "AMD64", "i686"):
        return lambda: None  # stores stay in order there, and loads do
    path = ctypes.util.find_library("atomic")
    if path is None:
        raise RuntimeError(
            f"CPU ranks on {platform.machine()} need libatomic and found none; install libatomic1"
        )
    fence = ctypes.CDLL(path).atomic_thread_fence
    sequentially_consistent = 5
    return lambda: fence(sequentially_consistent)
