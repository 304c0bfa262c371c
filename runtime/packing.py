"""Packing: a checkpoint, or a preset's seed, into shards that lie as the arena wants them.

The shards are mapped and the ordinary loaders fill them, so packed weights are the loaded ones to
the bit, and host memory is the page cache's affair. All is written under a temporary name, forced
to the disk and renamed: a reader sees all of it or none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import mmap
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from capture_cache.checksum import WORD_BYTES, sum64
from capture_cache.errors import CorruptBundle, StoreError
from capture_cache.files import TAKEN, Files, sweep, write_failure
from capture_cache.fingerprint import Fingerprint
from capture_cache.manifest import FileRecord
from capture_cache.packed import PackedWeights, is_packed
from capture_cache.packed_index import (
    INDEX,
    PIECE_BYTES,
    REMEDY,
    Index,
    PackedTensor,
    Shard,
    plan_shards,
    shard_names,
)
from graphs.checkpoint import load_checkpoint, random_weights
from graphs.model_config import ModelConfig
from graphs.model_source import ModelSource
from graphs.safetensors_dir import open_checkpoint, read_config
from graphs.weights import is_per_rank, weight_table
from kernels.triton.launch import Launcher
from runtime.weights import content_of, identity, made_from, origin_of

# Copied beside the weights, so that the directory can be given as a model.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_MAX_SMALL_BYTES = 256 << 20
# (kind of work, bytes done, bytes in all)
Progress = Callable[[str, int, int], None]
Views = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Packing:
    """Packed weights that stand now.

    Attributes:
        made: they were written by this call; else they were there, and every sha256 was compared.
        replaced: what was wrong with those that stood in their place, if that is why.
    """

    packed: PackedWeights
    made: bool
    replaced: str | None = None


def pack(model: ModelConfig, source: ModelSource, out: Path, **options: Any) -> PackedWeights:
    """`make_packed`, where only the result counts."""
    return make_packed(model, source, out, **options).packed


def make_packed(
    model: ModelConfig,
    source: ModelSource,
    out: Path,
    *,
    ep_size: int = 1,
    seed: int = 0,
    device: str = "cpu",
    launch: Launcher | None = None,
    force: bool = False,
    in_store: bool = False,
    progress: Progress = lambda *_: None,
    files: Files | None = None,
) -> Packing:
    """Write packed weights to `out`; the same weights that are there, and sound, are kept.

    Args:
        ep_size: ranks to share the experts among.
        seed: of a preset's weights.
        device: where they are converted: "cpu" or "cuda".
        launch: how to run kernels there; for a preset on "cuda".
        force: replace the packed weights that `out` holds, damaged or not.
        in_store: `out` is named after these weights, so what is damaged there is made again.
        files: how to write; tests pass one that fails.

    Raises:
        CheckpointError: the checkpoint is damaged or another model's.
        StoreError: no space, no permission, or `out` holds something else.
        ValueError: `ep_size` does not divide the experts.
    """
    name = identity(model, source, ep_size=ep_size, seed=seed)
    out = out.absolute()
    if force and out.exists() and not _is_replaceable(out):
        raise StoreError(
            f"{out}: expected nothing, or packed weights, got other files; --force does not remove "
            "them: give another --out"
        )
    damage = None
    if not force:
        try:
            standing = _standing(out, name, source)
            if standing is not None:
                for shard, done in _checked(standing):
                    progress(f"check {shard}", done, standing.shards[shard].nbytes)
                return Packing(standing, made=False)
        except CorruptBundle as e:
            damage = str(e).removesuffix(f"; {REMEDY}")
            if not in_store and not _is_of(out, name):
                raise StoreError(
                    f"{out}: expected nothing, or these weights, got {e}; give another --out, or "
                    "--force to replace it"
                ) from e
    packer = _Packer(model, source, name, ep_size, files or Files(), progress)
    packer.fill = lambda views, rank: _fill(
        model, source, views, rank, ep_size, seed, launch, progress
    )
    packer.device = torch.device(device)
    return Packing(packer.run(out, force=force or damage is not None), True, damage)


def _fill(
    model: ModelConfig,
    source: ModelSource,
    views: Views,
    rank: int,
    ep_size: int,
    seed: int,
    launch: Launcher | None,
    progress: Progress,
) -> None:
    """One rank's experts, and with rank 0 what all ranks share."""
    what = f"pack rank {rank}"
    if source.path is not None:
        load_checkpoint(
            source.path,
            model,
            views,
            ep_rank=rank,
            ep_size=ep_size,
            replicated=rank == 0,
            progress=lambda done, total: progress(what, done, total),
        )
        return
    progress(what, 0, 1)
    random_weights(
        model,
        views,
        seed=seed,
        launch=launch,
        ep_rank=rank,
        ep_size=ep_size,
        replicated=rank == 0,
    )
    progress(what, 1, 1)


def _standing(out: Path, name: Fingerprint, source: ModelSource) -> PackedWeights | None:
    """What `out` holds, if it is these weights; None if it is absent or empty.

    Raises:
        StoreError: it holds something else.
        CorruptBundle: it holds packed weights that are damaged, or of another version.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    got = "other files"
    if is_packed(out):
        packed = PackedWeights(out)
        got = "packed weights of another model, conversion or number of ranks"
        if packed.index.identity == name:
            got = f"packed weights of another checkpoint of equal shapes ({packed.index.origin})"
            if packed.index.content == content_of(source):
                return packed
    raise StoreError(
        f"{out}: expected nothing, or these weights, got {got}; give another --out, or --force to "
        "replace it"
    )


def _checked(packed: PackedWeights) -> Iterator[tuple[str, int]]:
    """(shard, bytes of it that are right so far). Raises CorruptBundle."""
    done = dict.fromkeys(packed.shards, 0)
    for shard, nbytes in packed.verify():
        done[shard] += nbytes
        yield shard, done[shard]


def _is_of(out: Path, name: Fingerprint) -> bool:
    """Whether what is damaged at `out` says, soundly, that it was these weights."""
    try:
        return PackedWeights(out).index.identity == name
    except CorruptBundle:
        return False


def _is_replaceable(out: Path) -> bool:
    return is_packed(out) or (out.is_dir() and not any(out.iterdir()))


class _Packer:
    """One packing, in a temporary directory beside its final place."""

    fill: Callable[[Views, int], None]
    device: torch.device

    def __init__(
        self,
        model: ModelConfig,
        source: ModelSource,
        name: Fingerprint,
        ep_size: int,
        files: Files,
        progress: Progress,
    ) -> None:
        self.model, self.source, self.name = model, source, name
        self.ep_size, self.files, self.progress = ep_size, files, progress
        self.tensors = tuple(
            PackedTensor(n, s.shape, s.dtype, is_per_rank(model, n))
            for n, s in weight_table(model, ep_size=ep_size).items()
        )
        self.shards = plan_shards(self.tensors, ep_size, name)

    def run(self, out: Path, *, force: bool) -> PackedWeights:
        temporary = out.parent / f".tmp-{uuid.uuid4().hex}"
        before = made_from(self.source)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            sweep(out.parent, self.files)
            self.files.make_dir(temporary)
            for shard in self.shards.values():
                self.files.allocate(temporary / shard.name, shard.nbytes)
            content = content_of(self.source)
            index = self._write_shards(temporary)
            if made_from(self.source) != before:
                raise StoreError(
                    f"{self.source.path}: expected files that stay as they are, got other sizes or "
                    "times after reading; pack again once nobody writes them"
                )
            self._write_small(temporary, index, before, content)
            return self._move_in(temporary, out, force)
        except OSError as e:
            raise write_failure(e, out, "--out") from e
        finally:
            with contextlib.suppress(OSError):  # swept later
                self.files.remove(temporary)

    def _write_shards(self, folder: Path) -> Index:
        maps = {n: _mapped(folder / n, s) for n, s in self.shards.items()}
        for name, data in maps.items():
            header = self.shards[name].header
            data[: len(header)] = np.frombuffer(header, np.uint8)
        staged = None if self.device.type == "cpu" else self._staging()
        for rank in range(self.ep_size):
            views = {t.name: self._view(maps, t, rank) for t in self.tensors}
            self.fill(staged if staged is not None else views, rank)
            for tensor in self.tensors:
                if staged is not None and (tensor.expert or rank == 0):
                    source = staged[tensor.name].view(torch.uint8)
                    views[tensor.name].view(torch.uint8).copy_(source)
            del views
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            digests = {n: self._digest(n, data, pool) for n, data in maps.items()}
        maps.clear()
        for name in self.shards:
            self.files.sync_file(folder / name)
        names = shard_names(self.ep_size)
        tensors = []
        for t in self.tensors:
            held = names[1:] if t.expert else names[:1]
            tensors.append(dataclasses.replace(t, sums=tuple(digests[n][1][t.name] for n in held)))
        pieces = {n: hashes for n, (hashes, _) in digests.items()}
        return Index(self.name, self.ep_size, tuple(tensors), (), pieces, {})

    def _digest(
        self, name: str, data: NDArray[np.uint8], pool: ThreadPoolExecutor
    ) -> tuple[str, dict[str, int]]:
        """The sha256 of a shard's pieces, joined, and the sum of each tensor, in one reading."""
        shard = self.shards[name]
        padded = {t.name: t.padded for t in self.tensors}
        spans = [(n, at, at + padded[n]) for n, at in shard.offsets.items()]
        sums = dict.fromkeys(shard.offsets, 0)

        def piece(begin: int) -> tuple[str, dict[str, int]]:
            end = min(begin + PIECE_BYTES, len(data))
            found = {
                n: sum64(data[max(a, begin) : min(b, end)], (max(a, begin) - a) // WORD_BYTES)
                for n, a, b in spans
                if a < end and b > begin
            }
            return hashlib.sha256(data[begin:end].data).hexdigest(), found

        hashes = []
        for digest, found in pool.map(piece, range(0, len(data), PIECE_BYTES)):
            hashes.append(digest)
            for n, value in found.items():
                sums[n] = (sums[n] + value) % (1 << 64)
            self.progress(f"hash {name}", min(len(data), len(hashes) * PIECE_BYTES), len(data))
        return "".join(hashes), sums

    def _staging(self) -> Views:
        """One rank's tensors on the device, used again for every rank."""
        return {
            t.name: torch.zeros(t.nbytes, dtype=torch.uint8, device=self.device)
            .view(getattr(torch, t.dtype))
            .view(t.shape)
            for t in self.tensors
        }

    def _view(
        self, maps: Mapping[str, NDArray[np.uint8]], tensor: PackedTensor, rank: int
    ) -> torch.Tensor:
        name = shard_names(self.ep_size)[rank + 1 if tensor.expert else 0]
        at = self.shards[name].offsets[tensor.name]
        raw = torch.from_numpy(maps[name][at : at + tensor.nbytes])
        dtype: torch.dtype = getattr(torch, tensor.dtype)
        return raw.view(dtype).view(tensor.shape)

    def _write_small(
        self, folder: Path, index: Index, before: tuple[tuple[str, int, int], ...], content: str
    ) -> None:
        small: dict[str, bytes] = {}
        stored_dtype = None
        if self.source.path is not None:
            found = [n for n in SMALL_FILES if (self.source.path / n).is_file()]
            for name in found:
                data = (self.source.path / name).read_bytes()
                if len(data) <= _MAX_SMALL_BYTES:
                    small[name] = data
            hf = read_config(self.source.path)
            if not hf.get("dtype") and not hf.get("torch_dtype"):
                tensors = open_checkpoint(self.source.path).tensors
                stored_dtype = tensors["model.embed_tokens.weight"].dtype
        records = {name: FileRecord.of(data) for name, data in small.items()}
        index = dataclasses.replace(
            index,
            made_from=before,
            small=records,
            stored_dtype=stored_dtype,
            origin=origin_of(self.source),
            content=content,
        )
        for name, data in {**small, INDEX: index.to_bytes()}.items():
            self.files.write(folder / name, data)
        self.files.sync_dir(folder)

    def _move_in(self, temporary: Path, out: Path, force: bool) -> PackedWeights:
        try:
            self._rename(temporary, out)
        except OSError as e:
            if e.errno not in TAKEN:
                raise
            if not force:  # another packer was quicker: its weights, if they are these
                standing = _standing(out, self.name, self.source)
                if standing is not None:
                    return standing
            aside = out.parent / f".tmp-{uuid.uuid4().hex}"
            self.files.rename(out, aside)
            self._rename(temporary, out)
            with contextlib.suppress(OSError):
                self.files.remove(aside)
        return PackedWeights(out)

    def _rename(self, temporary: Path, out: Path) -> None:
        self.files.rename(temporary, out)
        self.files.sync_dir(out.parent)


def _mapped(path: Path, shard: Shard) -> NDArray[np.uint8]:
    """A file's bytes, writable; the mapping lives as long as the array."""
    with path.open("r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), shard.nbytes), np.uint8)
