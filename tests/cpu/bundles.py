"""A small program and graph of every kind of node, for tests of the bundle's format."""

from __future__ import annotations

import hashlib

import numpy as np

from capture_cache.bundle import (
    ATTRIBUTE,
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
    Golden,
    Graph,
    Module,
    Program,
    Symbol,
)
from capture_cache.bundle_graph import payload_ends

CODE = (b"code of one module", b"of another")


def program() -> Program:
    return Program(
        tuple(Module(hashlib.sha256(c).hexdigest(), len(c)) for c in CODE),
        (
            Function(0, "add", ((0, 8), (8, 8), (16, 4))),
            Function(1, "copy", ((0, 8), (64, 128)), 65536, 100, True, True),
            Function(0, "nothing", ()),
        ),
        (Symbol("kv.0", 4096), Symbol("x", 512), Symbol("mailbox", 256, host=True)),
    )


def graph(tokens: int = 4, rows: int = 2, *, seed: int = 0) -> Graph:
    """Seven nodes: kernels with and without parameters, a copy, a memset, an empty one."""
    shared = program()
    kinds = [KERNEL, KERNEL, MEMCPY, KERNEL, MEMSET, EMPTY, KERNEL]
    functions = [0, 1, 0, 2, 0, 0, 0]
    other = {MEMCPY: MEMCPY_BYTES, MEMSET: MEMSET_BYTES, EMPTY: 0}
    nodes = np.zeros(len(kinds), NODE)
    nodes["kind"], nodes["function"] = kinds, functions
    nodes["payload_bytes"] = [
        shared.functions[f].param_bytes if k == KERNEL else other[k]
        for k, f in zip(kinds, functions, strict=True)
    ]
    nodes["payload"], total = payload_ends(nodes["payload_bytes"])
    kernel = nodes["kind"] == KERNEL
    nodes["grid"][kernel], nodes["block"][kernel] = (tokens, 2, 1), (128, 1, 1)
    nodes["shared"][1] = 60000
    rng = np.random.default_rng(seed)
    payload = np.zeros(total, np.uint8)
    for start, size in zip(nodes["payload"], nodes["payload_bytes"], strict=True):
        payload[start : start + size] = rng.integers(0, 256, size)
    relocations = np.zeros(5, RELOCATION)
    starts = nodes["payload"]
    relocations["at"] = [0, 8, starts[1], starts[2] + 48, starts[6]]
    relocations["symbol"], relocations["addend"] = [0, 1, 2, 0, 1], [16, 0, 64, 4096, 512]
    for at in relocations["at"]:
        payload[at : at + 8] = 0
    edges = np.zeros(6, EDGE)
    edges["from"], edges["to"] = range(6), range(1, 7)
    edges["from_port"][0], edges["type"][0] = 1, 1
    attributes = np.zeros(2, ATTRIBUTE)
    attributes["node"], attributes["id"] = [1, 1], [2, 4]
    attributes["value"][0, 0] = 1
    attributes["value"][1, :12] = np.frombuffer(np.array([2, 1, 1], "<u4").tobytes(), np.uint8)
    return Graph(tokens, rows, nodes, edges, attributes, relocations, payload)


def golden(tokens: int = 4, rows: int = 2) -> Golden:
    ids = np.array([[5, 6], [7, 8]], np.int32)
    return Golden(tokens, rows, ids, hashlib.sha256(b"answer").hexdigest())
