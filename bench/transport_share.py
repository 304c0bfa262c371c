"""`torchrun … -m bench.transport_share`: how much of a whole decode step the transport takes.

The step runs as in service, with a timestamp of the device before and after every dispatch and
combine. On each layer the rank that comes last waits for nobody, so the shortest of the ranks'
times is what the exchange itself costs; what the others spend beyond it is waiting for ranks whose
attention or experts took longer, and would be there with any transport. The load of each rank's
experts is read in the same step.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from barriers.transport import Received, Transport
from graphs.keys import GraphKey
from kernels.triton.settle import stamp
from runtime.build import build
from runtime.cli import Bar, add_selection, command, console, print_json, run, selection
from runtime.driver import Runtime
from runtime.engine import Engine
from runtime.report import provenance

WARM_UP = 5
MARKS = 4  # before and after dispatch, before and after combine


class Stamped:
    """A transport with a timestamp around each call and a copy of the experts' loads.

    Args:
        first: the first layer with experts; its marks come first.
    """

    def __init__(self, inner: Transport, engine: Engine, first: int) -> None:
        self.name, self.config, self.live = inner.name, inner.config, inner.live
        self.allocates, self.takes_act = inner.allocates, inner.takes_act
        self._inner, self._first = inner, first
        self._launch = engine.launcher
        self._stamps = engine.graphs.step.buffers["stamps"]
        self._offsets = engine.graphs.step.buffers["offsets"]
        layers = engine.model_config.num_layers - first
        self.loads = self._offsets.new_zeros(layers, self._offsets.numel())
        self.num_marks = MARKS * layers
        if self.num_marks > self._stamps.numel():
            raise ValueError(
                f"{layers} layers need {self.num_marks} timestamps, and a step has room for "
                f"{self._stamps.numel()}; choose fewer --layers"
            )

    def require_settled(self, doing: str) -> None:
        self._inner.require_settled(doing)

    def dispatch(self, *args: Any, layer: int = 0, opens_step: bool = False) -> Received:
        self._mark(layer, 0)
        received = self._inner.dispatch(*args, layer=layer, opens_step=opens_step)
        self._mark(layer, 1)
        return received

    def combine(self, *args: Any, layer: int = 0) -> None:
        self._mark(layer, 2)
        self._inner.combine(*args, layer=layer)
        self._mark(layer, 3)
        self.loads[layer - self._first].copy_(self._offsets)

    def _mark(self, layer: int, mark: int) -> None:
        assert self._launch is not None
        stamp(self._launch, self._stamps, MARKS * (layer - self._first) + mark)


def parser() -> argparse.ArgumentParser:
    p = command("bench.transport_share", __doc__)
    add_selection(p)
    p.add_argument("--ctx-len", type=int, default=2000, help="KV tokens a row holds")
    p.add_argument("--steps", type=int, default=30, help="measured steps")
    p.add_argument("--rows", type=int, help="live rows a rank; default: all")
    p.add_argument(
        "--compare-overlap",
        action="store_true",
        help="once more, with the shared expert behind the routed ones",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    report = _run(args)
    if args.compare_overlap:
        args.overlap = False
        report["without_overlap"] = _run(args)
    if args.json and report["rank"] == 0:
        print_json(report)
    return 0


def _run(args: argparse.Namespace) -> dict[str, Any]:
    """One engine, measured; rank 0 shows it."""
    with Bar() as bar:
        engine = build(selection(args, verify=False, bundle=False), bar)
    model = engine.model_config
    if not engine.selection.on_device or model.first_k_dense_replace >= model.num_layers:
        engine.close()
        raise ValueError("expected a GPU and a model with experts, got none; use --device cuda")
    with Runtime(engine) as runtime:
        engine.fill_kv(seed=engine.ranks.rank)
        rows = args.rows or engine.config.max_rows
        plain_us, marks, spans, loads = _measure(runtime, rows, args.ctx_len, args.steps)
        report = provenance(engine.device_name) | {
            "model": args.model,
            "transport": engine.config.transport,
            "overlap": engine.config.overlap,
            "rank": engine.ranks.rank,
            "ranks": engine.config.ep_size,
            "rows": rows,
            "ctx_len": args.ctx_len,
        }
        report |= _gather(engine, plain_us, marks, spans, loads)
    if report["rank"] == 0:
        _show(report)
    return report


def _measure(
    runtime: Runtime, rows: int, ctx_len: int, steps: int
) -> tuple[float, NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Microseconds of the plain step; of the marks [steps, layers, 4]; of the marked steps; and the
    experts' loads [layers, experts]."""
    engine = runtime.engine
    runtime.occupy(rows, ctx_len, 3 * WARM_UP + 2 * steps)
    plain = [_span(runtime) for _ in range(WARM_UP + steps)][WARM_UP:]
    key = runtime.last_key
    assert key is not None
    stamped = _capture(engine, key)
    marks, spans = [], []
    for i in range(WARM_UP + steps):
        span = _span(runtime)
        if i >= WARM_UP:
            spans.append(span)
            marks.append(engine.read_stamps(stamped.num_marks).reshape(-1, MARKS) / 1e3)
    loads = stamped.loads.diff(dim=1).cpu().numpy().astype(np.int64)
    return float(np.median(plain)), np.array(marks), np.array(spans), loads


def _capture(engine: Engine, key: GraphKey) -> Stamped:
    """Put a graph with timestamps in the place of the graph of `key`."""
    step, graphs = engine.graphs.step, engine.graphs
    stamped = Stamped(step.transport, engine, engine.model_config.first_k_dense_replace)
    step.replace_transport(stamped)
    torch.cuda.synchronize()
    engine.ranks.meet("timestamps")
    graphs.graphs[key] = graphs.backend.capture(key, lambda: step.run(key))
    engine.ranks.meet("captured with timestamps")
    return stamped


def _span(runtime: Runtime) -> float:
    runtime.step()
    entry = runtime.last_entry
    assert entry is not None
    return (entry.end_ns - entry.begin_ns) / 1e3


def _gather(
    engine: Engine,
    plain_us: float,
    marks: NDArray[np.float64],
    spans: NDArray[np.float64],
    loads: NDArray[np.int64],
) -> dict[str, Any]:
    """All ranks' medians, put together."""
    group = engine.ranks.group

    def all_ranks(what: str, values: NDArray[Any]) -> NDArray[np.float64]:
        told = [round(float(v), 2) for v in values]
        return np.array([p.value for p in group.allgather(what, told)])

    parts = np.median(np.diff(marks, axis=2), axis=0)  # [layers, 3]: dispatch, experts, combine
    dispatch, experts, combine = (
        all_ranks(name, parts[:, i]) for i, name in enumerate(("dispatch", "experts", "combine"))
    )
    touched = all_ranks("touched experts", (loads > 0).sum(1))
    pairs = all_ranks("pairs", loads.sum(1))
    step_us = all_ranks("step", np.array([plain_us, np.median(spans)]))
    exchange = dispatch.min(0).sum() + combine.min(0).sum()
    spent = (dispatch + combine).sum(1)  # of each rank
    return {
        "step_us": float(step_us[:, 0].mean()),
        "marked_step_us": float(step_us[:, 1].mean()),
        "layers": int(parts.shape[0]),
        "exchange_us": float(exchange),
        "exchange_us_per_layer": float(exchange / parts.shape[0]),
        "waiting_us_by_rank": [float(s - exchange) for s in spent],
        "exchange_share": float(exchange / step_us[:, 1].mean()),
        "by_rank": [
            {
                "dispatch_us": float(dispatch[r].mean()),
                "experts_us": float(experts[r].mean()),
                "combine_us": float(combine[r].mean()),
                "touched_experts": float(touched[r].mean()),
                "pairs": float(pairs[r].mean()),
            }
            for r in range(group.world)
        ],
        "slowest_experts_us": float(experts.max(0).mean()),
    }


def _show(report: dict[str, Any]) -> None:
    where = "beside" if report["overlap"] else "behind"
    title = f"{report['transport']}, shared expert {where}, mean of a layer, {report['device']}"
    table = Table(title=title)
    names = ("dispatch us", "experts us", "combine us", "experts touched", "(row, choice) pairs")
    for column in ("rank", *names):
        table.add_column(column, justify="right")
    for rank, r in enumerate(report["by_rank"]):
        table.add_row(str(rank), *(f"{value:.1f}" for value in r.values()))
    console.print(table)
    waiting = ", ".join(f"{w / 1e3:.2f}" for w in report["waiting_us_by_rank"])
    console.print(
        f"step {report['step_us'] / 1e3:.2f} ms ({report['marked_step_us'] / 1e3:.2f} with marks); "
        f"the exchange itself {report['exchange_us'] / 1e3:.2f} ms = "
        f"{report['exchange_share']:.1%}, {report['exchange_us_per_layer']:.1f} us a layer; "
        f"waiting for other ranks, by rank: {waiting} ms; slowest rank's experts "
        f"{report['slowest_experts_us']:.0f} us a layer"
    )


if __name__ == "__main__":
    run(main)
