"""`python -m runtime.restore_bench`: process start to first decoded step, restored and captured.

Every number is of a fresh process, from its start. A capture is made first where none is stored;
then processes restore it, without and with weight bytes, and others capture live, without the
proof: into an empty store ("cold") and then, with all kernels compiled there, once more ("warm").
Under torchrun every rank has its process; times are from the start of the first to where the last
one is done. Before each process that restores, one that only opens the driver (on every rank, all
at once) shows the floor under its first step.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from capture_cache.command import error_line, exit_code
from capture_cache.store import Store
from runtime.bundle_names import SKIP_WEIGHTS
from runtime.cli import Bar, add_selection, command, console, print_json, run, selection
from runtime.config import CHECK_KEYS, RuntimeConfig, told_to_ranks
from runtime.fingerprint import fingerprint
from runtime.report import provenance
from runtime.restore_runs import RunFailed, Runs

NO_WEIGHTS, WEIGHTS = "restored, no weights", "restored"
WARM, COLD = "captured, warm", "captured, cold"
KINDS = {"no-weights": NO_WEIGHTS, "weights": WEIGHTS, "warm": WARM, "cold": COLD}
# What others say of their own starts; not measured by us, other models and machines.
PUBLISHED = (
    ("vLLM, 35 graphs of a 1B model, capture", "14 s", "github.com/vllm-project/vllm/pull/11349"),
    ("vLLM, 67 graphs, capture", "more than 10 s", "github.com/vllm-project/vllm/issues/20098"),
    ("vLLM, capture at most", "a minute", "github.com/vllm-project/vllm/pull/29275"),
    ("Foundry, Qwen3-235B-A22B, start from templates", "3.9 s", "arxiv.org/abs/2604.06664"),
    ("vLLM, the same start, as Foundry measured it", "10 minutes", "arxiv.org/abs/2604.06664"),
)


def parser() -> argparse.ArgumentParser:
    p = command("runtime.restore_bench", __doc__)
    add_selection(p)
    p.add_argument("--repeats", type=int, default=3, help="processes of each restored kind")
    p.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="restored without and with weight bytes; captured with kernels compiled and without",
    )
    p.add_argument(
        "--check-keys", choices=CHECK_KEYS, default="first", help="golden steps compared"
    )
    p.add_argument(
        "--own-gpu",
        action="store_true",
        help="each rank's process sees no GPU but its own (CUDA_VISIBLE_DEVICES)",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    with told_to_ranks():
        if args.repeats < 1:
            raise ValueError(f"--repeats {args.repeats}: expected at least 1")
        options = selection(args, verify=False, check_keys=args.check_keys)
        facts = fingerprint(options)
        if dict(facts.fields)["device"] == "cpu twin":
            raise ValueError("the CPU twin has no graphs to restore; run this on a GPU's machine")
    store = Store(options.store_path)
    restores = any(kind in args.kinds for kind in ("no-weights", "weights"))
    try:
        with Bar() as bar, Runs(options.ranks, own_gpu=args.own_gpu) as runs:
            if restores and not (store.root / facts.digest).exists():
                runs.process(dataclasses.replace(options, check_keys="first"))  # and record it
                bar("capture", 1)
            found = _measure(runs, options, [KINDS[kind] for kind in args.kinds], args.repeats, bar)
    except RunFailed as error:
        print(error_line(error), file=sys.stderr)
        return exit_code(error)
    report = {
        "model": options.model,
        "ranks": options.num_ranks,
        "fingerprint": facts.digest,
        **_stored(store, facts.digest),
        "runs": found,
        "page_cache": "warm",
        "own_gpu": args.own_gpu,
        "published": [dict(zip(("what", "time", "source"), p, strict=True)) for p in PUBLISHED],
        **provenance(str(dict(facts.fields)["device"])),
    }
    _show(report)
    if args.json:
        print_json(report)
    restored = [r for kind in (NO_WEIGHTS, WEIGHTS) for r in found.get(kind, [])]
    return int(any(r["torch"] or r["from"] != "bundle" for r in restored))


def _measure(
    runs: Runs, options: RuntimeConfig, kinds: list[str], repeats: int, bar: Bar
) -> dict[str, list[dict[str, Any]]]:
    """The runs of each kind; all ranks call this alike."""
    chosen = {
        NO_WEIGHTS: dataclasses.replace(options, weights=SKIP_WEIGHTS, check_keys="first"),
        WEIGHTS: options,
    }
    if COLD in kinds or WARM in kinds:
        # What the cold capture compiles is what makes the warm one warm.
        captured = dataclasses.replace(options, bundle=False, store=str(runs.empty_store()))
        chosen |= {COLD: captured, WARM: captured}
        kinds = [k for k in kinds if k not in (COLD, WARM)] + [COLD] + [WARM] * (WARM in kinds)
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in kinds:
        count = repeats if kind in (NO_WEIGHTS, WEIGHTS) else 1
        found[kind] = []
        for _ in range(count):
            beside = {}
            if kind in (NO_WEIGHTS, WEIGHTS):
                beside["driver_alone"] = runs.bare_driver(chosen[kind])
            found[kind].append(runs.process(chosen[kind]) | beside)
            bar(kind, count)
    return found


def _stored(store: Store, digest: str) -> dict[str, Any]:
    """Size of the bundle, and nodes of each key; empty where none was restored."""
    entry = next((e for e in store.entries() if e.path.name == digest), None)
    if entry is None or entry.manifest is None:
        return {}
    keys = entry.manifest.ledger["keys"]
    return {
        "bundle_bytes": _folder_bytes(entry.path),
        "keys": len(keys),
        "nodes": [sum(key["nodes"].values()) for key in keys],
    }


def _folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _show(report: dict[str, Any]) -> None:
    table = Table(title=f"from process start, ms (median), {report['ranks']} rank(s)")
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
    for kind in (NO_WEIGHTS, WEIGHTS):
        if kind in report["runs"]:
            _show_floor(report["runs"][kind])
            _show_bytecode(report["runs"][kind])
            _show_keys(report["runs"][kind])
            break
    if "bundle_bytes" in report:
        nodes, nbytes = report["nodes"], report["bundle_bytes"]
        console.print(f"nodes      {min(nodes)} to {max(nodes)} a key, {len(nodes)} keys")
        console.print(f"bundle     {nbytes / 2**20:.1f} MiB; page cache warm")
    published = Table(title="published by others: other models, other machines")
    for name in ("", "time", "where"):
        published.add_column(name)
    for row in report["published"]:
        published.add_row(row["what"], row["time"], row["source"])
    console.print(published)


def _show_floor(found: list[dict[str, Any]]) -> None:
    """The driver alone, and what of the first step is not the driver's; medians."""
    bare = [r["driver_alone"] for r in found]
    ready = statistics.median(b["ready_ms"] for b in bare)
    rest = statistics.median(
        r["first_step_ms"] - b["ready_ms"] for r, b in zip(found, bare, strict=True)
    )
    middle = min(bare, key=lambda b: abs(b["ready_ms"] - ready))
    spans = ", ".join(f"{k} {v:.0f}" for k, v in middle["spans_ms"].items())
    asked = found[0]["connections"] or "as many as the driver likes"
    console.print(f"driver     {ready:,.0f} ms by itself ({spans}; connections: {asked})")
    console.print(f"the rest   {rest:,.0f} ms to the first step")


def _show_bytecode(found: list[dict[str, Any]]) -> None:
    """What every process compiles anew, which a deployment does once."""
    absent = sorted({name for r in found for name, there in r["bytecode"].items() if not there})
    if absent:
        console.print(
            f"imports    {' and '.join(absent)} without bytecode, so every process compiles what "
            "it imports: python -m compileall does that once"
        )


def _show_keys(found: list[dict[str, Any]]) -> None:
    middle = {k: statistics.median(r["key_ms"][k] for r in found) for k in found[0]["key_ms"]}
    console.print("keys, ms   " + ", ".join(f"{k} {v:.1f}" for k, v in middle.items()))
    last = found[-1]
    parts = ", ".join(f"{k} {v:.0f}" for k, v in last["key_parts_ms"].items())
    beside = ", ".join(f"{k} {v:.0f}" for k, v in last["ahead_ms"].items())
    console.print(f"all keys   {parts} ms; beside it, in a second thread: {beside} ms")


if __name__ == "__main__":
    run(main)
