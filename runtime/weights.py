"""Which weights a run reads: packed ones where there are any that fit, else the checkpoint.

Imports neither torch nor triton: the player asks the same questions.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

from capture_cache.arena import Arena
from capture_cache.fingerprint import Fingerprint, Value
from capture_cache.packed import PackedWeights, is_packed
from capture_cache.packed_index import INDEX
from capture_cache.restore_driver import Driver
from capture_cache.store import Store
from capture_cache.weights_io import LoadStats, Progress, load_packed
from graphs.model_config import ModelConfig
from graphs.model_source import ModelSource, model_digest
from graphs.safetensors_dir import CONFIG_FILE, shard_files
from graphs.weights import weight_table
from runtime.config import RuntimeConfig

# Raised whenever the bytes that a checkpoint or a seed is turned into change; a test holds it.
CONVERTER = 1
FOLDER = "weights"  # of the store
COMPUTED = frozenset({"rope_table"})  # entries of the arena's section that are not stored


@dataclass(frozen=True)
class Found:
    """The packed weights to use, or None for the checkpoint or seed; and the reason, for people."""

    packed: PackedWeights | None
    note: str


def identity(model: ModelConfig, source: ModelSource, *, ep_size: int, seed: int) -> Fingerprint:
    """What packed weights are, and what their directory in the store is named after."""
    table = repr([(n, s.shape, s.dtype) for n, s in weight_table(model, ep_size=ep_size).items()])
    facts: dict[str, Value] = {
        "converter": CONVERTER,
        "source": source.name if source.path is None else model_digest(source.path),
        "seed": seed if source.is_preset else None,
        "format": model.weight_format,
        "dtype": model.act_dtype,
        "ep size": ep_size,
        "layers": model.num_layers,
        "table": hashlib.sha256(table.encode()).hexdigest(),
    }
    return Fingerprint.of(facts)


def store_folder(store: Path, identity: Fingerprint) -> Path:
    """Where packed weights lie in a store."""
    return store / FOLDER / identity.digest


def made_from(source: ModelSource) -> tuple[tuple[str, int, int], ...]:
    """(file, bytes, mtime in ns) of each shard of a checkpoint; empty for a preset."""
    if source.path is None:
        return ()
    files = [(name, (source.path / name).stat()) for name in shard_files(source.path)]
    return tuple((name, info.st_size, info.st_mtime_ns) for name, info in files)


def find(options: RuntimeConfig, model: ModelConfig, source: ModelSource) -> Found:
    """The weights for these options.

    Given ones (`options.weights`, or a model directory that is packed itself) must fit; those that
    the store holds are used if they fit and the checkpoint's files are still the ones read then.

    Raises:
        ValueError: what is given holds no packed weights.
        FingerprintMismatch: given weights are of another model, or for another number of ranks.
        CorruptBundle: they are damaged.
    """
    wanted = identity(model, source, ep_size=options.num_ranks, seed=options.seed)
    given = options.weights
    if given is None and source.path is not None and is_packed(source.path):
        given = str(source.path)
    if given is not None:
        _check_given(Path(given))
        packed = PackedWeights(given)
        # Fewer layers may run than are packed; each tensor is compared with the arena's.
        packed.check_identity(wanted, unset=frozenset({"layers", "table"}))
        return Found(packed, f"packed, {packed.path}")
    plain = "seeded at random" if source.is_preset else "the checkpoint"
    whole = dataclasses.replace(model, num_layers=model.num_hidden_layers)
    for config in dict.fromkeys((model, whole)):
        name = identity(config, source, ep_size=options.num_ranks, seed=options.seed)
        folder = store_folder(options.store_path, name)
        if not is_packed(folder):
            continue
        packed = PackedWeights(folder)
        packed.check_identity(name)
        if packed.index.made_from != made_from(source):
            return Found(None, f"{plain}: its files have changed since {folder} was packed")
        return Found(packed, f"packed, {folder}")
    return Found(None, plain)


def _check_given(path: Path) -> None:
    """Raises ValueError, with what `path` is instead, unless it holds packed weights."""
    if is_packed(path):
        return
    got, remedy = "nothing", f"python -m runtime.pack --out {path} makes them"
    if (path / CONFIG_FILE).exists() or any(path.glob("*.safetensors")):
        got, remedy = "a checkpoint", "give that as --model, or pack it: python -m runtime.pack"
    elif path.exists():
        got = "a directory without it" if path.is_dir() else "a file"
        remedy = "python -m runtime.pack makes them"
    raise ValueError(
        f"--weights {path}: expected a directory of packed weights, with {INDEX} in it, got {got}; "
        f"{remedy}"
    )


def load(
    packed: PackedWeights,
    arena: Arena,
    options: RuntimeConfig,
    *,
    rank: int,
    driver: Driver | None,
    store: Store | None,
    progress: Progress | None = None,
) -> LoadStats:
    """Fill the arena's weights, the rope table excepted; raises as `load_packed`.

    Args:
        driver: opened, of the arena's device; None for the CPU twin.
        store: where the device's kernel for the sums is kept.
    """
    return load_packed(
        packed,
        arena,
        rank=rank,
        computed=COMPUTED,
        driver=driver,
        store=store,
        verify=options.verify_weights,
        progress=progress,
    )
