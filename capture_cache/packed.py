"""Packed weights on disk: safetensors shards that lie as the arena wants them, and a sealed index.

    weights.json               sealed: identity, tensors, sums, and size and hashes of every file
    shared.safetensors         what every rank holds: attention, dense layers, embedding, head
    experts-RRR-of-NNN.safetensors   the routed experts of one rank
    config.json, …             copies of the model's small files, if it had any

In a shard the tensors follow each other in the arena's order, each padded with zeros to 256 bytes
(a `pad.N` entry of the header), and the data begins on a multiple of 4096 bytes. So what is
adjacent in the arena is adjacent in a file, and is copied in one piece. Offsets are not stored but
computed, and a header is compared with the only bytes that it may be: nothing in a shard is ever
interpreted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from capture_cache import files
from capture_cache.checksum import WORD_BYTES
from capture_cache.errors import CorruptBundle, FingerprintMismatch, LayoutError
from capture_cache.files import open_dir, read_file, unsafe
from capture_cache.fingerprint import Fingerprint, diff
from capture_cache.layout import ENTRY_ALIGNMENT, ArenaLayout, Place
from capture_cache.manifest import MAX_RECORD_BYTES
from capture_cache.packed_index import (
    INDEX,
    PIECE_BYTES,
    REMEDY,
    SHARED,
    Index,
    PackedTensor,
    shard_names,
)


@dataclass(frozen=True)
class Run:
    """Bytes that are adjacent in a shard and in the arena."""

    file: str
    file_offset: int
    arena_offset: int
    nbytes: int


@dataclass(frozen=True)
class ArenaPart:
    """Where one stored tensor lies in the arena; `nbytes` is what is copied there."""

    name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def parts_of(place: Place) -> list[ArenaPart]:
    """The stored tensors of an entry: itself, or the two that lie joined in it.

    `layers.{i}.all_{leaf}` [E + 1, ...] holds `experts_{leaf}` [E, ...] and then `shared_{leaf}`
    (graphs.weights.stored_table).

    Raises:
        LayoutError: joined tensors of which the second does not begin on a word of the sums.
    """
    entry = place.entry
    layer, joined, leaf = entry.name.rpartition(".all_")
    if not joined:
        # The padding is copied too: the next entry begins behind it, for all are aligned alike.
        padded = -(-entry.nbytes // ENTRY_ALIGNMENT) * ENTRY_ALIGNMENT
        return [ArenaPart(entry.name, entry.shape, place.offset, padded)]
    count, shape = entry.shape[0] - 1, entry.shape[1:]
    each = entry.nbytes // entry.shape[0]
    if count * each % WORD_BYTES:
        raise LayoutError(
            f"arena entry {entry.name!r}: expected experts of whole {WORD_BYTES} bytes in all, got "
            f"{count} of {each}; sums are made of such words: load this model's checkpoint instead "
            "of packed weights"
        )
    whole = -(-each // WORD_BYTES) * WORD_BYTES  # the rest of its last word is padding
    return [
        ArenaPart(f"{layer}.experts_{leaf}", (count, *shape), place.offset, count * each),
        ArenaPart(f"{layer}.shared_{leaf}", shape, place.offset + count * each, whole),
    ]


class PackedWeights:
    """A directory of packed weights whose index has been read and checked.

    Raises:
        CorruptBundle: the index is missing, damaged or of another version.
        StoreError: the directory is not safe to read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        data = self._read(INDEX, MAX_RECORD_BYTES)
        with _packed_remedy():
            self.index = Index.from_bytes(data, self.path / INDEX)
        self.shards = self.index.shards()

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(s.nbytes for s in self.shards.values())

    def check_identity(self, wanted: Fingerprint, *, unset: frozenset[str] = frozenset()) -> None:
        """Raises FingerprintMismatch naming each field in which they differ, `unset` excepted."""
        found = diff(*(_without(f, unset) for f in (self.index.identity, wanted)))
        if found:
            raise FingerprintMismatch(
                f"{self.path} holds other weights than are wanted: {'; '.join(found)}; pack again "
                "with python -m runtime.pack, or give the right --weights"
            )

    def runs(self, layout: ArenaLayout, rank: int, *, computed: frozenset[str]) -> list[Run]:
        """What to copy where, to fill the weights section of `layout` for `rank`.

        Args:
            computed: entries of the section that are not stored.

        Raises:
            FingerprintMismatch: a tensor is missing, or of another shape or type.
        """
        tensors = {t.name: t for t in self.index.tensors}
        problems, runs = [], list[Run]()
        places = [p for p in layout.places if p.entry.section == "weights"]
        for place in places:
            entry = place.entry
            if entry.alignment % ENTRY_ALIGNMENT:
                raise LayoutError(
                    f"arena entry {entry.name!r}: expected an alignment of whole {ENTRY_ALIGNMENT} "
                    f"bytes, to which packed weights are padded, got {entry.alignment}"
                )
            if entry.name in computed:
                continue
            for part in parts_of(place):
                tensor = tensors.get(part.name)
                if tensor is None or (tensor.shape, tensor.dtype) != (part.shape, entry.dtype):
                    got = "nothing" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
                    problems.append(f"{part.name} {got} → {list(part.shape)} {entry.dtype}")
                    continue
                runs.append(self._run(tensor, rank, part))
        if problems:
            raise FingerprintMismatch(
                f"{self.path} does not hold this model's weights: {'; '.join(problems[:4])}"
                f"{' …' if len(problems) > 4 else ''}; pack again with python -m runtime.pack"
            )
        return list(_merged(runs))

    def _run(self, tensor: PackedTensor, rank: int, part: ArenaPart) -> Run:
        file = shard_names(self.index.ep_size)[rank + 1] if tensor.expert else SHARED
        return Run(file, self.shards[file].offsets[tensor.name], part.offset, part.nbytes)

    def open_shard(self, name: str) -> int:
        """A file handle of a shard whose owner, mode, size and header are as they must be.

        Raises:
            CorruptBundle: one of them is not.
        """
        shard, shown = self.shards[name], self.path / name
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(shown, flags)
        except OSError as e:
            raise CorruptBundle(
                f"{shown}: expected a regular file of ours, got {e.strerror}; {REMEDY}"
            ) from e
        try:
            info = os.fstat(fd)
            problem = unsafe(info)
            if not stat.S_ISREG(info.st_mode):
                problem = "expected a regular file, got another"
            elif info.st_size != shard.nbytes:
                problem = f"expected {shard.nbytes} bytes, got {info.st_size}"
            elif problem is None and os.pread(fd, len(shard.header), 0) != shard.header:
                problem = "expected the header that its index implies, got another"
            if problem is not None:
                raise CorruptBundle(f"{shown}: {problem}; {REMEDY}")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def check_small(self) -> None:
        """Compare the copied small files with their hashes. Raises CorruptBundle."""
        for name, record in self.index.small.items():
            with _packed_remedy():
                record.check(self._read(name, record.nbytes), self.path / name)

    def _read(self, name: str, max_bytes: int) -> bytes:
        with _packed_remedy(), open_dir(self.path, (), entry=False) as fd:
            if fd is None:
                raise CorruptBundle(
                    f"{self.path}: expected a directory of packed weights, got nothing; "
                    "make one with python -m runtime.pack"
                )
            return read_file(fd, name, self.path, max_bytes)

    def verify(self, shards: Sequence[str] | None = None) -> Iterator[tuple[str, int]]:
        """Compare every sha256, of some shards or of all and of the small files.

        Yields:
            (shard, bytes) after each piece that is right.

        Raises:
            CorruptBundle: names the file and where in it the damage is.
        """
        if shards is None:
            self.check_small()
        for name in self.shards if shards is None else shards:
            fd = self.open_shard(name)
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                try:
                    check = functools.partial(self._check_piece, name, fd)
                    for nbytes in pool.map(check, range(self.shards[name].num_pieces)):
                        yield name, nbytes
                finally:
                    pool.shutdown(cancel_futures=True)
                    os.close(fd)

    def _check_piece(self, shard: str, fd: int, i: int) -> int:
        """Compare piece `i` with its sha256; returns its bytes. Raises CorruptBundle."""
        data = os.pread(fd, PIECE_BYTES, i * PIECE_BYTES)
        expected = self.index.pieces[shard][64 * i : 64 * i + 64]
        got = hashlib.sha256(data).hexdigest()
        if got != expected:
            begin = i * PIECE_BYTES
            held = [
                t
                for t, at in self.shards[shard].offsets.items()
                if begin <= at < begin + PIECE_BYTES
            ]
            raise CorruptBundle(
                f"{self.path / shard}: expected sha256 {expected} of bytes {begin} to "
                f"{begin + len(data)}, got {got} (near {', '.join(held[:3]) or 'one tensor'}); "
                f"{REMEDY}"
            )
        return len(data)


def _without(fingerprint: Fingerprint, names: frozenset[str]) -> Fingerprint:
    return Fingerprint(tuple(f for f in fingerprint.fields if f[0] not in names))


def _merged(runs: Sequence[Run]) -> Iterator[Run]:
    """Runs joined where they are adjacent on both sides."""
    last: Run | None = None
    for run in runs:
        joins = (
            last is not None
            and last.file == run.file
            and last.file_offset + last.nbytes == run.file_offset
            and last.arena_offset + last.nbytes == run.arena_offset
        )
        if joins:
            assert last is not None
            last = Run(last.file, last.file_offset, last.arena_offset, last.nbytes + run.nbytes)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last


@contextlib.contextmanager
def _packed_remedy() -> Iterator[None]:
    """What reads any entry says that it will be made again; packed weights are so when asked."""
    try:
        yield
    except CorruptBundle as e:
        raise type(e)(str(e).replace(files.REMEDY, REMEDY)) from e


def is_packed(path: Path) -> bool:
    """Whether a directory holds packed weights, damaged or not."""
    return os.path.lexists(path / INDEX)
