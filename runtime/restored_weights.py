"""The weights of a restored run: packed ones, else a preset's, filled by a stored graph."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from capture_cache.arena import DeviceArena
from capture_cache.bundle_files import BundleFiles
from capture_cache.dataclass import dataclass
from capture_cache.errors import CorruptBundle
from capture_cache.files import REMEDY
from capture_cache.restore import build_graph, prepare_graph
from capture_cache.restore_code import Code
from capture_cache.restore_driver import Driver
from capture_cache.store import Store
from graphs.model_config import ModelConfig
from graphs.model_source import ModelSource
from runtime.bundle_names import ROPE_FILE, SKIP_WEIGHTS, weights_file
from runtime.config import RuntimeConfig
from runtime.opening import NotRestored

_FILLING = "filling the weights"


@dataclass(frozen=True)
class Target:
    """Where weights go, and what runs there: code and addresses of the bundle's symbols."""

    driver: Driver
    arena: DeviceArena
    code: Code
    symbols: NDArray[np.uint64]
    stream: int


def fill_weights(
    options: RuntimeConfig,
    model: ModelConfig,
    source: ModelSource,
    files: BundleFiles,
    target: Target,
) -> bool:
    """Fill the arena's weights; whether a golden step can be expected to agree.

    Raises:
        NotRestored: there are no weights that can be had without torch.
        FingerprintMismatch: given packed weights are others.
        CorruptBundle, CudaError: packed weights or the graph are damaged, or the device refuses.
    """
    driver, rope = target.driver, _rope(files, target.arena)
    skipped = options.weights == SKIP_WEIGHTS
    if not skipped:
        note = _load_packed(options, model, source, target)
        if note is not None:
            _run_fill(options, source, files, target, note)
    driver.upload(target.arena.view_spec("rope_table").ptr, rope)
    return not skipped


def _load_packed(
    options: RuntimeConfig, model: ModelConfig, source: ModelSource, target: Target
) -> str | None:
    """None where packed weights were loaded; else why there were none.

    Raises:
        CorruptBundle: given ones are damaged.
        NotRestored: the store's are; nothing is wrong with the bundle.
    """
    from runtime.weights import find, load  # a measurement without weights needs neither

    found = find(options, model, source)
    if found.packed is None:
        return found.note
    store, rank = Store(options.store_path), options.ranks.rank
    try:
        load(found.packed, target.arena, options, rank=rank, driver=target.driver, store=store)
    except CorruptBundle as e:
        if found.given:
            raise
        raise NotRestored(f"packed weights are damaged and not used: {e}") from e
    return None


def _run_fill(
    options: RuntimeConfig, source: ModelSource, files: BundleFiles, target: Target, note: str
) -> None:
    """Launch the graph that fills this rank's weights, over zeros.

    Args:
        note: why packed ones are not used.
    """
    driver, arena, stream = target.driver, target.arena, target.stream
    name = weights_file(options.ranks.rank)
    if not source.is_preset or not files.has(name):
        raise NotRestored(
            f"the weights of {source.name} are not in the bundle and no packed ones were found "
            f"({note}); pack them with python -m runtime.pack"
        )
    section = next(e for e in arena.layout.extents if e.section.name == "weights")
    driver.fill(arena.base + section.offset, 0, section.nbytes, stream)
    prepared = prepare_graph(driver, target.code, files.graph(name), target.symbols)
    graph = build_graph(driver, target.code, prepared, "the weights' graph")
    try:
        driver.launch(graph, stream, _FILLING)
        driver.wait(stream, _FILLING)
    finally:
        driver.drop_exec(graph)


def _rope(files: BundleFiles, arena: DeviceArena) -> NDArray[np.uint8]:
    """The rope table's bytes; raises CorruptBundle."""
    rope, place = np.frombuffer(files.read(ROPE_FILE), np.uint8), arena.view_spec("rope_table")
    if rope.nbytes != place.nbytes:
        raise CorruptBundle(
            f"{ROPE_FILE}: expected {place.nbytes} bytes, got {rope.nbytes}; {REMEDY}"
        )
    return rope
