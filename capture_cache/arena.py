"""The arena: all memory that a graph may touch, laid out by an `ArenaLayout`.

`DeviceArena` is one reserved range of device addresses with physical memory behind it, and one
range of pinned host memory. `HostArena` is the CPU twin's: ordinary memory, which the system gives
page by page as it is touched. Both say where an entry is; neither knows about tensors.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np

from capture_cache.dataclass import dataclass
from capture_cache.errors import ArenaError, CudaError
from capture_cache.layout import SECTION_ALIGNMENT, ArenaLayout, Place

ARENA_BASE = 0x600000000000  # far from what the driver and the C library hand out by themselves
MIN_SPAN = 1 << 30  # of addresses reserved: the driver does not heed a hint for a few MiB
MAX_CHUNK_BYTES = 8 << 30  # of one physical allocation: bounded work per driver call
_MAP_NORESERVE = 0x4000  # Linux; Python's mmap module does not name it
_FLAGS = {
    "weights": "--layers (or more ranks)",
    "rows": "--bs or --max-seq-len",
    "kv": "--num-pages",
    "scratch": "--bs, or the largest entries of --ladder",
    "peers": "--bs",
    "ring": "--bs",
}


@dataclass(frozen=True)
class ViewSpec:
    """One entry as memory: address, shape, dtype name (`layout.ITEM_BYTES`), bytes."""

    ptr: int
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class Memory(Protocol):
    """The driver calls a device arena is built from; `capture_cache.driver.Device` has them."""

    ordinal: int

    def memory_info(self) -> tuple[int, int]: ...
    def granularity(self) -> int: ...
    def reserve(self, nbytes: int, hint: int) -> int: ...
    def unreserve(self, address: int, nbytes: int) -> None: ...
    def create(self, nbytes: int) -> Any: ...
    def release(self, handle: Any) -> None: ...
    def map(self, address: int, nbytes: int, handle: Any) -> None: ...
    def unmap(self, address: int, nbytes: int) -> None: ...
    def host_alloc(self, nbytes: int) -> int: ...
    def host_free(self, address: int) -> None: ...


class Arena(Protocol):
    """What both arenas offer."""

    layout: ArenaLayout

    def ptr(self, name: str) -> int: ...
    def view_spec(self, name: str) -> ViewSpec: ...
    def close(self) -> None: ...


class _Ranges:
    """Addresses of a layout's two ranges, until closed."""

    def __init__(self, layout: ArenaLayout) -> None:
        self.layout = layout
        self._places = layout.by_name
        self._bases: dict[bool, int] | None = {}  # host? → address; None once closed

    @property
    def base(self) -> int:
        """Address of the device range (0 if it is empty)."""
        return self._base(host=False)

    @property
    def host_base(self) -> int:
        """Address of the host range (0 if it is empty)."""
        return self._base(host=True)

    def ptr(self, name: str) -> int:
        """Address of an entry.

        Raises:
            ArenaError: no such entry, or the arena is closed.
        """
        place = self._place(name)
        return self._base(host=place.host) + place.offset

    def view_spec(self, name: str) -> ViewSpec:
        """Where an entry is and what it is; raises as `ptr`."""
        entry = self._place(name).entry
        return ViewSpec(self.ptr(name), entry.shape, entry.dtype, entry.nbytes)

    def _base(self, *, host: bool) -> int:
        if self._bases is None:
            raise ArenaError("the arena is closed; its addresses are gone: make a new one")
        return self._bases.get(host, 0)

    def _place(self, name: str) -> Place:
        place = self._places.get(name)
        if place is None:
            raise ArenaError(f"the arena has no entry {name!r}; add it to the layout")
        return place


class DeviceArena(_Ranges):
    """Device memory at a fixed address, and pinned host memory. Contents are undefined at first.

    Args:
        device: ordinal of the device.
        memory: the driver calls to use, in place of that device's own.
        base: the address wanted; a multiple of 2 MiB.
        exact: refuse any other address (a stored graph needs this), instead of taking what comes.
        back: put memory behind the addresses at once; else `back` does, and until then only
            addresses may be asked for.

    Raises:
        ArenaError: not enough memory, by section; or another address than an exact `base`.
        CudaError: the driver refuses for another reason.
    """

    def __init__(
        self,
        layout: ArenaLayout,
        *,
        device: int = 0,
        memory: Memory | None = None,
        base: int = ARENA_BASE,
        exact: bool = False,
        back: bool = True,
    ) -> None:
        super().__init__(layout)
        self._memory: Memory = _device(device) if memory is None else memory
        self._undo: list[Callable[[], None]] = []  # what gives everything back, last first
        try:
            if layout.host_bytes:
                self._pin()
            if layout.device_bytes:
                self._reserve(base, exact)
            if back:
                self.back()
        except BaseException:
            self.close()
            raise

    def back(self) -> None:
        """Put physical memory behind the device range, once. Raises as the constructor."""
        for extent in self.layout.extents:
            if not extent.section.host:
                self._back(self.base + extent.offset, extent.nbytes)

    def close(self) -> None:
        """Unmap and free everything; idempotent. Graphs and views that used it are dead."""
        self._bases = None
        failure: CudaError | None = None
        while self._undo:
            try:
                self._undo.pop()()
            except CudaError as e:  # give the rest back before telling
                failure = failure or e
        if failure is not None:
            raise failure

    def _pin(self) -> None:
        nbytes = self.layout.host_bytes
        try:
            address = self._memory.host_alloc(nbytes)
        except CudaError as e:
            raise ArenaError(
                f"cannot pin {_gib(nbytes)} of host memory ({e.name}); free some or lower --bs"
            ) from e
        self._undo.append(partial(self._memory.host_free, address))
        self._set_base(host=True, address=address)

    def _reserve(self, base: int, exact: bool) -> None:
        memory, nbytes = self._memory, self.layout.device_bytes
        granularity = memory.granularity()
        if any(e.nbytes % granularity for e in self.layout.extents):
            raise ArenaError(
                f"the device maps memory in units of {granularity} bytes, the layout is made for "
                "2 MiB; lay it out with a larger section alignment"
            )
        free = memory.memory_info()[0]
        if nbytes > free:
            raise ArenaError(self._shortage(free))
        span = max(nbytes, MIN_SPAN)
        address = memory.reserve(span, base)
        self._undo.append(partial(memory.unreserve, address, span))
        if exact and address != base:
            raise ArenaError(
                f"expected the arena at {base:#x}, got {address:#x}: something else is mapped "
                "there; close the other runtime of this process, or capture again"
            )
        self._set_base(host=False, address=address)

    def _back(self, address: int, nbytes: int) -> None:
        """Put physical memory behind a section."""
        memory = self._memory
        for at in range(address, address + nbytes, MAX_CHUNK_BYTES):
            chunk = min(MAX_CHUNK_BYTES, address + nbytes - at)
            try:
                handle = memory.create(chunk)
            except CudaError as e:
                if e.name != "CUDA_ERROR_OUT_OF_MEMORY":
                    raise
                raise ArenaError(self._shortage(memory.memory_info()[0])) from e
            self._undo.append(partial(memory.release, handle))
            memory.map(at, chunk, handle)
            self._undo.append(partial(memory.unmap, at, chunk))

    def _set_base(self, *, host: bool, address: int) -> None:
        assert self._bases is not None
        self._bases[host] = address

    def _shortage(self, free: int) -> str:
        parts = [
            f"{e.section.name} {_gib(e.nbytes)} (lower {_FLAGS.get(e.section.name, 'its entries')})"
            for e in sorted(self.layout.extents, key=lambda e: -e.nbytes)
            if e.nbytes and not e.section.host
        ]
        return (
            f"the arena needs {_gib(self.layout.device_bytes)} on device {self._memory.ordinal}, "
            f"{_gib(free)} are free: {', '.join(parts)}"
        )


class HostArena(_Ranges):
    """The CPU twin's arena: zeroed memory that costs nothing before it is touched.

    Raises:
        ArenaError: the system refuses the address range.
    """

    def __init__(self, layout: ArenaLayout) -> None:
        super().__init__(layout)
        self._memory = {
            False: _anonymous(layout.device_bytes, layout),
            True: _anonymous(layout.host_bytes, layout),
        }
        self._bases = {host: array.ctypes.data for host, array in self._memory.items()}

    def bytes_of(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """An entry's memory, uint8 [nbytes]; it lives as long as the array does.

        Raises:
            ArenaError: no such entry, or the arena is closed.
        """
        place = self._place(name)
        self._base(host=place.host)
        return self._memory[place.host][place.offset : place.offset + place.nbytes]

    def close(self) -> None:
        """Forget the memory, which goes with its last view; idempotent."""
        self._bases = None
        self._memory = {}


def _device(ordinal: int) -> Memory:
    from capture_cache.driver import Device  # what a restore does without

    return Device(ordinal)


def _anonymous(nbytes: int, layout: ArenaLayout) -> np.ndarray[Any, np.dtype[np.uint8]]:
    # No swap is reserved: an arena larger than the machine is fine as long as little is touched.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, nbytes + SECTION_ALIGNMENT, flags=flags)
    except (OSError, OverflowError) as e:
        sizes = ", ".join(f"{name} {_gib(n)}" for name, n in layout.section_bytes.items() if n)
        raise ArenaError(
            f"the system gives no {_gib(nbytes)} of address space ({e}): {sizes}; "
            "lower --num-pages, --max-seq-len or --bs"
        ) from e
    array = np.frombuffer(memory, dtype=np.uint8)
    skip = -array.ctypes.data % SECTION_ALIGNMENT
    return array[skip : skip + nbytes]


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.{3 if nbytes < 2**30 else 1}f} GiB" if nbytes else "0 GiB"
