"""The store: a directory of bundles and of compiled kernels, shared by every process of a machine.

    <store>/<fingerprint>/manifest.json, files…          one captured configuration
    <store>/kernels/<arch>/<digest>/meta.json, files…    device code, shared by all of them
    <store>/records/<digest>/meta.json                   what was measured on this machine
    <store>/.tmp-…                                       unfinished or replaced; swept after a day

An entry appears by one rename of a finished, synced directory, so a reader sees all of it or none.
There is no lock: of two writers the second finds the first one's entry and uses it. An entry that
fails its own checks is reported (`CorruptBundle`), and replaced when it is published again.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from capture_cache.contents import Contents
from capture_cache.dataclass import dataclass
from capture_cache.errors import CorruptBundle, FingerprintMismatch, OtherVersion, StoreError
from capture_cache.files import REMEDY, TAKEN, Files, open_dir, read_file, sweep, write_failure
from capture_cache.fingerprint import Fingerprint, diff, matches, nearest
from capture_cache.manifest import (
    MAX_RECORD_BYTES,
    FileRecord,
    Manifest,
    files_from_json,
    files_to_json,
    seal,
    unseal,
)

_HEX = re.compile(r"[0-9a-f]{64}")
_ARCH = re.compile(r"sm_[0-9]{2,3}[a-z]?")
_ATTEMPTS = 16  # at moving an entry in, while others replace and prune the same one
_FOLDERS = ("kernels", "records", "weights")
_WHERE = "give the directory that capture was given with --store"
MANIFEST = "manifest.json"
META = "meta.json"


@dataclass(frozen=True)
class Loaded:
    """An entry that passed every check: its record and its files' contents."""

    path: Path
    record: Mapping[str, Any]
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class Bundle:
    """A stored capture: the manifest and its files' contents."""

    path: Path
    manifest: Manifest
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class Listed:
    """One bundle as found: its manifest, or what is wrong with it, or that it is not of ours."""

    path: Path
    manifest: Manifest | None
    problem: str | None
    other_version: bool = False


class Store:
    """Reads and writes `root`; nothing is created before the first write.

    Args:
        root: the directory; its owner must be the caller or root, and not everyone may write it.
        files: how to write; tests pass one that fails.
    """

    def __init__(self, root: Path | str, files: Files | None = None) -> None:
        self.root = Path(root).absolute()
        self._files = files or Files()
        self._ready = False

    # -- bundles ---------------------------------------------------------------------------------

    def publish(
        self,
        fingerprint: Fingerprint,
        manifest: Manifest,
        files: Mapping[str, bytes],
        *,
        replace_existing: bool = False,
    ) -> Bundle:
        """Store a bundle; an existing valid one wins unless `replace_existing`.

        Returns the bundle that now stands in the store.

        Raises:
            StoreError: no space, no permission, an unsafe directory.
            ValueError: the manifest is of another fingerprint, or holds what JSON cannot.
        """
        if manifest.fingerprint.digest != fingerprint.digest:
            raise ValueError(
                "the manifest describes another fingerprint: "
                + "; ".join(diff(manifest.fingerprint, fingerprint))
            )
        parts = (fingerprint.digest,)
        record = manifest.to_json()
        winner = self._publish(parts, MANIFEST, record, files, replace_existing)
        if winner is not None:
            return _bundle(winner)
        sealed = replace(manifest, files={n: FileRecord.of(d) for n, d in files.items()})
        return Bundle(self.root / parts[0], sealed, dict(files))

    def load(self, fingerprint: Fingerprint) -> Bundle | None:
        """The bundle of `fingerprint`, every byte checked; None if there is none.

        Raises:
            CorruptBundle: there is one, and it is not what its manifest says.
            StoreError: the store cannot be read safely.
        """
        loaded = self._load((fingerprint.digest,), MANIFEST)
        return None if loaded is None else _bundle(loaded)

    def read(self, fingerprint: Fingerprint, first: Sequence[str] = ()) -> Loaded | None:
        """As `load`, its manifest still as JSON (`parse` reads that), its files on their way.

        Args:
            first: files that are wanted before the others.

        Its `files` are `Contents`: each is checked before it is handed out. The caller finishes or
        closes them.
        """
        return self._open((fingerprint.digest,), MANIFEST, first)

    @staticmethod
    def parse(loaded: Loaded) -> Bundle:
        """The bundle that `read` found; raises CorruptBundle."""
        return _bundle(loaded)

    def find(
        self, fingerprint: Fingerprint, *, unset: Collection[str] = frozenset()
    ) -> Fingerprint | None:
        """The stored fingerprint that is valid here: `fingerprint` itself, or one that agrees.

        Args:
            unset: fields in which this installation cannot differ, such as the version of a
                compiler that it has not got.
        """
        if (self.root / fingerprint.digest).exists() or not unset:
            return fingerprint if (self.root / fingerprint.digest).exists() else None
        return next((s for s in self._fingerprints() if matches(s, fingerprint, unset=unset)), None)

    def require(self, fingerprint: Fingerprint) -> Bundle:
        """`load`, where a miss is an error.

        Raises:
            FingerprintMismatch: nothing stored is valid here; says what differs in the nearest.
            CorruptBundle, StoreError: as `load`.
        """
        bundle = self.load(fingerprint)
        if bundle is None:
            raise FingerprintMismatch(self.explain_miss(fingerprint))
        return bundle

    def explain_miss(self, fingerprint: Fingerprint) -> str:
        """Why nothing stored serves: the nearest bundle, field by field."""
        stored = list(self._fingerprints())
        best = nearest(stored, fingerprint)
        if best is None:
            return f"{self.root} holds no bundle; capture one"
        return (
            f"none of the {len(stored)} bundles in {self.root} is valid here; nearest: "
            + "; ".join(diff(best, fingerprint))
            + ". Capture again"
        )

    def entries(self) -> list[Listed]:
        """Every bundle, the damaged ones with their problem; only records are read, not files."""
        if not self.root.is_dir():
            return []
        found = []
        for name in sorted(n for n in os.listdir(self.root) if _HEX.fullmatch(n)):
            path = self.root / name
            try:
                record = self._record((name,), MANIFEST)
                if record is not None:
                    found.append(Listed(path, _manifest(record, path), None))
            except CorruptBundle as e:
                found.append(Listed(path, None, str(e), isinstance(e, OtherVersion)))
        return found

    def require_store(self) -> None:
        """Raises ValueError, with what `root` is instead, unless it is a store, or empty."""
        if not self.root.is_dir():
            got = "something else" if os.path.lexists(self.root) else "nothing"
            raise ValueError(f"store {self.root}: expected a directory, got {got}; {_WHERE}")
        names = [n for n in os.listdir(self.root) if not n.startswith(".tmp-")]
        if names and not any(_HEX.fullmatch(n) or n in _FOLDERS for n in names):
            told = ", ".join(sorted(names)[:3])
            raise ValueError(
                f"store {self.root}: expected a store of ours, got a directory of {told}; {_WHERE}"
            )

    def check_writable(self) -> None:
        """Find out before hours of work whether its result could be stored.

        Raises:
            StoreError: no permission, an unsafe directory, or none at all.
        """
        self._prepare(())
        temporary = self._temporary()
        try:
            self._files.make_dir(temporary)
        except OSError as e:
            raise self._failure(e, self.root) from e
        finally:
            self._discard(temporary)

    def _fingerprints(self) -> Iterator[Fingerprint]:
        """Of every bundle whose record is sound."""
        for name in sorted(_names(self.root, _HEX)):
            with contextlib.suppress(CorruptBundle, ValueError, TypeError):
                record = self._record((name,), MANIFEST)
                if record is not None:
                    yield Fingerprint.from_json(record.get("fingerprint"))

    # -- compiled kernels ------------------------------------------------------------------------

    def publish_kernel(
        self,
        arch: str,
        digest: str,
        meta: Mapping[str, Any],
        files: Mapping[str, bytes],
        *,
        replace_existing: bool = False,
    ) -> Loaded:
        """Store device code under (arch, digest); a valid entry wins unless `replace_existing`.

        Raises:
            StoreError: no space, no permission, an unsafe directory.
        """
        parts = kernel_parts(arch, digest)
        winner = self._publish(parts, META, {"meta": dict(meta)}, files, replace_existing)
        if winner is not None:
            return _kernel(winner)
        return Loaded(self.root.joinpath(*parts), dict(meta), dict(files))

    def load_kernel(self, arch: str, digest: str) -> Loaded | None:
        """The kernel entry, `record` being the meta that was published; None if there is none.

        Raises:
            CorruptBundle: it is not what its record says.
            StoreError: the store cannot be read safely.
        """
        loaded = self._load(kernel_parts(arch, digest), META)
        return None if loaded is None else _kernel(loaded)

    def kernels(self) -> list[tuple[str, str]]:
        """(arch, digest) of every stored kernel, damaged ones included."""
        folder, found = self.root / "kernels", []
        for arch in sorted(_names(folder, _ARCH)):
            found += [(arch, digest) for digest in sorted(_names(folder / arch, _HEX))]
        return found

    def kernel_record(self, arch: str, digest: str) -> dict[str, Any] | None:
        """What `load_kernel` would read first: the record alone; raises as that."""
        return self._record(kernel_parts(arch, digest), META)

    def weights(self) -> list[Path]:
        """Directories of packed weights, damaged ones included."""
        folder = self.root / "weights"
        return [folder / name for name in sorted(_names(folder, _HEX))]

    # -- measurements ----------------------------------------------------------------------------

    def publish_record(self, digest: str, record: Mapping[str, Any]) -> None:
        """Store a small record under what it is valid for; replaces an earlier one.

        Raises:
            StoreError: no space, no permission, an unsafe directory.
            ValueError: something in it is not JSON.
        """
        self._publish(record_parts(digest), META, {"meta": dict(record)}, {}, True)

    def load_record(self, digest: str) -> Mapping[str, Any] | None:
        """The record that was published; None if there is none.

        Raises:
            CorruptBundle: it is not what was written.
            StoreError: the store cannot be read safely.
        """
        loaded = self._load(record_parts(digest), META)
        return None if loaded is None else dict(loaded.record["meta"])

    def records(self) -> list[str]:
        """Digests of all measurements, damaged ones included."""
        return sorted(_names(self.root / "records", _HEX))

    # -- entries ---------------------------------------------------------------------------------

    def remove(self, parts: tuple[str, ...]) -> None:
        """Remove an entry: it vanishes in one step, then its files go.

        Raises:
            StoreError: no permission.
        """
        aside = self._temporary()
        try:
            self._files.rename(self.root.joinpath(*parts), aside)
        except FileNotFoundError:
            return  # another was quicker
        except OSError as e:
            raise self._failure(e, self.root.joinpath(*parts)) from e
        self._discard(aside)

    def _record(self, parts: tuple[str, ...], record_name: str) -> dict[str, Any] | None:
        with open_dir(self.root, parts) as fd:
            if fd is None:
                return None
            path = self.root.joinpath(*parts)
            return unseal(read_file(fd, record_name, path, MAX_RECORD_BYTES), path / record_name)

    def _load(self, parts: tuple[str, ...], record_name: str) -> Loaded | None:
        """As `_open`, every file read and checked."""
        loaded = self._open(parts, record_name)
        if loaded is None:
            return None
        assert isinstance(loaded.files, Contents)
        loaded.files.finish()
        return replace(loaded, files=dict(loaded.files))

    def _open(
        self, parts: tuple[str, ...], record_name: str, first: Sequence[str] = ()
    ) -> Loaded | None:
        with open_dir(self.root, parts) as fd:
            if fd is None:
                return None
            path = self.root.joinpath(*parts)
            record = unseal(read_file(fd, record_name, path, MAX_RECORD_BYTES), path / record_name)
            if record.get("entry") != "/".join(parts):
                raise CorruptBundle(
                    f"{path}: expected the record of {'/'.join(parts)}, got "
                    f"{record.get('entry')!r:.100}; {REMEDY}"
                )
            records = files_from_json(record.get("files"), path / record_name)
            return Loaded(path, record, Contents(fd, records, path, first))

    def _publish(
        self,
        parts: tuple[str, ...],
        record_name: str,
        record: Mapping[str, Any],
        files: Mapping[str, bytes],
        replace_existing: bool,
    ) -> Loaded | None:
        """Write an entry; returns the valid one that was there and stays, if so."""
        sealed = seal({**record, "entry": "/".join(parts), "files": files_to_json(files)})
        self._prepare(parts[:-1])
        temporary = self._temporary()
        try:
            self._write(temporary, {**files, record_name: sealed})
            return self._move_in(temporary, parts, record_name, replace_existing)
        except OSError as e:
            raise self._failure(e, self.root.joinpath(*parts)) from e
        finally:
            self._discard(temporary)

    def _write(self, temporary: Path, contents: Mapping[str, bytes]) -> None:
        self._files.make_dir(temporary)
        folders = sorted({str(Path(name).parent) for name in contents} - {"."})
        for folder in folders:
            self._files.make_dir(temporary / folder)
        for name, data in contents.items():
            self._files.write(temporary / name, data)
        for folder in folders:
            self._files.sync_dir(temporary / folder)
        self._files.sync_dir(temporary)

    def _move_in(
        self, temporary: Path, parts: tuple[str, ...], record_name: str, replace_existing: bool
    ) -> Loaded | None:
        final = self.root.joinpath(*parts)
        for _ in range(_ATTEMPTS):
            try:
                self._files.rename(temporary, final)
                self._files.sync_dir(final.parent)
                return None
            except OSError as e:
                if e.errno not in TAKEN:
                    raise
            winner = None if replace_existing else self._valid(parts, record_name)
            if winner is not None:
                return winner
            # Moved away in one step, so no reader ever sees it half deleted.
            aside = self._temporary()
            with contextlib.suppress(FileNotFoundError):  # another writer was quicker
                self._files.rename(final, aside)
            self._discard(aside)
            replace_existing = False
        raise StoreError(
            f"{final} reappeared {_ATTEMPTS} times while it was being replaced; "
            "stop the other process that writes it, or give another --store"
        )

    def _valid(self, parts: tuple[str, ...], record_name: str) -> Loaded | None:
        try:
            return self._load(parts, record_name)
        except CorruptBundle:
            return None  # it is being replaced by a good one: that is the remedy

    def _prepare(self, parents: tuple[str, ...]) -> None:
        """Make the directories above an entry and see that they are safe."""
        try:
            self.root.mkdir(0o755, parents=True, exist_ok=True)
            for depth in range(len(parents)):
                folder = self.root.joinpath(*parents[: depth + 1])
                with contextlib.suppress(FileExistsError):
                    self._files.make_dir(folder)
                    self._files.sync_dir(folder.parent)
            with open_dir(self.root, parents, entry=False):
                pass
        except OSError as e:
            raise self._failure(e, self.root) from e
        if not self._ready:
            sweep(self.root, self._files)
            self._ready = True

    def _temporary(self) -> Path:
        return self.root / f".tmp-{os.urandom(16).hex()}"

    def _discard(self, path: Path) -> None:
        # What cannot be removed now is invisible under its name and swept later.
        with contextlib.suppress(OSError):
            self._files.remove(path)

    def _failure(self, e: OSError, path: Path) -> StoreError:
        return write_failure(e, path, "--store")


def _names(folder: Path, pattern: re.Pattern[str]) -> list[str]:
    return [n for n in os.listdir(folder) if pattern.fullmatch(n)] if folder.is_dir() else []


def _bundle(loaded: Loaded) -> Bundle:
    return Bundle(loaded.path, _manifest(loaded.record, loaded.path), loaded.files)


def _manifest(record: Mapping[str, Any], path: Path) -> Manifest:
    manifest = Manifest.from_json(record, path / MANIFEST)
    if manifest.fingerprint.digest != path.name:
        raise CorruptBundle(
            f"{path}: expected the fingerprint {path.name}, got {manifest.fingerprint.digest}; "
            "delete it and capture again"
        )
    return manifest


def _kernel(loaded: Loaded) -> Loaded:
    return replace(loaded, record=loaded.record["meta"])


def record_parts(digest: str) -> tuple[str, ...]:
    """Where a measurement lies below the root. Raises ValueError for names that are none."""
    if not _HEX.fullmatch(digest):
        raise ValueError(f"expected 64 hex digits, got {digest!r}")
    return ("records", digest)


def kernel_parts(arch: str, digest: str) -> tuple[str, ...]:
    """Where a kernel lies below the root. Raises ValueError for names that are none."""
    if not _ARCH.fullmatch(arch) or not _HEX.fullmatch(digest):
        raise ValueError(f"expected an architecture and 64 hex digits, got {arch!r}, {digest!r}")
    return ("kernels", arch, digest)
