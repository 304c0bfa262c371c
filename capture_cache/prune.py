"""Making room in a store: the oldest bundles go, and the kernels that no bundle left over uses."""

from __future__ import annotations

import time
from dataclasses import dataclass

from capture_cache import survey
from capture_cache.store import Store

GRACE_S = 3600.0  # kernels younger than this may belong to a capture that is still under way


@dataclass(frozen=True)
class Pruned:
    """What was, or would be, removed.

    Attributes:
        bundles: fingerprints, oldest first.
        kernels: (arch, digest).
        nbytes: of both; left_bytes: of what stays, packed weights not counted.
    """

    bundles: tuple[str, ...]
    kernels: tuple[tuple[str, str], ...]
    nbytes: int
    left_bytes: int


def prune(
    store: Store,
    *,
    keep: int | None = None,
    max_bytes: int | None = None,
    dry_run: bool = False,
    grace_s: float = GRACE_S,
) -> Pruned:
    """Remove bundles until both limits hold, then kernels without a bundle. Weights and
    measurements stay.

    Damaged bundles count as the oldest. Removal of one entry is one rename, so whoever is reading
    the store sees it whole or not at all.

    Args:
        keep: the newest so many bundles stay.
        max_bytes: of bundles and of the kernels that they use.

    Raises:
        StoreError: no permission.
        ValueError: no limit, or a negative one.
    """
    limits = [n for n in (keep, max_bytes) if n is not None]
    if not limits or min(limits) < 0:
        got = f"{keep} and {max_bytes}" if limits else "neither"
        raise ValueError(f"expected --keep or --max-bytes, 0 or more, got {got}")
    rows = sorted(survey.bundles(store), key=lambda r: (r["problem"] is None, r["captured"]))
    uses = _uses(store)
    sizes = {k: survey.tree_bytes(store.root.joinpath("kernels", *k)) for k in store.kernels()}

    def nbytes(left: list[dict[str, object]]) -> int:
        held = {k for r in left for k in uses.get(str(r["fingerprint"]), ())}
        return sum(int(str(r["bytes"])) for r in left) + sum(sizes.get(k, 0) for k in held)

    first = 0 if keep is None else max(0, len(rows) - keep)
    while max_bytes is not None and first < len(rows) and nbytes(rows[first:]) > max_bytes:
        first += 1
    gone, left = rows[:first], rows[first:]
    held = {k for r in left for k in uses.get(r["fingerprint"], ())}
    idle = tuple(k for k in sizes if k not in held and _age_s(store, k) >= grace_s)
    freed = sum(r["bytes"] for r in gone) + sum(sizes[k] for k in idle)
    names = tuple(r["fingerprint"] for r in gone)
    if not dry_run:
        for name in names:
            store.remove((name,))
        for kernel in idle:
            store.remove(("kernels", *kernel))
    total = sum(r["bytes"] for r in rows) + sum(sizes.values())
    return Pruned(names, idle, freed, total - freed)


def _uses(store: Store) -> dict[str, tuple[tuple[str, str], ...]]:
    return {e.path.name: e.manifest.kernels for e in store.entries() if e.manifest is not None}


def _age_s(store: Store, kernel: tuple[str, str]) -> float:
    try:
        return time.time() - store.root.joinpath("kernels", *kernel).lstat().st_mtime
    except FileNotFoundError:
        return 0.0
