"""CPU ranks meet before every collective, so that a rank that does not come has a name.

A collective of gloo only says that some connection timed out or broke. The meeting is a tag barrier
on shared memory (`HostBarrier`) with the run's own deadline; what still breaks in the collective
after it is explained by the state of the peers' processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from barriers.errors import BarrierTimeout, RankError, name_ranks
from barriers.group import RankGroup
from barriers.host_barrier import HostBarrier
from barriers.members import GONE
from barriers.symmetric import HostMemory

_NOTICE_S = 1.0  # from a broken connection to the system's word that its process has ended


class HostMeeting:
    """Meetings of one run.

    Args:
        deadline_ms: of every wait.
        step: the step that this rank is in.
    """

    def __init__(self, group: RankGroup, *, deadline_ms: int, step: Callable[[], int]) -> None:
        self._group, self._step = group, step
        self._memory = HostMemory(group, 0)
        self._barrier = HostBarrier(self._memory, deadline_ms=deadline_ms)
        self._failure: RankError | None = None

    @contextmanager
    def collectives(self, layer: int, operation: str, *, opens_step: bool) -> Iterator[None]:
        """All ranks are here when the body begins; what breaks in it is told by rank.

        Raises:
            BarrierTimeout: ranks did not come, or went away in the body. Every later call raises
                it again, at once.
            StepMismatch: a rank is in another step.
            RankError: the body failed while every other rank was well.
        """
        if self._failure is not None:
            raise self._failure
        step = self._step()
        self._barrier.wait(step=step, layer=layer, operation=operation, opens_step=opens_step)
        try:
            yield
        except RuntimeError as error:
            self._failure = self._explain(error, f"step {step}, layer {layer}, {operation}")
            raise self._failure from error

    def _explain(self, error: RuntimeError, place: str) -> RankError:
        end = time.monotonic() + _NOTICE_S
        unwell: tuple[int, ...] = ()
        while not unwell and time.monotonic() < end:
            unwell = tuple(m.rank for m in self._group.members if m.state() in GONE)
            time.sleep(0.01)
        told = str(error).splitlines()[0][:160]
        remedy = "close this runtime, look at what those ranks did, and start all ranks again"
        if unwell:
            known = self._group.describe(unwell)
            return BarrierTimeout(
                f"rank {self._group.rank} in {place}: {name_ranks(unwell)} went away{known}; "
                f"{remedy} (gloo: {told})",
                unwell,
            )
        return RankError(f"rank {self._group.rank} in {place}: {told}; start all ranks again")

    def close(self) -> None:
        """Unmap; idempotent."""
        self._memory.close()
