"""`python -m bench.decode_profile`: one decode step by kernel, as torch's profiler saw it replayed.

The step runs as a graph, as in service. For each kernel: how often a step launches it, its time,
its share of the step; and what is left over between kernels. Under torchrun every rank profiles the
same steps and rank 0 prints its own.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from runtime.build import build
from runtime.cli import Bar, add_selection, command, console, print_json, run, selection
from runtime.driver import Runtime
from runtime.report import provenance

WARM_UP = 5


def parser() -> argparse.ArgumentParser:
    p = command("bench.decode_profile", __doc__)
    add_selection(p)
    p.add_argument("--ctx-len", type=int, default=2000, help="KV tokens a row holds")
    p.add_argument("--steps", type=int, default=10, help="profiled steps")
    p.add_argument("--rows", type=int, help="live rows a rank; default: all")
    p.add_argument("--trace", type=Path, help="write the profiler's Chrome trace here")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    with Bar() as bar:
        engine = build(selection(args, verify=False), bar)
    if not engine.selection.on_device:
        engine.close()
        raise ValueError("the profile is of a device; the CPU twin has none (use --device cuda)")
    with Runtime(engine, engine.options.scheduling) as runtime:
        engine.fill_kv(seed=0)
        rows = args.rows or engine.config.max_rows
        runtime.occupy(rows, args.ctx_len, WARM_UP + args.steps + 1)
        for _ in range(WARM_UP):
            runtime.step()
        kernels, span_us = _profile(runtime, args.steps, args.trace)
    report = provenance(engine.device_name) | {
        "model": args.model,
        "rows": rows,
        "ctx_len": args.ctx_len,
        "step_us": span_us,
        "kernels": _summary(kernels, args.steps),
    }
    _show(report)
    if args.json:
        print_json(report)
    return 0


def _profile(
    runtime: Runtime, steps: int, trace: Path | None
) -> tuple[dict[str, list[float]], float]:
    """Microseconds of every launch by kernel, and of a whole step by the graph's own clock."""
    spans = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            runtime.step()
            entry = runtime.last_entry
            assert entry is not None
            spans.append((entry.end_ns - entry.begin_ns) / 1e3)
        torch.cuda.synchronize()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type.name == "CUDA" and event.device_time > 0:
            found[_short(event.name)].append(event.device_time)
    if not found:
        raise RuntimeError(
            "the profile holds no GPU data: CUPTI could not attach; look for another profiler "
            "that holds it, or for missing permissions"
        )
    return found, float(np.median(spans))


def _short(name: str) -> str:
    """A kernel's own name, without template arguments and namespaces."""
    return re.sub(r"<.*", "", name.removeprefix("void ")).split("::")[-1]


def _summary(kernels: dict[str, list[float]], steps: int) -> list[dict[str, Any]]:
    rows = [
        {
            "name": name,
            "count": len(times) / steps,
            "median_us": float(np.median(times)),
            "us_per_step": sum(times) / steps,
        }
        for name, times in kernels.items()
    ]
    return sorted(rows, key=lambda r: -float(r["us_per_step"]))


def _show(report: dict[str, Any]) -> None:
    table = Table(title=f"kernels of one step, {report['rows']} rows, {report['device']}")
    for column in ("kernel", "count", "median us", "us a step", "share"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    total = sum(k["us_per_step"] for k in report["kernels"])
    for k in report["kernels"]:
        table.add_row(
            k["name"],
            f"{k['count']:g}",
            f"{k['median_us']:.1f}",
            f"{k['us_per_step']:.0f}",
            f"{k['us_per_step'] / report['step_us']:.1%}",
        )
    console.print(table)
    console.print(
        f"step {report['step_us']:.0f} us by the graph's clock, kernels {total:.0f} us in all "
        "(more than the step where they overlap)"
    )


if __name__ == "__main__":
    run(main)
