"""The host's watch over the deadlines of GPU ranks' waits.

A restored run needs this and no compiler: importing it imports none.
"""

from __future__ import annotations

import ctypes

import numpy as np

from barriers.symmetric_device import DeviceMemory
from barriers.watch import DEFAULT_DEADLINE_MS, Record, Watch

STATE_AT = 3328  # of `State` in the control block
_PAGE = 4096


class State(ctypes.Structure):
    """`State` of cuda/barrier.cuh: what a rank's waits go by, in its device memory."""

    _fields_ = (
        ("step", ctypes.c_uint64),
        ("record", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("poison", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("own_step", ctypes.c_int64),
    )


class DeviceWatch(Watch):
    """What this rank's waits go by, written to its device, and the record they leave.

    Args:
        memory: in whose control block the state lies.
        deadline_ms: of every wait.
        step_address: int64 [1] on the device, the number of the running step; None: the state's own
            word, which whoever launches keeps.

    All ranks make theirs before any of them launches a barrier: meet after this.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        *,
        deadline_ms: int = DEFAULT_DEADLINE_MS,
        step_address: int | None = None,
    ) -> None:
        if deadline_ms < 1:
            raise ValueError(f"a deadline must be at least 1 ms, got {deadline_ms}")
        self._memory, self._deadline_ns = memory, deadline_ms * 1_000_000
        own_step = memory.base + STATE_AT + State.own_step.offset
        self.step_address = own_step if step_address is None else step_address
        self._pinned: int | None = memory.device.host_alloc(_PAGE)
        ctypes.memset(self._pinned, 0, _PAGE)
        record = Record.from_address(self._pinned)
        group = memory.group
        super().__init__(record, group.rank, group.world, describe=group.describe)
        self._write_state()

    def rearm(self) -> None:
        """Forget a failure: zero this rank's signals, record and state.

        Every rank's stream must be idle and every rank must do this: meet before and after. A
        runtime never does; it closes. Tests and benchmarks go on to their next case.
        """
        assert self._pinned is not None
        ctypes.memset(self._pinned, 0, _PAGE)
        self._memory.clear_control()
        self._write_state()

    def close(self) -> None:
        """Free the record; idempotent. Kernels that wait must be done."""
        if self._pinned is not None:
            pinned, self._pinned = self._pinned, None
            # Not the freed page: a late `check` must not touch it.
            self._record = Record.from_buffer_copy(self._record)
            self._memory.device.host_free(pinned)

    def _write_state(self) -> None:
        assert self._pinned is not None
        state = State(step=self.step_address, record=self._pinned, deadline_ns=self._deadline_ns)
        device = self._memory.device
        device.upload(self._memory.base + STATE_AT, np.frombuffer(bytes(state), np.uint8))
        # The copy may still be on its way, and the streams that launch barriers do not wait for it.
        device.synchronize("writing what barriers go by")
