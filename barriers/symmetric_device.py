"""Device memory that every rank of a node sees, through the driver's virtual memory calls alone.

Each rank makes one physical allocation, passes it as a file over the group's socket, and maps all
of them side by side into one reserved range: rank (self + k) mod world at `base + k * stride`. The
range has a fixed address, so a stored graph finds its peers where it left them, whatever its rank.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial

from barriers.errors import RankError, RankMismatch
from barriers.group import Part, RankGroup
from barriers.symmetric import CONTROL_BYTES, check_sizes, close_parts
from barriers.watch import slot_of_rank
from capture_cache.arena import MIN_SPAN
from capture_cache.errors import CudaError
from capture_cache.restore_driver import Driver

PEERS_BASE = 0x680000000000  # above the arena, below what the C library hands out


class DeviceMemory:
    """Peer memory of GPU ranks, zeroed.

    Args:
        device: this rank's GPU; another one on every rank.
        payload_bytes: of each rank; the same on all of them.
        base: the address wanted, a multiple of 2 MiB.
        exact: refuse any other address (a stored graph needs this).
        shared_gpu: let ranks share a GPU: for tests, since their kernels then take turns.

    Attributes:
        base: of slot 0, this rank's own.
        stride: bytes from one slot to the next.

    Raises:
        RankMismatch: different sizes, or two ranks on one GPU.
        RankError: a rank could not allocate or map; raised on every rank, quoting it.
        RanksMissing: a rank did not come.
    """

    def __init__(
        self,
        group: RankGroup,
        device: Driver,
        payload_bytes: int,
        *,
        base: int = PEERS_BASE,
        exact: bool = False,
        shared_gpu: bool = False,
    ) -> None:
        self.group, self.device, self.payload_bytes = group, device, payload_bytes
        self._undo: list[Callable[[], None]] = []  # what gives everything back, last first
        try:
            with self._agreed("allocating peer memory"):
                granularity = device.granularity()
                self.stride = -(-(CONTROL_BYTES + payload_bytes) // granularity) * granularity
                self.base = self._reserve(base, exact)
                own = self._create()
            parts = self._exchange(own)
            try:
                check_sizes(parts)
                if not shared_gpu:
                    _check_gpus(parts)
                with self._agreed("mapping peer memory"):
                    self._map_peers(parts)
            finally:
                close_parts(parts)
        except BaseException:
            with contextlib.suppress(CudaError):  # the first failure is the one to tell
                self.close()
            raise

    def address(self, rank: int) -> int:
        return self.base + slot_of_rank(self.group.rank, rank, self.group.world) * self.stride

    @property
    def payload(self) -> int:
        """Address of this rank's payload; a peer's is a multiple of `stride` further on."""
        return self.base + CONTROL_BYTES

    def clear_control(self) -> None:
        """Zero this rank's control block. No rank may signal meanwhile: meet before and after."""
        self.device.fill_now(self.base, 0, CONTROL_BYTES, "zeroing the signals")

    def close(self) -> None:
        """Unmap; idempotent, waits for nobody. Graphs and kernels that use it must be done."""
        failure: CudaError | None = None
        while self._undo:
            try:
                self._undo.pop()()
            except CudaError as e:  # give the rest back before telling
                failure = failure or e
        if failure is not None:
            raise failure

    @contextlib.contextmanager
    def _agreed(self, doing: str) -> Iterator[None]:
        """A failure inside is raised on every rank, so that no rank waits for one that gave up."""
        error: CudaError | RankError | None = None
        try:
            yield
        except (CudaError, RankError) as e:
            error = e
        try:
            self.group.agree(doing, None if error is None else str(error))
        except RankError as e:
            raise e from error

    def _reserve(self, base: int, exact: bool) -> int:
        nbytes = max(self.stride * self.group.world, MIN_SPAN)
        address = self.device.reserve(nbytes, base)
        self._undo.append(partial(self.device.unreserve, address, nbytes))
        if exact and address != base:
            raise RankError(
                f"expected peer memory at {base:#x}, got {address:#x}: something else is mapped "
                "there; close the other runtime of this process, or capture again",
                (self.group.rank,),
            )
        return address

    def _create(self) -> int:
        """This rank's memory: exportable, mapped in slot 0, zeroed."""
        own = self.device.create(self.stride, shareable=True)
        self._undo.append(partial(self.device.release, own))
        self._map(self.base, own)
        self.device.fill_now(self.base, 0, self.stride, "zeroing peer memory")
        return own

    def _exchange(self, own: int) -> list[Part]:
        """Give every rank this rank's memory as a file; by then each rank has zeroed its own."""
        fd = self.device.export(own)
        try:
            value = {"bytes": self.stride, "gpu": self.device.pci_bus()}
            return self.group.allgather("peer memory", value, [fd])
        finally:
            os.close(fd)

    def _map_peers(self, parts: list[Part]) -> None:
        group = self.group
        for slot in range(1, group.world):
            peer = (group.rank + slot) % group.world
            doing = f"importing the memory of rank {peer}"
            try:
                handle = self.device.import_file(parts[peer].fds[0], doing)
                self._undo.append(partial(self.device.release, handle))
                self._map(self.base + slot * self.stride, handle)
            except CudaError as e:
                raise RankError(
                    f"{e}: GPU {self.device.ordinal} needs peer access to "
                    f"{parts[peer].value['gpu']} (see nvidia-smi topo -p2p rw)",
                    (peer,),
                ) from e

    def _map(self, address: int, handle: int) -> None:
        self.device.map(address, self.stride, handle)
        self._undo.append(partial(self.device.unmap, address, self.stride))


def _check_gpus(parts: list[Part]) -> None:
    """Raises RankMismatch where two ranks have one GPU: their waits would starve each other."""
    seen: dict[str, int] = {}
    for rank, part in enumerate(parts):
        other = seen.setdefault(part.value["gpu"], rank)
        if other != rank:
            raise RankMismatch(
                f"expected a GPU for each rank, got {part.value['gpu']} for ranks {other} and "
                f"{rank}; start no more ranks than GPUs, and give each its own (LOCAL_RANK, "
                "or CUDA_VISIBLE_DEVICES of each)",
                (other, rank),
            )
