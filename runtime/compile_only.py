"""Compile every kernel of every key for a chip that need not be here.

The step is run once per key on tensors without storage, with a launcher that writes down what would
be launched. What it lists is exactly what a capture will ask the store for.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from rich.table import Table

from barriers.rdep import compile_rdep
from barriers.vocabulary_peers import compile_head
from capture_cache.nvrtc import CudaModule
from capture_cache.store import Store
from graphs.buffers import transport_config, vocabulary_config
from graphs.compile import Compiled, KernelCompiler, compile_all
from graphs.flashinfer_mla import FlashinferMla
from graphs.hopper_mla import HopperMla
from runtime.assemble import list_kernels
from runtime.cli import Bar, console, print_json
from runtime.config import RuntimeConfig
from runtime.selection import choose


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
    # Whether flashinfer is installed is known only on the machine that captures.
    kinds = ["triton"]
    if arch == "sm_90" and not FlashinferMla.unfit(selection.model):
        kinds.append("flashinfer")
    if arch == "sm_90" and not HopperMla.unfit_here(selection.model, selection.step.page_size):
        kinds.append("hopper")
    requests = list_kernels(selection, arch, kinds).requests
    store = Store(options.store_path)
    with Bar() as bar:
        rows = compile_all(
            requests,
            KernelCompiler(store, arch),
            jobs=jobs,
            progress=lambda name: bar("compile", len(requests), name),
        )
    if selection.step.transport == "rdep":
        sizes = transport_config(selection.model, selection.step, selection.ladder.max_tokens)
        rows += compiled_cuda(lambda: compile_rdep(sizes, arch, store=store), arch)
        shared = vocabulary_config(selection.model, selection.step, selection.ladder.max_rows)
        if shared is not None:
            rows += compiled_cuda(lambda: compile_head(shared, arch, store=store), arch)
    seconds = time.perf_counter() - start
    console.print(_table(rows, arch))
    cached = sum(r.cached for r in rows)
    # Kernels of one CUDA C++ source are compiled together and lie in one entry of the store.
    entries = len({r.key for r in rows})
    console.print(
        f"{len(rows) - cached} kernels compiled, {cached} were in {options.store_path}, "
        f"{seconds:.1f} s; as {entries} entries of that store; a capture for {arch} on it compiles "
        "none of them"
    )
    if as_json:
        print_json(
            {
                "arch": arch,
                "model": options.model,
                "ladder": str(selection.ladder),
                "compiled": len(rows) - cached,
                "cached": cached,
                "entries": entries,
                "seconds": seconds,
                "kernels": [r.to_json() for r in rows],
            }
        )
    return 0


def compiled_cuda(compiling: Callable[[], CudaModule], arch: str) -> list[Compiled]:
    """CUDA C++ kernels of the exchanges between ranks, compiled through NVRTC into the store."""
    start = time.perf_counter()
    module = compiling()
    seconds = (time.perf_counter() - start) / len(module.kernels)
    return [
        Compiled(
            name=name,
            key="nvrtc",
            arch=arch,
            num_warps=0,
            registers=facts.registers,
            local_bytes=facts.local_bytes,
            spill_bytes=facts.local_bytes,
            shared_bytes=facts.static_shared_bytes,
            seconds=seconds,
            cached=module.cached,
        )
        for name, facts in module.kernels.items()
    ]


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
