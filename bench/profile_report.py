"""How a profile is shown and kept: tables, JSON, Chrome trace, PNG."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.profile_kernels import Row, layer_kind
from bench.profile_map import Placed
from runtime.replay_bench import MARKS

NAME = "decode_profile"
MAX_BARS = 16


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print by part, by kernel, and the host beside the device."""
    console.print(_part_table(report))
    console.print(_kernel_table(report["kernels"], f"{report['what']}, {report['rows']} rows"))
    total = sum(k["us_per_step"] for k in report["kernels"])
    gaps = sum(k["gap_us"] for k in report["kernels"])
    console.print(
        f"step       {report['step_us']:.0f} us by the graph's clock; kernels {total:.0f} us in "
        f"all (with overlap more than the step), {gaps:.0f} us with none running"
    )
    floor = report["floor_us"]
    if floor is not None:
        console.print(
            f"floor      {floor:.0f} us of reading, {floor / report['step_us']:.0%} of the step"
        )
    if not report["times_mean_something"]:
        return
    console.print(
        f"host       {report['python_us']:.1f} us of Python a step (mark {MARKS['python_us']:.0f}) "
        f"and {report['graph_launch_us']:.1f} us of CUDA's graph launch; device idle "
        f"{report['idle_us']:.1f} us between two steps when run ahead (mark {MARKS['idle_us']:.0f})"
    )


def _part_table(report: Mapping[str, Any]) -> Table:
    table = Table(title=f"one step by part, {report['rows']} rows, {report['device']}")
    for name in ("part", "count", "us", "kernels us", "gap us", "floor us", "of floor", "share"):
        table.add_column(name, justify="left" if name == "part" else "right")
    groups: dict[str, list[Row]] = {}
    for row in report["parts"]:
        groups.setdefault(layer_kind(row["part"], report["first_dense"]), []).append(row)
    whole = sum(row["clock_us"] for row in report["parts"])
    for kind, rows in groups.items():
        sums = {n: sum(r[n] or 0.0 for r in rows) for n in ("clock_us", "kernels_us", "gap_us")}
        floor = sum(r["floor_us"] or 0.0 for r in rows)
        table.add_row(
            kind,
            str(len(rows)),
            f"{sums['clock_us']:.1f}",
            f"{sums['kernels_us']:.1f}",
            f"{sums['gap_us']:.1f}",
            f"{floor:.1f}" if floor else "-",
            f"{floor / sums['clock_us']:.0%}" if floor and sums["clock_us"] else "-",
            f"{sums['clock_us'] / whole:.1%}" if whole else "-",
        )
    return table


def _kernel_table(kernels: Sequence[Row], title: str) -> Table:
    table = Table(title=title)
    for name in ("kernel", "of", "count", "median us", "us a step", "share", "floor us", "gap us"):
        table.add_column(name, justify="left" if name in ("kernel", "of") else "right")
    for k in kernels:
        table.add_row(
            k["name"],
            k["label"],
            f"{k['count']:g}",
            f"{k['median_us']:.1f}",
            f"{k['us_per_step']:.1f}",
            f"{k['share']:.1%}",
            "-" if k["floor_us"] is None else f"{k['floor_us']:.1f}",
            f"{k['gap_us']:.1f}",
        )
    return table


def show_diff(rows: Sequence[Row], before: Row, after: Row, console: Console) -> None:
    """Print what `bench.profile_kernels.diff` found."""
    table = Table(title=f"A {before.get('commit')} → B {after.get('commit')}")
    for name in ("kernel", "", "count A", "count B", "us A", "us B", "delta us"):
        table.add_column(name, justify="left" if name in ("kernel", "") else "right")
    for r in rows:
        counts = ["-" if c is None else f"{c:g}" for c in r["count"]]
        table.add_row(
            r["name"],
            "" if r["state"] == "both" else r["state"],
            *counts,
            f"{r['us'][0]:.1f}",
            f"{r['us'][1]:.1f}",
            f"{r['delta_us']:+.1f}",
        )
    console.print(table)
    a, b = before["step_us"], after["step_us"]
    console.print(f"step {a:.0f} → {b:.0f} us ({b - a:+.0f} us, {b / a - 1:+.1%})")
    for name in ("model", "layers", "rows", "ctx_len", "device"):
        if before.get(name) != after.get(name):
            console.print(f"note: {name} differs: {before.get(name)} → {after.get(name)}")


def chrome_trace(step: Sequence[Placed]) -> list[dict[str, Any]]:
    """Chrome trace events of one step: kernels in one line, parts in another."""
    if not step:
        return []
    start = step[0].event.begin
    events = [
        {
            "name": f"{p.event.name} {p.label}".strip(),
            "ph": "X",
            "pid": 0,
            "tid": 1,
            "ts": p.event.begin - start,
            "dur": p.event.us,
            "args": {"part": p.part, "gap_us": p.gap, "floor_bytes": p.floor_bytes},
        }
        for p in step
    ]
    for part in dict.fromkeys(p.part for p in step):
        own = [p.event for p in step if p.part == part]
        begin, end = min(e.begin for e in own), max(e.end for e in own)
        line = {"name": part, "ph": "X", "pid": 0, "tid": 0, "ts": begin - start}
        events.append(line | {"dur": end - begin})
    return events


def write_files(folder: Path, report: Row, trace: list[dict[str, Any]]) -> list[Path]:
    """Write decode_profile.json, .trace.json and .png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    record, events, plot = (folder / f"{NAME}{end}" for end in (".json", ".trace.json", ".png"))
    record.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    events.write_text(json.dumps({"traceEvents": trace}) + "\n")
    _plot(plot, report)
    return [record, events, plot]


def _plot(path: Path, report: Row) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kernels = report["kernels"][:MAX_BARS][::-1]
    names = [f"{k['name']} {k['label']}".strip() for k in kernels]
    figure = Figure(figsize=(9, 0.35 * len(kernels) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.barh(names, [k["us_per_step"] for k in kernels], label=report["what"])
    floors = [k["floor_us"] or 0.0 for k in kernels]
    if any(floors):
        axes.barh(names, floors, height=0.35, color="black", label="floor (bytes read)")
    axes.set_xlabel("us a step")
    axes.set_title(
        f"{report['model']}, {report['layers']} layers, {report['rows']} rows, context "
        f"{report['ctx_len']}: {report['step_us']:.0f} us, {report['device']}",
        fontsize=10,
    )
    axes.legend()
    figure.savefig(path, dpi=120)
