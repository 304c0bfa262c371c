"""Captured graph → structs → rebuilt graph: identical nodes, moved pointers, and every refusal."""

from __future__ import annotations

import ctypes
import struct
import threading

import pytest

from capture_cache.bundle import Graph, Program, Table
from capture_cache.bundle_extract import Extractor
from capture_cache.bundle_files import BundleFiles
from capture_cache.bundle_graph import decode_graph, encode_graph
from capture_cache.bundle_program import decode_program, encode_program
from capture_cache.errors import CudaError, NotRestorable
from capture_cache.graph_reader import GraphReader
from capture_cache.kernel import CompiledKernel
from capture_cache.memory_ranges import Range
from capture_cache.replay import GraphExec
from capture_cache.restore import build_graph, prepare_graph
from capture_cache.restore_code import Code, symbol_table
from capture_cache.restore_driver import Driver
from tests.cpu.fake_cuda import FakeCuda, FakeGraph, FakeKernel

ARENA, PINNED, MOVED = 0x600000000000, 0x7F0000000000, 0x7A0000000000
OURS, THEIRS = b"cubin of ours", b"fat binary of theirs"
KINDS = ("ptr", "ptr", "i32", "i64", "tensormap")
OFFSETS = ((0, 8), (8, 8), (16, 4), (24, 8), (64, 128))
CODE = {
    OURS: (FakeKernel("ours", OFFSETS), FakeKernel("bare", ())),
    THEIRS: (FakeKernel("theirs", ((0, 40), (40, 4))),),
}
ENTRIES = [
    Range("weights", ARENA, 4096),
    Range("x", ARENA + 4096, 512),
    Range("mailbox", PINNED, 256, host=True),
]
WHOLES = [Range("arena", ARENA, 1 << 20), Range("pinned", PINNED, 4096, host=True)]


class Captured:
    """A graph in the making, as if torch had captured it."""

    def __init__(self) -> None:
        self.lib = FakeCuda(CODE)
        self.driver = GraphReader(self.lib)
        self.graph = self.driver.new_graph()
        self.handles = {}
        for code, names in ((OURS, ("ours", "bare")), (THEIRS, ("theirs",))):
            library = self.driver.load_library(code, "")
            self.handles |= {name: self.driver.kernel(library, name) for name in names}
        # As the runtime library of that kernel's owner set it.
        self.lib.kernels[self.handles["theirs"]].attributes |= {8: 100_000, 14: 1}
        self.nodes: list[int] = []

    def kernel(self, name: str, *params: bytes, shared: int = 0) -> int:
        raw = bytearray(72)
        values = [ctypes.create_string_buffer(p, len(p)) for p in params]
        pointers = (ctypes.c_uint64 * max(1, len(values)))(*map(ctypes.addressof, values))
        struct.pack_into(
            "<Q7I4xQ",
            raw,
            0,
            self.handles[name],
            4,
            2,
            1,
            128,
            1,
            1,
            shared,
            ctypes.addressof(pointers),
        )
        node = self.driver.try_kernel_node(self.graph, bytes(raw))
        assert node
        self.nodes.append(node)
        return node

    def ours(self, a: int, b: int, number: int = 7, long: int = 5) -> int:
        words = [struct.pack("<Q", v) for v in (a, b)]
        return self.kernel("ours", *words, struct.pack("<i", number), struct.pack("<q", long), MAP)

    def theirs(self, *words: int, shared: int = 0) -> int:
        data = struct.pack("<5Q", *words, *([0] * (5 - len(words))))
        return self.kernel("theirs", data, b"\1\2\3\4", shared=shared)

    def edge(self, first: int, last: int, data: bytes = bytes(8)) -> None:
        a, b = (ctypes.c_uint64 * 1)(first), (ctypes.c_uint64 * 1)(last)
        raw = ctypes.create_string_buffer(data, 8)
        at = [ctypes.addressof(x) for x in (a, b, raw)]
        assert not self.lib.cuGraphAddDependencies_v2(self.graph, *at, 1)

    def extract(self, find: bool = True) -> tuple[Graph, Program, dict[str, bytes]]:
        known = {self.handles[n]: compiled(n) for n in ("ours", "bare")}
        extractor = Extractor(
            self.driver, known, ENTRIES, WHOLES, lambda _: THEIRS if find else None
        )
        try:
            graph = extractor.graph(self.graph, 8, 4)
            program = decode_program(encode_program(extractor.program))
            return decode_graph(encode_graph(graph), program), program, extractor.code
        finally:
            extractor.close()


MAP = bytes(range(128))


def compiled(name: str) -> CompiledKernel:
    kinds = KINDS if name == "ours" else ()
    return CompiledKernel(
        name, "sm_90", OURS, 4, 1, False, 0, kinds, (), registers=0, local_bytes=0, spill_bytes=0
    )


def built(driver: Driver, code: Code, graph: Graph, symbols: Table) -> int:
    prepared = prepare_graph(driver, code, graph, symbols)
    return build_graph(driver, code, prepared, "the graph")


def rebuilt(
    found: tuple[Graph, Program, dict[str, bytes]], addresses: dict[str, int]
) -> tuple[FakeGraph, FakeCuda]:
    graph, program, code = found
    lib = FakeCuda(CODE)
    driver = Driver(lib)
    files = BundleFiles({"program": encode_program(program), **code}, "bundle")
    symbols = symbol_table(program, addresses.__getitem__)
    made = built(driver, Code(driver, files), graph, symbols)
    assert not lib.graphs, "the template is dropped"
    return lib.execs[made], lib


HERE = {"weights": ARENA, "x": ARENA + 4096, "mailbox": PINNED, "arena": ARENA, "pinned": PINNED}


def some_graph() -> Captured:
    c = Captured()
    a = c.ours(ARENA + 16, 0)
    b = c.theirs(ARENA + 4096, 3, 0, ARENA + 4608 + 8, shared=90_000)
    d = c.ours(PINNED + 64, ARENA + 4600)
    e = c.kernel("bare")
    c.edge(a, b)
    c.edge(b, d, bytes([1, 0, 1, 0, 0, 0, 0, 0]))
    c.edge(d, e)
    c.edge(a, d)
    cooperative = ctypes.create_string_buffer(bytes([1]), 64)
    c.lib.cuGraphKernelNodeSetAttribute(b, 2, ctypes.addressof(cooperative))
    return c


def test_a_rebuilt_graph_is_the_captured_one() -> None:
    captured = some_graph()
    made, lib = rebuilt(captured.extract(), HERE)
    assert made.seen == captured.lib.graphs[captured.graph].seen
    theirs = next(k for k in lib.kernels.values() if k.name == "theirs")
    assert theirs.attributes == {8: 100_000, 14: 1}


def test_edges_keep_their_types() -> None:
    made, _ = rebuilt(some_graph().extract(), HERE)
    assert [data for _, _, data in sorted(made.edges)].count(bytes([1, 0, 1, 0, 0, 0, 0, 0])) == 1


def test_pointers_follow_memory_that_moved() -> None:
    made, _ = rebuilt(some_graph().extract(), HERE | {"mailbox": MOVED, "pinned": MOVED})
    nodes = list(made.nodes.values())
    assert nodes[2].params[0] == struct.pack("<Q", MOVED + 64)
    assert nodes[0].params[0] == struct.pack("<Q", ARENA + 16)
    assert nodes[0].params[4] == MAP


def test_code_is_loaded_once_and_unloaded() -> None:
    captured = some_graph()
    graph, program, code = captured.extract()
    lib = FakeCuda(CODE)
    driver = Driver(lib)
    loaded = Code(driver, BundleFiles({"program": encode_program(program), **code}, "bundle"))
    symbols = symbol_table(program, HERE.__getitem__)
    for _ in range(2):
        built(driver, loaded, graph, symbols)
    assert lib.calls.count("cuLibraryLoadData") == 2
    loaded.close()
    assert not lib.libraries


def test_copies_and_memsets_are_rebuilt() -> None:
    c = Captured()
    copy, memset = bytearray(200), bytearray(40)
    struct.pack_into("<Q", copy, 48, ARENA + 8)
    struct.pack_into("<Q", copy, 136, PINNED + 16)
    struct.pack_into("<Q", memset, 0, ARENA + 4096)
    memset[16] = 9
    out = (ctypes.c_uint64 * 3)()
    at = ctypes.addressof(out)
    for i, (add, data) in enumerate(
        ((c.lib.cuGraphAddMemcpyNode, copy), (c.lib.cuGraphAddMemsetNode, memset))
    ):
        raw = ctypes.create_string_buffer(bytes(data), len(data))
        add(at + 8 * i, c.graph, 0, 0, ctypes.addressof(raw), 0)
    c.lib.cuGraphAddEmptyNode(at + 16, c.graph, 0, 0)
    made, _ = rebuilt(c.extract(), HERE)
    assert made.seen == c.lib.graphs[c.graph].seen


def test_nodes_out_of_order_are_put_in_order() -> None:
    c = Captured()
    late, early = c.ours(ARENA, 0), c.theirs(ARENA)
    c.edge(early, late)
    graph, _, _ = c.extract()
    assert graph.edges["from"].tolist() == [0]
    made, _ = rebuilt(c.extract(), HERE)
    assert [n.kernel.name for n in made.nodes.values() if n.kernel] == ["theirs", "ours"]


def refused(c: Captured, message: str, *, find: bool = True) -> None:
    with pytest.raises(NotRestorable, match=message):
        c.extract(find)


def test_a_pointer_into_nothing_is_refused_by_kernel_parameter_and_value() -> None:
    c = Captured()
    c.ours(ARENA, 0x123456789000)
    refused(c, r"kernel ours \(node 0\), parameter 1: the pointer 0x123456789000 lies in no memory")


def test_an_address_in_a_number_is_refused() -> None:
    c = Captured()
    c.ours(ARENA, 0, long=ARENA + 5)
    refused(c, "parameter 3: expected a number, got the address 0x600000000005")


def test_foreign_memory_in_a_struct_is_refused() -> None:
    c = Captured()
    c.lib.foreign = ((0x302000000, 4096),)
    c.theirs(ARENA, 0x302000010)
    refused(c, "kernel theirs .* parameter 0: the pointer 0x302000010")


def test_pinned_memory_in_a_struct_is_left_alone_only_if_the_driver_does_not_know_it() -> None:
    c = Captured()
    c.lib.foreign = ((PINNED, 4096),)
    c.theirs(PINNED + 8)
    refused(c, "parameter 0: the pointer")


def test_a_kernel_without_code_is_refused() -> None:
    c = Captured()
    c.theirs(ARENA)
    refused(c, r"kernel theirs \(node 0\): expected one that we compiled", find=False)


@pytest.mark.parametrize(("kind", "name"), [(3, "host"), (6, "event wait"), (10, "allocation")])
def test_a_node_of_this_process_alone_is_refused(kind: int, name: str) -> None:
    c = Captured()
    c.lib.graphs[c.graph].nodes[c.ours(ARENA, 0)].kind = kind
    refused(c, f"node 0 is a node of kind {name}")


def test_a_copy_from_pageable_memory_is_refused() -> None:
    c = Captured()
    copy = bytearray(200)
    struct.pack_into("<Q", copy, 40, 0x55550000)
    raw, out = ctypes.create_string_buffer(bytes(copy), 200), ctypes.c_uint64()
    c.lib.cuGraphAddMemcpyNode(ctypes.addressof(out), c.graph, 0, 0, ctypes.addressof(raw), 0)
    refused(c, r"copy \(node 0\), byte 40: the pointer 0x55550000")


def test_a_signature_that_the_code_does_not_have_is_refused() -> None:
    c = Captured()
    c.ours(ARENA, 0)
    c.lib.kernels[c.handles["ours"]].params = ((0, 8), (8, 8))
    c.lib.graphs[c.graph].nodes[c.nodes[0]].params = (bytes(8), bytes(8))
    refused(c, r"kernel ours: its signature has parameters of \[8, 8, 4, 8, 128\] bytes")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("cuGraphAddNode_v2", "adding node 0 of the graph, kernel ours over"),
        ("cuGraphInstantiateWithFlags", "instantiating the graph"),
        ("cuLibraryLoadData", "loading the code of kernel ours"),
        ("cuGraphKernelNodeSetAttribute", "setting attribute 2 of node 1 of the graph"),
    ],
)
def test_a_driver_that_refuses_is_told(call: str, message: str) -> None:
    graph, program, code = some_graph().extract()
    lib = FakeCuda(CODE)
    lib.fail[call] = 2
    driver = Driver(lib)
    loaded = Code(driver, BundleFiles({"program": encode_program(program), **code}, "bundle"))
    symbols = symbol_table(program, HERE.__getitem__)
    with pytest.raises(CudaError, match=f"{message}.*OUT_OF_MEMORY"):
        built(driver, loaded, graph, symbols)
    assert not lib.graphs


def with_a_fork() -> Captured:
    """Kernels around an empty node; the last has three predecessors that lie apart."""
    c = Captured()
    a, b = c.ours(ARENA, 0), c.ours(ARENA + 8, 0)
    out = ctypes.c_uint64()
    c.lib.cuGraphAddEmptyNode(ctypes.addressof(out), c.graph, 0, 0)
    d, e = c.ours(ARENA + 16, 0), c.ours(ARENA + 24, 0)
    programmatic = bytes([1, 0, 1, 0, 0, 0, 0, 0])
    c.edge(a, b, programmatic)
    c.edge(a, out.value)
    c.edge(out.value, d)
    c.edge(a, e)
    c.edge(b, e)
    c.edge(d, e, programmatic)
    return c


SPREAD = struct.pack("<i", 1)
CLUSTER_SIZE, SCHEDULING, PREFERRED_SIZE = 4, 5, 11


def attributes_of(c: Captured, **given: bytes) -> dict[int, bytes]:
    """What is recorded of a node of `ours` to which the driver ascribes these attributes."""
    ids = {"size": CLUSTER_SIZE, "scheduling": SCHEDULING, "preferred": PREFERRED_SIZE}
    node = c.ours(ARENA, 0)
    for name, value in given.items():
        c.lib.graphs[c.graph].nodes[node].attributes[ids[name]] = value.ljust(64, b"\0")
    graph, _, _ = c.extract()
    table = graph.attributes
    return {int(a["id"]): a["value"].tobytes().rstrip(b"\0") for a in table}


@pytest.mark.parametrize("size", [{}, {"size": struct.pack("<3I", 1, 1, 1)}])
def test_how_clusters_are_scheduled_means_nothing_without_any(size: dict[str, bytes]) -> None:
    assert SCHEDULING not in attributes_of(Captured(), scheduling=SPREAD, **size)


@pytest.mark.parametrize("which", ["size", "preferred"])
def test_how_a_launchs_clusters_are_scheduled_is_kept(which: str) -> None:
    size = struct.pack("<3I", 2, 1, 1)
    found = attributes_of(Captured(), scheduling=SPREAD, **{which: size})
    known = {"size": CLUSTER_SIZE, "preferred": PREFERRED_SIZE}[which]
    assert found == {known: size.rstrip(b"\0"), SCHEDULING: SPREAD.rstrip(b"\0")}


@pytest.mark.parametrize("which", [10, 11, 12, 13])  # must be set; required width, height, depth
def test_how_a_kernels_own_clusters_are_scheduled_is_kept(which: int) -> None:
    c = Captured()
    c.lib.kernels[c.handles["ours"]].attributes[which] = 2
    assert attributes_of(c, scheduling=SPREAD) == {SCHEDULING: SPREAD.rstrip(b"\0")}


def edges_by_what_they_join(graph: FakeGraph) -> list[tuple[object, object, bytes]]:
    found = [(graph.nodes[a].seen, graph.nodes[b].seen, data) for a, b, data in graph.edges]
    return sorted(found, key=repr)


def test_kernels_get_the_edges_that_lead_to_them_and_other_nodes_theirs() -> None:
    captured = with_a_fork()
    made, lib = rebuilt(captured.extract(), HERE)
    want = edges_by_what_they_join(captured.lib.graphs[captured.graph])
    assert edges_by_what_they_join(made) == want
    assert lib.calls.count("cuGraphAddNode_v2") == 4
    assert lib.calls.count("cuGraphAddDependencies_v2") == 1, "that of the empty node"


def test_a_driver_that_refuses_such_an_edge_is_told() -> None:
    graph, program, code = with_a_fork().extract()
    lib = FakeCuda(CODE)
    lib.fail["cuGraphAddDependencies_v2"] = 2
    driver = Driver(lib)
    loaded = Code(driver, BundleFiles({"program": encode_program(program), **code}, "bundle"))
    symbols = symbol_table(program, HERE.__getitem__)
    with pytest.raises(CudaError, match="adding the edges of the graph.*OUT_OF_MEMORY"):
        built(driver, loaded, graph, symbols)
    assert not lib.graphs


def test_pointers_between_entries_are_found_in_the_whole() -> None:
    graph, program, _ = some_graph().extract()
    names = [program.symbols[i].name for i in graph.relocations["symbol"]]
    assert names == ["weights", "x", "arena", "mailbox", "x"]
    assert [int(a) for a in graph.relocations["addend"]] == [16, 0, 4616, 64, 504]


def test_an_instantiated_graph_is_launched_from_any_thread_and_dropped_once() -> None:
    captured, launched = some_graph(), []
    lib = captured.lib
    lib.on_launch = launched.append
    graph = GraphExec(captured.graph, 0x57, lib=lib)
    graph.launch()
    assert lib.calls.count("cuCtxSetCurrent") == 0
    thread = threading.Thread(target=graph.launch)
    thread.start()
    thread.join()
    assert lib.calls.count("cuCtxSetCurrent") == 1, "another thread needs the context"
    assert len(launched) == 2
    lib.fail["cuGraphLaunch"] = 2
    with pytest.raises(CudaError, match="launching a graph: CUDA_ERROR_OUT_OF_MEMORY|OUT_OF_MEM"):
        graph.launch()
    graph.close()
    graph.close()
    assert not lib.execs
