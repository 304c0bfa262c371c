"""`python -m runtime.capture`: compile the decode step into one graph per bucket, and prove it.

With `--compile-only sm_90` nothing is captured: every kernel of every key is compiled for that chip
into the store, on a machine that needs no GPU; a capture on the GPU machine then compiles nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from graphs.choices import KernelChoices
from graphs.ledger import Ledger
from runtime.build import build
from runtime.cli import (
    Bar,
    add_selection,
    command,
    console,
    print_json,
    run,
    selection,
    writable_file,
)
from runtime.config import told_to_ranks
from runtime.engine import Engine

TWIN_NOTE = "CPU twin: no CUDA graph, for correctness only; its times mean nothing"


def parser() -> argparse.ArgumentParser:
    p = command("runtime.capture", __doc__)
    add_selection(p)
    p.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prove that each key's replay equals the eager step bit for bit",
    )
    p.add_argument(
        "--bundle",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="store the captured graphs, so that Runtime.load restores them",
    )
    p.add_argument("--proof-replays", type=int, help="replays per key of that proof")
    p.add_argument(
        "--save-kernels", metavar="FILE", type=Path, help="write the choice of kernels, to pin it"
    )
    p.add_argument(
        "--compile-only", metavar="SM", help="only compile, for this chip (sm_90, sm_100)"
    )
    p.add_argument("--jobs", type=int, help="processes that compile; default: one per core")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    options = selection(
        args, verify=args.verify, proof_replays=args.proof_replays, bundle=args.bundle
    )
    if args.compile_only:
        from runtime.compile_only import compile_only

        if args.save_kernels is not None:
            raise ValueError("--save-kernels needs a capture; --compile-only chooses no kernels")
        return compile_only(options, args.compile_only, jobs=args.jobs, as_json=args.json)
    with told_to_ranks():
        if args.jobs is not None:
            raise ValueError("--jobs goes with --compile-only")
        if args.save_kernels is not None:
            writable_file("--save-kernels", args.save_kernels)
    start = time.perf_counter()
    with Bar() as bar:
        engine = build(options, bar)
    try:
        report = _report(engine, time.perf_counter() - start)
        _show(engine, report)
        if args.save_kernels is not None:
            _save(args.save_kernels, engine)
        if args.json:
            print_json(report)
    finally:
        engine.close()
    return 0


def _report(engine: Engine, seconds: float) -> dict[str, Any]:
    assert engine.ledger is not None
    launcher = engine.launcher
    return {
        "model": engine.options.model,
        "bs": engine.options.bs,
        "device": engine.device_name,
        "fingerprint": engine.fingerprint().digest,
        "attention": f"{engine.config.attention} ({engine.selection.attention_reason})",
        "ladder": str(engine.ladder),
        "num_pages": engine.config.num_pages,
        "kernels_compiled": launcher.num_compiled if launcher else 0,
        "kernels_loaded": launcher.num_loaded if launcher else 0,
        "seconds": seconds,
        "weights": engine.weights_note,
        "stages_s": engine.stages,
        "bundle": engine.bundle_note,
        "ledger": engine.ledger.to_json(),
    }


def _save(path: Path, engine: Engine) -> None:
    if engine.ranks.rank:
        return
    try:
        path.write_text(json.dumps(engine.choices.to_json(), indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"--save-kernels {path} cannot be written: {error.strerror}") from error
    console.print(f"kernels    chosen ones written to {path}")


def _show(engine: Engine, report: dict[str, Any]) -> None:
    assert engine.ledger is not None
    console.print(_key_table(engine.ledger, twin=not engine.selection.on_device))
    sizes = ", ".join(
        f"{name} {nbytes / 2**20:,.0f} MiB"
        for name, nbytes in engine.ledger.section_bytes.items()
        if nbytes
    )
    console.print(f"arena      {sizes}")
    console.print(
        f"KV cache   {engine.ledger.kv_capacity_tokens:,} tokens in "
        f"{engine.config.num_pages - 1:,} "
        f"pages of {engine.config.page_size}, {engine.ledger.kv_bytes_per_token:,} bytes a token"
    )
    console.print(f"attention  {report['attention']}")
    console.print(f"weights    {report['weights']}", soft_wrap=True)
    if engine.launcher:
        console.print(
            f"kernels    {report['kernels_compiled']} compiled, {report['kernels_loaded']} loaded"
        )
        _show_choices(engine.choices)
        general = engine.ledger.general_kernels
        if general:
            console.print(f"general    {', '.join(general)}: shapes that the fast form cannot take")
    stages = ", ".join(f"{name} {s:.1f}" for name, s in engine.stages.items() if s >= 0.05)
    console.print(f"seconds    {report['seconds']:.1f} ({stages})")
    console.print(f"stored     {report['fingerprint'][:16]} in {engine.options.store_path}")
    console.print(f"bundle     {engine.bundle_note}")
    if engine.ledger.live and engine.selection.on_device:
        console.print(f"captured live: {engine.ledger.live}; these graphs serve this process alone")
    if not engine.selection.on_device:
        console.print(TWIN_NOTE)


def _show_choices(choices: KernelChoices) -> None:
    picks = [pick for site in choices.sites.values() for pick in site.tokens.values()]
    unmeasured = sum(pick.us is None for pick in picks)
    console.print(
        f"chosen     {len(picks)} for {len(choices.sites)} products, {choices.origin}"
        + (f"; {unmeasured} unmeasured, for lack of time or need" if unmeasured else "")
    )
    if choices.note:
        console.print(f"           {choices.note}")
    for site in choices.inexact:
        console.print(f"INEXACT    {site}: bits of a token depend on how many tokens there are")


def _key_table(ledger: Ledger, *, twin: bool) -> Table:
    table = Table(title="captured keys (ROWS or ROWS+PROMPT_TOKENS)")
    columns = ("key", "tokens", "nodes", "graph MiB", "scratch MiB", "in KV tokens", "ms", "proofs")
    for name in columns:
        table.add_column(name, justify="right")
    for k in ledger.keys:
        table.add_row(
            k.key,
            str(k.tokens),
            "-" if twin else str(sum(k.nodes.values())),
            "-" if twin else f"{k.graph_bytes / 2**20:.1f}",
            f"{k.scratch_bytes / 2**20:.1f}",
            f"{k.kv_tokens:,}",
            f"{k.capture_seconds * 1e3:.1f}",
            str(k.replays_proved or "no"),
        )
    return table


if __name__ == "__main__":
    run(main)
