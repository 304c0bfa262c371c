"""How many steps each rank's host has launched, for transports whose waits on the device are not
ours and tell nobody whom they miss: NCCL's and DeepEP's.

One word a rank in shared memory, written by its host at every launch. A step that does not end
within the deadline is then the fault of those who have not launched it, or who are gone.
Invariants: every word has one writer; nothing here waits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from barriers.group import RankGroup
from barriers.members import GONE
from barriers.symmetric import HostMemory
from barriers.watch import CLOSE, DEADLINE, NO_LAYER, Late

_KEPT = 4  # launches whose time is remembered: more than can be in flight


class StepBoard:
    """The board of one run; all ranks make theirs together.

    Args:
        operation: what the steps wait in, for messages.
        first: what to do at once where ranks are late.
        clock: seconds.
    """

    def __init__(
        self,
        group: RankGroup,
        *,
        deadline_s: float,
        operation: str,
        first: str = CLOSE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._group, self._clock = group, clock
        self._deadline_s, self._operation, self._first = deadline_s, operation, first
        self._memory = HostMemory(group, np.dtype(np.int64).itemsize)
        self._words = [self._memory.payload(r, np.int64) for r in range(group.world)]
        self._launched: deque[tuple[int, float]] = deque(maxlen=_KEPT)  # (step, when)

    def restart(self) -> None:
        """Steps are counted from 0 again; on every rank."""
        self._words[self._group.rank][0] = 0
        self._launched.clear()

    def launch(self) -> None:
        """This rank launches its next step."""
        own = self._words[self._group.rank]
        self._launched.append((int(own[0]), self._clock()))
        own[0] += 1

    def check(self, step: int) -> None:
        """To be called now and then while the step of that number, from 0, is waited for.

        Raises:
            BarrierTimeout: it was launched longer than the deadline ago, and these ranks have not
                launched it, or their processes have ended or are stopped.
        """
        began = next((when for number, when in self._launched if number == step), None)
        if began is None or (waited := self._clock() - began) <= self._deadline_s:
            return
        me = self._group.rank
        late = {r for r, word in enumerate(self._words) if r != me and word[0] <= step}
        late |= {m.rank for m in self._group.members if m.rank != me and m.state() in GONE}
        if late:
            ranks = tuple(sorted(late))
            found = Late(DEADLINE, me, step, NO_LAYER, self._operation, ranks, waited)
            raise found.failure(self._group.describe, first=self._first)

    def close(self) -> None:
        """Unmap; idempotent."""
        self._words = []
        self._memory.close()
