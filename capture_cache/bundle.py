"""The bundle's binary files: graphs, the program they run, and golden steps.

Pure functions between bytes and dataclasses: no CUDA, no files. Everything is little-endian, each
section follows the one before it, and every count decides where the next begins, so there is no
offset that could point elsewhere. `decode_*` accepts exactly what `encode_*` writes; anything else
is a `CorruptBundle` that names the file and the field.

    program         what all graphs of the bundle share
      header   64   magic "LSPROGR1", u32 schema, modules, functions, params, symbols,
                    u32 names_bytes, u64 total bytes, zeros
      module   40   sha256 of the device code (its file is cubin/<sha256>), u64 its bytes
      function 32   u32 module, name (offset into names), first param, params;
                    i32 max_dynamic_shared, carveout (-1: as loaded); u32 nonportable_cluster,
                    prefer_shared
      param     8   u32 offset, bytes: where the device expects it
      symbol   16   u32 name, u32 host (1: pinned host memory), u64 bytes
      names         function names, then symbol names, each ending in a zero

    graph/t<tokens>r<rows>       one key
      header   64   magic "LSGRAPH1", u32 schema, tokens, rows, nodes, edges, attributes,
                    relocations, 0, u64 payload bytes, total bytes, zeros
      node     48   u32 kind, function, grid[3], block[3], shared bytes, payload (offset),
                    payload bytes, 0
      edge     12   u32 from, to; u8 from_port, to_port, type, 0   (CUgraphEdgeData)
      attribute 72  u32 node, id (CUlaunchAttributeID); 64 bytes value
      relocation 16 u32 at (offset into the payload, of an 8-byte word), symbol; u64 addend
      zeros to a multiple of 64
      payload       of each node, at multiples of 64: kernel parameters as the device lays them out,
                    CUDA_MEMCPY3D, or CUDA_MEMSET_NODE_PARAMS; relocated words are zero

    golden/t<tokens>r<rows>      a canned state and what one step of that key makes of it
      header   64   magic "LSGOLD01", u32 schema, tokens, rows, requests, prompt tokens of each, 0,
                    sha256 of the answer
      ids           i32 [requests, prompt tokens]

Nodes stand in an order in which every edge goes forward; edges, attributes and relocations are
sorted and unique.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture_cache.errors import CorruptBundle
from capture_cache.files import REMEDY

SCHEMA = 1
PROGRAM_FILE = "program"
KERNEL, MEMCPY, MEMSET, EMPTY = 0, 1, 2, 3  # node kinds
MEMCPY_BYTES, MEMSET_BYTES = 200, 40
ATTRIBUTE_BYTES = 64
ALIGNMENT = 64  # of a payload: what a tensor map wants
MAX_PARAM_BYTES = 32764  # the driver's own limit
# CUlaunchAttributeIDs that a kernel node may carry: access policy window, cooperative, cluster
# dimension, cluster scheduling, priority, memory sync domain map, memory sync domain, preferred
# cluster dimension, preferred carve-out, NVLink-centric scheduling.
ATTRIBUTES = (1, 2, 4, 5, 8, 9, 10, 11, 14, 16)
MAX_PORT = 2  # CU_GRAPH_KERNEL_NODE_PORT_LAUNCH_ORDER
MAX_EDGE_TYPE = 1  # CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC

NODE = np.dtype(
    [
        ("kind", "<u4"),
        ("function", "<u4"),
        ("grid", "<u4", 3),
        ("block", "<u4", 3),
        ("shared", "<u4"),
        ("payload", "<u4"),
        ("payload_bytes", "<u4"),
        ("reserved", "<u4"),
    ]
)
EDGE = np.dtype(
    [
        ("from", "<u4"),
        ("to", "<u4"),
        ("from_port", "u1"),
        ("to_port", "u1"),
        ("type", "u1"),
        ("reserved", "u1"),
    ]
)
ATTRIBUTE = np.dtype([("node", "<u4"), ("id", "<u4"), ("value", "u1", ATTRIBUTE_BYTES)])
RELOCATION = np.dtype([("at", "<u4"), ("symbol", "<u4"), ("addend", "<u8")])

_HEADER_BYTES = 64
_PROGRAM = struct.Struct("<8s6IQ24x")
_GRAPH = struct.Struct("<8s8I2Q8x")
_GOLDEN = struct.Struct("<8s6I32s")
_MODULE = struct.Struct("<32sQ")
_FUNCTION = struct.Struct("<4I2i2I")
_PARAM = struct.Struct("<2I")
_SYMBOL = struct.Struct("<2IQ")
_MAGIC_PROGRAM, _MAGIC_GRAPH, _MAGIC_GOLDEN = b"LSPROGR1", b"LSGRAPH1", b"LSGOLD01"

Table = NDArray[Any]


@dataclass(frozen=True)
class Module:
    """Device code: a cubin or a fat binary, by content."""

    sha256: str
    nbytes: int

    @property
    def file(self) -> str:
        return f"cubin/{self.sha256}"


@dataclass(frozen=True)
class Function:
    """One kernel of a module.

    Attributes:
        module: index among the modules.
        params: (offset, bytes) of each parameter on the device.
        max_dynamic_shared: bytes to allow, -1 to leave as loaded.
        carveout: preferred share of shared memory in percent, -1 to leave as loaded.
        nonportable_cluster: clusters above the portable size are allowed.
        prefer_shared: prefer shared memory to L1.
    """

    module: int
    name: str
    params: tuple[tuple[int, int], ...]
    max_dynamic_shared: int = -1
    carveout: int = -1
    nonportable_cluster: bool = False
    prefer_shared: bool = False

    @property
    def param_bytes(self) -> int:
        offset, nbytes = self.params[-1] if self.params else (0, 0)
        return offset + nbytes


@dataclass(frozen=True)
class Symbol:
    """A named range of memory that parameters point into."""

    name: str
    nbytes: int
    host: bool = False


@dataclass(frozen=True)
class Program:
    """What all graphs of a bundle share."""

    modules: tuple[Module, ...]
    functions: tuple[Function, ...]
    symbols: tuple[Symbol, ...]


@dataclass(frozen=True)
class Graph:
    """One key's graph.

    Attributes:
        nodes, edges, attributes, relocations: arrays of `NODE`, `EDGE`, `ATTRIBUTE`, `RELOCATION`.
        payload: uint8; every node's parameters.
    """

    tokens: int
    rows: int
    nodes: Table
    edges: Table
    attributes: Table
    relocations: Table
    payload: Table


@dataclass(frozen=True)
class Golden:
    """A canned state and the digest of one step on it.

    Attributes:
        ids: int32 [requests, prompt tokens]: request i is new in row i, its pages from 1 on.
        digest: sha256 of what the step publishes, times left out; 64 hex digits.
    """

    tokens: int
    rows: int
    ids: NDArray[np.int32]
    digest: str


def graph_file(tokens: int, rows: int) -> str:
    return f"graph/t{tokens}r{rows}"


def golden_file(tokens: int, rows: int) -> str:
    return f"golden/t{tokens}r{rows}"


# ------------------------------------------------------------------------------------- program


def encode_program(program: Program) -> bytes:
    """Raises ValueError: a name with a zero in it, or a number that does not fit its field."""
    names, at = bytearray(), []
    for name in [f.name for f in program.functions] + [s.name for s in program.symbols]:
        at.append(len(names))
        names += _text(name)
    functions, params = bytearray(), bytearray()
    try:
        for f, name_at in zip(program.functions, at, strict=False):
            flags = (f.max_dynamic_shared, f.carveout, f.nonportable_cluster, f.prefer_shared)
            first = len(params) // _PARAM.size
            functions += _FUNCTION.pack(f.module, name_at, first, len(f.params), *flags)
            params += b"".join(_PARAM.pack(*p) for p in f.params)
        symbols = b"".join(
            _SYMBOL.pack(name_at, s.host, s.nbytes)
            for s, name_at in zip(program.symbols, at[len(program.functions) :], strict=True)
        )
        modules = b"".join(_MODULE.pack(bytes.fromhex(m.sha256), m.nbytes) for m in program.modules)
    except struct.error as e:
        raise ValueError(f"the program does not fit its format: {e}") from e
    body = modules + functions + params + symbols + names
    counts = (len(program.modules), len(program.functions), len(params) // _PARAM.size)
    header = _PROGRAM.pack(
        _MAGIC_PROGRAM,
        *(SCHEMA, *counts, len(program.symbols), len(names), _HEADER_BYTES + len(body)),
    )
    return header + body


def decode_program(data: bytes, shown: str = PROGRAM_FILE) -> Program:
    """Raises CorruptBundle: not exactly what `encode_program` writes."""
    head = _header(_PROGRAM, data, _MAGIC_PROGRAM, shown)
    _, num_modules, num_functions, num_params, num_symbols, names_bytes, total = head
    at = _HEADER_BYTES
    sizes = (
        num_modules * _MODULE.size,
        num_functions * _FUNCTION.size,
        num_params * _PARAM.size,
        num_symbols * _SYMBOL.size,
        names_bytes,
    )
    _expect(shown, "length", at + sum(sizes), len(data))
    _expect(shown, "total bytes", total, len(data))
    parts = []
    for size in sizes:
        parts.append(data[at : at + size])
        at += size
    modules = tuple(Module(sha.hex(), nbytes) for sha, nbytes in _MODULE.iter_unpack(parts[0]))
    params = list(_PARAM.iter_unpack(parts[2]))
    raw_functions = list(_FUNCTION.iter_unpack(parts[1]))
    raw_symbols = list(_SYMBOL.iter_unpack(parts[3]))
    names = _names(parts[4], [f[1] for f in raw_functions] + [s[0] for s in raw_symbols], shown)
    functions, first = [], 0
    for raw, name in zip(raw_functions, names, strict=False):
        functions.append(_function(raw, name, first, params, num_modules, shown))
        first += raw[3]
    _expect(shown, "parameters used", first, num_params)
    symbols = []
    for (_, host, nbytes), name in zip(raw_symbols, names[num_functions:], strict=True):
        if host > 1:
            raise _corrupt(shown, f"symbol {name!r}: expected host 0 or 1, got {host}")
        symbols.append(Symbol(name, nbytes, bool(host)))
    for what, found in (("module", modules), ("symbol", [s.name for s in symbols])):
        if len(set(found)) != len(found):
            raise _corrupt(shown, f"expected each {what} once, got a repeated one")
    return Program(modules, tuple(functions), tuple(symbols))


def _function(
    raw: tuple[int, ...],
    name: str,
    first: int,
    params: Sequence[tuple[int, ...]],
    num_modules: int,
    shown: str,
) -> Function:
    module, _, first_param, count, dynamic, carveout, nonportable, prefer = raw
    who = f"function {name!r}"
    if module >= num_modules:
        raise _corrupt(shown, f"{who}: expected a module below {num_modules}, got {module}")
    _expect(shown, f"{who}: first parameter", first, first_param)
    if first + count > len(params):
        raise _corrupt(shown, f"{who}: expected {len(params)} parameters in all, got more")
    if not (-1 <= dynamic < 1 << 20 and -1 <= carveout <= 100 and nonportable < 2 and prefer < 2):
        raise _corrupt(
            shown, f"{who}: attributes out of range: {dynamic, carveout, nonportable, prefer}"
        )
    end, own = 0, []
    for offset, nbytes in params[first : first + count]:
        if offset < end or not 1 <= nbytes <= MAX_PARAM_BYTES - offset:
            raise _corrupt(shown, f"{who}: parameter of {nbytes} bytes at {offset} after {end}")
        end = offset + nbytes
        own.append((offset, nbytes))
    return Function(module, name, tuple(own), dynamic, carveout, bool(nonportable), bool(prefer))


def _text(name: str) -> bytes:
    raw = name.encode()
    if not raw or b"\0" in raw:
        raise ValueError(f"a name must not be empty or hold a zero, got {name!r}")
    return raw + b"\0"


def _names(blob: bytes, offsets: Sequence[int], shown: str) -> list[str]:
    """The names at `offsets`, which must be all of the blob, in order."""
    names, at = [], 0
    for offset in offsets:
        end = blob.find(b"\0", at)
        if offset != at or end <= at:
            raise _corrupt(shown, f"names: expected one at {at}, got {offset} and its end at {end}")
        try:
            names.append(blob[at:end].decode())
        except UnicodeDecodeError as e:
            raise _corrupt(shown, f"names: expected UTF-8 at {at}, got {e}") from e
        at = end + 1
    _expect(shown, "bytes of names", at, len(blob))
    return names


# --------------------------------------------------------------------------------------- graph


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
        _HEADER_BYTES + len(body),
    )
    return header + body


def decode_graph(data: bytes, program: Program, shown: str = "graph") -> Graph:
    """The graph, as views on `data`.

    Raises:
        CorruptBundle: not exactly what `encode_graph` writes for a graph of `program`.
    """
    head = _header(_GRAPH, data, _MAGIC_GRAPH, shown)
    _, tokens, rows, *counts, reserved, payload_bytes, total = head
    dtypes = (NODE, EDGE, ATTRIBUTE, RELOCATION)
    tables_bytes = sum(n * d.itemsize for n, d in zip(counts, dtypes, strict=True))
    padding = -tables_bytes % ALIGNMENT
    _expect(shown, "length", _HEADER_BYTES + tables_bytes + padding + payload_bytes, len(data))
    _expect(shown, "total bytes", total, len(data))
    _expect(shown, "reserved words", 0, reserved)
    if not 1 <= rows <= tokens:
        raise _corrupt(shown, f"expected 1 <= rows <= tokens, got rows {rows}, tokens {tokens}")
    at, tables = _HEADER_BYTES, list[Table]()
    for count, dtype in zip(counts, dtypes, strict=True):
        tables.append(np.frombuffer(data, dtype, count, at))
        at += count * dtype.itemsize
    if any(data[at : at + padding]):
        raise _corrupt(shown, "expected zeros before the payload, got others")
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
        raise _corrupt(shown, "expected at least one node, got none")
    kernel = nodes["kind"] == KERNEL
    _all(shown, "node", nodes["kind"] <= EMPTY, "a known kind")
    _all(shown, "node", nodes["reserved"] == 0, "zeros in reserved fields")
    used = np.where(kernel, nodes["function"], 0)
    _all(shown, "node", ~kernel | (used < len(program.functions)), "a function of the program")
    sizes = np.array([f.param_bytes for f in program.functions] or [0], np.int64)
    fixed = np.array([0, MEMCPY_BYTES, MEMSET_BYTES, 0], np.int64)
    want = np.where(kernel, sizes[used], fixed[nodes["kind"]])
    _all(shown, "node", nodes["payload_bytes"] == want, "as many parameter bytes as its kind takes")
    starts, total = payload_ends(want)
    _all(shown, "node", nodes["payload"] == starts, "its payload after its predecessor's")
    _expect(shown, "payload bytes", total, len(graph.payload))
    shape = np.concatenate((nodes["grid"], nodes["block"]), axis=1)
    _all(shown, "node", np.where(kernel, (shape > 0).all(1), (shape == 0).all(1)), "a shape")
    _all(shown, "node", kernel | ((nodes["shared"] | nodes["function"]) == 0), "no kernel's fields")
    _check_gaps(graph, shown)


def _check_gaps(graph: Graph, shown: str) -> None:
    """Between payloads there is nothing."""
    nodes = graph.nodes
    starts, sizes = nodes["payload"].astype(np.int64), nodes["payload_bytes"].astype(np.int64)
    ends, after = starts + sizes, np.append(starts[1:], len(graph.payload))
    lengths = after - ends  # of the gap behind each payload
    before = np.cumsum(lengths) - lengths
    outside = np.repeat(ends - before, lengths) + np.arange(int(lengths.sum()))
    if graph.payload[outside].any():
        raise _corrupt(shown, "expected zeros between payloads, got others")


def _check_edges(graph: Graph, shown: str) -> None:
    edges = graph.edges
    first, last = edges["from"].astype(np.int64), edges["to"].astype(np.int64)
    _all(shown, "edge", (first < last) & (last < len(graph.nodes)), "a forward step between nodes")
    _all(shown, "edge", edges["reserved"] == 0, "zeros in reserved fields")
    _all(shown, "edge", edges["from_port"] <= MAX_PORT, "a known port")
    _all(shown, "edge", edges["to_port"] == 0, "port 0 at its end")
    _all(shown, "edge", edges["type"] <= MAX_EDGE_TYPE, "a known type")
    _ascending(shown, "edges", first * len(graph.nodes) + last)


def _check_attributes(graph: Graph, shown: str) -> None:
    table = graph.attributes
    node, which = table["node"].astype(np.int64), table["id"].astype(np.int64)
    _all(shown, "attribute", node < len(graph.nodes), "an existing node")
    _all(shown, "attribute", graph.nodes["kind"][node] == KERNEL, "a kernel node")
    _all(shown, "attribute", np.isin(which, ATTRIBUTES), "a known attribute")
    _ascending(shown, "attributes", node * 256 + which)


def _check_relocations(graph: Graph, program: Program, shown: str) -> None:
    table, nodes = graph.relocations, graph.nodes
    at, symbol = table["at"].astype(np.int64), table["symbol"].astype(np.int64)
    _all(shown, "relocation", at % 8 == 0, "an aligned word")
    _ascending(shown, "relocations", at)
    starts = nodes["payload"].astype(np.int64)
    # How many relocations lie in each node: both are sorted. Of empty payloads, which share a start
    # with their successor, none has any.
    bounds = np.append(np.searchsorted(at, starts), len(at))
    end = np.repeat(starts + nodes["payload_bytes"], np.diff(bounds))
    _all(shown, "relocation", at + 8 <= end, "a word of some node's parameters")
    _all(shown, "relocation", symbol < len(program.symbols), "a symbol of the program")
    sizes = np.array([s.nbytes for s in program.symbols] or [0], np.uint64)
    _all(shown, "relocation", table["addend"] <= sizes[symbol], "an address within its symbol")
    words = graph.payload[: len(graph.payload) // 8 * 8].view("<u8")
    _all(shown, "relocation", words[at // 8] == 0, "zeros where it is applied")


# -------------------------------------------------------------------------------------- golden


def encode_golden(golden: Golden) -> bytes:
    """The bytes of a golden step."""
    requests, prompt = golden.ids.shape
    header = _GOLDEN.pack(
        _MAGIC_GOLDEN,
        *(SCHEMA, golden.tokens, golden.rows, requests, prompt, 0),
        bytes.fromhex(golden.digest),
    )
    return header + golden.ids.astype("<i4").tobytes()


def decode_golden(data: bytes, shown: str = "golden") -> Golden:
    """Raises CorruptBundle: not exactly what `encode_golden` writes."""
    head = _header(_GOLDEN, data, _MAGIC_GOLDEN, shown)
    _, tokens, rows, requests, prompt, reserved, digest = head
    _expect(shown, "length", _HEADER_BYTES + 4 * requests * prompt, len(data))
    _expect(shown, "reserved words", 0, reserved)
    if not (1 <= requests <= rows <= tokens and prompt >= 1 and requests * prompt <= tokens):
        raise _corrupt(
            shown,
            f"expected requests that fit {tokens} tokens and {rows} rows, got {requests} of "
            f"{prompt} tokens",
        )
    ids = np.frombuffer(data, "<i4", requests * prompt, _HEADER_BYTES).reshape(requests, prompt)
    _all(shown, "token id", ids.ravel() >= 0, "at least 0")
    return Golden(tokens, rows, ids, digest.hex())


# ------------------------------------------------------------------------------------- checking


def _header(form: struct.Struct, data: bytes, magic: bytes, shown: str) -> tuple[Any, ...]:
    """The fields after the magic, the schema first."""
    if len(data) < _HEADER_BYTES:
        raise _corrupt(shown, f"expected a header of {_HEADER_BYTES} bytes, got {len(data)}")
    found, *fields = form.unpack_from(data)
    if found != magic:
        raise _corrupt(shown, f"expected it to begin with {magic!r}, got {found!r}")
    if fields[0] != SCHEMA:
        raise _corrupt(shown, f"expected schema {SCHEMA}, got {fields[0]} (of another version)")
    if form.pack(found, *fields) != data[:_HEADER_BYTES]:
        raise _corrupt(shown, "expected zeros at the end of the header, got others")
    return tuple(fields)


def _expect(shown: str, what: str, expected: int, got: int) -> None:
    if got != expected:
        raise _corrupt(shown, f"{what}: expected {expected}, got {got}")


def _all(shown: str, what: str, good: Table, expected: str) -> None:
    if not good.all():
        raise _corrupt(shown, f"{what} {int(np.argmin(good))}: expected {expected}, got another")


def _ascending(shown: str, what: str, keys: Table) -> None:
    if (keys[1:] <= keys[:-1]).any():
        raise _corrupt(shown, f"expected {what} sorted and unique, got others")


def _corrupt(shown: str, problem: str) -> CorruptBundle:
    return CorruptBundle(f"{shown}: {problem}; {REMEDY}")
