"""What a store holds, as plain data: for the command `python -m capture_cache`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capture_cache.bundle import PROGRAM_FILE
from capture_cache.bundle_files import BundleFiles
from capture_cache.bundle_golden import decode_golden
from capture_cache.errors import CorruptBundle, OtherVersion, StoreError
from capture_cache.fingerprint import Fingerprint, Value
from capture_cache.fingerprint import differing as differing_fields
from capture_cache.machine import here
from capture_cache.manifest import Manifest
from capture_cache.packed import PackedWeights
from capture_cache.packed_index import INDEX
from capture_cache.store import MANIFEST, Store, record_parts

SHORT = 12  # hex digits that name an entry in a table


@dataclass(frozen=True)
class Problem:
    """One damaged entry."""

    path: str
    message: str


def bundles(store: Store) -> list[dict[str, Any]]:
    """One row a bundle, oldest first: identity, size, age, and what is wrong with it."""
    rows = []
    for entry in store.entries():
        row: dict[str, Any] = {
            "fingerprint": entry.path.name,
            "captured": _captured(entry.path),
            "problem": entry.problem,
            "other_version": entry.other_version,
            "bytes": tree_bytes(entry.path),
        }
        if entry.manifest is not None:
            fields = dict(entry.manifest.fingerprint.fields)
            row |= {n: fields.get(n) for n in ("model", "device", "ep size", "rows", "ladder")}
            row |= {
                "graphs": sum(name.startswith("graph/t") for name in entry.manifest.files),
                **_restore(entry.manifest),
                "checkpoint": checkpoint(entry.manifest),
                "keys": len(ledger_keys(entry.manifest)),
                "kernels": len(entry.manifest.kernels),
            }
        rows.append(row)
    return sorted(rows, key=lambda r: (r["captured"], r["fingerprint"]))


def _restore(manifest: Manifest) -> dict[str, Any]:
    """Whether graphs can be restored ("graphs"), or why there are none ("live", "skipped")."""
    told = manifest.restore if isinstance(manifest.restore, dict) else {}
    return {"restore": told.get("kind"), "reason": told.get("reason")}


def checkpoint(manifest: Manifest) -> str | None:
    """The directory that was captured from, for people; None for a preset, or where none is told.

    It identifies nothing: the fingerprint's `model` does.
    """
    told = manifest.ledger.get("model") if isinstance(manifest.ledger, dict) else None
    return told if isinstance(told, str) and told.startswith("/") else None


def ledger_keys(manifest: Manifest) -> list[Mapping[str, Any]]:
    """The ledger's rows, one a captured key; none where it has another form."""
    ledger = manifest.ledger
    keys = ledger.get("keys") if isinstance(ledger, dict) else None
    return [k for k in keys if isinstance(k, dict)] if isinstance(keys, list) else []


def weights(store: Store) -> list[dict[str, Any]]:
    """One row for each directory of packed weights; of its shards, sizes and headers are read."""
    rows = []
    for path in store.weights():
        row: dict[str, Any] = {"identity": path.name, "problem": None, "other_version": False}
        row["bytes"] = tree_bytes(path)
        try:
            packed = PackedWeights(path)
            fields = dict(packed.index.identity.fields)
            row |= {n: fields.get(n) for n in ("source", "format", "ep size", "layers")}
            row |= {"origin": packed.index.origin, "content": packed.index.content}
            for shard in packed.shards:
                os.close(packed.open_shard(shard))
        except (CorruptBundle, StoreError) as e:
            row["problem"], row["other_version"] = str(e), isinstance(e, OtherVersion)
        rows.append(row)
    return rows


def kernels(store: Store) -> dict[str, dict[str, int]]:
    """Stored kernels by architecture: how many, and their bytes."""
    found: dict[str, dict[str, int]] = {}
    for arch, digest in store.kernels():
        row = found.setdefault(arch, {"kernels": 0, "bytes": 0})
        row["kernels"] += 1
        row["bytes"] += tree_bytes(store.root / "kernels" / arch / digest)
    return found


def named(store: Store, text: str) -> Path:
    """The one bundle, or directory of packed weights, whose name begins with `text`.

    Raises:
        ValueError: none does, or several do.
    """
    names = [*(e.path for e in store.entries()), *store.weights()]
    found = [path for path in names if path.name.startswith(text)]
    if len(found) != 1 or not text:
        known = ", ".join(p.name[:SHORT] for p in found or names) or "nothing"
        which = "several entries begin" if len(found) > 1 else "no entry begins"
        raise ValueError(f"{which} with {text!r} in {store.root}; it holds {known}")
    return found[0]


def manifest_of(store: Store, text: str) -> tuple[Path, Manifest]:
    """The bundle whose name begins with `text`, its record checked.

    Raises:
        ValueError: there is no such bundle, or it is packed weights.
        CorruptBundle: it is damaged.
    """
    path = named(store, text)
    for entry in store.entries():
        if entry.path == path:
            if entry.manifest is None:
                raise CorruptBundle(str(entry.problem))
            return path, entry.manifest
    raise ValueError(f"{path} holds packed weights, not a bundle")


def kernel_rows(store: Store, manifest: Manifest) -> list[dict[str, Any]]:
    """The kernels that a bundle was captured with, as the store has them."""
    rows = []
    for arch, digest in manifest.kernels:
        row: dict[str, Any] = {"arch": arch, "digest": digest, "name": None, "problem": None}
        try:
            record = store.kernel_record(arch, digest)
            meta = record.get("meta") if record is not None else None
            if isinstance(meta, dict):
                row["name"] = meta.get("name") or ",".join(meta.get("kernels", ()))
                row |= {n: meta.get(n) for n in ("registers", "spill_bytes", "shared_bytes")}
            else:
                row["problem"] = "not in the store"
        except CorruptBundle as e:
            row["problem"] = str(e)
        rows.append(row)
    return sorted(rows, key=lambda r: str(r["name"]))


def compared(a: Fingerprint, b: Fingerprint) -> list[tuple[str, Value, Value, bool]]:
    """Field by field (name, of a, of b, differs), in a's order."""
    one, two = dict(a.fields), dict(b.fields)
    differ = set(differing_fields(a, b))
    return [(n, one.get(n), two.get(n), n in differ) for n in dict.fromkeys((*one, *two))]


def machine(stored: Fingerprint, ordinal: int = 0) -> Fingerprint:
    """`stored` with the fields that a machine and its installation decide replaced by those here.

    Raises:
        CudaError: it was captured on a GPU, and there is none here.
    """
    fields = dict(stored.fields)
    facts = here(on_device=fields.get("device") != "cpu twin", ordinal=ordinal)
    return Fingerprint.of(fields | {n: v for n, v in facts.items() if n in fields})


def verify(store: Store, chosen: Path | None = None) -> Iterator[tuple[str, int, Problem | None]]:
    """Read every byte of every entry, or of one, and compare all sizes and hashes.

    Yields:
        (entry, bytes read, what is wrong) for each.
    """
    for entry in store.entries():
        if chosen in (None, entry.path):
            yield _checked(entry.path, entry.problem, store, entry.manifest)
    for arch, digest in store.kernels() if chosen is None else ():
        path = store.root / "kernels" / arch / digest
        try:
            loaded = store.load_kernel(arch, digest)
            yield str(path), tree_bytes(path) if loaded is not None else 0, None
        except CorruptBundle as e:
            yield str(path), 0, Problem(str(path), str(e))
    for digest in store.records() if chosen is None else ():
        yield _checked_record(store, digest)
    for path in store.weights():
        if chosen in (None, path):
            yield verify_weights(path)


def _checked_record(store: Store, digest: str) -> tuple[str, int, Problem | None]:
    path = store.root.joinpath(*record_parts(digest))
    try:
        store.load_record(digest)
        return str(path), tree_bytes(path), None
    except CorruptBundle as e:
        return str(path), 0, Problem(str(path), str(e))


def verify_weights(path: Path) -> tuple[str, int, Problem | None]:
    """Compare every sha256 of a directory of packed weights; counts what was read until then."""
    nbytes = 0
    try:
        packed = PackedWeights(path)
        nbytes = (path / INDEX).stat().st_size + sum(r.nbytes for r in packed.index.small.values())
        for _, read in packed.verify():
            nbytes += read
    except (CorruptBundle, StoreError) as e:
        return str(path), nbytes, Problem(str(path), str(e))
    return str(path), nbytes, None


def _checked(
    path: Path, problem: str | None, store: Store, manifest: Manifest | None
) -> tuple[str, int, Problem | None]:
    if manifest is None:
        return str(path), 0, Problem(str(path), str(problem))
    try:
        bundle = store.load(manifest.fingerprint)
        if bundle is None:
            return str(path), 0, None  # removed meanwhile
        read_structs(bundle.files, path)
        return str(path), tree_bytes(path), None
    except CorruptBundle as e:
        return str(path), 0, Problem(str(path), str(e))


def tree_bytes(path: Path) -> int:
    """Bytes of the regular files below `path`; what vanishes meanwhile counts nothing."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                info = os.lstat(os.path.join(folder, name))
                total += info.st_size if stat.S_ISREG(info.st_mode) else 0
    return total


def read_structs(contents: Mapping[str, bytes], path: Path) -> dict[str, int]:
    """Nodes of each graph of a bundle, every struct in it read; empty where it holds no graphs.

    Raises:
        CorruptBundle: a struct makes no sense, or device code is not what its name says.
    """
    if PROGRAM_FILE not in contents:
        return {}
    files, nodes = BundleFiles(contents, str(path)), {}
    for i, module in enumerate(files.program.modules):
        if hashlib.sha256(files.code(i)).hexdigest() != module.sha256:
            raise CorruptBundle(f"{path / module.file}: expected the code it is named after")
    for name in sorted(contents):
        if name.startswith("graph/"):
            nodes[name] = len(files.graph(name).nodes)
        elif name.startswith("golden/"):
            decode_golden(contents[name], str(path / name))
    return nodes


def _captured(path: Path) -> int:
    """When a bundle's manifest was written, in seconds; 0 where it has none."""
    try:
        return int((path / MANIFEST).lstat().st_mtime)
    except OSError:
        return 0
