"""`python -m runtime.restore_bench`: process start to first decoded step, restored and captured.

Every number is of a fresh process, from its start. A capture is made first where none is stored;
then processes restore it, with and without weight bytes, and others capture live with all kernels
compiled ("warm"), and, with `--cold`, with nothing compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from capture_cache.store import Store
from runtime.bundle_names import SKIP_WEIGHTS
from runtime.cli import Bar, add_selection, command, console, print_json, run, selection
from runtime.config import RuntimeConfig
from runtime.fingerprint import fingerprint
from runtime.report import provenance

LIMIT_S = 1800.0


def parser() -> argparse.ArgumentParser:
    p = command("runtime.restore_bench", __doc__)
    add_selection(p)
    p.add_argument("--repeats", type=int, default=3, help="processes of each kind")
    p.add_argument("--cold", action="store_true", help="also capture with nothing compiled")
    p.add_argument("--no-weights", action="store_true", help="restore without weight bytes only")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: expected at least 1")
    options = selection(args, verify=False)
    facts = fingerprint(options)
    if dict(facts.fields)["device"] == "cpu twin":
        raise ValueError("the CPU twin has no graphs to restore; run this on a machine with a GPU")
    store = Store(options.store_path)
    with Bar() as bar:
        if not (store.root / facts.digest).exists():
            _process(options)  # captures and records
            bar("capture", 1)
        kinds = {} if args.no_weights else {"restored": options}
        kinds["restored, no weights"] = dataclasses.replace(options, weights=SKIP_WEIGHTS)
        if not args.no_weights:
            kinds["captured, warm"] = dataclasses.replace(options, bundle=False)
        runs: dict[str, list[dict[str, Any]]] = {}
        for kind, chosen in kinds.items():
            count = args.repeats if chosen.bundle else 1
            runs[kind] = []
            for _ in range(count):
                runs[kind].append(_process(chosen))
                bar(kind, count)
        if args.cold:
            with tempfile.TemporaryDirectory(prefix="lockstep-cold-") as empty:
                cold = dataclasses.replace(options, store=empty, bundle=False)
                runs["captured, cold"] = [_process(cold)]
    bundle = store.load(facts)
    assert bundle is not None, "it has just been restored"
    report = {
        "model": options.model,
        "keys": len(runs["restored, no weights"][0]["key_ms"]),
        "fingerprint": facts.digest,
        "bundle_bytes": _folder_bytes(bundle.path),
        "nodes": [sum(k["nodes"].values()) for k in bundle.manifest.ledger["keys"]],
        "runs": runs,
        "page_cache": "warm",
        **provenance(str(dict(facts.fields)["device"])),
    }
    _show(report)
    if args.json:
        print_json(report)
    wrong = [
        k for k, found in runs.items() if k.startswith("restored") for r in found if r["torch"]
    ]
    return 1 if wrong else 0


def _process(options: RuntimeConfig) -> dict[str, Any]:
    """One fresh process that loads with `options`.

    Raises:
        RuntimeError: it failed; holds the end of what it said.
    """
    chosen = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
    command_line = [sys.executable, "-m", "runtime.restore_child", json.dumps(chosen)]
    more = ["restore"] if options.bundle else []
    start_ns = time.time_ns()
    done = subprocess.run(
        [*command_line, str(start_ns), *more],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT ") and done.returncode == 0:
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return result
    raise RuntimeError(f"a process ended with {done.returncode}: {done.stderr[-2000:]}")


def _folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _show(report: dict[str, Any]) -> None:
    table = Table(title="from process start, ms (median)")
    for name in ("", "first step", "all keys", "stages"):
        table.add_column(name, justify="left" if name in ("", "stages") else "right")
    for kind, found in report["runs"].items():
        first = statistics.median(r["first_step_ms"] for r in found)
        every = statistics.median(r["all_keys_ms"] for r in found)
        middle = min(found, key=lambda r: abs(r["first_step_ms"] - first))
        spans = {**middle["spans_ms"], **{f"·{k}": v for k, v in middle["stages_ms"].items()}}
        stages = ", ".join(f"{k} {v:.0f}" for k, v in spans.items() if v >= 0.5)
        table.add_row(kind, f"{first:,.0f}", f"{every:,.0f}", stages)
    console.print(table)
    keys = report["runs"]["restored, no weights"][0]["key_ms"]
    console.print("keys, ms   " + ", ".join(f"{k} {v:.1f}" for k, v in keys.items()))
    parts = report["runs"]["restored, no weights"][-1]["key_parts_ms"]
    console.print("all keys   " + ", ".join(f"{k} {v:.0f}" for k, v in parts.items()) + " ms")
    nodes = report["nodes"]
    console.print(f"nodes      {min(nodes)} to {max(nodes)} a key, {len(nodes)} keys")
    console.print(f"bundle     {report['bundle_bytes'] / 2**20:.1f} MiB; page cache warm")


if __name__ == "__main__":
    run(main)
