"""From captured graphs to a bundle's structs: every node, edge, kernel and pointer, or a refusal.

A pointer is stored as (symbol, offset): the memory that it lies in by name. Kernels that we
compiled say which parameters are pointers. Of others only the sizes are known: there every aligned
word that lies in device memory of ours is taken for a pointer into it, which is harmless should it
be none, since device memory comes back at the same address.
"""

from __future__ import annotations

import hashlib
import heapq
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from capture_cache.bundle import (
    ATTRIBUTE,
    ATTRIBUTE_BYTES,
    ATTRIBUTES,
    EDGE,
    EMPTY,
    KERNEL,
    MEMCPY,
    MEMCPY_BYTES,
    MEMSET,
    MEMSET_BYTES,
    NODE,
    RELOCATION,
    Function,
    Graph,
    Module,
    Program,
    Table,
)
from capture_cache.bundle_graph import payload_ends
from capture_cache.captured_kernel import CapturedKernel, Param, read_params, with_kinds
from capture_cache.errors import NotRestorable
from capture_cache.graph_reader import GraphReader
from capture_cache.kernel import CompiledKernel
from capture_cache.memory_ranges import Range, Ranges
from capture_cache.restore import KERNEL_PARAMS

_NODE_TYPES = {0: KERNEL, 1: MEMCPY, 2: MEMSET, 5: EMPTY}  # CUgraphNodeType
_TYPE_NAMES = {3: "host", 4: "graph", 6: "event wait", 7: "event record", 10: "allocation"}
_MAX_DYNAMIC_SHARED, _CARVEOUT, _NONPORTABLE_CLUSTER, _STATIC_SHARED = 8, 9, 14, 1
_COMPILED_CLUSTER = (10, 11, 12, 13)  # a size must be set; required width, height, depth
_CLUSTER_SIZE, _CLUSTER_SCHEDULING, _PREFERRED_CLUSTER_SIZE = 4, 5, 11  # CUlaunchAttributeID
_NO_CLUSTER = (b"", bytes(12), struct.pack("<3I", 1, 1, 1))  # b"": the driver knows none
_DEFAULT_SHARED_BYTES = 48 << 10  # what a kernel gets without asking
_RANGE_START = 11  # CU_POINTER_ATTRIBUTE_RANGE_START_ADDR
_MIN_POINTER, _MAX_POINTER = 1 << 20, 1 << 57
_WORD = 8


class Extractor:
    """Reads graphs one after another; what they share is in `program` and `code` at the end.

    Args:
        driver: opened on the device of the graphs.
        kernels: by handle (CUfunction), those that we compiled.
        find_code: device code that holds a kernel of this name which we did not compile, or None.
        entries: memory that parameters may point into, by name; no two overlap.
        wholes: ranges that hold entries, for what lies between them.
    """

    def __init__(
        self,
        driver: GraphReader,
        kernels: Mapping[int, CompiledKernel],
        entries: Sequence[Range],
        wholes: Sequence[Range] = (),
        find_code: Callable[[str], bytes | None] = lambda _: None,
    ) -> None:
        self._driver, self._known, self._find_code = driver, kernels, find_code
        self._ranges = Ranges(entries, wholes)
        self._kernels: dict[int, CapturedKernel] = {}
        self._modules: dict[str, bytes] = {}
        self._scratch = driver.new_graph()

    # -- what all graphs share ---------------------------------------------------------------------

    @property
    def program(self) -> Program:
        functions = []
        for k in self._kernels.values():
            large = k.wanted_shared + k.static_shared > _DEFAULT_SHARED_BYTES
            carveout = self._attribute(k, _CARVEOUT)
            functions.append(
                Function(
                    module=k.module,
                    name=k.name,
                    params=tuple((p.offset, p.nbytes) for p in k.params),
                    max_dynamic_shared=k.dynamic_shared if large else -1,
                    carveout=carveout if 0 <= carveout <= 100 else -1,
                    nonportable_cluster=self._attribute(k, _NONPORTABLE_CLUSTER) == 1,
                    # As `launch.LoadedKernel` does; the runtime library asks for nothing.
                    prefer_shared=large and k.known,
                )
            )
        modules = tuple(Module(sha, len(data)) for sha, data in self._modules.items())
        return Program(modules, tuple(functions), self._ranges.symbols)

    @property
    def code(self) -> dict[str, bytes]:
        """Contents of the modules' files, by file name."""
        return {Module(sha, len(data)).file: data for sha, data in self._modules.items()}

    def close(self) -> None:
        """Drop what the driver holds for this. Idempotent."""
        if self._scratch:
            scratch, self._scratch = self._scratch, 0
            self._driver.drop_graph(scratch)

    # -- one graph ---------------------------------------------------------------------------------

    def graph(self, handle: int, tokens: int, rows: int) -> Graph:
        """One captured graph (a CUgraph handle).

        Raises:
            NotRestorable: names the node, and for a pointer the kernel, parameter and value.
            CudaError: the driver fails.
        """
        handles, edges = self._ordered(handle)
        nodes = np.zeros(len(handles), NODE)
        payloads: list[bytes] = []
        pointers: list[
            tuple[int, int, int, int]
        ] = []  # node, offset in its payload, symbol, addend
        attributes: list[tuple[int, int, bytes]] = []
        for index, node in enumerate(handles):
            kind = self._kind(node, index)
            nodes["kind"][index] = kind
            if kind == KERNEL:
                data, found, own = self._kernel_node(node, index, nodes)
                attributes += [(index, which, value) for which, value in own]
            else:
                data, found = self._other_node(node, index, kind)
            pointers += [(index, *pointer) for pointer in found]
            payloads.append(data)
        nodes["payload_bytes"] = [len(p) for p in payloads]
        nodes["payload"], total = payload_ends(nodes["payload_bytes"])
        payload = np.zeros(total, np.uint8)
        for start, data in zip(nodes["payload"].tolist(), payloads, strict=True):
            payload[start : start + len(data)] = np.frombuffer(data, np.uint8)
        relocations = np.zeros(len(pointers), RELOCATION)
        for i, (index, offset, symbol, addend) in enumerate(pointers):
            relocations[i] = (int(nodes["payload"][index]) + offset, symbol, addend)
        table = np.zeros(len(attributes), ATTRIBUTE)
        for i, (index, which, value) in enumerate(attributes):
            table[i] = (index, which, np.frombuffer(value, np.uint8))
        return Graph(tokens, rows, nodes, edges, table, relocations, payload)

    def _ordered(self, graph: int) -> tuple[list[int], Table]:
        """Node handles in an order in which every edge goes forward, and the sorted edges."""
        handles, raw = self._driver.graph_nodes(graph), self._driver.graph_edges(graph)
        index = {handle: i for i, handle in enumerate(handles)}
        order = _forward(len(handles), [(index[a], index[b]) for a, b, _ in raw])
        place = {handles[old]: new for new, old in enumerate(order)}
        edges = np.zeros(len(raw), EDGE)
        for i, (a, b, data) in enumerate(sorted((place[a], place[b], d) for a, b, d in raw)):
            edges[i] = (a, b, data[0], data[1], data[2], 0)
        return [handles[old] for old in order], edges

    def _kind(self, node: int, index: int) -> int:
        found = self._driver.node_type(node)
        kind = _NODE_TYPES.get(found)
        if kind is None:
            named = _TYPE_NAMES.get(found, f"type {found}")
            raise NotRestorable(
                f"node {index} is a node of kind {named}, which lives in this process alone; "
                "leave it out of the step, or capture live"
            )
        return kind

    # -- kernels -----------------------------------------------------------------------------------

    def _kernel_node(
        self, node: int, index: int, nodes: Table
    ) -> tuple[bytes, list[tuple[int, int, int]], list[tuple[int, bytes]]]:
        raw = self._driver.kernel_node_params(node)
        params = np.frombuffer(raw, KERNEL_PARAMS)[0]
        function, storage, extra = (
            int.from_bytes(raw[at : at + 8], "little") for at in (0, 40, 48)
        )
        kernel = self._kernel(function, int(params["kernel"]), index)
        kernel.wanted_shared = max(kernel.wanted_shared, int(params["shared"]))
        nodes["function"][index] = kernel.index
        nodes["grid"][index], nodes["block"][index] = params["grid"], params["block"]
        nodes["shared"][index] = params["shared"]
        data = bytearray(read_params(kernel, storage, extra))
        pointers = []
        for number, param in enumerate(kernel.params):
            who = f"kernel {kernel.name} (node {index}), parameter {number}"
            pointers += self._pointers(param, bytes(data), who)
        for offset, _, _ in pointers:
            data[offset : offset + _WORD] = bytes(_WORD)
        return bytes(data), pointers, self._attributes(node, raw, kernel)

    def _kernel(self, function: int, kernel: int, index: int) -> CapturedKernel:
        driver = self._driver
        function = function or driver.function_of(kernel)
        found = self._kernels.get(function)
        if found is not None:
            return found
        name = driver.function_name(function)
        sizes = driver.param_info(function)
        known = self._known.get(function)
        code = self._find_code(name) if known is None else known.cubin
        if code is None:
            raise NotRestorable(
                f"kernel {name} (node {index}): expected one that we compiled or whose library is "
                "known, got another; name its library, or capture live"
            )
        found = CapturedKernel(
            index=len(self._kernels),
            handle=function,
            name=name,
            params=with_kinds(name, sizes, known),
            static_shared=driver.function_attribute(function, _STATIC_SHARED),
            dynamic_shared=driver.function_attribute(function, _MAX_DYNAMIC_SHARED),
            module=self._module(code),
            known=known is not None,
            compiled_cluster=any(
                driver.function_attribute(function, which) for which in _COMPILED_CLUSTER
            ),
        )
        self._kernels[function] = found
        return found

    def _module(self, code: bytes) -> int:
        sha = hashlib.sha256(code).hexdigest()
        self._modules.setdefault(sha, code)
        return list(self._modules).index(sha)

    def _attribute(self, kernel: CapturedKernel, which: int) -> int:
        return self._driver.function_attribute(kernel.handle, which)

    def _pointers(self, param: Param, data: bytes, who: str) -> list[tuple[int, int, int]]:
        """(offset, symbol, addend) of each pointer in one parameter."""
        at, end = param.offset, param.offset + param.nbytes
        if param.kind == "ptr":
            value = int.from_bytes(data[at:end], "little")
            if value == 0:
                return []
            place = self._ranges.find(value)
            if place is None:
                raise _foreign(who, value)
            return [(at, *place)]
        if param.kind is not None:
            self._refuse_hidden(param, data, who)
            return []
        found = []
        for word in range(-(-at // _WORD) * _WORD, end - _WORD + 1, _WORD):
            value = int.from_bytes(data[word : word + _WORD], "little")
            place = self._ranges.find(value)
            if place is not None and not self._ranges.is_host(value):
                found.append((word, *place))
            elif self._is_pointer(value):
                raise _foreign(who, value)
        return found

    def _refuse_hidden(self, param: Param, data: bytes, who: str) -> None:
        """A pointer passed as a number would be left as it is."""
        if param.kind not in ("i64", "u64"):
            return
        value = int.from_bytes(data[param.offset : param.offset + param.nbytes], "little")
        if self._ranges.find(value) is not None or self._is_pointer(value):
            raise NotRestorable(
                f"{who}: expected a number, got the address {value:#x}; pass it as a pointer"
            )

    def _is_pointer(self, value: int) -> bool:
        return _MIN_POINTER <= value < _MAX_POINTER and self._driver.is_address(value, _RANGE_START)

    def _attributes(self, node: int, raw: bytes, kernel: CapturedKernel) -> list[tuple[int, bytes]]:
        """Launch attributes that are not what a plain launch of the kernel has."""
        if kernel.defaults is None:
            twin = self._driver.try_kernel_node(self._scratch, raw)
            kernel.defaults = {
                which: self._driver.node_attribute(twin, which) if twin else b""
                for which in ATTRIBUTES
            }
        values = {which: self._driver.node_attribute(node, which) for which in ATTRIBUTES}
        found = []
        for which, value in values.items():
            # The driver calls every captured launch "spread", and a node that is added "default":
            # without clusters that is the same, and each attribute costs a restore a call.
            if which == _CLUSTER_SCHEDULING and not _in_clusters(kernel, values):
                continue
            if value and value != (kernel.defaults[which] or bytes(ATTRIBUTE_BYTES)):
                found.append((which, value))
        return found

    # -- other nodes -------------------------------------------------------------------------------

    def _other_node(
        self, node: int, index: int, kind: int
    ) -> tuple[bytes, list[tuple[int, int, int]]]:
        if kind == EMPTY:
            return b"", []
        if kind == MEMCPY:
            data, what = self._driver.memcpy_node_params(node, MEMCPY_BYTES), "copy"
            # srcHost, srcDevice, srcArray, dstHost, dstDevice, dstArray of CUDA_MEMCPY3D
            words: Iterable[int] = (40, 48, 56, 128, 136, 144)
        else:
            data, what = self._driver.memset_node_params(node, MEMSET_BYTES), "memset"
            words = (0,)
        found, changed = [], bytearray(data)
        for word in words:
            value = int.from_bytes(data[word : word + _WORD], "little")
            if not value:
                continue
            place = self._ranges.find(value)
            if place is None:
                raise _foreign(f"{what} (node {index}), byte {word}", value)
            found.append((word, *place))
            changed[word : word + _WORD] = bytes(_WORD)
        return bytes(changed), found


def _in_clusters(kernel: CapturedKernel, attributes: Mapping[int, bytes]) -> bool:
    """Whether a node with these attributes runs in clusters of several blocks, or may."""
    sizes = (attributes[which][:12] for which in (_CLUSTER_SIZE, _PREFERRED_CLUSTER_SIZE))
    return kernel.compiled_cluster or any(size not in _NO_CLUSTER for size in sizes)


def _forward(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """An order of 0 … count-1 in which every edge goes forward; the given one where it does."""
    after: list[list[int]] = [[] for _ in range(count)]
    waits = [0] * count
    for first, last in edges:
        after[first].append(last)
        waits[last] += 1
    ready = [i for i in range(count) if not waits[i]]
    order: list[int] = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for j in after[i]:
            waits[j] -= 1
            if not waits[j]:
                heapq.heappush(ready, j)
    assert len(order) == count, "a captured graph has no cycle"
    return order


def _foreign(who: str, value: int) -> NotRestorable:
    return NotRestorable(
        f"{who}: the pointer {value:#x} lies in no memory that can be found again; take the buffer "
        "from the arena, or capture live"
    )
