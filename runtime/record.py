"""A capture turned into a bundle's files: every key's graph, its golden step, the first weights.

What cannot be found again in another process refuses the whole (`NotRestorable`), and says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from barriers.rdep import Rdep, peer_layout
from barriers.vocabulary_peers import VocabularyPeers
from capture_cache.arena import DeviceArena
from capture_cache.bundle import PROGRAM_FILE, golden_file, graph_file
from capture_cache.bundle_extract import Extractor
from capture_cache.bundle_fatbin import fat_binaries
from capture_cache.bundle_golden import encode_golden
from capture_cache.bundle_graph import encode_graph
from capture_cache.bundle_program import encode_program
from capture_cache.errors import CudaError, NotRestorable
from capture_cache.graph_reader import GraphReader
from capture_cache.kernel import CompiledKernel
from capture_cache.memory_ranges import Range
from capture_cache.restore_driver import Driver
from graphs.capture import CudaBackend
from graphs.keys import GraphKey
from graphs.random_weights import random_weights
from graphs.weights import add_part_views
from runtime.bundle_names import (
    DEVICE_WHOLE,
    GRAPHS,
    HOST_WHOLE,
    PEERS,
    ROPE_FILE,
    weights_file,
)
from runtime.engine import Engine
from runtime.golden import take_golden

RESTORABLE_TRANSPORTS = ("local", "rdep")
TIMEOUT_S = 600.0  # how long the other ranks wait for rank 0 to read the graphs


@dataclass(frozen=True)
class Recording:
    """What a bundle holds beside its manifest's own fields.

    Attributes:
        files: contents by name.
        restore: for `Manifest.restore`.
    """

    files: dict[str, bytes]
    restore: dict[str, Any]


def record(
    engine: Engine,
    arena: DeviceArena,
    progress: Callable[[GraphKey], None] = lambda _: None,
) -> Recording:
    """Read every captured graph and take every golden step; the rows must be free.

    All ranks call this alike, since they take the golden steps together; rank 0 has the files.

    Raises:
        NotRestorable: names what cannot be rebuilt elsewhere; on all ranks.
        CudaError, StepFailed: the device fails.
    """
    group, reason = engine.ranks.group, None
    files: dict[str, bytes] = {}
    restore: dict[str, Any] = {}
    if group.rank == 0:
        try:
            files, restore = _extract(engine, arena)
        except NotRestorable as e:
            reason = str(e)
    # Extraction takes seconds; golden steps wait for every rank.
    told = group.allgather("graphs", None if reason is None else reason[:600], timeout_s=TIMEOUT_S)
    if told[0].value is not None:
        raise NotRestorable(reason or told[0].value)
    for key in engine.ladder.keys:
        golden = take_golden(engine, key)
        files[golden_file(key.tokens, key.rows)] = encode_golden(golden)
        progress(key)
    return Recording(files, restore)


def _extract(engine: Engine, arena: DeviceArena) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Files but the golden steps, and `Manifest.restore`."""
    transport = engine.config.transport
    if transport not in RESTORABLE_TRANSPORTS:
        raise NotRestorable(
            f"transport {transport}: its library holds device state that only this process has; "
            "it is captured live each time"
        )
    with ExitStack() as resources:
        driver = GraphReader()
        driver.init()
        driver.open(torch.cuda.current_device())
        resources.callback(driver.close)
        extractor = _extractor(driver, engine, arena)
        resources.callback(extractor.close)
        files: dict[str, bytes] = {ROPE_FILE: _bytes_of(engine, "rope_table")}
        for key in engine.ladder.keys:
            graph = extractor.graph(engine.graphs.graphs[key].graph, key.tokens, key.rows)
            files[graph_file(key.tokens, key.rows)] = encode_graph(graph)
        if engine.selection.source.is_preset:
            for rank in range(engine.config.ep_size):
                files[weights_file(rank)] = _weights_graph(engine, extractor, rank)
        files[PROGRAM_FILE] = encode_program(extractor.program)
        files |= extractor.code
    step = dataclasses.asdict(engine.config)
    del step["ep_rank"]  # one bundle serves every rank
    restore = {"kind": GRAPHS, "arena_base": arena.base, "ladder": str(engine.ladder), "step": step}
    return files, restore | {"peers": _peers(engine)}


def _peers(engine: Engine) -> dict[str, Any] | None:
    """What `runtime.player_ranks.PeerFacts` holds; None where ranks share nothing."""
    transport = engine.graphs.step.transport_or_none
    if not isinstance(transport, Rdep):
        return None
    vocabulary = engine.graphs.step.vocabulary
    shared = () if vocabulary is None else VocabularyPeers.buffers(vocabulary.config)
    layout = peer_layout(transport.config, shared)
    places = layout.by_name
    return {
        "base": transport.memory[0],
        "payload_bytes": layout.device_bytes,
        "words_at": [p.offset for n, p in places.items() if n in ("ep_words", "head_words")],
    }


def _bytes_of(engine: Engine, name: str) -> bytes:
    tensor = engine.graphs.step.weights[name]
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _extractor(driver: GraphReader, engine: Engine, arena: DeviceArena) -> Extractor:
    layout, launcher = arena.layout, engine.launcher
    assert launcher is not None, "the CPU twin has no graphs"
    kernels: dict[int, CompiledKernel] = launcher.handles
    entries = [
        Range(p.entry.name, arena.ptr(p.entry.name), p.nbytes, p.host) for p in layout.places
    ]
    wholes = [
        Range(DEVICE_WHOLE, arena.base, layout.device_bytes),
        Range(HOST_WHOLE, arena.host_base, layout.host_bytes, host=True),
    ]
    transport = engine.graphs.step.transport_or_none
    if isinstance(transport, Rdep):
        kernels = kernels | transport.handles
        vocabulary = engine.graphs.step.vocabulary
        if isinstance(vocabulary, VocabularyPeers):
            kernels = kernels | vocabulary.handles
        base, nbytes = transport.memory
        entries.append(Range(PEERS, base, nbytes))
    libraries = engine.graphs.step.attention.libraries
    containers = [c for path in libraries for c in fat_binaries(path.read_bytes())]

    def find_code(name: str) -> bytes | None:
        return next((c for c in containers if _holds(driver, c, name)), None)

    return Extractor(driver, kernels, entries, wholes, find_code)


def _holds(driver: Driver, container: bytes, name: str) -> bool:
    """Whether the driver finds the kernel in this code; it may be for another chip, or packed."""
    try:
        library = driver.load_library(container, "looking into a library")
    except CudaError:
        return False
    try:
        driver.kernel(library, name)
    except CudaError:
        return False
    finally:
        driver.unload_library(library)
    return True


def _weights_graph(engine: Engine, extractor: Extractor, rank: int) -> bytes:
    """The launches that fill a rank's weights of a preset, as a graph; over zeroed weights."""
    backend = engine.graphs.backend
    assert isinstance(backend, CudaBackend)
    views = dict(engine.graphs.step.weights)
    add_part_views(views)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.stream(backend.stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            random_weights(
                engine.model_config,
                views,
                seed=engine.options.seed,
                launch=engine.launcher,
                ep_rank=rank,
                ep_size=engine.config.ep_size,
                zeroed=True,
            )
        finally:
            graph.capture_end()
    return encode_graph(extractor.graph(int(graph.raw_cuda_graph()), 1, 1))
