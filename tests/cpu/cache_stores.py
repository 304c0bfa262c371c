"""Stores for tests of `python -m capture_cache`, and the command over one of them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capture_cache.__main__ import main
from capture_cache.fingerprint import Fingerprint
from capture_cache.layout import ArenaLayout, Entry
from capture_cache.machine import here
from capture_cache.manifest import Manifest
from capture_cache.store import Store

FACTS = {**here(on_device=False), "model": "tiny", "ep size": 1, "rows": 4, "ladder": "1,2,4"}
LEDGER = {"keys": [{"key": "1", "rows": 1}, {"key": "2", "rows": 2}]}
Run = Callable[..., tuple[int, Any]]


def kernel_name(n: int) -> tuple[str, str]:
    return "sm_90", f"{n:064x}"


def publish(root: Path, kernels: list[int], *, age_s: float = 0, **facts: Any) -> Fingerprint:
    """A bundle of the given kernels, captured so long ago."""
    fingerprint = Fingerprint.of(FACTS | facts)
    store = Store(root)
    then = time.time() - age_s
    for n in kernels:
        meta = {"name": f"kernel_{n}", "registers": n, "spill_bytes": 0, "shared_bytes": 0}
        loaded = store.publish_kernel(*kernel_name(n), meta, {"cubin": bytes([n]) * 1000})
        os.utime(loaded.path, (then, then))
    layout = ArenaLayout.build([Entry("weights", "w", (3, 5), "bfloat16")])
    used = tuple(kernel_name(n) for n in kernels)
    files = {"graph/t1r1": b"nodes" * 100, "golden/t1r1": b"state"}
    bundle = store.publish(fingerprint, Manifest(fingerprint, layout, LEDGER, used), files)
    os.utime(bundle.path / "manifest.json", (then, then))
    return fingerprint


def three_bundles(root: Path) -> Path:
    """Three bundles, the first the oldest; kernel 2 is used twice, kernel 9 by none."""
    for i, kernels in enumerate(([1, 2], [2, 3], [4])):
        publish(root, kernels, age_s=10_000 * (3 - i), model=f"model-{i}")
    Store(root).publish_kernel(*kernel_name(9), {"name": "idle"}, {"cubin": b"x" * 1000})
    old = time.time() - 50_000
    os.utime(root / "kernels" / "sm_90" / kernel_name(9)[1], (old, old))
    return root


def commands(store: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command with --json; (exit code, what it printed)."""

    def command(*argv: str) -> tuple[int, Any]:
        code = main([*argv, "--store", str(store), "--json"])
        out = capsys.readouterr()
        return code, json.loads(out.out) if out.out else out.err

    return command


def entry_name(store: Path, model: str) -> str:
    entries = Store(store).entries()
    return next(
        e.path.name
        for e in entries
        if e.manifest is not None and ("model", model) in e.manifest.fingerprint.fields
    )


def of_another_version(record: Path) -> None:
    text = record.read_text()
    record.write_text(text.replace('"schema": 2', '"schema": 1'))
