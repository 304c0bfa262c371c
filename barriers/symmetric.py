"""Memory that every rank of a node sees: one slot a rank, its own first.

Rank r sees rank p's memory in slot (p - r) mod world. A slot begins with a control block (the
signals of the barriers, cuda/barrier.cuh) and goes on with payload. All slots have one size. The
memory starts zeroed on every rank before any rank can reach it.

`HostMemory` is the CPU ranks': anonymous files passed over the group's socket, so nothing has a
name that could be left behind. `barriers.symmetric_device.DeviceMemory` is the GPUs'.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from barriers.errors import RankMismatch
from barriers.group import Part, RankGroup
from barriers.watch import slot_of_rank

CONTROL_BYTES = 4096  # of every slot; payload follows
_SEAL_SHRINK = 0x0002  # F_SEAL_SHRINK: a peer cannot make our mapping fault by cutting the file


class HostMemory:
    """Shared memory of CPU ranks, zeroed.

    Args:
        payload_bytes: of each rank; the same on all of them.

    Raises:
        RankMismatch: ranks ask for different sizes.
        RanksMissing: a rank did not come.
    """

    def __init__(self, group: RankGroup, payload_bytes: int) -> None:
        self.group = group
        self.payload_bytes = payload_bytes
        nbytes = CONTROL_BYTES + payload_bytes
        fd = os.memfd_create("lockstep-rank", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEAL_SHRINK)
            parts = group.allgather("shared memory", {"bytes": nbytes}, [fd])
        finally:
            os.close(fd)
        try:
            check_sizes(parts)
            slots = [parts[(group.rank + k) % group.world].fds[0] for k in range(group.world)]
            self._slots: list[NDArray[np.uint8]] = [
                np.frombuffer(mmap.mmap(fd, nbytes), dtype=np.uint8) for fd in slots
            ]
        finally:
            close_parts(parts)
        group.barrier("shared memory is mapped")

    def address(self, rank: int) -> int:
        return int(self._slot(rank).ctypes.data)

    def control(self, rank: int) -> NDArray[np.int64]:
        """The control block of `rank`, int64 [CONTROL_BYTES / 8]."""
        return self._slot(rank)[:CONTROL_BYTES].view(np.int64)

    def payload(self, rank: int, dtype: Any = np.uint8) -> NDArray[Any]:
        """The payload of `rank` as a flat array; it stays valid for as long as the array lives."""
        return self._slot(rank)[CONTROL_BYTES:].view(dtype)

    def close(self) -> None:
        self._slots = []

    def _slot(self, rank: int) -> NDArray[np.uint8]:
        if not self._slots:
            raise ValueError("this shared memory is closed; make a new one")
        return self._slots[slot_of_rank(self.group.rank, rank, self.group.world)]


def check_sizes(parts: list[Part]) -> None:
    """Raises RankMismatch where a rank asked for another size than rank 0."""
    want = parts[0].value["bytes"]
    for rank, part in enumerate(parts):
        if part.value["bytes"] != want:
            raise RankMismatch(
                f"ranks disagree on shared memory: rank 0 has {want} bytes, rank {rank} has "
                f"{part.value['bytes']}; start all ranks with the same model and ladder",
                (rank,),
            )


def close_parts(parts: list[Part]) -> None:
    """Close the files of a gathering."""
    for part in parts:
        for fd in part.fds:
            os.close(fd)
