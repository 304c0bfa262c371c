"""Why a wait between ranks ended without its peers, and the exception that says so.

A device writes one `Record` into pinned host memory (cuda/barrier.cuh has its twin) and stores
`stop` last; the host looks at that one word on every poll. CPU ranks make the same `Late`
themselves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from barriers.errors import (
    BarrierAborted,
    BarrierTimeout,
    RankError,
    StepMismatch,
    name_ranks,
)

RUNNING, DEADLINE, STEP_MISMATCH, ABORTED = range(4)  # `Stop` in cuda/barrier.cuh
DEFAULT_DEADLINE_MS = 10_000
NO_LAYER = -1
# What a wait belongs to; kernels carry the index.
OPERATIONS = ("barrier", "step", "dispatch", "combine", "head", "sample", "close")


class Record(ctypes.Structure):
    """`Record` of cuda/barrier.cuh."""

    _fields_ = (
        ("stop", ctypes.c_int32),
        ("abort", ctypes.c_int32),
        ("layer", ctypes.c_int32),
        ("operation", ctypes.c_int32),
        ("step", ctypes.c_int64),
        ("peer_step", ctypes.c_int64),
        ("missing", ctypes.c_uint64),
        ("waited_ns", ctypes.c_uint64),
    )


CLOSE = "close this runtime"  # what to do at once where a rank is late


@dataclass(frozen=True)
class Late:
    """One wait that ended without its peers.

    Attributes:
        stop: DEADLINE, STEP_MISMATCH or ABORTED.
        rank: that waited.
        step: that it was in; layer: NO_LAYER outside of layers; operation: of `OPERATIONS`.
        ranks: that had not arrived, or are in another step.
        peer_step: the step of the first of them, for STEP_MISMATCH.
    """

    stop: int
    rank: int
    step: int
    layer: int
    operation: str
    ranks: tuple[int, ...]
    waited_s: float
    peer_step: int = 0

    @property
    def place(self) -> str:
        layer = "" if self.layer == NO_LAYER else f", layer {self.layer}"
        return f"step {self.step}{layer}, {self.operation}"

    def failure(
        self,
        describe: Callable[[Sequence[int]], str] | None = None,
        *,
        first: str = CLOSE,
    ) -> RankError:
        """The exception to raise.

        Args:
            describe: what is known of some ranks' processes, such as `RankGroup.describe`.
            first: what to do at once where ranks are late.
        """
        known = describe(self.ranks) if describe is not None else ""
        verb = "is" if len(self.ranks) == 1 else "are"
        who = f"{name_ranks(self.ranks)} {verb}"
        if self.stop == DEADLINE:
            return BarrierTimeout(
                f"rank {self.rank} waited {self.waited_s:.1f} s in {self.place}: {who} late{known}"
                f"; {first}, look at what those ranks did, and start all ranks again",
                self.ranks,
            )
        if self.stop == STEP_MISMATCH:
            return StepMismatch(
                f"rank {self.rank} is in {self.place}: {who} in step {self.peer_step}{known}; "
                "every rank must launch every step: close this runtime and start all ranks again",
                self.ranks,
            )
        return BarrierAborted(
            f"rank {self.rank} stopped waiting in {self.place} after {self.waited_s:.1f} s, as its "
            f"host asked: {name_ranks(self.ranks)} had not arrived{known}",
            self.ranks,
        )


def rank_of_slot(rank: int, slot: int, world: int) -> int:
    """The rank whose memory `rank` sees in `slot`; its own is slot 0."""
    return (rank + slot) % world


def slot_of_rank(rank: int, peer: int, world: int) -> int:
    """The slot in which `rank` sees `peer`."""
    return (peer - rank) % world


class Watch:
    """The host's eye on its device's waits.

    Args:
        record: at which the device writes; must outlive this.
        describe: adds what is known of late ranks' processes to the message.
    """

    def __init__(
        self,
        record: Record,
        rank: int,
        world: int,
        *,
        describe: Callable[[Sequence[int]], str] | None = None,
        operations: Sequence[str] = OPERATIONS,
    ) -> None:
        self._record: Any = record
        self._rank, self._world = rank, world
        self._describe, self._operations = describe, operations

    def check(self) -> None:
        """Cheap enough for every poll: one read of host memory.

        Raises:
            BarrierTimeout: a wait on this device passed its deadline.
            StepMismatch: ranks met from different steps.
            BarrierAborted: `abort` ended a wait.
        """
        if self._record.stop:
            late = self.late()
            assert late is not None
            raise late.failure(self._describe)

    def late(self) -> Late | None:
        """What the device recorded, if it did."""
        r = self._record
        # `stop` is stored last with a system-scope release; this host reads it first.
        stop = int(r.stop)
        if stop == RUNNING:
            return None
        named = 0 <= r.operation < len(self._operations)
        return Late(
            stop=stop,
            rank=self._rank,
            step=int(r.step),
            layer=int(r.layer),
            operation=self._operations[r.operation] if named else f"operation {r.operation}",
            ranks=tuple(
                sorted(
                    rank_of_slot(self._rank, slot, self._world)
                    for slot in range(self._world)
                    if r.missing >> slot & 1
                )
            ),
            waited_s=r.waited_ns / 1e9,
            peer_step=int(r.peer_step),
        )

    def abort(self) -> None:
        """Ask the device to end whatever wait it is in; later waits end at once, too."""
        self._record.abort = 1
