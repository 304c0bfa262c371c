"""A bundle in a store, and a fake GPU that plays it: every step ends at once, with no tokens."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from capture_cache.arena import ARENA_BASE
from capture_cache.bundle import ATTRIBUTE as ATTRIBUTES
from capture_cache.bundle import (
    EDGE,
    NODE,
    PROGRAM_FILE,
    RELOCATION,
    Function,
    Golden,
    Graph,
    Module,
    Program,
    Symbol,
    golden_file,
    graph_file,
)
from capture_cache.bundle_golden import encode_golden
from capture_cache.bundle_graph import encode_graph, payload_ends
from capture_cache.bundle_program import encode_program
from capture_cache.manifest import Manifest
from capture_cache.restore_driver import Driver
from capture_cache.store import Store
from graphs.keys import Ladder
from runtime.bundle_names import GRAPHS, ROPE_FILE, weights_file
from runtime.config import RuntimeConfig
from tests.cpu.fake_cuda import FakeCuda, FakeGraph, FakeKernel

CODE = b"cubin that publishes"
KERNELS = (FakeKernel("publish", ((0, 8), (8, 8))), FakeKernel("fill", ((0, 8),)))
SYMBOLS = ("step", "ring_step", "embed")
LADDER = "1,2,2+6"
NOTHING = hashlib.sha256().hexdigest()  # the digest of a step without tokens
OPTIONS: dict[str, Any] = {
    "model": "tiny",
    "layers": 1,
    "bs": 2,
    "max_seq_len": 128,
    "ladder": LADDER,
    "device": "cuda",
}


class Gpu(FakeCuda):
    """A GPU whose graphs publish steps.

    Attributes:
        launched: kernel names of each launch.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__({CODE: KERNELS}, on_launch=self._run, **options)
        self.launched: list[str] = []

    def _run(self, graph: FakeGraph) -> None:
        (node,) = graph.nodes.values()
        assert node.kernel is not None
        self.launched.append(node.kernel.name)
        at = [int.from_bytes(p, "little") for p in node.params]
        if node.kernel.name == "fill":
            self.at(at[0], 4)[:] = 0x11
            return
        counter = self.at(at[0], 8).view(np.int64)
        ring = self.at(at[1], 8 * 4).view(np.int64)
        step = int(counter[0])
        ring[step % 4] = step + 1
        counter[0] += 1


def one_kernel(function: int, pointers: tuple[int, ...], tokens: int, rows: int) -> Graph:
    """A graph of one kernel over these symbols."""
    nodes = np.zeros(1, NODE)
    nodes["function"], nodes["grid"], nodes["block"] = function, 1, 32
    nodes["payload_bytes"] = 8 * len(pointers)
    _, total = payload_ends(nodes["payload_bytes"])
    table = np.zeros(len(pointers), RELOCATION)
    table["at"], table["symbol"] = np.arange(len(pointers)) * 8, pointers
    edges, attributes = np.zeros(0, EDGE), np.zeros(0, ATTRIBUTES)
    return Graph(tokens, rows, nodes, edges, attributes, table, np.zeros(total, np.uint8))


def publish_bundle(
    root: Path,
    *,
    kind: str = GRAPHS,
    digest: str | Mapping[str, str] = NOTHING,
    drop: str = "",
    base: int = ARENA_BASE,
    peers: dict[str, int] | None = None,
    **changes: Any,
) -> Path:
    """Store a bundle for `OPTIONS` as the fake GPU has them; returns its directory.

    Args:
        digest: of every golden step, or of those keys; the others' are right.
        drop: a file to leave out.
        peers: the ranks' shared memory, as `runtime.restore_facts.PeerFacts`.
        changes: of the options.
    """
    from runtime.fingerprint import fingerprint  # torch comes with the selection
    from runtime.selection import choose

    options = RuntimeConfig.of(**(OPTIONS | {"store": str(root)} | changes))
    several = options.num_ranks > 1  # this process is none of them
    selection = choose(dataclasses.replace(options, device="cpu"), compile_only=several)
    layout, ladder = selection.layout, Ladder.parse(LADDER, 2)
    places = layout.by_name
    program = Program(
        (Module(hashlib.sha256(CODE).hexdigest(), len(CODE)),),
        tuple(Function(0, k.name, k.params) for k in KERNELS),
        tuple(Symbol(n, places[n].nbytes, places[n].host) for n in SYMBOLS),
    )
    files = {PROGRAM_FILE: encode_program(program), program.modules[0].file: CODE}
    files[ROPE_FILE] = b"\x07" * places["rope_table"].nbytes
    for rank in range(options.num_ranks):
        files[weights_file(rank)] = encode_graph(one_kernel(1, (2,), 1, 1))
    for key in ladder.keys:
        graph = one_kernel(0, (0, 1), key.tokens, key.rows)
        files[graph_file(key.tokens, key.rows)] = encode_graph(graph)
        told = digest if isinstance(digest, str) else digest.get(str(key), NOTHING)
        golden = Golden(key.tokens, key.rows, np.ones((1, 1), np.int32), told)
        files[golden_file(key.tokens, key.rows)] = encode_golden(golden)
    files.pop(drop, None)
    step = dataclasses.asdict(selection.step)
    del step["ep_rank"]
    restore = {"kind": kind, "arena_base": base, "ladder": str(ladder), "step": step}
    restore |= {"reason": "the test says so", "peers": peers}
    facts = fingerprint(options, on_device=True, driver=lambda: Driver(Gpu()))
    manifest = Manifest(facts, layout, {"keys": []}, restore=restore)
    return Store(root).publish(facts, manifest, files).path
