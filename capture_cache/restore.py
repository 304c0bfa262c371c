"""Graphs from a bundle's structs: code loaded once, nodes laid out in one buffer, then added.

Everything that can be computed for all nodes at once is: relocated parameters, the arrays of
pointers to them, the driver's own structs. What is left for each node is one driver call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from capture_cache.bundle import (
    EMPTY,
    KERNEL,
    MEMCPY,
    MEMSET,
    PROGRAM_FILE,
    Function,
    Golden,
    Graph,
    Program,
    Table,
    decode_golden,
    decode_graph,
    decode_program,
    golden_file,
    graph_file,
)
from capture_cache.errors import CorruptBundle
from capture_cache.files import REMEDY
from capture_cache.restore_driver import Driver

# CUDA_KERNEL_NODE_PARAMS_v2 of cuda.h
KERNEL_PARAMS = np.dtype(
    {
        "names": ["grid", "block", "shared", "params", "kernel", "context"],
        "formats": [("<u4", 3), ("<u4", 3), "<u4", "<u8", "<u8", "<u8"],
        "offsets": [8, 20, 32, 40, 56, 64],
        "itemsize": 72,
    }
)
EDGE_DATA_BYTES = 8
_MAX_DYNAMIC_SHARED, _CARVEOUT, _NONPORTABLE_CLUSTER = 8, 9, 14  # CUfunction_attribute


class Files:
    """The files of a bundle as what they hold.

    Args:
        contents: by name; every hash has been checked.
        shown: the bundle's directory, for messages.
    Raises:
        CorruptBundle: no program, or not one.
    """

    def __init__(self, contents: Mapping[str, bytes], shown: str) -> None:
        self._contents, self._shown = contents, shown
        self.program: Program = decode_program(self.read(PROGRAM_FILE), f"{shown}/{PROGRAM_FILE}")

    def read(self, name: str) -> bytes:
        """Raises CorruptBundle: there is no such file."""
        data = self._contents.get(name)
        if data is None:
            raise CorruptBundle(
                f"{self._shown}: expected a file {name}, got only "
                f"{', '.join(sorted(self._contents)) or 'none'}; {REMEDY}"
            )
        return data

    def has(self, name: str) -> bool:
        return name in self._contents

    def graph(self, name: str) -> Graph:
        return decode_graph(self.read(name), self.program, f"{self._shown}/{name}")

    def graph_of(self, tokens: int, rows: int) -> Graph:
        """One key's graph; raises CorruptBundle, also where it is another key's."""
        name = graph_file(tokens, rows)
        graph = self.graph(name)
        self._expect_key(name, (tokens, rows), (graph.tokens, graph.rows))
        return graph

    def golden_of(self, tokens: int, rows: int) -> Golden:
        """One key's golden step; raises CorruptBundle, also where it is another key's."""
        name = golden_file(tokens, rows)
        golden = decode_golden(self.read(name), f"{self._shown}/{name}")
        self._expect_key(name, (tokens, rows), (golden.tokens, golden.rows))
        return golden

    def code(self, index: int) -> bytes:
        """A module's device code."""
        module = self.program.modules[index]
        data = self.read(module.file)
        if len(data) != module.nbytes:
            raise CorruptBundle(
                f"{self._shown}/{module.file}: expected {module.nbytes} bytes, got {len(data)}; "
                f"{REMEDY}"
            )
        return data

    def _expect_key(self, name: str, expected: tuple[int, int], got: tuple[int, int]) -> None:
        if expected != got:
            raise CorruptBundle(
                f"{self._shown}/{name}: expected (tokens, rows) {expected}, got {got}; {REMEDY}"
            )


class Code:
    """The kernels of a program, each loaded when it is first wanted.

    Not for several threads at once.
    """

    def __init__(self, driver: Driver, files: Files) -> None:
        self._driver, self._files = driver, files
        self._libraries: dict[int, int] = {}
        program = files.program
        self._kernels = np.zeros(max(1, len(program.functions)), np.uint64)
        counts = [len(f.params) for f in program.functions] or [0]
        self.num_params = np.array(counts, np.int64)
        self.first_param = np.cumsum(self.num_params) - self.num_params
        self.offsets = np.array([o for f in program.functions for o, _ in f.params], np.uint64)

    @property
    def num_libraries(self) -> int:
        return len(self._libraries)

    def name(self, function: int) -> str:
        return self._files.program.functions[function].name

    def kernels(self, functions: Table) -> Table:
        """CUkernel handles, uint64, of function indices.

        Raises:
            CudaError: code that the driver refuses.
        """
        for index in set(functions.tolist()):
            if not self._kernels[index]:
                self._kernels[index] = self._load(self._files.program.functions[index])
        handles: Table = self._kernels[functions]
        return handles

    def close(self) -> None:
        """Unload all code; no graph that uses it may run again. Idempotent."""
        while self._libraries:
            self._driver.unload_library(self._libraries.popitem()[1])
        self._kernels[:] = 0

    def _load(self, function: Function) -> int:
        driver, name = self._driver, function.name
        library = self._libraries.get(function.module)
        if library is None:
            data = self._files.code(function.module)
            library = driver.load_library(data, f"loading the code of kernel {name}")
            self._libraries[function.module] = library
        kernel = driver.kernel(library, name)
        for which, value in (
            (_MAX_DYNAMIC_SHARED, function.max_dynamic_shared),
            (_CARVEOUT, function.carveout),
            (_NONPORTABLE_CLUSTER, 1 if function.nonportable_cluster else -1),
        ):
            if value >= 0:
                driver.set_kernel_attribute(kernel, which, value, name)
        if function.prefer_shared:
            driver.prefer_shared(kernel, name)
        return kernel


def symbol_table(program: Program, find: Callable[[str], int]) -> Table:
    """Addresses, uint64, of a program's symbols; `find` raises for a name that it does not know."""
    return np.array([find(s.name) for s in program.symbols] or [0], np.uint64)


class Parts:
    """Seconds of the parts of building graphs, summed up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def start(self) -> None:
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        """What was done since the last call was `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def build_graph(
    driver: Driver,
    code: Code,
    graph: Graph,
    symbols: Table,
    shown: str,
    parts: Parts | None = None,
) -> int:
    """Rebuild and instantiate a graph; returns its CUgraphExec.

    Args:
        symbols: from `symbol_table`.
        shown: what it is, for messages.
        parts: told how long what took.
    Raises:
        CudaError: the driver refuses a kernel, a node, or the whole.
    """
    parts = parts or Parts()
    parts.start()
    code.kernels(graph.nodes["function"][graph.nodes["kind"] == KERNEL])
    parts.end("code")
    payload = relocated(graph, symbols)
    handle = driver.new_graph()
    try:
        nodes = _add_nodes(driver, code, graph, payload, handle, shown)
        parts.end("nodes")
        _set_attributes(driver, graph, nodes, shown)
        _add_edges(driver, graph, nodes, handle, shown)
        parts.end("edges")
        return driver.instantiate(handle, f"instantiating {shown}")
    finally:
        parts.end("instantiate")
        driver.drop_graph(handle)
        parts.end("drop")


def relocated(graph: Graph, symbols: Table) -> Table:
    """The payload, uint8 and 64-byte aligned, with every address of this process."""
    room = np.empty(len(graph.payload) + 64, np.uint8)
    payload: Table = room[-room.ctypes.data % 64 :][: len(graph.payload)]
    payload[:] = graph.payload
    words = payload.view("<u8")
    table = graph.relocations
    words[table["at"] // 8] = symbols[table["symbol"]] + table["addend"]
    return payload


def _add_nodes(
    driver: Driver, code: Code, graph: Graph, payload: Table, handle: int, shown: str
) -> Table:
    """Add every node, without edges; returns their handles."""
    lib, nodes = driver.lib, graph.nodes
    handles = np.zeros(len(nodes), np.uint64)
    out = handles.ctypes.data
    kernel = np.flatnonzero(nodes["kind"] == KERNEL)
    params, _pointers = _kernel_params(driver, code, nodes[kernel], payload)
    add = lib.cuGraphAddKernelNode_v2
    first, size = params.ctypes.data, KERNEL_PARAMS.itemsize
    # A loop that does nothing but the calls: it holds Python's lock for as long as it runs.
    for into, at in zip(
        (out + 8 * kernel).tolist(), range(first, first + size * len(params), size), strict=True
    ):
        if status := add(into, handle, 0, 0, at):
            _refuse(driver, status, code, graph, (into - out) // 8, shown)
    base, context = payload.ctypes.data, driver.context
    for index in np.flatnonzero(nodes["kind"] != KERNEL).tolist():
        kind, start = int(nodes["kind"][index]), base + int(nodes["payload"][index])
        if kind == MEMCPY:
            status = lib.cuGraphAddMemcpyNode(out + 8 * index, handle, 0, 0, start, context)
        elif kind == MEMSET:
            status = lib.cuGraphAddMemsetNode(out + 8 * index, handle, 0, 0, start, context)
        else:
            assert kind == EMPTY, kind
            status = lib.cuGraphAddEmptyNode(out + 8 * index, handle, 0, 0)
        driver.check(status, f"adding node {index} of {shown}")
    return handles


def _kernel_params(driver: Driver, code: Code, nodes: Table, payload: Table) -> tuple[Table, Table]:
    """The driver's struct for each kernel node, and the pointer arrays that they point to."""
    functions = nodes["function"].astype(np.int64)
    counts = code.num_params[functions]
    ends = np.cumsum(counts)
    first = ends - counts
    total = int(ends[-1]) if len(ends) else 0
    which = np.arange(total) + np.repeat(code.first_param[functions] - first, counts)
    starts = nodes["payload"].astype(np.uint64) + np.uint64(payload.ctypes.data)
    pointers = np.zeros(total + 1, np.uint64)  # one more: a kernel without parameters points here
    pointers[:total] = np.repeat(starts, counts) + code.offsets[which]
    params = np.zeros(len(nodes), KERNEL_PARAMS)
    params["grid"], params["block"] = nodes["grid"], nodes["block"]
    params["shared"] = nodes["shared"]
    params["params"] = first.astype(np.uint64) * 8 + np.uint64(pointers.ctypes.data)
    params["kernel"] = code.kernels(functions)
    params["context"] = driver.context
    return params, pointers


def _refuse(driver: Driver, status: int, code: Code, graph: Graph, index: int, shown: str) -> None:
    node = graph.nodes[index]
    name = code.name(int(node["function"]))
    grid, block = node["grid"].tolist(), node["block"].tolist()
    driver.check(status, f"adding node {index} of {shown}, kernel {name} over {grid} x {block}")


def _set_attributes(driver: Driver, graph: Graph, nodes: Table, shown: str) -> None:
    table = graph.attributes
    values = np.ascontiguousarray(table["value"])
    at = values.ctypes.data
    for node, which in zip(table["node"].tolist(), table["id"].tolist(), strict=True):
        status = driver.lib.cuGraphKernelNodeSetAttribute(int(nodes[node]), which, at)
        if status:
            driver.check(status, f"setting attribute {which} of node {node} of {shown}")
        at += values.shape[1]


def _add_edges(driver: Driver, graph: Graph, nodes: Table, handle: int, shown: str) -> None:
    edges = graph.edges
    if not len(edges):
        return
    first, last = nodes[edges["from"]], nodes[edges["to"]]
    data = np.zeros((len(edges), EDGE_DATA_BYTES), np.uint8)
    for column, field in enumerate(("from_port", "to_port", "type")):
        data[:, column] = edges[field]
    status = driver.lib.cuGraphAddDependencies_v2(
        handle, first.ctypes.data, last.ctypes.data, data.ctypes.data, len(edges)
    )
    driver.check(status, f"adding the edges of {shown}")
