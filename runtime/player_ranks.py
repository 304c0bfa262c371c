"""The ranks of a restored run: they agree on the bundle and on every stage, then share memory.

What one rank cannot do, none does: a rank that captured while the others restored would never meet
them.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from barriers.device_watch import DeviceWatch
from barriers.group import RankGroup
from barriers.symmetric_device import DeviceMemory
from capture_cache.restore_driver import Driver
from runtime.config import RuntimeConfig

if TYPE_CHECKING:
    from runtime.restore_facts import PeerFacts

_MAX_REASON = 600  # characters that are passed on


class PlayerRanks:
    """This rank's side; joins the others.

    Args:
        options: rank and world.

    Raises:
        RankError, RanksMissing, RankMismatch: the ranks do not come together.
    """

    def __init__(self, options: RuntimeConfig) -> None:
        self._open = ExitStack()
        self._deadline_s = options.deadline_s
        self._watch: DeviceWatch | None = None
        self._base = 0
        fields = {"load": "a stored bundle", "deadline": f"{options.deadline_s} s"}
        self.group = self._open.enter_context(RankGroup(options.ranks, fields))

    @property
    def base(self) -> int:
        """Address of the shared memory; 0 where there is none."""
        return self._base

    def agree(self, what: str, value: str, reason: str | None) -> str | None:
        """Why not all ranks can go on, or None; the same on every rank.

        Args:
            value: what must be equal on all ranks.
            reason: why this rank cannot, or None.
        """
        told = {"value": value, "reason": None if reason is None else reason[:_MAX_REASON]}
        parts = self.group.allgather(what, told)
        for rank, part in enumerate(parts):
            if part.value["reason"] is not None:
                return f"rank {rank}: {part.value['reason']}"
        values = {part.value["value"] for part in parts}
        return None if len(values) == 1 else f"ranks differ in {what}: {', '.join(sorted(values))}"

    def share(self, driver: Driver, facts: PeerFacts, step_address: int) -> None:
        """Map every rank's memory where it was, and arm the watch over waits.

        Raises:
            RankError: a rank cannot; raised on all of them.
        """
        memory = DeviceMemory(self.group, driver, facts.payload_bytes, base=facts.base, exact=True)
        self._open.callback(memory.close)
        self._base = memory.base
        self._watch = DeviceWatch(
            memory, deadline_ms=round(self._deadline_s * 1e3), step_address=step_address
        )
        self._open.callback(self._watch.close)
        words = np.array([self.group.rank, 0, 0, 0], np.int32)
        for at in facts.words_at:
            driver.upload(memory.payload + at, words)
        self.group.barrier("peer memory")

    def check(self) -> None:
        """One read of host memory; raises `BarrierTimeout` naming the ranks that are late."""
        if self._watch is not None:
            self._watch.check()

    def close(self) -> None:
        """Leave the group and release what is shared; waits for nobody. Idempotent."""
        self._open.close()
