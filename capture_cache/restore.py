"""Graphs from a bundle's structs: nodes laid out in one buffer, then added.

Everything that can be computed for all nodes at once is (`prepare_graph`): relocated parameters,
the arrays of pointers to them, the driver's own structs. What is left for each node is one driver
call (`add_graph`). One thread may make a graph while another instantiates the one before.
"""

from __future__ import annotations

import time

import numpy as np

from capture_cache.bundle import ATTRIBUTE_BYTES, EMPTY, KERNEL, MEMCPY, MEMSET, Graph, Table
from capture_cache.dataclass import dataclass
from capture_cache.restore_code import Code
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
# CUgraphNodeParams: a type, and what that takes; of kernels type 0, and CUDA_KERNEL_NODE_PARAMS_v3,
# whose layout is that of v2.
NODE_PARAMS = np.dtype(
    {"names": ["kernel"], "formats": [KERNEL_PARAMS], "offsets": [16], "itemsize": 256}
)
EDGE_DATA_BYTES = 8


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


@dataclass(frozen=True)
class Prepared:
    """A graph laid out for the driver: what is left are its calls.

    Attributes:
        payload: uint8, 64-byte aligned: every node's parameters, with this process's addresses.
        kernels: indices of the kernel nodes; params: of each, `NODE_PARAMS`.
        pointers: what `params` points to, and that to `payload`.
        edges: ordered by the node that they lead to.
        edge_data: uint8 [edges, 8], CUgraphEdgeData of each.
    """

    graph: Graph
    payload: Table
    kernels: Table
    params: Table
    pointers: Table
    edges: Table
    edge_data: Table


def prepare_graph(driver: Driver, code: Code, graph: Graph, symbols: Table) -> Prepared:
    """Load a graph's code and lay out its nodes; in any thread of the context.

    Args:
        symbols: from `symbol_table`.
    Raises:
        CudaError: code that the driver refuses.
    """
    payload = relocated(graph, symbols)
    kernels = np.flatnonzero(graph.nodes["kind"] == KERNEL)
    params, pointers = _kernel_params(driver, code, graph.nodes[kernels], payload)
    edges = graph.edges[np.argsort(graph.edges["to"], kind="stable")]
    data = np.zeros((len(edges), EDGE_DATA_BYTES), np.uint8)
    for column, field in enumerate(("from_port", "to_port", "type")):
        data[:, column] = edges[field]
    return Prepared(graph, payload, kernels, params, pointers, edges, data)


def build_graph(driver: Driver, code: Code, prepared: Prepared, shown: str) -> int:
    """Rebuild and instantiate a graph; returns its CUgraphExec.

    Args:
        shown: what it is, for messages.
    Raises:
        CudaError: the driver refuses a node, or the whole.
    """
    handle = add_graph(driver, code, prepared, shown, Parts())
    try:
        return driver.instantiate(handle, f"instantiating {shown}")
    finally:
        driver.drop_graph(handle)


def add_graph(driver: Driver, code: Code, prepared: Prepared, shown: str, parts: Parts) -> int:
    """A CUgraph with all nodes, attributes and edges; `prepared` is not needed any more.

    Args:
        shown: what it is, for messages.
        parts: told how long what took.
    Raises:
        CudaError: the driver refuses a node, or the whole.
    """
    handle = driver.new_graph()
    try:
        nodes = _add_nodes(driver, code, prepared, handle, shown)
        parts.end("nodes")
        _set_attributes(driver, prepared.graph, nodes, shown)
        parts.end("attributes")
        into = np.flatnonzero(prepared.graph.nodes["kind"][prepared.edges["to"]] != KERNEL)
        _add_edges(driver, prepared, into, nodes, handle, shown)
        parts.end("edges")
    except BaseException:
        driver.drop_graph(handle)
        raise
    return handle


def relocated(graph: Graph, symbols: Table) -> Table:
    """The payload, uint8 and 64-byte aligned, with every address of this process."""
    room = np.empty(len(graph.payload) + 64, np.uint8)
    payload: Table = room[-room.ctypes.data % 64 :][: len(graph.payload)]
    payload[:] = graph.payload
    words = payload.view("<u8")
    table = graph.relocations
    words[table["at"] // 8] = symbols[table["symbol"]] + table["addend"]
    return payload


def _add_nodes(driver: Driver, code: Code, prepared: Prepared, handle: int, shown: str) -> Table:
    """Add every node, kernels with the edges that lead to them; returns their handles."""
    handles = np.zeros(len(prepared.graph.nodes), np.uint64)
    _add_others(driver, prepared, handles, handle, shown)  # kernels may wait for them
    _add_kernels(driver, code, prepared, handles, handle, shown)
    return handles


def _add_kernels(
    driver: Driver, code: Code, prepared: Prepared, handles: Table, handle: int, shown: str
) -> None:
    """Add kernel nodes, each with the edges that lead to it, which are forward steps: a graph that
    got its edges afterwards takes the driver longer to instantiate."""
    edges, kernels = prepared.edges, prepared.kernels
    out, data = handles.ctypes.data, prepared.edge_data.ctypes.data
    before = edges["from"].astype(np.int64)
    counts = np.bincount(edges["to"], minlength=len(handles))
    first = (np.cumsum(counts) - counts)[kernels]
    counts = counts[kernels]
    # A node's predecessors lie side by side: one alone does where it is, several are gathered.
    gathered = np.zeros(len(edges) + 1, np.uint64)
    alone = out + 8 * np.append(before, 0)[first]
    depends = np.where(counts > 1, gathered.ctypes.data + 8 * first, alone)
    at, size = prepared.params.ctypes.data, NODE_PARAMS.itemsize
    add = driver.lib.cuGraphAddNode_v2
    # A loop that does little but the calls: it holds Python's lock for as long as it runs.
    for into, depend, edge, count, params in zip(
        (out + 8 * kernels).tolist(),
        depends.tolist(),
        first.tolist(),
        counts.tolist(),
        range(at, at + size * len(kernels), size),
        strict=True,
    ):
        if count > 1:
            gathered[edge : edge + count] = handles[before[edge : edge + count]]
        if status := add(into, handle, depend, data + 8 * edge, count, params):
            _refuse(driver, status, code, prepared.graph, (into - out) // 8, shown)


def _add_others(
    driver: Driver, prepared: Prepared, handles: Table, handle: int, shown: str
) -> None:
    """Add the nodes that are no kernels, without edges."""
    nodes, lib, out = prepared.graph.nodes, driver.lib, handles.ctypes.data
    base, context = prepared.payload.ctypes.data, driver.context
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
    params = np.zeros(len(nodes), NODE_PARAMS)
    kernel = params["kernel"]
    kernel["grid"], kernel["block"] = nodes["grid"], nodes["block"]
    kernel["shared"] = nodes["shared"]
    kernel["params"] = first.astype(np.uint64) * 8 + np.uint64(pointers.ctypes.data)
    kernel["kernel"] = code.kernels(functions)
    kernel["context"] = driver.context
    return params, pointers


def _refuse(driver: Driver, status: int, code: Code, graph: Graph, index: int, shown: str) -> None:
    node = graph.nodes[index]
    name = code.name(int(node["function"]))
    grid, block = node["grid"].tolist(), node["block"].tolist()
    driver.check(status, f"adding node {index} of {shown}, kernel {name} over {grid} x {block}")


def _set_attributes(driver: Driver, graph: Graph, nodes: Table, shown: str) -> None:
    table = graph.attributes
    values, size = np.ascontiguousarray(table["value"]), ATTRIBUTE_BYTES
    first, set_attribute = values.ctypes.data, driver.lib.cuGraphKernelNodeSetAttribute
    for handle, which, at in zip(
        nodes[table["node"]].tolist(),
        table["id"].tolist(),
        range(first, first + size * len(table), size),
        strict=True,
    ):
        if status := set_attribute(handle, which, at):
            node = table["node"][(at - first) // size]
            driver.check(status, f"setting attribute {which} of node {node} of {shown}")


def _add_edges(
    driver: Driver, prepared: Prepared, which: Table, nodes: Table, handle: int, shown: str
) -> None:
    """Add these of `prepared.edges`."""
    edges, data = prepared.edges[which], np.ascontiguousarray(prepared.edge_data[which])
    if not len(edges):
        return
    first, last = nodes[edges["from"]], nodes[edges["to"]]
    status = driver.lib.cuGraphAddDependencies_v2(
        handle, first.ctypes.data, last.ctypes.data, data.ctypes.data, len(edges)
    )
    driver.check(status, f"adding the edges of {shown}")
