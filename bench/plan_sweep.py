"""`python -m bench.plan_sweep`: how each weight-streaming product of a layer is best cut.

For every product of a DeepSeek-V3 layer, each number of rows and each candidate plan: the result is
checked against the default plan's (bits where K is split the same way, closely otherwise), then
timed in a graph of many launches whose weights rotate beyond L2. In front of each launch stands a
small norm kernel, as in a step, and its own time is taken off; so what a plan gains by starting
before its inputs are there is seen, too. The floor stands beside.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from capture_cache.store import Store
from graphs.aot import AotLauncher
from graphs.compile import KernelCompiler, RecordingLauncher, compile_all
from graphs.floor import READ_BYTES_PER_S
from kernels.triton import grouped, linear, norm
from kernels.triton.grouped import GroupedPlan
from kernels.triton.launch import Launcher
from kernels.triton.linear import LinearPlan, linear_plan
from kernels.triton.overlap import MODES
from runtime.cli import Bar, command, console, print_json, run
from runtime.config import PDL
from runtime.report import provenance

BF16, F32, FP8, I32 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int32
HIDDEN, INTER, TOP_K = 7168, 2048, 8
ROTATED_BYTES = 400 << 20  # of weights, several times L2
LAUNCHES = 24  # a graph
REPLAYS = 7
# Name, N and K of a DeepSeek-V3 layer's FP8 products.
DENSE = {
    "qkv_a": (2112, 7168),
    "q_b": (24576, 1536),
    "o": (7168, 16384),
    "shared_gate_up": (4096, 7168),
    "shared_down": (7168, 2048),
    "dense_gate_up": (36864, 7168),
    "dense_down": (7168, 18432),
}
Plan = LinearPlan | GroupedPlan


@dataclass(frozen=True)
class Case:
    """One product at one number of rows.

    Attributes:
        nbytes: weights read by one launch.
        make: buffers for a copy of the weights, on a device.
        launch: one launch over such buffers.
    """

    name: str
    rows: int
    nbytes: int
    plans: tuple[Plan, ...]
    make: Callable[[torch.device], dict[str, torch.Tensor]]
    launch: Callable[[Launcher, dict[str, torch.Tensor], Plan], None]


def parser() -> Any:
    p = command("bench.plan_sweep", __doc__)
    p.add_argument("--rows", default="1,32,64")
    p.add_argument("--only", help="names of products, separated by commas; default: all")
    p.add_argument("--experts", type=int, default=32, help="local experts")
    p.add_argument("--pdl", choices=PDL[1:], default="early")
    p.add_argument("--store", required=True, help="directory of compiled kernels")
    p.add_argument("--out", help="directory for the JSON")
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not torch.cuda.is_available():
        raise ValueError("plans are timed on a CUDA device, and torch sees none")
    rows = [int(r) for r in args.rows.split(",")]
    wanted = set(args.only.split(",")) if args.only else None
    cases = [c for c in _cases(rows, args.experts) if wanted is None or c.name in wanted]
    if not cases:
        raise ValueError(f"--only {args.only}: known are {sorted({*DENSE, 'gate_up', 'down'})}")
    launcher = _launcher(Path(args.store), MODES[args.pdl], cases)
    device = torch.cuda.get_device_name()
    found = []
    with Bar() as bar:
        for case in cases:
            found.append(_sweep(case, launcher))
            bar("sweep", len(cases), f"{case.name} {case.rows}")
    bandwidth = READ_BYTES_PER_S.get(device)
    for row in found:
        row["floor_us"] = None if bandwidth is None else row["bytes"] / bandwidth * 1e6
    _show(found, device)
    report = provenance(device) | {"pdl": args.pdl, "experts": args.experts, "cases": found}
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"plan_sweep_{args.pdl}.json").write_text(json.dumps(report, indent=1))
    if args.json:
        print_json(report)
    return 0


# ------------------------------------------------------------------ candidates


def _cases(rows: Sequence[int], experts: int) -> Iterator[Case]:
    for t in rows:
        for name, (n, k) in DENSE.items():
            yield _dense(name, n, k, t)
        yield _gate_up(t, experts)
        yield _down(t, experts)


def _linear_plans(n: int, k: int) -> tuple[LinearPlan, ...]:
    default = linear_plan(n, k, elem_bytes=1)
    plans = [default, *(replace(default, prefetch=p) for p in (0,))]
    for block_n in (128, 64):
        tiles = -(-n // block_n)
        # From one program an SM to three; never more than K has blocks to share out.
        counts = {max(1, round(p / tiles)) for p in (132, 176, 264, 396)}
        for splits in sorted(c for c in counts if k // 128 // c >= 4):
            for unroll in (1, 2):
                plans.append(LinearPlan(block_n, splits, unroll=unroll))
            for per_sm in (1, 3):
                plans.append(LinearPlan(block_n, splits, per_sm=per_sm))
    return tuple(dict.fromkeys(plans))


def _dense(name: str, n: int, k: int, t: int) -> Case:
    most = max(p.splits for p in _linear_plans(n, k))

    def make(device: torch.device) -> dict[str, torch.Tensor]:
        return {
            "xq": _fp8(device, t, k),
            "xs": torch.ones(t, -(-k // 128), device=device),
            "w": _fp8(device, n, k),
            "ws": torch.ones(-(-n // 128), -(-k // 128), device=device),
            "out": torch.empty(t, n, dtype=BF16, device=device),
            "workspace": torch.empty(most * t * n, device=device),
        }

    def launch(launcher: Launcher, b: dict[str, torch.Tensor], plan: Plan) -> None:
        assert isinstance(plan, LinearPlan)
        linear.linear_fp8(launcher, **b, plan=plan)

    return Case(name, t, n * k, _linear_plans(n, k), make, launch)


def _grouped_plans(block_ns: Sequence[int]) -> tuple[GroupedPlan, ...]:
    return tuple(GroupedPlan(block_n, per_sm) for block_n in block_ns for per_sm in (1, 2, 3))


def _gate_up(t: int, experts: int) -> Case:
    plans = (grouped.GATE_UP_PLAN, *_grouped_plans((128,)))

    def make(device: torch.device) -> dict[str, torch.Tensor]:
        return {
            "x": _fp8(device, t, HIDDEN),
            "x_scale": torch.ones(t, HIDDEN // 128, device=device),
            "w": _fp8(device, experts, 2 * INTER, HIDDEN),
            "w_scale": torch.ones(experts, 2 * INTER // 128, HIDDEN // 128, device=device),
            **_lists(device, t, experts),
            "out": _fp8(device, t * TOP_K, INTER),
            "out_scale": torch.ones(t * TOP_K, INTER // 128, device=device),
        }

    def launch(launcher: Launcher, b: dict[str, torch.Tensor], plan: Plan) -> None:
        assert isinstance(plan, GroupedPlan)
        grouped.grouped_gate_up(launcher, **b, top_k=TOP_K, plan=plan)

    busy = min(experts, t * TOP_K)
    return Case("gate_up", t, busy * 2 * INTER * HIDDEN, tuple(dict.fromkeys(plans)), make, launch)


def _down(t: int, experts: int) -> Case:
    plans = (grouped.DOWN_PLAN, *_grouped_plans((128, 64)))

    def make(device: torch.device) -> dict[str, torch.Tensor]:
        return {
            "h": _fp8(device, t * TOP_K, INTER),
            "h_scale": torch.ones(t * TOP_K, INTER // 128, device=device),
            "w": _fp8(device, experts, HIDDEN, INTER),
            "w_scale": torch.ones(experts, HIDDEN // 128, INTER // 128, device=device),
            **_lists(device, t, experts),
            "out": torch.empty(t * TOP_K, HIDDEN, dtype=BF16, device=device),
        }

    def launch(launcher: Launcher, b: dict[str, torch.Tensor], plan: Plan) -> None:
        assert isinstance(plan, GroupedPlan)
        grouped.grouped_down(launcher, **b, top_k=TOP_K, plan=plan)

    busy = min(experts, t * TOP_K)
    return Case("down", t, busy * INTER * HIDDEN, tuple(dict.fromkeys(plans)), make, launch)


def _lists(device: torch.device, t: int, experts: int) -> dict[str, torch.Tensor]:
    """Even routing: pair p goes to expert p mod experts."""
    expert = torch.arange(t * TOP_K) % experts
    counts = torch.bincount(expert, minlength=experts)
    offsets = torch.zeros(experts + 1, dtype=I32)
    offsets[1:] = counts.cumsum(0)
    return {
        "offsets": offsets.to(device),
        "pairs": expert.argsort(stable=True).to(I32).to(device),
    }


def _fp8(device: torch.device, *shape: int) -> torch.Tensor:
    """Values of order one, made without a wide temporary."""
    if device.type == "meta":
        return torch.empty(shape, dtype=FP8, device=device)
    # 0x28 … 0x47 are e4m3's 0.25 … 3.75; the sign is drawn as well.
    low = torch.randint(0x28, 0x48, shape, dtype=torch.uint8, device=device)
    return (low | torch.randint(0, 2, shape, dtype=torch.uint8, device=device) * 0x80).view(FP8)


# ------------------------------------------------------------------ compile, check, time


def _launcher(store: Path, mode: int, cases: Sequence[Case]) -> AotLauncher:
    major, minor = torch.cuda.get_device_capability()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    arch, sms = f"sm_{major}{minor}", properties.multi_processor_count
    recorder = RecordingLauncher(arch, sms, mode)
    meta = torch.device("meta")
    for case in cases:
        buffers = case.make(meta)
        for plan in case.plans:
            case.launch(recorder, buffers, plan)
        _small(recorder, _small_buffers(meta, case.rows))
    compiler = KernelCompiler(Store(store), arch)
    with Bar() as bar:
        total = len(recorder.requests)
        compile_all(recorder.requests, compiler, progress=lambda n: bar("compile", total, n))
    return AotLauncher(compiler, num_sms=sms, pdl=mode)


def _small_buffers(device: torch.device, t: int) -> dict[str, torch.Tensor]:
    """Of the kernel that stands in front of each product."""
    return {
        "x": torch.ones(t, HIDDEN, dtype=BF16, device=device),
        "delta": torch.zeros(t, HIDDEN, dtype=BF16, device=device),
        "weight": torch.ones(HIDDEN, dtype=BF16, device=device),
        "out_q": _fp8(device, t, HIDDEN),
        "out_scale": torch.ones(t, HIDDEN // 128, device=device),
    }


def _small(launcher: Launcher, b: dict[str, torch.Tensor]) -> None:
    norm.add_rmsnorm(
        launcher,
        b["x"],
        b["delta"],
        b["weight"],
        eps=1e-6,
        out_q=b["out_q"],
        out_scale=b["out_scale"],
    )


def _sweep(case: Case, launcher: AotLauncher) -> dict[str, Any]:
    device = torch.device("cuda")
    copies = max(2, min(LAUNCHES, ROTATED_BYTES // case.nbytes))
    buffers = [case.make(device) for _ in range(copies)]
    small = _small_buffers(device, case.rows)
    default = case.plans[0]
    want = _run(case, launcher, buffers[0], default)
    alone = _time(launcher, lambda i: _small(launcher, small))
    rows = []
    for plan in case.plans:
        same = _differs(want, _run(case, launcher, buffers[0], plan), default, plan)
        if same:
            raise RuntimeError(f"{case.name}, {case.rows} rows, {plan}: {same}")

        def pair(i: int, plan: Plan = plan) -> None:
            _small(launcher, small)
            case.launch(launcher, buffers[i % copies], plan)

        def bare(i: int, plan: Plan = plan) -> None:
            case.launch(launcher, buffers[i % copies], plan)

        rows.append(
            {
                "plan": asdict(plan),
                "us": _time(launcher, pair) - alone,
                "bare_us": _time(launcher, bare),
            }
        )
    return {
        "name": case.name,
        "rows": case.rows,
        "bytes": case.nbytes,
        "small_us": alone,
        "default": rows[0],
        "plans": sorted(rows, key=lambda r: float(r["us"])),
    }


def _run(
    case: Case, launcher: AotLauncher, buffers: dict[str, torch.Tensor], plan: Plan
) -> torch.Tensor:
    buffers["out"].view(torch.uint8).zero_()
    case.launch(launcher, buffers, plan)
    torch.cuda.synchronize()
    return buffers["out"].clone()


def _differs(want: torch.Tensor, got: torch.Tensor, default: Plan, plan: Plan) -> str:
    """What is wrong with a plan's result; empty if nothing."""
    splits = {p.splits if isinstance(p, LinearPlan) else 1 for p in (default, plan)}
    if len(splits) == 1:
        equal = torch.equal(want.view(torch.uint8), got.view(torch.uint8))
        return "" if equal else "other bits than the default plan, with K cut alike"
    a, b = want.float(), got.float()
    error = float((a - b).norm() / a.norm())
    return "" if error < 1e-2 else f"relative error {error:.2g} against the default plan"


def _time(launcher: AotLauncher, launch: Callable[[int], None]) -> float:
    """Median microseconds of one call, in a graph of LAUNCHES."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        launch(0)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(LAUNCHES):
                launch(i)
        times = []
        for _ in range(REPLAYS + 2):
            begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) * 1e3 / LAUNCHES)
    return statistics.median(times[2:])


def _show(found: list[dict[str, Any]], device: str) -> None:
    table = Table(title=f"products on {device}: default plan, best plan, floor; us")
    for column in ("product", "rows", "floor", "default", "best", "bare", "best plan"):
        table.add_column(column, justify="left" if column.endswith(("ct", "an")) else "right")
    for row in found:
        best = row["plans"][0]
        floor = "" if row["floor_us"] is None else f"{row['floor_us']:.1f}"
        table.add_row(
            row["name"],
            str(row["rows"]),
            floor,
            f"{row['default']['us']:.1f}",
            f"{best['us']:.1f}",
            f"{best['bare_us']:.1f}",
            " ".join(f"{k[:8]}={v}" for k, v in best["plan"].items()),
        )
    console.print(table)


if __name__ == "__main__":
    run(main)
