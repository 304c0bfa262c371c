"""`python -m bench.decode_profile`: one decode step by layer and kernel, beside its floor.

The step runs as a graph, as in service, three times over: for the driver's own time and the idle
time between steps; with timestamps inside the graph, for the time of each part; and under torch's
profiler, for each kernel: how often a step launches it, its time, its share, what must be read, and
the gap before it. Kernels that overlap (programmatic dependent launch) count the time that they
wait for each other twice. Under torchrun every rank profiles the same steps and rank 0 prints its
own. On the CPU twin there are no kernels: its operations are timed on the host, for the shape of
the report only.

--diff A.json B.json compares two profiles kernel by kernel, and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch
from rich.console import Console

from bench.profile_kernels import Row, by_kernel, by_part, diff, split_steps
from bench.profile_map import Event, Placed, StepMap, place
from bench.profile_report import chrome_trace, show, show_diff, write_files
from graphs.calls import Call, RecordingOps
from graphs.keys import GraphKey
from graphs.ops import Ops
from runtime.assemble import make_step
from runtime.build import build
from runtime.capture import TWIN_NOTE
from runtime.cli import Bar, add_selection, command, console, print_json, run, selection
from runtime.driver import Runtime
from runtime.engine import Engine
from runtime.replay_bench import ReplayBench
from runtime.report import provenance

TABLE_WIDTH = 120
NO_GPU_DATA = """A profile that holds no GPU data: torch's profiler reads kernels through CUPTI, and
CUPTI serves one client at a time. Look for another profiler that holds it (nsys, ncu, dcgm, a
second torch profiler); for a driver that lets only root profile (module option
NVreg_RestrictProfilingToAdminUsers=1: use a container with CAP_SYS_ADMIN, or ask its owner); for a
MIG slice without profiling rights; and for a torch built without kineto. The parts by the graph's
own clock need none of it: python -m runtime.replay_bench prints them."""


def parser() -> argparse.ArgumentParser:
    p = command("bench.decode_profile", __doc__)
    p.epilog = NO_GPU_DATA
    add_selection(p)
    p.add_argument("--ctx-len", type=int, default=2000, help="KV tokens a row holds")
    p.add_argument("--steps", type=int, default=10, help="profiled steps")
    p.add_argument("--rows", type=int, help="live rows a rank, a key of the ladder; default: all")
    p.add_argument("--bandwidth", type=float, help="device read bandwidth for the floor, TB/s")
    p.add_argument("--out", type=Path, help="directory for the JSON, the Chrome trace and the PNG")
    p.add_argument("--trace", type=Path, help="write torch's own Chrome trace, of all steps, here")
    p.add_argument("--diff", type=Path, nargs=2, metavar=("A.json", "B.json"))
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    wide = Console(width=max(console.width, TABLE_WIDTH))
    if args.diff:
        return _diff(args, wide)
    if args.steps < 2:
        raise ValueError(f"--steps {args.steps}: expected at least 2, to time what lies between")
    with Bar() as bar:
        engine = build(selection(args, verify=False), bar)
    with Runtime(engine, engine.options.scheduling) as runtime:
        wide.quiet = console.quiet
        report, step = profile(runtime, args)
    show(report, wide)
    if not engine.selection.on_device:
        console.print(TWIN_NOTE)
    if args.out and not console.quiet:
        for path in write_files(args.out, report, chrome_trace(step)):
            console.print(f"wrote      {path}")
    if args.json:
        print_json(report)
    return 0


def profile(runtime: Runtime, args: argparse.Namespace) -> tuple[Row, list[Placed]]:
    """The whole report, and the kernels of one step.

    Raises:
        ValueError: rows that are no key of the ladder, or a context that does not fit.
        RuntimeError: the profile holds no GPU data.
    """
    engine = runtime.engine
    key = _key(engine, args.rows)
    # Warm-up, timed and profiled steps all append a token.
    most = engine.config.max_seq_len - args.steps - 8
    if not 1 <= args.ctx_len <= most:
        raise ValueError(
            f"--ctx-len {args.ctx_len} with {args.steps} steps: expected 1 … {most} "
            f"(--max-seq-len {engine.config.max_seq_len} less the steps); raise --max-seq-len"
        )
    bench = ReplayBench(runtime, args.ctx_len, args.steps, args.bandwidth)
    times = bench.time_key(key)
    parts = bench.time_parts(key)
    if engine.selection.on_device:
        events = _device_events(bench, key, args.steps, args.trace)
    else:
        events = _twin_events(bench, key, args.steps)
    layout = StepMap(engine, key, by_operation=not engine.selection.on_device)
    first = layout.launches[0].kernel
    steps = [place(step, layout.launches) for step in split_steps(events, args.steps, first)]
    report = provenance(engine.device_name) | {
        "model": args.model,
        "layers": engine.model_config.num_layers,
        "first_dense": engine.model_config.first_k_dense_replace,
        "what": "kernels" if engine.selection.on_device else "operations of the CPU twin",
        "times_mean_something": engine.selection.on_device,
        "rows": key.rows,
        "ctx_len": args.ctx_len,
        "steps": args.steps,
        "attention": engine.config.attention,
        "kernels_chosen": engine.choices.digest,
        "step_us": times.span_us,
        "host_us": times.host_us,
        "python_us": times.python_us,
        "graph_launch_us": times.graph_launch_us,
        "idle_us": times.idle_us,
        "floor_us": times.floor_us,
        "parts": by_part(steps, parts, layout.part_bytes, bench.bandwidth),
        "kernels": by_kernel(steps, times.span_us, bench.bandwidth),
    }
    return report, steps[-1]


def _key(engine: Engine, rows: int | None) -> GraphKey:
    pure = [k for k in engine.ladder.keys if k.tokens == k.rows]
    if not pure:
        raise ValueError(f"ladder {engine.ladder} has no key of decoding rows alone; add one")
    key = pure[-1] if rows is None else GraphKey(max(rows, 1), max(rows, 1))
    if key not in pure:
        raise ValueError(f"--rows {rows}: not a key of the ladder {engine.ladder}; add it there")
    return key


def _device_events(
    bench: ReplayBench, key: GraphKey, steps: int, trace: Path | None
) -> list[Event]:
    """Every kernel of `steps` replays, as CUPTI saw it."""
    runtime = bench.runtime
    runtime.occupy(key.rows, bench.ctx_len, steps + 4)
    for _ in range(2):
        runtime.step()
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds, acc_events=True) as profiler:
        for _ in range(steps):
            runtime.step()
        torch.cuda.synchronize()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    events = [
        Event(short_name(e.name), e.time_range.start, e.time_range.end)
        for e in profiler.events()
        if e.device_type.name == "CUDA" and e.device_time > 0
    ]
    for row in range(runtime.config.max_rows):
        runtime.cancel(row)
    runtime.step()
    if not events:
        raise RuntimeError(NO_GPU_DATA)
    return events


def short_name(name: str) -> str:
    """A kernel's own name, without template arguments and namespaces."""
    return re.sub(r"<.*", "", name.removeprefix("void ")).split("::")[-1]


# ------------------------------------------------------------------ the CPU twin


def _twin_events(bench: ReplayBench, key: GraphKey, steps: int) -> list[Event]:
    """Every operation of `steps` steps, by the host's clock."""
    events: list[Event] = []
    engine = bench.engine
    bench.runtime.occupy(key.rows, bench.ctx_len, steps + 4)
    oracles = Ops(None)

    def hook(call: Call) -> None:
        begin = time.perf_counter()
        getattr(oracles, call.op)(*call.args, **call.kwargs)
        events.append(Event(call.op, begin * 1e6, time.perf_counter() * 1e6))

    buffers = engine.graphs.step.buffers
    views = {name: buffers[name] for name in buffers.addresses()}
    transport = engine.graphs.step.transport if engine.model_config.num_experts else None
    vocabulary = engine.graphs.step.vocabulary
    recording = RecordingOps(oracles, hook)
    step = make_step(engine.selection, recording, views, transport, vocabulary=vocabulary)
    for _ in range(steps):
        step.run(key)
    return events


# ------------------------------------------------------------------ two profiles


def _diff(args: argparse.Namespace, wide: Console) -> int:
    reports: list[Row] = []
    for path in args.diff:
        try:
            reports.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise ValueError(f"--diff {path}: expected a profile's JSON, got {error}") from error
    rows = diff(reports[0], reports[1])
    show_diff(rows, reports[0], reports[1], wide)
    if args.json:
        print_json({"diff": rows, "step_us": [r["step_us"] for r in reports]})
    return 0


if __name__ == "__main__":
    run(main)
