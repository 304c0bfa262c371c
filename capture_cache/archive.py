"""A bundle and its kernels as one file: a plain tar that is written and read by one rule.

    export.json              sealed: which entries follow, their files, sizes and hashes
    <fingerprint>/manifest.json, …    the bundle, as it lies in a store
    kernels/<arch>/<digest>/meta.json, …

Any tar program lists it. Reading interprets nothing but the sealed first member: each header that
follows is compared with the only 512 bytes that it may be, so there are no links, no devices, no
paths that lead elsewhere and no sizes that lie. Entries are published as if they had been made
here: whole or not at all, and one that is there already wins.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from capture_cache.errors import CorruptBundle, StoreError
from capture_cache.files import Files, unsafe, write_failure
from capture_cache.manifest import (
    MAX_RECORD_BYTES,
    FileRecord,
    Manifest,
    files_from_json,
    files_to_json,
    seal,
    unseal,
)
from capture_cache.store import MANIFEST, META, Store, kernel_parts

INDEX = "export.json"
KIND = "lockstep export"
FORMAT = 1
BLOCK = 512
MAX_FILES = 100_000
MAX_FILE_BYTES = 8 << 30  # what a tar header of the plain kind can say
_REMEDY = "export it again"


@dataclass(frozen=True)
class Imported:
    """What an import did: entries that are new in the store, and those that were there."""

    added: tuple[str, ...]
    present: tuple[str, ...]


def export(
    store: Store, manifest: Manifest, out: Path, *, force: bool = False, files: Files | None = None
) -> int:
    """Write the bundle of `manifest` and its kernels to `out`; returns the bytes.

    Every file is checked on the way. The result appears by one rename.

    Raises:
        CorruptBundle: the bundle or one of its kernels is damaged or missing.
        StoreError: `out` exists, or cannot be written; or is a folder or device, `force` or not.
    """
    if out.exists() and not out.is_file():
        raise StoreError(
            f"{out}: expected nothing, or a regular file, got a folder, device or pipe, which is "
            "not replaced; give the name of a file"
        )
    if out.exists() and not force:
        raise StoreError(f"{out}: expected nothing, got a file; give another name, or --force")
    contents = _contents(store, manifest)
    index = seal(
        {
            "kind": KIND,
            "format": FORMAT,
            "entries": [[entry, files_to_json(held)] for entry, held in contents.items()],
        }
    )
    members = [(INDEX, index)]
    members += [
        (f"{e}/{name}", data) for e, held in contents.items() for name, data in held.items()
    ]
    data = b"".join(_header(n, len(d)) + d + bytes(-len(d) % BLOCK) for n, d in members)
    data += bytes(2 * BLOCK)
    disk = files or Files()
    temporary = out.absolute().parent / f".tmp-{uuid.uuid4().hex}"
    try:
        disk.write(temporary, data)
        disk.rename(temporary, out.absolute())
        disk.sync_dir(out.absolute().parent)
    except OSError as e:
        raise write_failure(e, out, "FILE") from e
    finally:
        temporary.unlink(missing_ok=True)
    return len(data)


def _contents(store: Store, manifest: Manifest) -> dict[str, dict[str, bytes]]:
    """Entry → its files, the record among them, in the order in which they are written."""
    contents: dict[str, dict[str, bytes]] = {}
    for arch, digest in sorted(manifest.kernels):
        loaded = store.load_kernel(arch, digest)
        if loaded is None:
            raise CorruptBundle(
                f"{store.root}: expected kernel {arch}/{digest}, which the bundle was captured "
                "with, got none; capture again"
            )
        record = (loaded.path / META).read_bytes()
        contents["/".join(kernel_parts(arch, digest))] = _sorted({META: record, **loaded.files})
    bundle = store.load(manifest.fingerprint)
    if bundle is None:
        raise CorruptBundle(f"{store.root}: the bundle is gone; capture again")
    record = (bundle.path / MANIFEST).read_bytes()
    contents[manifest.fingerprint.digest] = _sorted({MANIFEST: record, **bundle.files})
    return contents


def _sorted(held: Mapping[str, bytes]) -> dict[str, bytes]:
    """As a sealed record lists them."""
    return dict(sorted(held.items()))


def import_file(store: Store, path: Path) -> Imported:
    """Publish what an exported file holds.

    Raises:
        CorruptBundle: the file is not exactly what `export` writes; nothing of a damaged entry is
            published, and kernels come before the bundle that uses them.
        StoreError: the file or the store is unsafe, or cannot be read or written.
    """
    added, present = list[str](), list[str]()
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        for entry, held in read_export(file, size, path):
            there = (store.root / entry).exists()
            _publish(store, entry, held, path)
            (present if there else added).append(entry)
    return Imported(tuple(added), tuple(present))


def _opened(path: Path) -> BinaryIO:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise StoreError(f"cannot read {path}: {e.strerror}; give an exported file") from e
    info = os.fstat(fd)
    problem = unsafe(info)
    if not stat.S_ISREG(info.st_mode):
        problem = "expected a regular file, got another"
    if problem is not None:
        os.close(fd)
        raise StoreError(f"{path}: {problem}; copy it to a file of your own")
    return os.fdopen(fd, "rb")


def read_export(file: BinaryIO, size: int, shown: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(entry, its files, all hashes compared) in order, one entry in memory at a time.

    Args:
        size: bytes of the file.

    Raises:
        CorruptBundle: not exactly what `export` writes.
    """
    entries, at = _read_index(file, size, shown)
    members = [(f"{e}/{n}", r) for e, held in entries.items() for n, r in held.items()]
    expected = at + sum(BLOCK + r.nbytes + -r.nbytes % BLOCK for _, r in members) + 2 * BLOCK
    if size != expected:
        raise _corrupt(shown, f"expected {expected} bytes, got {size}")
    for entry, held in entries.items():
        contents = {}
        for name, record in held.items():
            data = _read_member(file, f"{entry}/{name}", record.nbytes, shown)
            record.check(data, shown / entry / name)
            contents[name] = data
        yield entry, contents
    if file.read() != bytes(2 * BLOCK):
        raise _corrupt(shown, "expected two blocks of zeros at the end, got others")


def _read_index(
    file: BinaryIO, size: int, shown: Path
) -> tuple[dict[str, dict[str, FileRecord]], int]:
    """Entries with their files, and where the second member begins."""
    head = file.read(BLOCK)
    digits = head[124:135]  # the size, in octal
    nbytes = int(digits, 8) if len(head) == BLOCK and digits.isdigit() and _octal(digits) else -1
    if not 0 < nbytes <= min(MAX_RECORD_BYTES, size) or head != _header(INDEX, nbytes):
        raise _corrupt(shown, f"expected the header of {INDEX}, got another")
    data = _body(file, INDEX, nbytes, shown)
    record = unseal(data, shown / INDEX)
    if record.get("kind") != KIND or record.get("format") != FORMAT:
        got = f"{record.get('kind')!r:.40} format {record.get('format')!r:.20}"
        raise _corrupt(shown, f"expected {KIND} of format {FORMAT}, got {got}")
    entries: dict[str, dict[str, FileRecord]] = {}
    listed = record.get("entries")
    if not isinstance(listed, list) or not listed:
        raise _corrupt(shown, f"expected entries, got {listed!r:.80}")
    for row in listed:
        if not isinstance(row, list) or len(row) != 2 or not isinstance(row[0], str):
            raise _corrupt(shown, f"expected [entry, files], got {row!r:.80}")
        entry, table = row
        _parts(entry, shown)
        if entry in entries:
            raise _corrupt(shown, f"expected each entry once, got {entry} again")
        held = files_from_json(table, shown / INDEX)
        if any(not 0 <= r.nbytes <= MAX_FILE_BYTES for r in held.values()):
            raise _corrupt(shown, f"{entry}: expected sizes up to {MAX_FILE_BYTES}")
        entries[entry] = held
    if sum(map(len, entries.values())) > MAX_FILES:
        raise _corrupt(shown, f"expected at most {MAX_FILES} files")
    return entries, BLOCK + nbytes + -nbytes % BLOCK


def _octal(digits: bytes) -> bool:
    return all(c in b"01234567" for c in digits)


def _read_member(file: BinaryIO, name: str, nbytes: int, shown: Path) -> bytes:
    if file.read(BLOCK) != _header(name, nbytes):
        raise _corrupt(shown, f"expected the header of {name}, got another")
    return _body(file, name, nbytes, shown)


def _body(file: BinaryIO, name: str, nbytes: int, shown: Path) -> bytes:
    data, padding = file.read(nbytes), -nbytes % BLOCK
    if len(data) != nbytes or file.read(padding) != bytes(padding):
        raise _corrupt(shown, f"{name}: expected {nbytes} bytes and zeros to a full block")
    return data


def _header(name: str, nbytes: int) -> bytes:
    """The header block of a regular file, the same for everybody at any time."""
    info = tarfile.TarInfo(name)
    info.size = nbytes
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    except (ValueError, UnicodeError) as e:
        raise CorruptBundle(f"{name!r:.200}: does not fit a tar header ({e}); {_REMEDY}") from e


def _parts(entry: str, shown: Path) -> tuple[str, ...]:
    """The parts of an entry's path, which is a bundle's or a kernel's and nothing else."""
    parts = tuple(entry.split("/"))
    try:
        if len(parts) == 3 and parts == kernel_parts(parts[1], parts[2]):
            return parts
    except ValueError:
        pass
    if len(parts) == 1 and len(entry) == 64 and set(entry) <= set("0123456789abcdef"):
        return parts
    raise _corrupt(shown, f"expected entries of a store, got {entry!r:.100}")


def _publish(store: Store, entry: str, held: Mapping[str, bytes], shown: Path) -> None:
    parts = _parts(entry, shown)
    record_name = META if len(parts) == 3 else MANIFEST
    contents = dict(held)
    if record_name not in contents:
        raise _corrupt(shown, f"{entry}: expected {record_name}, got none")
    where = shown / entry / record_name
    record = unseal(contents.pop(record_name), where)
    if record.get("entry") != entry:
        raise _corrupt(shown, f"expected the record of {entry}, got {record.get('entry')!r:.100}")
    _same_files(files_from_json(record.get("files"), where), contents, where)
    if len(parts) == 3:
        meta: Any = record.get("meta")
        if not isinstance(meta, dict):
            raise _corrupt(shown, f"{entry}: expected a kernel's record, got {meta!r:.80}")
        store.publish_kernel(parts[1], parts[2], meta, contents)
        return
    manifest = Manifest.from_json(record, where)
    if manifest.fingerprint.digest != entry:
        raise _corrupt(
            shown, f"expected the fingerprint {entry}, got {manifest.fingerprint.digest}"
        )
    store.publish(manifest.fingerprint, manifest, contents)


def _same_files(
    recorded: Mapping[str, FileRecord], contents: Mapping[str, bytes], where: Path
) -> None:
    if recorded.keys() != contents.keys():
        raise CorruptBundle(
            f"{where}: expected the files {sorted(recorded)}, got {sorted(contents)}; {_REMEDY}"
        )
    for name, data in contents.items():
        recorded[name].check(data, where.parent / name)


def _corrupt(shown: Path, problem: str) -> CorruptBundle:
    return CorruptBundle(f"{shown}: {problem}; {_REMEDY}")


def read_bytes(data: bytes, shown: Path) -> list[tuple[str, dict[str, bytes]]]:
    """`read_export` of a file in memory."""
    return list(read_export(io.BytesIO(data), len(data), shown))
