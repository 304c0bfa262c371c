"""The shared expert beside the exchange: two branches of the captured graph, and the same bits."""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from graphs.capture import CudaBackend
from runtime import Runtime
from tests.gpu.conftest import Load
from tests.serving import make_requests, serve

PLAIN = 0  # CUgraphDependencyType of an edge that waits for the end


class Edge(ctypes.Structure):
    """CUgraphEdgeData."""

    _fields_ = (
        ("from_port", ctypes.c_uint8),
        ("to_port", ctypes.c_uint8),
        ("type", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8 * 5),
    )


def edges_of(graph: Any) -> list[tuple[int, int, int]]:
    """(from, to, type) of every edge; through ctypes, for cuda-bindings 13 returns freed memory."""
    get = ctypes.CDLL("libcuda.so.1").cuGraphGetEdges_v2
    get.argtypes = [ctypes.c_void_p] * 5
    count = ctypes.c_size_t()
    assert get(graph.raw_cuda_graph(), None, None, None, ctypes.byref(count)) == 0
    first, last = ((ctypes.c_void_p * count.value)() for _ in range(2))
    data = (Edge * count.value)()
    assert get(graph.raw_cuda_graph(), first, last, data, ctypes.byref(count)) == 0
    return [(int(a), int(b), e.type) for a, b, e in zip(first, last, data, strict=True)]


def captured_edges(runtime: Runtime) -> list[tuple[int, int, int]]:
    """Of the smallest key's graph, captured once more."""
    graphs = runtime.engine.graphs
    assert isinstance(graphs.backend, CudaBackend)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with graphs.backend.on_stream():
        graph.capture_begin(capture_error_mode="thread_local")
        graphs.step.run(graphs.ladder.keys[0])
        graph.capture_end()
    return edges_of(graph)


@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_the_branch_is_in_the_graph_and_changes_no_bit(name: str, load: Load) -> None:
    """`rdep` serves one rank, too."""
    bits, edges = {}, {}
    for overlap in (True, False):
        options = {"transport": "rdep", "overlap": overlap, "verify": True, "proof_replays": 20}
        with load(name, **options) as runtime:
            model = runtime.model_config
            layers = model.num_layers - model.first_k_dense_replace
            requests = make_requests(
                np.random.default_rng(5), (1, 40, 7, 90), model.vocab_size, [12, 20]
            )
            bits[overlap] = [a.bits for a in serve(runtime, requests)]
            edges[overlap] = captured_edges(runtime)
    assert bits[True] == bits[False]
    out_of, into = (Counter(edge[end] for edge in edges[True]) for end in (0, 1))
    assert [n for n in out_of.values() if n > 1] == [2] * layers
    assert [n for n in into.values() if n > 1] == [2] * layers
    joins = {node for node, n in into.items() if n > 1}
    forks = {node for node, n in out_of.items() if n > 1}
    assert all(kind == PLAIN for _, to, kind in edges[True] if to in joins)
    assert sum(kind == PLAIN for at, _, kind in edges[True] if at in forks) >= layers
    assert max(Counter(edge[0] for edge in edges[False]).values()) == 1
