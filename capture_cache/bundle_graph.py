"""A bundle's `graph/…` files: one key's nodes, edges, attributes and pointers, all in arrays.

Layout: `capture_cache.bundle`. A graph of a thousand nodes is read in well under a millisecond:
each check looks at all nodes at once.
"""

from __future__ import annotations

import struct

import numpy as np

from capture_cache.bundle import (
    ALIGNMENT,
    ATTRIBUTE,
    ATTRIBUTES,
    EDGE,
    EMPTY,
    KERNEL,
    MAX_EDGE_TYPE,
    MAX_PORT,
    MEMCPY_BYTES,
    MEMSET_BYTES,
    NODE,
    RELOCATION,
    SCHEMA,
    Graph,
    Program,
    Table,
)
from capture_cache.bundle_checks import (
    HEADER_BYTES,
    corrupt,
    expect_all,
    expect_ascending,
    expect_equal,
    header_fields,
)

_GRAPH = struct.Struct("<8s8I2Q8x")
_MAGIC_GRAPH = b"LSGRAPH1"
_KNOWN_ATTRIBUTE = np.isin(np.arange(max(ATTRIBUTES) + 2), ATTRIBUTES)  # the last stands for more


def encode_graph(graph: Graph) -> bytes:
    """The bytes of a graph; `decode_graph` says what makes a graph valid."""
    tables = (
        (graph.nodes, NODE),
        (graph.edges, EDGE),
        (graph.attributes, ATTRIBUTE),
        (graph.relocations, RELOCATION),
    )
    body = b"".join(np.ascontiguousarray(table, dtype).tobytes() for table, dtype in tables)
    body += bytes(-len(body) % ALIGNMENT) + graph.payload.tobytes()
    header = _GRAPH.pack(
        _MAGIC_GRAPH,
        *(SCHEMA, graph.tokens, graph.rows),
        *(len(table) for table, _ in tables),
        0,
        len(graph.payload),
        HEADER_BYTES + len(body),
    )
    return header + body


def decode_graph(data: bytes, program: Program, shown: str = "graph") -> Graph:
    """The graph, as views on `data`.

    Raises:
        CorruptBundle: not exactly what `encode_graph` writes for a graph of `program`.
    """
    head = header_fields(_GRAPH, data, _MAGIC_GRAPH, shown)
    _, tokens, rows, *counts, reserved, payload_bytes, total = head
    dtypes = (NODE, EDGE, ATTRIBUTE, RELOCATION)
    tables_bytes = sum(n * d.itemsize for n, d in zip(counts, dtypes, strict=True))
    padding = -tables_bytes % ALIGNMENT
    expect_equal(shown, "length", HEADER_BYTES + tables_bytes + padding + payload_bytes, len(data))
    expect_equal(shown, "total bytes", total, len(data))
    expect_equal(shown, "reserved words", 0, reserved)
    if not 1 <= rows <= tokens:
        raise corrupt(shown, f"expected 1 <= rows <= tokens, got rows {rows}, tokens {tokens}")
    at, tables = HEADER_BYTES, list[Table]()
    for count, dtype in zip(counts, dtypes, strict=True):
        tables.append(np.frombuffer(data, dtype, count, at))
        at += count * dtype.itemsize
    if any(data[at : at + padding]):
        raise corrupt(shown, "expected zeros before the payload, got others")
    payload = np.frombuffer(data, np.uint8, payload_bytes, at + padding)
    nodes, edges, attributes, relocations = tables
    graph = Graph(tokens, rows, nodes, edges, attributes, relocations, payload)
    _check_nodes(graph, program, shown)
    _check_edges(graph, shown)
    _check_attributes(graph, shown)
    _check_relocations(graph, program, shown)
    return graph


def payload_ends(sizes: Table) -> tuple[Table, int]:
    """Where payloads of these sizes begin, and the bytes of all of them."""
    rounded = -(-sizes.astype(np.int64) // ALIGNMENT) * ALIGNMENT
    ends = np.cumsum(rounded)
    return ends - rounded, int(ends[-1]) if len(ends) else 0


def _check_nodes(graph: Graph, program: Program, shown: str) -> None:
    nodes = graph.nodes
    if not len(nodes):
        raise corrupt(shown, "expected at least one node, got none")
    kernel = nodes["kind"] == KERNEL
    expect_all(shown, "node", nodes["kind"] <= EMPTY, "a known kind")
    expect_all(shown, "node", nodes["reserved"] == 0, "zeros in reserved fields")
    used = np.where(kernel, nodes["function"], 0)
    expect_all(
        shown, "node", ~kernel | (used < len(program.functions)), "a function of the program"
    )
    fixed = np.array([0, MEMCPY_BYTES, MEMSET_BYTES, 0], np.int64)
    want = np.where(kernel, program.param_bytes[used], fixed[nodes["kind"]])
    expect_all(
        shown, "node", nodes["payload_bytes"] == want, "as many parameter bytes as its kind takes"
    )
    starts, total = payload_ends(want)
    expect_all(shown, "node", nodes["payload"] == starts, "its payload after its predecessor's")
    expect_equal(shown, "payload bytes", total, len(graph.payload))
    shape = np.concatenate((nodes["grid"], nodes["block"]), axis=1)
    expect_all(shown, "node", np.where(kernel, (shape > 0).all(1), (shape == 0).all(1)), "a shape")
    expect_all(
        shown, "node", kernel | ((nodes["shared"] | nodes["function"]) == 0), "no kernel's fields"
    )
    _check_gaps(graph, shown)


def _check_gaps(graph: Graph, shown: str) -> None:
    """Between payloads there is nothing."""
    nodes = graph.nodes
    starts = nodes["payload"].astype(np.int64)
    ends, after = starts + nodes["payload_bytes"], np.append(starts[1:], len(graph.payload))
    gaps = np.flatnonzero(ends < after)
    # or of [end, next start), [next start, next end), …: the first of each pair is a gap
    bounds = np.stack((ends[gaps], after[gaps]), axis=1).ravel()
    bounds = bounds[bounds < len(graph.payload)]
    if len(bounds) and np.bitwise_or.reduceat(graph.payload, bounds)[::2].any():
        raise corrupt(shown, "expected zeros between payloads, got others")


def _check_edges(graph: Graph, shown: str) -> None:
    edges = graph.edges
    first, last = edges["from"].astype(np.int64), edges["to"].astype(np.int64)
    expect_all(
        shown, "edge", (first < last) & (last < len(graph.nodes)), "a forward step between nodes"
    )
    expect_all(shown, "edge", edges["reserved"] == 0, "zeros in reserved fields")
    expect_all(shown, "edge", edges["from_port"] <= MAX_PORT, "a known port")
    expect_all(shown, "edge", edges["to_port"] == 0, "port 0 at its end")
    expect_all(shown, "edge", edges["type"] <= MAX_EDGE_TYPE, "a known type")
    expect_ascending(shown, "edges", first * len(graph.nodes) + last)


def _check_attributes(graph: Graph, shown: str) -> None:
    table = graph.attributes
    node, which = table["node"].astype(np.int64), table["id"].astype(np.int64)
    expect_all(shown, "attribute", node < len(graph.nodes), "an existing node")
    expect_all(shown, "attribute", graph.nodes["kind"][node] == KERNEL, "a kernel node")
    known = _KNOWN_ATTRIBUTE[np.minimum(which, len(_KNOWN_ATTRIBUTE) - 1)]
    expect_all(shown, "attribute", known, "a known attribute")
    expect_ascending(shown, "attributes", node * 256 + which)


def _check_relocations(graph: Graph, program: Program, shown: str) -> None:
    table, nodes = graph.relocations, graph.nodes
    at, symbol = table["at"].astype(np.int64), table["symbol"].astype(np.int64)
    expect_all(shown, "relocation", at % 8 == 0, "an aligned word")
    expect_ascending(shown, "relocations", at)
    starts = nodes["payload"].astype(np.int64)
    # How many relocations lie in each node: both are sorted. Of empty payloads, which share a start
    # with their successor, none has any.
    bounds = np.append(np.searchsorted(at, starts), len(at))
    end = np.repeat(starts + nodes["payload_bytes"], np.diff(bounds))
    expect_all(shown, "relocation", at + 8 <= end, "a word of some node's parameters")
    expect_all(shown, "relocation", symbol < len(program.symbols), "a symbol of the program")
    room = program.symbol_bytes[symbol]
    expect_all(shown, "relocation", table["addend"] <= room, "an address within its symbol")
    words = graph.payload[: len(graph.payload) // 8 * 8].view("<u8")
    expect_all(shown, "relocation", words[at // 8] == 0, "zeros where it is applied")
