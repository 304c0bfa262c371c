"""Making room in a store: what is damaged or of another version goes, then the oldest bundles, and
the kernels that no bundle left over uses.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from capture_cache import survey
from capture_cache.errors import CorruptBundle, OtherVersion
from capture_cache.store import Store, kernel_parts, record_parts

GRACE_S = 3600.0  # kernels younger than this may belong to a capture that is still under way


@dataclass(frozen=True)
class Pruned:
    """What was, or would be, removed.

    Attributes:
        bundles: fingerprints, oldest first; sound ones, or the one that was named.
        kernels: (arch, digest).
        broken: (entry, "damaged" or "of another version") of what cannot be used: bundles, packed
            weights, kernels, measurements.
        weights: the packed weights that were named.
        nbytes: of all; left_bytes: of what stays, packed weights not counted.
    """

    bundles: tuple[str, ...]
    kernels: tuple[tuple[str, str], ...]
    nbytes: int
    left_bytes: int
    broken: tuple[tuple[str, str], ...] = ()
    weights: tuple[str, ...] = ()


def prune(
    store: Store,
    *,
    keep: int | None = None,
    max_bytes: int | None = None,
    dry_run: bool = False,
    grace_s: float = GRACE_S,
) -> Pruned:
    """Remove what cannot be used; then bundles until both limits hold, and kernels without a
    bundle. Sound weights and measurements stay.

    Of damage, what records, sizes and headers tell is found; hashes of files are not compared.
    Removal of one entry is one rename, so whoever is reading the store sees it whole or not at all.

    Args:
        keep: the newest so many bundles stay.
        max_bytes: of bundles and of the kernels that they use.
            Where neither is given, only what cannot be used goes.

    Raises:
        StoreError: no permission.
        ValueError: a negative limit.
    """
    limits = [n for n in (keep, max_bytes) if n is not None]
    if limits and min(limits) < 0:
        raise ValueError(f"expected --keep or --max-bytes, 0 or more, got {keep} and {max_bytes}")
    found = survey.bundles(store)
    broken = _broken(store, found)
    rows = [r for r in found if not r["problem"]]
    uses = _uses(store)
    bad = {parts for parts, _ in broken}
    sizes = {
        k: survey.tree_bytes(store.root.joinpath("kernels", *k))
        for k in store.kernels()
        if kernel_parts(*k) not in bad
    }

    def nbytes(left: list[dict[str, Any]]) -> int:
        held = {k for r in left for k in uses.get(r["fingerprint"], ())}
        bundle_bytes: int = sum(r["bytes"] for r in left)
        return bundle_bytes + sum(sizes.get(k, 0) for k in held)

    first = 0 if keep is None else max(0, len(rows) - keep)
    while max_bytes is not None and first < len(rows) and nbytes(rows[first:]) > max_bytes:
        first += 1
    gone, left = rows[:first], rows[first:]
    held = {k for r in left for k in uses.get(r["fingerprint"], ())}
    idle = tuple(k for k in sizes if limits and k not in held and _age_s(store, k) >= grace_s)
    freed = sum(r["bytes"] for r in gone) + sum(sizes[k] for k in idle)
    total = sum(r["bytes"] for r in rows) + sum(sizes.values())
    left_bytes = total - freed
    freed += sum(survey.tree_bytes(store.root.joinpath(*parts)) for parts in bad)
    names = tuple(r["fingerprint"] for r in gone)
    if not dry_run:
        entries = [*(parts for parts, _ in broken), *((n,) for n in names)]
        for entry in (*entries, *(kernel_parts(*k) for k in idle)):
            store.remove(entry)
    told = tuple(("/".join(parts), why) for parts, why in broken)
    return Pruned(names, idle, freed, left_bytes, told)


def prune_one(store: Store, text: str, *, dry_run: bool = False) -> Pruned:
    """Remove the one bundle, or directory of packed weights, whose name begins with `text`.

    Its kernels stay. Raises ValueError: none does, or several do; StoreError: no permission.
    """
    path = survey.named(store, text)
    nbytes = survey.tree_bytes(path)
    left = sum(r["bytes"] for r in survey.bundles(store))
    left += sum(survey.tree_bytes(store.root.joinpath("kernels", *k)) for k in store.kernels())
    is_bundle = path.parent == store.root
    if not dry_run:
        store.remove(path.relative_to(store.root).parts)
    if is_bundle:
        return Pruned((path.name,), (), nbytes, left - nbytes)
    return Pruned((), (), nbytes, left, weights=(path.name,))


def _broken(store: Store, bundles: list[dict[str, Any]]) -> list[tuple[tuple[str, ...], str]]:
    """Where what cannot be used lies, and why it cannot."""

    def why(other_version: bool) -> str:
        return "of another version" if other_version else "damaged"

    found: list[tuple[tuple[str, ...], str]] = []
    for row in bundles:
        if row["problem"]:
            found.append(((row["fingerprint"],), why(row["other_version"])))
    for row in survey.weights(store):
        if row["problem"]:
            found.append((("weights", row["identity"]), why(row["other_version"])))
    for arch, digest in store.kernels():
        try:
            store.kernel_record(arch, digest)
        except CorruptBundle as e:
            found.append((kernel_parts(arch, digest), why(isinstance(e, OtherVersion))))
    for digest in store.records():
        try:
            store.load_record(digest)
        except CorruptBundle as e:
            found.append((record_parts(digest), why(isinstance(e, OtherVersion))))
    return found


def _uses(store: Store) -> dict[str, tuple[tuple[str, str], ...]]:
    return {e.path.name: e.manifest.kernels for e in store.entries() if e.manifest is not None}


def _age_s(store: Store, kernel: tuple[str, str]) -> float:
    try:
        return time.time() - store.root.joinpath("kernels", *kernel).lstat().st_mtime
    except FileNotFoundError:
        return 0.0
