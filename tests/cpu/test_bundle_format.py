"""The bundle's binary files: what is written is read back, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from capture_cache.bundle import KERNEL, MEMCPY, Graph, Program
from capture_cache.bundle_golden import decode_golden, encode_golden
from capture_cache.bundle_graph import decode_graph, encode_graph
from capture_cache.bundle_program import decode_program, encode_program
from capture_cache.errors import CorruptBundle
from tests.cpu import bundles


def test_a_program_comes_back() -> None:
    assert decode_program(encode_program(bundles.program())) == bundles.program()


def test_an_empty_program_comes_back() -> None:
    empty = Program((), (), ())
    assert decode_program(encode_program(empty)) == empty


def test_a_graph_comes_back() -> None:
    data = encode_graph(bundles.graph())
    found = decode_graph(data, bundles.program())
    for field in dataclasses.fields(Graph):
        assert np.array_equal(getattr(found, field.name), getattr(bundles.graph(), field.name))
    assert encode_graph(found) == data


def test_a_golden_step_comes_back() -> None:
    found = decode_golden(encode_golden(bundles.golden()))
    assert found.digest == bundles.golden().digest
    assert np.array_equal(found.ids, bundles.golden().ids)


DECODERS: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "program": (encode_program(bundles.program()), decode_program),
    "graph": (encode_graph(bundles.graph()), lambda d: decode_graph(d, bundles.program())),
    "golden": (encode_golden(bundles.golden()), decode_golden),
}


@pytest.mark.parametrize("kind", DECODERS)
def test_every_truncation_and_extension_is_refused(kind: str) -> None:
    data, decode = DECODERS[kind]
    for cut in range(len(data)):
        with pytest.raises(CorruptBundle):
            decode(data[:cut])
    with pytest.raises(CorruptBundle):
        decode(data + b"\0")


@pytest.mark.parametrize("kind", DECODERS)
def test_any_flipped_byte_is_refused_or_is_another_valid_file(kind: str) -> None:
    """Hashes tell a flipped byte; the parser must only never fail in another way."""
    data, decode = DECODERS[kind]
    refused = 0
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            changed = bytearray(data)
            changed[at] ^= flip
            try:
                decode(bytes(changed))
            except CorruptBundle:
                refused += 1
    assert refused > len(data) // 4


def _set(field: str, table: str, index: int, value: int) -> Callable[[Graph], Graph]:
    def change(graph: Graph) -> Graph:
        copy = getattr(graph, table).copy()
        copy[field][index] = value
        return dataclasses.replace(graph, **{table: copy})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("function", "nodes", 0, 3), "node 0: expected a function of the program"),
        (_set("kind", "nodes", 0, 9), "node 0: expected a known kind"),
        (_set("kind", "nodes", 0, MEMCPY), "parameter bytes"),
        (_set("payload", "nodes", 2, 0), "payload after its predecessor's"),
        (_set("to", "edges", 5, 7), "edge 5: expected a forward step"),
        (_set("from", "edges", 3, 5), "edge 3: expected a forward step"),
        (_set("type", "edges", 0, 2), "edge 0: expected a known type"),
        (_set("node", "attributes", 1, 2), "attribute 1: expected an existing node|kernel node"),
        (_set("id", "attributes", 1, 3), "attribute 1: expected a known attribute"),
        (_set("at", "relocations", 4, 1 << 20), "relocation 4: expected a word of some node"),
        (_set("at", "relocations", 4, 12), "an aligned word"),
        (_set("symbol", "relocations", 0, 3), "relocation 0: expected a symbol"),
        (_set("addend", "relocations", 0, 4097), "relocation 0: expected an address within"),
        (_set("at", "relocations", 1, 16), "a word of some node's parameters"),
        (_set("at", "relocations", 1, 0), "relocations sorted and unique"),
    ],
)
def test_a_graph_that_points_elsewhere_is_refused(
    change: Callable[[Graph], Graph], message: str
) -> None:
    with pytest.raises(CorruptBundle, match=message):
        decode_graph(encode_graph(change(bundles.graph())), bundles.program())


def test_a_kernel_without_a_program_is_refused() -> None:
    assert KERNEL in bundles.graph().nodes["kind"]
    with pytest.raises(CorruptBundle, match="function of the program"):
        decode_graph(encode_graph(bundles.graph()), Program((), (), ()))


def test_bytes_between_payloads_are_refused() -> None:
    graph = bundles.graph()
    payload = graph.payload.copy()
    payload[20] = 1  # the first node's parameters end here
    with pytest.raises(CorruptBundle, match="zeros between payloads"):
        decode_graph(encode_graph(dataclasses.replace(graph, payload=payload)), bundles.program())
