"""What a benchmark leaves behind: a JSON record with its provenance, a plot, a Chrome trace."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any


def provenance(device: str) -> dict[str, Any]:
    """Command, commit, hardware and versions, so that a number can be made again."""
    return {
        "command": f"python -m {_module()} {shlex.join(sys.argv[1:])}".strip(),
        "commit": _commit(),
        "device": device,
        "host_cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {
            p: _version(p) for p in ("torch", "triton", "flashinfer-python", "cuda-bindings")
        },
    }


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).name


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, "+" behind it if it was changed; None outside one."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def write_files(folder: Path, report: dict[str, Any], trace: list[dict[str, Any]]) -> list[Path]:
    """Write replay_bench.json, .png and .trace.json; returns their paths.

    Raises:
        ValueError: a file cannot be written; names it.
    """
    record, events, plot = (
        folder / f"replay_bench.{kind}" for kind in ("json", "trace.json", "png")
    )
    work: dict[Path, Callable[[], object]] = {
        record: lambda: record.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n"),
        events: lambda: events.write_text(json.dumps({"traceEvents": trace}) + "\n"),
        plot: lambda: _plot(plot, report),
    }
    for path, write in work.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write()
        except OSError as error:
            raise ValueError(
                f"--out: {path} cannot be written ({error.strerror}); make room, or give another "
                "folder (with --json the numbers are the last line of the output, too)"
            ) from error
    return list(work)


def _plot(path: Path, report: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pure = [k for k in report["keys"] if k["tokens"] == k["rows"]]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = [k["rows"] for k in pure]
    axes.plot(rows, [k["p50_us"] / 1e3 for k in pure], marker="o", label="step, p50")
    if all(k["floor_us"] is not None for k in pure):
        axes.plot(
            rows, [k["floor_us"] / 1e3 for k in pure], linestyle="--", label="floor (bytes read)"
        )
    axes.set_xlabel("rows a rank")
    axes.set_ylabel("ms a step")
    axes.set_ylim(bottom=0)
    axes.set_title(
        f"{report['model']}, {report['layers']} layers, context {report['ctx_len']}, "
        f"{report['device']}"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
