"""Packed weights into the arena: parallel reads into pinned memory, overlapped with copies.

Every lane is a thread with two staging buffers and a stream of its own: it reads a piece into one
buffer while the copy out of the other is under way. When all is there, the sum of every tensor is
compared where it lies, so what a step will read has been checked, whatever way it came.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from capture_cache.arena import Arena, HostArena
from capture_cache.checksum import device_sums, sum64, sum64_code
from capture_cache.errors import CorruptBundle
from capture_cache.packed import PackedWeights, Run, parts_of
from capture_cache.packed_index import REMEDY, PackedTensor
from capture_cache.restore_driver import Driver
from capture_cache.store import Store

BUFFER_BYTES = 8 << 20  # of one staging buffer: long reads, and little to pin
MAX_LANES = 12
_BUFFERS = 2
_COPYING = "copying weights"

# (bytes done, bytes in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoadStats:
    """What a load did.

    Attributes:
        copy_s: seconds of reading and copying; check_s: of comparing the sums; pin_s: of getting
            the staging memory.
    """

    nbytes: int
    num_runs: int
    lanes: int
    pin_s: float
    copy_s: float
    check_s: float


class Lane(Protocol):
    """One reader's way into the arena; used by one thread.

    Attributes:
        nbytes: of a staging buffer, the same for all lanes of a load.
    """

    nbytes: int

    def begin(self) -> None:
        """In its thread, before anything else."""

    def buffer(self) -> memoryview:
        """A staging buffer that no copy uses any more; writable."""

    def send(self, address: int, nbytes: int) -> None:
        """Copy the beginning of the buffer that `buffer` gave last to `address`."""

    def drain(self) -> None:
        """Wait until every copy is done."""

    def close(self) -> None:
        """Give staging memory and stream back; idempotent."""


class HostLane:
    """The CPU twin's: the copy is a copy in memory."""

    def __init__(self, nbytes: int = BUFFER_BYTES) -> None:
        self.nbytes = nbytes
        self._buffer = np.empty(nbytes, np.uint8)

    def begin(self) -> None:
        pass

    def buffer(self) -> memoryview:
        return self._buffer.data

    def send(self, address: int, nbytes: int) -> None:
        ctypes.memmove(address, self._buffer.ctypes.data, nbytes)

    def drain(self) -> None:
        pass

    def close(self) -> None:
        pass


class DeviceLane:
    """Two pinned buffers, a stream, and an event a buffer that its copy records."""

    def __init__(self, driver: Driver, nbytes: int = BUFFER_BYTES) -> None:
        self._driver, self._next, self.nbytes = driver, 0, nbytes
        self._open = ExitStack()
        try:
            address = driver.host_alloc(_BUFFERS * nbytes)
            self._open.callback(driver.host_free, address)
            self._addresses = [address + i * nbytes for i in range(_BUFFERS)]
            self.stream = driver.create_stream()
            self._open.callback(driver.destroy_stream, self.stream)
            self._events = list[int]()
            for _ in range(_BUFFERS):
                self._events.append(driver.create_event())
                self._open.callback(driver.destroy_event, self._events[-1])
        except BaseException:
            self.close()
            raise
        whole = memoryview((ctypes.c_uint8 * (_BUFFERS * nbytes)).from_address(address)).cast("B")
        self._views = [whole[i * nbytes : (i + 1) * nbytes] for i in range(_BUFFERS)]

    def begin(self) -> None:
        self._driver.make_current()

    def buffer(self) -> memoryview:
        self._driver.wait_event(self._events[self._next], _COPYING)
        return self._views[self._next]

    def send(self, address: int, nbytes: int) -> None:
        i = self._next
        self._driver.copy_async(address, self._addresses[i], nbytes, self.stream)
        self._driver.record_event(self._events[i], self.stream)
        self._next = (i + 1) % _BUFFERS

    def drain(self) -> None:
        self._driver.wait(self.stream, _COPYING)

    def close(self) -> None:
        self._open.close()


def num_lanes() -> int:
    """Readers that this machine can use: its processors, up to 12."""
    return max(1, min(MAX_LANES, len(os.sched_getaffinity(0))))


def load_packed(
    weights: PackedWeights,
    arena: Arena,
    *,
    rank: int = 0,
    computed: frozenset[str] = frozenset(),
    driver: Driver | None = None,
    store: Store | None = None,
    verify: bool = False,
    progress: Progress | None = None,
    lanes: int | None = None,
) -> LoadStats:
    """Fill the weights section of `arena`; what is `computed` is left alone. Waits.

    Args:
        rank: whose experts to take.
        driver: opened, of a device arena; None for the CPU twin's.
        store: where the device's kernel for the sums is kept.
        verify: compare every sha256 of the shards that are read first, too.
        progress: called with (bytes read, bytes to read), by one thread at a time.
        lanes: readers; None: as many as the machine can use.

    Raises:
        FingerprintMismatch: other tensors than the arena wants.
        CorruptBundle: a file, or a tensor's sum, is not what the index says. The section is then
            partly filled.
        CudaError: the driver refuses, or the device failed.
        ValueError: no such rank.
    """
    if not 0 <= rank < weights.index.ep_size:
        raise ValueError(f"rank: expected 0 … {weights.index.ep_size - 1}, got {rank}")
    if isinstance(arena, HostArena) != (driver is None):
        raise ValueError(
            f"an arena of type {type(arena).__name__} cannot be filled through {driver}"
        )
    runs = weights.runs(arena.layout, rank, computed=computed)
    if verify:
        for _ in weights.verify(sorted({run.file for run in runs})):
            pass
    begin = time.perf_counter()
    with ExitStack() as held:
        made = list[Lane]()
        for _ in range(lanes or num_lanes()):
            made.append(HostLane() if driver is None else DeviceLane(driver))
            held.callback(made[-1].close)
        pinned = time.perf_counter()
        nbytes = copy_runs(weights, runs, _base(arena), made, progress)
        copied = time.perf_counter()
        check_sums(weights, arena, rank, computed, driver, store, made[0])
    done = time.perf_counter()
    return LoadStats(nbytes, len(runs), len(made), pinned - begin, copied - pinned, done - copied)


def _base(arena: Arena) -> int:
    """Address of offset 0 of the device range."""
    place = next(p for p in arena.layout.places if p.entry.section == "weights")
    return arena.ptr(place.entry.name) - place.offset


def copy_runs(
    weights: PackedWeights,
    runs: Sequence[Run],
    base: int,
    lanes: Sequence[Lane],
    progress: Progress | None = None,
) -> int:
    """Copy `runs` from their shards to the arena at `base`; returns the bytes. Waits.

    Raises:
        CorruptBundle: a shard is not what it must be, or ends early.
    """
    with ExitStack() as files:
        fds = {}
        for name in sorted({run.file for run in runs}):
            fds[name] = weights.open_shard(name)
            files.callback(os.close, fds[name])
        job = _Job(weights, _pieces(runs, lanes[0].nbytes), base, fds, progress)
        threads = [
            threading.Thread(target=job.work, args=(lane,), name=f"weights-{i}", daemon=True)
            for i, lane in enumerate(lanes)
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # an interrupt: the handles must outlive the readers
            job.failed.set()
            for thread in threads:
                thread.join()
            raise
    if job.error is not None:
        raise job.error
    return job.total


def _pieces(runs: Sequence[Run], nbytes: int) -> list[Run]:
    """Runs cut to the size of a staging buffer, in the order of the arena."""
    return [
        Run(
            run.file,
            run.file_offset + at,
            run.arena_offset + at,
            min(nbytes, run.nbytes - at),
        )
        for run in runs
        for at in range(0, run.nbytes, nbytes)
    ]


class _Job:
    """The pieces of one load, taken by the lanes' threads in order."""

    def __init__(
        self,
        weights: PackedWeights,
        pieces: Sequence[Run],
        base: int,
        fds: Mapping[str, int],
        progress: Progress | None,
    ) -> None:
        self._weights, self._pieces, self._base, self._fds = weights, pieces, base, fds
        self._progress = progress
        self._next, self._lock, self._done = itertools.count(), threading.Lock(), 0
        self.total = sum(p.nbytes for p in pieces)
        self.failed = threading.Event()
        self.error: BaseException | None = None

    def work(self, lane: Lane) -> None:
        """A thread's whole life: pieces until there are none, or until one has failed."""
        try:
            lane.begin()
            while not self.failed.is_set():
                i = next(self._next)
                if i >= len(self._pieces):
                    break
                piece = self._pieces[i]
                self._read(piece, lane.buffer())
                lane.send(self._base + piece.arena_offset, piece.nbytes)
                self._tell(piece.nbytes)
            lane.drain()
        except BaseException as error:  # raised again by the thread that waits
            with self._lock:
                self.error = self.error or error
            self.failed.set()

    def _read(self, piece: Run, buffer: memoryview) -> None:
        at, fd = 0, self._fds[piece.file]
        while at < piece.nbytes:
            got = os.preadv(fd, [buffer[at : piece.nbytes]], piece.file_offset + at)
            if got == 0:
                raise CorruptBundle(
                    f"{self._weights.path / piece.file}: expected {piece.nbytes} bytes at "
                    f"{piece.file_offset}, got {at}: it was cut short meanwhile; {REMEDY}"
                )
            at += got

    def _tell(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self.total)


def check_sums(
    weights: PackedWeights,
    arena: Arena,
    rank: int,
    computed: frozenset[str],
    driver: Driver | None,
    store: Store | None,
    lane: Lane,
) -> None:
    """Compare the sum of every tensor in the arena with the index.

    Raises:
        CorruptBundle: names the tensors that differ, and their file.
    """
    tensors = {t.name: t for t in weights.index.tensors}
    held, places = list[PackedTensor](), list[tuple[int, int]]()
    for place in arena.layout.places:
        if place.entry.section == "weights" and place.entry.name not in computed:
            start = arena.ptr(place.entry.name) - place.offset
            for part in parts_of(place):
                held.append(tensors[part.name])
                # Padding is zero and adds nothing, so a part without it has the same sum.
                places.append((start + part.offset, part.nbytes))
    if driver is None:
        got = [sum64(_bytes(address, nbytes)) for address, nbytes in places]
    else:
        assert isinstance(lane, DeviceLane)
        major, minor = driver.compute_capability(driver.ordinal)
        code = sum64_code(f"sm_{major}{minor}", store)
        got = device_sums(driver, code, places, lane.stream)
    wrong = [t for t, s in zip(held, got, strict=True) if s != t.sums[rank if t.expert else 0]]
    if wrong:
        raise CorruptBundle(_damage(weights, wrong, rank))


def _damage(weights: PackedWeights, wrong: Sequence[PackedTensor], rank: int) -> str:
    first = wrong[0]
    file = next(
        name
        for name, shard in weights.shards.items()
        if first.name in shard.offsets and (not first.expert or f"-{rank:03}-of-" in name)
    )
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return (
        f"{weights.path / file}: expected the sum {first.sums[rank if first.expert else 0]:016x} "
        f"of tensor {first.name}, got another{more}: the weights are damaged on disk, or were on "
        f"their way; run python -m capture_cache verify, or {REMEDY}"
    )


def _bytes(address: int, nbytes: int) -> Any:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
