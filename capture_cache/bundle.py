"""The bundle's binary files: graphs, the program they run, and golden steps.

Here is what they hold; `bundle_program`, `bundle_graph` and `bundle_golden` turn bytes into it and
back: pure functions, no CUDA, no files. Everything is little-endian, each
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
sorted and unique. Attributes are those that a node has beyond a plain one of its kernel; how
clusters are scheduled only where there are any.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture_cache.dataclass import dataclass

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

    @cached_property
    def param_bytes(self) -> Table:
        """Of each function's parameters, int64; one 0 where there is no function."""
        return np.array([f.param_bytes for f in self.functions] or [0], np.int64)

    @cached_property
    def symbol_bytes(self) -> Table:
        """Of each symbol, uint64; one 0 where there is none."""
        return np.array([s.nbytes for s in self.symbols] or [0], np.uint64)


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
