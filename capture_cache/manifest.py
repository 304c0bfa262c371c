"""Records on disk: JSON that carries its own hash, and the manifest of a bundle.

A record ends in the sha256 of all bytes before it, so no flipped bit and no byte more or less can
pass. Nothing here executes what it reads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from capture_cache.dataclass import dataclass
from capture_cache.errors import CorruptBundle, LayoutError, OtherVersion
from capture_cache.files import REMEDY
from capture_cache.fingerprint import Fingerprint
from capture_cache.layout import ArenaLayout

SCHEMA = 2  # 1 had its sha256 among the sorted fields
MAX_RECORD_BYTES = 64 << 20
_END = b"}\n"  # of a record, and of one that is sealed
_SEAL = b', "sha256": "%s"}\n'
_SEAL_BYTES = len(_SEAL % bytes(64))
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")


def seal(record: Mapping[str, Any]) -> bytes:
    """`record` as JSON with its schema version, and as its last field the sha256 of the rest.

    Raises:
        ValueError: something in it is not JSON (NaN included).
    """
    body = _json({**record, "schema": SCHEMA})
    return body[: -len(_END)] + _SEAL % hashlib.sha256(body).hexdigest().encode()


def unseal(data: bytes, shown: Path) -> dict[str, Any]:
    """The record that `seal` wrote.

    Raises:
        OtherVersion: it says that it is of another schema.
        CorruptBundle: `data` is not exactly that; names `shown`.
    """
    try:
        record = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as e:
        raise CorruptBundle(f"{shown}: expected a JSON record, got {e}; {REMEDY}") from e
    if not isinstance(record, dict) or "sha256" not in record:
        raise CorruptBundle(f"{shown}: expected a sealed JSON record, got another; {REMEDY}")
    schema = record.get("schema")
    if schema != SCHEMA:
        kind = OtherVersion if type(schema) is int else CorruptBundle
        raise kind(
            f"{shown}: expected schema {SCHEMA}, got {schema!r:.80} (of another version); {REMEDY}"
        )
    digest = hashlib.sha256(data[:-_SEAL_BYTES] + _END).hexdigest()
    if data[-_SEAL_BYTES:] != _SEAL % digest.encode():
        raise CorruptBundle(
            f"{shown}: expected sha256 {digest} at its end, got {record['sha256']!r:.80}; {REMEDY}"
        )
    return {k: v for k, v in record.items() if k not in ("sha256", "schema")}


@dataclass(frozen=True)
class FileRecord:
    """What a file must be to be used."""

    nbytes: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> FileRecord:
        return cls(len(data), hashlib.sha256(data).hexdigest())

    def check(self, data: bytes, shown: Path) -> None:
        """Raises CorruptBundle with both sizes, or both hashes."""
        if len(data) != self.nbytes:
            got = f"{len(data)}" if len(data) < self.nbytes else f"more than {self.nbytes}"
            raise CorruptBundle(f"{shown}: expected {self.nbytes} bytes, got {got}; {REMEDY}")
        digest = hashlib.sha256(data).hexdigest()
        if digest != self.sha256:
            raise CorruptBundle(f"{shown}: expected sha256 {self.sha256}, got {digest}; {REMEDY}")


def files_to_json(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The `files` table of a record.

    Raises:
        ValueError: a name that is not a plain relative path of one or two parts.
    """
    for name in files:
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"file name {name!r}: expected letters, digits, '._-' and one '/'")
    records = {name: FileRecord.of(data) for name, data in files.items()}
    return {name: {"bytes": r.nbytes, "sha256": r.sha256} for name, r in records.items()}


def files_from_json(table: Any, shown: Path) -> dict[str, FileRecord]:
    """Raises CorruptBundle: malformed table, or a name that leaves the bundle."""
    try:
        records = {name: FileRecord(int(r["bytes"]), str(r["sha256"])) for name, r in table.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise CorruptBundle(f"{shown}: expected a table of files, got {e!r:.200}; {REMEDY}") from e
    for name in records:
        if not _FILE_NAME.fullmatch(name):
            raise CorruptBundle(f"{shown}: unsafe file name {name!r:.200}; {REMEDY}")
    return records


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        fingerprint: the facts under which it is valid.
        arena: the layout its graphs were captured for; None if it holds none.
        ledger: JSON, bytes and microseconds per bucket.
        kernels: (arch, digest) of the stored kernels it uses.
        restore: JSON, what a player must know beside the files; None: it holds no graphs.
        files: its own files, filled in by the store.
    """

    fingerprint: Fingerprint
    arena: ArenaLayout | None = None
    ledger: Any = None
    kernels: tuple[tuple[str, str], ...] = ()
    restore: Any = None
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything but `files`, which the store writes."""
        return {
            "fingerprint": self.fingerprint.to_json(),
            "arena": None if self.arena is None else self.arena.to_json(),
            "arena_digest": None if self.arena is None else self.arena.digest,
            "ledger": self.ledger,
            "kernels": [list(k) for k in self.kernels],
            "restore": self.restore,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], shown: Path) -> Manifest:
        """Raises CorruptBundle: a field is missing, malformed, or disagrees with another."""
        try:
            arena = None if record["arena"] is None else ArenaLayout.from_json(record["arena"])
            manifest = cls(
                Fingerprint.from_json(record["fingerprint"]),
                arena,
                record["ledger"],
                tuple((str(arch), str(digest)) for arch, digest in record["kernels"]),
                record["restore"],
                files_from_json(record["files"], shown),
            )
            stored_digest = record["arena_digest"]
        except (KeyError, TypeError, ValueError, LayoutError) as e:
            raise CorruptBundle(f"{shown}: malformed manifest: {e!s:.300}; {REMEDY}") from e
        if stored_digest != (None if arena is None else arena.digest):
            raise CorruptBundle(f"{shown}: arena table and its digest disagree; {REMEDY}")
        return manifest


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name}, which JSON has not got")


def _json(value: Any) -> bytes:
    # On one line: with an indent Python's own encoder would take 100 ms for a large arena.
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return text.encode() + b"\n"
