"""Which weights a run reads: packed ones where there are any that fit, else the checkpoint.

Imports neither torch nor triton: the player asks the same questions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

from capture_cache.arena import Arena
from capture_cache.errors import CorruptBundle, FingerprintMismatch, StoreError
from capture_cache.fingerprint import Fingerprint, Value
from capture_cache.packed import PackedWeights, is_packed
from capture_cache.packed_index import INDEX
from capture_cache.restore_driver import Driver
from capture_cache.store import Store
from capture_cache.weights_io import LoadStats, Progress, load_packed
from graphs.model_config import ModelConfig, parse_overrides
from graphs.model_source import ModelSource, model_digest, resolve_model
from graphs.safetensors_dir import CONFIG_FILE, CheckpointError, has_weights, shard_files
from graphs.weights import weight_table
from runtime.config import RuntimeConfig
from runtime.model import with_head

# Raised whenever the bytes that a checkpoint or a seed is turned into change; a test holds it.
CONVERTER = 1
FOLDER = "weights"  # of the store
_HALF = 32  # of the 64 digits of a name
COMPUTED = frozenset({"rope_table"})  # entries of the arena's section that are not stored
CLOCK_SLACK_NS = 2_000_000_000  # by which clocks of file systems may differ


@dataclass(frozen=True)
class Found:
    """The packed weights to use, or None for the checkpoint or seed; and the reason, for people.

    Attributes:
        plain: what there is beside packed ones, for people.
        given: the user named the packed weights; nothing else may take their place.
    """

    packed: PackedWeights | None
    note: str
    plain: str
    given: bool = False


def identity(
    model: ModelConfig,
    source: ModelSource,
    *,
    ep_size: int,
    seed: int,
    weights_elsewhere: bool = False,
) -> Fingerprint:
    """What packed weights are, but for the bytes of the tensors that they were made from.

    Args:
        weights_elsewhere: as `model_digest` takes it.
    """
    table = repr([(n, s.shape, s.dtype) for n, s in weight_table(model, ep_size=ep_size).items()])
    facts: dict[str, Value] = {
        "converter": CONVERTER,
        "source": source.name
        if source.path is None
        else model_digest(source.path, weights_elsewhere=weights_elsewhere),
        "seed": seed if source.is_preset else None,
        "format": model.weight_format,
        "dtype": model.act_dtype,
        "ep size": ep_size,
        "layers": model.num_layers,
        "table": hashlib.sha256(table.encode()).hexdigest(),
    }
    return Fingerprint.of(facts)


def store_folder(store: Path, identity: Fingerprint, content: str = "") -> Path:
    """Where packed weights lie in a store.

    The name begins with what tells checkpoints of equal shapes apart, and ends alike for all of
    them (`_HALF` digits each).

    Args:
        content: as `content_of`; empty for a preset.
    """
    name = identity.digest
    return store / FOLDER / (content[:_HALF] + name[:_HALF] if content else name)


def origin_of(source: ModelSource) -> str:
    """Where a checkpoint really lies, links followed; empty for a preset."""
    return "" if source.path is None else str(source.path.resolve())


def content_of(source: ModelSource) -> str:
    """What tells a checkpoint from others of equal shapes; empty for a preset.

    Reads about a thousandth of its bytes; packed weights say what it was. Raises CheckpointError.
    """
    if source.path is None:
        return ""
    if is_packed(source.path):
        return PackedWeights(source.path).index.content
    from graphs.checkpoint_content import content_digest

    return content_digest(source.path)


def made_from(source: ModelSource) -> tuple[tuple[str, int, int], ...]:
    """(file, bytes, mtime in ns) of each shard of a checkpoint; empty for a preset."""
    if source.path is None:
        return ()
    try:
        files = [(name, (source.path / name).stat()) for name in shard_files(source.path)]
    except OSError as e:
        problem = f"{e.filename}: expected a file, got: {e.strerror}"
        raise CheckpointError(source.path, [problem], "download the directory again") from e
    return tuple((name, info.st_size, info.st_mtime_ns) for name, info in files)


def find(options: RuntimeConfig, model: ModelConfig, source: ModelSource) -> Found:
    """The weights for these options.

    Given ones (`options.weights`, or a model directory that is packed itself) must fit, and be of
    this checkpoint; those that the store holds are used if they are and do, and else left alone.

    Of this checkpoint they are if its files are those that were read (path, sizes, times), or else
    if its sampled bytes are the same.

    Raises:
        ValueError: what is given holds no packed weights, or there are no weights at all.
        FingerprintMismatch: given weights are of another model or checkpoint, or for another number
            of ranks.
        CorruptBundle: given ones are damaged.
    """
    given = options.weights
    if given is None and source.path is not None and is_packed(source.path):
        given = str(source.path)
    if given is not None:
        return _find_given(Path(given), options, model, source)
    return _find_stored(options, model, source)


def _find_given(
    given: Path, options: RuntimeConfig, model: ModelConfig, source: ModelSource
) -> Found:
    _check_given(given)
    packed = PackedWeights(given)
    wanted = identity(
        model,
        source,
        ep_size=options.num_ranks,
        seed=options.seed,
        weights_elsewhere=True,
    )
    # Fewer layers may run than are packed; each tensor is compared with the arena's.
    unset = {"layers", "table"}
    path, note = source.path, f"packed, {packed.path}"
    if path is not None and not is_packed(path) and not has_weights(path):
        packed.check_identity(wanted, unset=frozenset(unset | {"source"}))
        _check_config(packed, options, model)
        note += (
            f"; {path} has no weights to compare them with, but its config is that of the "
            f"checkpoint they were made from ({packed.index.origin})"
        )
        return Found(packed, note, "", given=True)
    packed.check_identity(wanted, unset=frozenset(unset))
    if path is not None and path.resolve() != packed.path.resolve():
        _check_content(packed, source)
    return Found(packed, note, "", given=True)


def _check_content(packed: PackedWeights, source: ModelSource) -> None:
    """Raises FingerprintMismatch unless the weights were made from this checkpoint's bytes."""
    index = packed.index
    assert source.path is not None
    if not is_packed(source.path) and _is_as_read(packed, source):
        return
    content = content_of(source)
    if index.content != content:
        raise FingerprintMismatch(
            f"{packed.path} was packed from {index.origin}, which is another checkpoint than "
            f"{source.path}, or has changed since: content {index.content[:16]} → {content[:16]}; "
            f"pack this one (python -m runtime.pack --model {source.path}), or give --model the "
            "checkpoint that --weights was packed from"
        )


def _is_as_read(packed: PackedWeights, source: ModelSource) -> bool:
    """Whether the checkpoint's files are those that were packed, by path, sizes and times.

    Who unpacks or copies files may give them any time of writing (an image of containers the same
    one to all): so none may have come to its place, or been touched, after the packing or shortly
    before its end.
    """
    index, path = packed.index, source.path
    if (index.origin, index.made_from) != (origin_of(source), made_from(source)):
        return False
    if path is None:
        return True
    before_ns = (packed.path / INDEX).stat().st_mtime_ns - CLOCK_SLACK_NS
    return all((path / name).stat().st_ctime_ns < before_ns for name, _, _ in index.made_from)


def _check_config(packed: PackedWeights, options: RuntimeConfig, model: ModelConfig) -> None:
    """Raises FingerprintMismatch unless the checkpoint's own config means the same model."""
    if CONFIG_FILE not in packed.index.small:
        raise FingerprintMismatch(
            f"{packed.path}: expected weights packed from a checkpoint, got a preset's; give that "
            "preset as --model"
        )
    packed.check_small()
    overrides = parse_overrides(options.overrides)
    theirs, _ = resolve_model(packed.path, layers=options.layers, overrides=overrides)
    theirs = with_head(theirs, options)
    one, two = dataclasses.asdict(theirs), dataclasses.asdict(model)
    # Where a text ends is the reader's to choose.
    skipped = ("eos_token_ids", "bos_token_id")
    found = [f"{n} {one[n]} → {two[n]}" for n in one if one[n] != two[n] and n not in skipped]
    if found:
        raise FingerprintMismatch(
            f"{packed.path} was packed from a checkpoint of another config than {options.model}: "
            f"{'; '.join(found)}; give --model the right directory, or pack that model's checkpoint"
        )


def _find_stored(options: RuntimeConfig, model: ModelConfig, source: ModelSource) -> Found:
    plain = "seeded at random" if source.is_preset else "the checkpoint"
    whole = dataclasses.replace(model, num_layers=model.num_hidden_layers)
    note, content = plain, None
    for config in dict.fromkeys((model, whole)):
        name = identity(config, source, ep_size=options.num_ranks, seed=options.seed)
        for folder in _candidates(options.store_path, name):
            try:
                packed = PackedWeights(folder)
                packed.check_identity(name)
            except (CorruptBundle, FingerprintMismatch, StoreError) as e:
                note = left_alone(plain, e)
                continue
            if not _is_as_read(packed, source):
                content = content_of(source) if content is None else content
                if packed.index.content != content:
                    note = (
                        f"{plain}: {folder} was packed from other weights, or they have changed "
                        f"since (content {packed.index.content[:16]} → {content[:16]}); pack again "
                        "with python -m runtime.pack"
                    )
                    continue
            return Found(packed, f"packed, {folder}", plain)
    return Found(None, note, plain)


def left_alone(plain: str, why: Exception) -> str:
    """The note for packed weights of the store that cannot be used; warns, for users without it."""
    note = f"{plain}: packed ones are not used: {why}"
    warnings.warn(note, RuntimeWarning, stacklevel=3)
    return note


def _candidates(store: Path, name: Fingerprint) -> list[Path]:
    """The store's packed weights of these shapes, of whatever checkpoint; an exact name first."""
    exact = store_folder(store, name)
    found = [
        p for p in Store(store).weights() if p == exact or p.name[-_HALF:] == exact.name[:_HALF]
    ]
    return sorted((p for p in found if is_packed(p)), key=lambda p: p != exact)


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
