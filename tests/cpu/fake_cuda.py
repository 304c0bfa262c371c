"""A driver that records: the functions of `capture_cache.restore_driver.LibCuda`, without a GPU.

It reads and fills the very structs that the real one does, keeps device memory as host memory, and
calls back on a launch. Graphs made here can be read as captured ones are.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from capture_cache.restore import KERNEL_PARAMS

INVALID, OUT_OF_MEMORY, NOT_INITIALISED, NOT_FOUND = 1, 2, 3, 500
NAMES = {INVALID: b"CUDA_ERROR_INVALID_VALUE", OUT_OF_MEMORY: b"CUDA_ERROR_OUT_OF_MEMORY"}
NAMES[NOT_FOUND] = b"CUDA_ERROR_NOT_FOUND"


@dataclass
class FakeKernel:
    """A kernel of registered code: name, (offset, bytes) of its parameters, attributes."""

    name: str
    params: tuple[tuple[int, int], ...]
    attributes: dict[int, int] = field(default_factory=dict)
    handle: int = 0


@dataclass
class FakeNode:
    """A node: CUgraphNodeType, and what it was added with."""

    kind: int
    kernel: FakeKernel | None = None
    grid: tuple[int, ...] = ()
    block: tuple[int, ...] = ()
    shared: int = 0
    params: tuple[bytes, ...] = ()
    data: bytes = b""
    attributes: dict[int, bytes] = field(default_factory=dict)

    @property
    def seen(self) -> tuple[Any, ...]:
        """All that decides what it does, for comparison between processes."""
        name = self.kernel.name if self.kernel else ""
        own = tuple(sorted(self.attributes.items()))
        return self.kind, name, self.grid, self.block, self.shared, self.params, self.data, own


@dataclass
class FakeGraph:
    nodes: dict[int, FakeNode] = field(default_factory=dict)
    edges: list[tuple[int, int, bytes]] = field(default_factory=list)

    @property
    def seen(self) -> tuple[Any, ...]:
        index = {handle: i for i, handle in enumerate(self.nodes)}
        edges = sorted((index[a], index[b], data) for a, b, data in self.edges)
        return tuple(n.seen for n in self.nodes.values()), tuple(edges)


def _word(address: int, value: int, kind: Any = ctypes.c_uint64) -> None:
    kind.from_address(address).value = value


class FakeCuda:
    """The driver.

    Args:
        code: kernels by device code.
        devices: how many there are.
        taken: reserve addresses elsewhere than asked.
        on_launch: called with the graph of each launch.

    Attributes:
        calls: names of the functions called, in order.
        fail: function → status that it returns instead of working.
    """

    def __init__(
        self,
        code: Mapping[bytes, tuple[FakeKernel, ...]] | None = None,
        *,
        devices: int = 1,
        taken: bool = False,
        on_launch: Callable[[FakeGraph], None] = lambda _: None,
    ) -> None:
        self.code, self.devices, self.taken, self.on_launch = code or {}, devices, taken, on_launch
        self.calls: list[str] = []
        self.initialised = False
        self.fail: dict[str, int] = {}
        self.graphs: dict[int, FakeGraph] = {}
        self.execs: dict[int, FakeGraph] = {}
        self.kernels: dict[int, FakeKernel] = {}
        self.libraries: dict[int, bytes] = {}
        self.pinned: dict[int, Any] = {}
        self.mapped: dict[int, Any] = {}
        self.reserved: dict[int, int] = {}
        self._handles = itertools.count(0x1000, 8)
        self._kept: list[Any] = []

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cu"):
            return found

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            status = self.fail.get(name)
            return found(*arguments) or 0 if status is None else status

        return call

    def new(self) -> int:
        return next(self._handles)

    # -- device and memory -------------------------------------------------------------------------

    def cuInit(self, _: int) -> None:
        self.initialised = True

    def cuCtxGetCurrent(self, out: int) -> None:
        _word(out, 0xC0)

    def cuCtxSetCurrent(self, _: int) -> None: ...
    def cuDevicePrimaryCtxRelease_v2(self, _: int) -> None: ...
    def cuStreamDestroy_v2(self, _: int) -> None: ...
    def cuStreamSynchronize(self, _: int) -> None: ...
    def cuStreamQuery(self, _: int) -> None: ...
    def cuGraphUpload(self, graph: int, _: int) -> int:
        return 0 if graph in self.execs else INVALID

    def cuGetErrorName(self, status: int, out: int) -> None:
        _word(out, ctypes.cast(ctypes.c_char_p(NAMES[status]), ctypes.c_void_p).value or 0)

    def cuDeviceGet(self, out: int, ordinal: int) -> None:
        _word(out, ordinal, ctypes.c_int)

    def cuDeviceGetCount(self, out: int) -> int:
        _word(out, self.devices, ctypes.c_int)
        return 0 if self.initialised else NOT_INITIALISED

    def cuDeviceGetName(self, out: int, size: int, _: int) -> None:
        ctypes.memmove(out, b"Fake GPU\0", 9)

    def cuDeviceGetAttribute(self, out: int, which: int, _: int) -> None:
        _word(out, {75: 9, 76: 0, 16: 132, 97: 227 << 10}[which], ctypes.c_int)

    def cuDriverGetVersion(self, out: int) -> None:
        _word(out, 13000, ctypes.c_int)

    def cuDevicePrimaryCtxRetain(self, out: int, _: int) -> None:
        _word(out, 0xC0)

    def cuStreamCreate(self, out: int, _: int) -> None:
        _word(out, 0x57)

    def cuMemGetInfo_v2(self, free: int, total: int) -> None:
        _word(free, 100 << 30)
        _word(total, 140 << 30)

    def cuMemGetAllocationGranularity(self, out: int, prop: int, _: int) -> None:
        _word(out, 2 << 20)

    def cuMemAddressReserve(self, out: int, nbytes: int, _: int, hint: int, flags: int) -> None:
        heeded = nbytes >= 1 << 30 and not self.taken  # the real driver ignores hints for less
        address = hint + (0 if heeded else 1 << 40)
        self.reserved[address] = nbytes
        _word(out, address)

    def cuMemAddressFree(self, address: int, nbytes: int) -> int:
        return 0 if self.reserved.pop(address, 0) == nbytes else INVALID

    def cuMemCreate(self, out: int, nbytes: int, prop: int, _: int) -> None:
        _word(out, self.new())

    def cuMemRelease(self, _: int) -> None: ...
    def cuMemSetAccess(self, address: int, nbytes: int, desc: int, count: int) -> None: ...

    def cuMemMap(self, address: int, nbytes: int, offset: int, handle: int, flags: int) -> None:
        self.mapped[address] = np.zeros(nbytes, np.uint8)  # pages come when they are touched

    def cuMemExportToShareableHandle(self, out: int, handle: int, kind: int, _: int) -> int:
        if kind != 1:
            return INVALID
        _word(out, os.memfd_create("fake device memory"), ctypes.c_int)
        return 0

    def cuMemImportFromShareableHandle(self, out: int, fd: int, kind: int) -> int:
        os.fstat(fd)  # an open file
        _word(out, self.new())
        return 0 if kind == 1 else INVALID

    def cuDeviceGetPCIBusId(self, out: int, size: int, ordinal: int) -> None:
        name = f"0000:{ordinal:02x}:00.0".encode() + b"\0"
        assert len(name) <= size
        ctypes.memmove(out, name, len(name))

    def cuCtxSynchronize(self) -> None: ...

    def cuMemsetD8_v2(self, address: int, byte: int, nbytes: int) -> None:
        self.cuMemsetD8Async(address, byte, nbytes, 0)

    def cuMemUnmap(self, address: int, nbytes: int) -> int:
        return 0 if len(self.mapped.pop(address, ())) == nbytes else INVALID

    def cuMemHostAlloc(self, out: int, nbytes: int, _: int) -> None:
        memory = (ctypes.c_uint8 * nbytes)()
        self.pinned[ctypes.addressof(memory)] = memory
        _word(out, ctypes.addressof(memory))

    def cuMemHostGetDevicePointer_v2(self, out: int, address: int, _: int) -> None:
        _word(out, address)

    def cuMemFreeHost(self, address: int) -> None:
        self._kept.append(self.pinned.pop(address))  # numpy views may outlive it here

    def at(self, address: int, nbytes: int) -> Any:
        """Device or pinned memory as uint8, to read or write."""
        for base, memory in self.pinned.items():
            if base <= address and address + nbytes <= base + len(memory):
                return np.frombuffer(memory, np.uint8)[address - base :][:nbytes]
        bases = sorted(self.mapped)
        base = bases[bisect.bisect_right(bases, address) - 1]
        return self.mapped[base][address - base :][:nbytes]

    def cuMemsetD8Async(self, address: int, byte: int, nbytes: int, _: int) -> None:
        while nbytes:  # over several mappings
            part = self.at(address, nbytes)
            part[:] = byte
            address, nbytes = address + len(part), nbytes - len(part)

    def cuMemcpyHtoD_v2(self, address: int, source: int, nbytes: int) -> None:
        self.at(address, nbytes)[:] = np.frombuffer(ctypes.string_at(source, nbytes), np.uint8)

    def cuMemcpyDtoH_v2(self, target: int, address: int, nbytes: int) -> None:
        ctypes.memmove(target, self.at(address, nbytes).tobytes(), nbytes)

    def cuPointerGetAttribute(self, out: int, which: int, address: int) -> int:
        ranges = [*((b, len(m)) for b, m in self.mapped.items()), *self.foreign]
        return 0 if any(b <= address < b + n for b, n in ranges) else INVALID

    foreign: tuple[tuple[int, int], ...] = ()  # (address, bytes) of memory that is nobody's

    # -- code --------------------------------------------------------------------------------------

    def cuLibraryLoadData(self, out: int, data: int, *_: int) -> int:
        for code in self.code:
            if ctypes.string_at(data, len(code)) == code:
                handle = self.new()
                self.libraries[handle] = code
                _word(out, handle)
                return 0
        return INVALID

    def cuLibraryUnload(self, library: int) -> int:
        return 0 if self.libraries.pop(library, None) else INVALID

    def cuLibraryGetKernel(self, out: int, library: int, name: bytes) -> int:
        for kernel in self.code[self.libraries[library]]:
            if kernel.name == name.decode():
                handle = self.new()
                made = FakeKernel(kernel.name, kernel.params, dict(kernel.attributes), handle)
                self.kernels[handle] = made
                _word(out, handle)
                return 0
        return NOT_FOUND

    def cuKernelSetAttribute(self, which: int, value: int, kernel: int, _: int) -> None:
        self.kernels[kernel].attributes[which] = value

    def cuKernelSetCacheConfig(self, kernel: int, config: int, _: int) -> None:
        self.kernels[kernel].attributes[-1] = config

    def cuKernelGetFunction(self, out: int, kernel: int) -> None:
        _word(out, kernel)

    def cuFuncGetName(self, out: int, function: int) -> None:
        text = ctypes.create_string_buffer(self.kernels[function].name.encode())
        self._kept.append(text)
        _word(out, ctypes.addressof(text))

    def cuFuncGetParamInfo(self, function: int, index: int, offset: int, size: int) -> int:
        params = self.kernels[function].params
        if index >= len(params):
            return INVALID
        _word(offset, params[index][0])
        _word(size, params[index][1])
        return 0

    def cuFuncGetAttribute(self, out: int, which: int, function: int) -> None:
        default = {8: 48 << 10, 9: -1}.get(which, 0)
        value = self.kernels[function].attributes.get(which, default)
        _word(out, value, ctypes.c_int)

    # -- graphs ------------------------------------------------------------------------------------

    def cuGraphCreate(self, out: int, _: int) -> None:
        handle = self.new()
        self.graphs[handle] = FakeGraph()
        _word(out, handle)

    def cuGraphDestroy(self, graph: int) -> int:
        return 0 if self.graphs.pop(graph, None) else INVALID

    def cuGraphExecDestroy(self, graph: int) -> int:
        return 0 if self.execs.pop(graph, None) else INVALID

    def _add(self, out: int, graph: int, node: FakeNode) -> None:
        handle = self.new()
        self.graphs[graph].nodes[handle] = node
        _word(out, handle)

    def cuGraphAddKernelNode_v2(
        self, out: int, graph: int, deps: int, count: int, params: int
    ) -> int:
        raw = np.frombuffer(ctypes.string_at(params, 72), KERNEL_PARAMS)[0]
        function = ctypes.c_uint64.from_address(params).value or int(raw["kernel"])
        kernel = self.kernels.get(function)
        if kernel is None or deps or count:
            return INVALID
        n = len(kernel.params)
        pointers = (ctypes.c_uint64 * n).from_address(int(raw["params"])) if n else ()
        values = tuple(
            ctypes.string_at(p, size) for p, (_, size) in zip(pointers, kernel.params, strict=True)
        )
        shape = tuple(raw["grid"].tolist()), tuple(raw["block"].tolist()), int(raw["shared"])
        self._add(out, graph, FakeNode(0, kernel, *shape, values))
        return 0

    def cuGraphAddNode_v2(
        self, out: int, graph: int, deps: int, data: int, count: int, params: int
    ) -> int:
        if ctypes.c_uint64.from_address(params).value:  # another type, or reserved words
            return INVALID
        if status := self.cuGraphAddKernelNode_v2(out, graph, 0, 0, params + 16):
            return status
        node, found = ctypes.c_uint64.from_address(out).value, self.graphs[graph]
        before = (ctypes.c_uint64 * count).from_address(deps) if count else ()
        for i, handle in enumerate(before):
            if handle not in found.nodes:
                return INVALID
            found.edges.append((handle, node, ctypes.string_at(data + 8 * i, 8)))
        return 0

    def cuGraphAddMemcpyNode(
        self, out: int, graph: int, deps: int, count: int, params: int, _: int
    ) -> None:
        self._add(out, graph, FakeNode(1, data=ctypes.string_at(params, 200)))

    def cuGraphAddMemsetNode(
        self, out: int, graph: int, deps: int, count: int, params: int, _: int
    ) -> None:
        self._add(out, graph, FakeNode(2, data=ctypes.string_at(params, 40)))

    def cuGraphAddEmptyNode(self, out: int, graph: int, deps: int, count: int) -> None:
        self._add(out, graph, FakeNode(5))

    def cuGraphKernelNodeSetAttribute(self, node: int, which: int, value: int) -> None:
        self._node(node).attributes[which] = ctypes.string_at(value, 64)

    def cuGraphAddDependencies_v2(
        self, graph: int, first: int, last: int, data: int, count: int
    ) -> int:
        a, b = (
            (ctypes.c_uint64 * count).from_address(first),
            (ctypes.c_uint64 * count).from_address(last),
        )
        raw = ctypes.string_at(data, 8 * count)
        found = self.graphs[graph]
        for i in range(count):
            if a[i] not in found.nodes or b[i] not in found.nodes:
                return INVALID
            found.edges.append((a[i], b[i], raw[8 * i : 8 * i + 8]))
        return 0

    def cuGraphInstantiateWithFlags(self, out: int, graph: int, _: int) -> None:
        handle = self.new()
        self.execs[handle] = self.graphs[graph]
        _word(out, handle)

    def cuGraphLaunch(self, graph: Any, _: Any) -> int:
        graph = getattr(graph, "value", graph)  # as an integer, or as ctypes has it
        if graph not in self.execs:
            return INVALID
        self.on_launch(self.execs[graph])
        return 0

    # -- reading -----------------------------------------------------------------------------------

    def _node(self, handle: int) -> FakeNode:
        return next(g.nodes[handle] for g in self.graphs.values() if handle in g.nodes)

    def cuGraphGetNodes(self, graph: int, nodes: int, count: int) -> None:
        found = list(self.graphs[graph].nodes)
        _word(count, len(found))
        for i, handle in enumerate(found if nodes else ()):
            _word(nodes + 8 * i, handle)

    def cuGraphGetEdges_v2(self, graph: int, first: int, last: int, data: int, count: int) -> None:
        found = self.graphs[graph].edges
        _word(count, len(found))
        for i, (a, b, raw) in enumerate(found if first else ()):
            _word(first + 8 * i, a)
            _word(last + 8 * i, b)
            ctypes.memmove(data + 8 * i, raw, 8)

    def cuGraphNodeGetType(self, node: int, out: int) -> None:
        _word(out, self._node(node).kind, ctypes.c_int)

    def cuGraphKernelNodeGetParams_v2(self, node: int, out: int) -> None:
        found = self._node(node)
        assert found.kernel is not None
        values = [ctypes.create_string_buffer(p, max(1, len(p))) for p in found.params]
        pointers = (ctypes.c_uint64 * max(1, len(values)))(*map(ctypes.addressof, values))
        self._kept += [values, pointers]
        raw = np.zeros(1, KERNEL_PARAMS)
        raw["grid"], raw["block"], raw["shared"] = found.grid, found.block, found.shared
        raw["params"] = ctypes.addressof(pointers)
        ctypes.memmove(out, raw.tobytes(), 72)
        _word(out, found.kernel.handle)

    def cuGraphMemcpyNodeGetParams(self, node: int, out: int) -> None:
        ctypes.memmove(out, self._node(node).data, 200)

    def cuGraphMemsetNodeGetParams(self, node: int, out: int) -> None:
        ctypes.memmove(out, self._node(node).data, 40)

    def cuGraphKernelNodeGetAttribute(self, node: int, which: int, out: int) -> None:
        ctypes.memmove(out, self._node(node).attributes.get(which, bytes(64)), 64)
