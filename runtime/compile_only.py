"""Compile every kernel of every key for a chip that need not be here.

The step is run once per key on tensors without storage, with a launcher that writes down what would
be launched. What it lists is exactly what a capture will ask the store for.
"""

from __future__ import annotations

import re
import time
from dataclasses import replace

import torch
from rich.table import Table

from capture_cache.store import Store
from graphs.checkpoint import random_weights
from graphs.compile import Compiled, KernelCompiler, RecordingLauncher, compile_all
from graphs.devices import bind_views
from graphs.flashinfer_mla import FlashinferMla
from graphs.ops import Ops
from kernels.triton.state import stamp
from runtime.cli import Bar, console, print_json
from runtime.config import RuntimeConfig
from runtime.engine import Selection, choose, make_step


def list_kernels(selection: Selection, arch: str) -> RecordingLauncher:
    """Everything that a capture of `selection` launches, random weights and timestamps included.

    Where the model suits flashinfer, what stands around its kernel is listed too: whether it is
    installed is known only on the machine that captures.
    """
    launcher = RecordingLauncher(arch)
    kinds = ["triton"]
    if arch == "sm_90" and not FlashinferMla.unfit(selection.model):
        kinds.append("flashinfer")
    for kind in kinds:
        chosen = replace(selection, step=replace(selection.step, attention=kind))
        views = bind_views(None, chosen.layout, torch.device("meta"))
        step = make_step(chosen, Ops(launcher), views)
        for key in chosen.ladder.keys:
            step.run(key)
    stamp(launcher, views["stamps"], 0)
    stamp(launcher, views["stamps"], 1)
    if selection.source.is_preset:
        random_weights(
            selection.model, views, seed=0, launch=launcher, ep_size=selection.step.ep_size
        )
    return launcher


def compile_only(options: RuntimeConfig, arch: str, *, jobs: int | None, as_json: bool) -> int:
    """The command behind `--compile-only`; prints registers, spills and shared memory of each
    kernel.

    Raises:
        ValueError: `arch` is not a chip that the kernels are written for.
    """
    if not re.fullmatch(r"sm_(90|100)", arch):
        raise ValueError(f"--compile-only takes sm_90 (Hopper) or sm_100 (Blackwell), got {arch!r}")
    start = time.perf_counter()
    selection = choose(options, compile_only=True)
    requests = list_kernels(selection, arch).requests
    with Bar() as bar:
        rows = compile_all(
            requests,
            KernelCompiler(Store(options.store_path), arch),
            jobs=jobs,
            progress=lambda name: bar("compile", len(requests), name),
        )
    seconds = time.perf_counter() - start
    console.print(_table(rows, arch))
    cached = sum(r.cached for r in rows)
    console.print(
        f"{len(rows) - cached} kernels compiled, {cached} were in {options.store_path}, "
        f"{seconds:.1f} s; a capture for {arch} on this store compiles none of them"
    )
    if as_json:
        print_json(
            {
                "arch": arch,
                "model": options.model,
                "ladder": str(selection.ladder),
                "compiled": len(rows) - cached,
                "cached": cached,
                "seconds": seconds,
                "kernels": [r.to_json() for r in rows],
            }
        )
    return 0


def _table(rows: list[Compiled], arch: str) -> Table:
    table = Table(title=f"kernels for {arch}")
    for name in ("kernel", "variants", "registers", "spill bytes", "shared KiB", "compile s"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    by_name: dict[str, list[Compiled]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    for name, group in sorted(by_name.items()):
        table.add_row(
            name,
            str(len(group)),
            _span([r.registers for r in group]),
            _span([r.spill_bytes for r in group]),
            _span([r.shared_bytes // 1024 for r in group]),
            f"{sum(r.seconds for r in group):.1f}",
        )
    return table


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"
