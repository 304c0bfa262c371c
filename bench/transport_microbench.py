"""Dispatch and combine alone, every transport side by side, in CUDA graphs, checked first.

    torchrun --nproc-per-node 4 -m bench.transport_microbench --mode all --rows 8,32,64,128

Times are of one layer: `dispatch` with quantisation, `combine` with the weighted sum of a rank's
own experts (`sum`), the exchange and the ordered sum, `both` of them one after the other. `net` is
both without `sum`, which a transport that is given partial sums does not do. The floor is the bytes
of one copy of a token a rank each way, at the link's measured bandwidth, and no latency at all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from barriers.config import GroupConfig
from barriers.deepep import DeepEpMissing
from barriers.errors import RankError
from barriers.group import RankGroup
from barriers.rdep import RdepTuning
from barriers.rdep_ref import quantize_ref, relative_error
from barriers.transport import TransportConfig
from bench.routing import KINDS
from bench.transport_cases import (
    Tokens,
    make_gains,
    make_tokens,
    oracle,
    reference,
    run_experts,
    wire_bytes,
)
from bench.transport_modes import MODES, Subject, make_subject
from bench.transport_report import merge, print_mode
from capture_cache.driver import Device
from runtime.report import provenance

LINK_GBPS = 353.0  # one way, measured on H200 with NV18 (bytes of 128 tokens, two ranks)
# One change at a time from the default.
SWEEP: tuple[dict[str, Any], ...] = (
    {},
    {"send_threads": 448},
    {"send_threads": 128},
    {"send_threads": 64},
    {"pull_threads": 896},
    {"pull_threads": 448},
    {"pull_threads": 128},
    {"bulk_pull": True},
    {"bulk_pull": True, "pull_threads": 128},
    {"share_blocks": 0},
    {"share_blocks": 512},
    {"sum_blocks": 132},
    {"sum_blocks": 528},
    {"sum_threads": 448, "sum_blocks": 132},
    {"sum_threads": 128, "sum_blocks": 528},
    {"pdl": False},
)


@dataclass(frozen=True)
class Timing:
    """How often: calls in a graph, replays of it."""

    inner: int
    replays: int


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 (a mode failed or was wrong), 2 (bad arguments)."""
    args = _parser().parse_args(argv)
    try:
        place = GroupConfig.from_env(os.environ)
        rows = _rows(args, place.world)
        config = TransportConfig(
            rank=place.rank,
            world=place.world,
            capacity=args.capacity or max(rows),
            hidden=args.hidden_size,
            num_experts=args.num_experts,
            top_k=args.topk,
            fp8=not args.plain,
        )
        if args.plain and args.prequantized:
            raise ValueError("--plain sends bf16 tokens and --prequantized e4m3 ones: choose one")
        make_tokens(config, 0, 1, torch.device("cpu"), routing=args.routing, path=args.routing_file)
        if not torch.cuda.is_available():
            raise ValueError(
                "transports are timed on GPUs, got none; tests/cpu checks them without"
            )
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", place.rank)))
    torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
    report: dict[str, Any] = {
        "config": {k: v for k, v in asdict(config).items() if k != "rank"},
        "routing": args.routing,
        "prequantized": args.prequantized,
        "modes": {},
    }
    names = MODES if args.mode == "all" else (args.mode,)
    with RankGroup(place, {"config": json.dumps(report["config"])}) as group:
        device = Device(torch.cuda.current_device())
        for name in names:
            report["modes"][name] = _run_mode(name, args, config, rows, group, device)
            if place.rank == 0 and not args.json:
                print_mode(name, report["modes"][name])
    failed = [n for n, r in report["modes"].items() if not r["ok"] and not r.get("absent")]
    missing = args.mode != "all" and report["modes"][args.mode].get("absent", False)
    if place.rank == 0 and args.json:
        print(json.dumps({**report, **provenance(device.name)}))
    return 1 if failed or missing else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.transport_microbench")
    add = parser.add_argument
    add("--mode", choices=(*MODES, "all"), default="all")
    add("--decode-batch-size", type=int, default=256, help="global batch: rows a rank times ranks")
    add("--rows", help="rows a rank, such as 8,32,64,128, instead of the batch")
    add("--capacity", type=int, help="rows a rank that the buffers hold; default: the most rows")
    add("--hidden-size", type=int, default=7168)
    add("--num-experts", type=int, default=256)
    add("--topk", type=int, default=8)
    add("--plain", action="store_true", help="send bf16 tokens, not quantised ones")
    add("--prequantized", action="store_true", help="dispatch e4m3 tokens, as the decode step does")
    add("--routing", choices=KINDS, default="random")
    add("--routing-file", type=Path, help=".npy of integers [N, topk], with --routing file")
    add("--sweep", action="store_true", help="time rdep under each tuning, too")
    add("--inner", type=int, default=20, help="layers in a graph")
    add("--replays", type=int, default=15)
    add("--deadline-ms", type=int, default=3000, help="of each wait of rdep")
    add("--link-gbps", type=float, default=LINK_GBPS, help="one way; for the floor")
    add("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _rows(args: argparse.Namespace, world: int) -> list[int]:
    if args.rows is None:
        if args.decode_batch_size < world or args.decode_batch_size % world:
            raise ValueError(
                f"--decode-batch-size {args.decode_batch_size} does not divide among {world} ranks"
            )
        return [args.decode_batch_size // world]
    parts = args.rows.split(",")
    if not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"--rows must be positive numbers such as 8,32, got {args.rows!r}")
    return [int(p) for p in parts]


# -- one mode ------------------------------------------------------------------------------------


def _run_mode(
    name: str,
    args: argparse.Namespace,
    config: TransportConfig,
    rows: list[int],
    group: RankGroup,
    device: Device,
) -> dict[str, Any]:
    """Set up, measure, close; what all ranks found. A failure is a result, not an end."""
    subject: Subject | None = None
    try:
        error = None
        try:
            subject = make_subject(
                name,
                config,
                group,
                device,
                deadline_ms=args.deadline_ms,
                tunings=[replace(RdepTuning(), **c) for c in (SWEEP if args.sweep else SWEEP[:1])],
            )
        except (DeepEpMissing, RankError):
            raise  # alike on all ranks
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
        group.agree(f"setting {name} up", error)
        assert subject is not None
        found: dict[str, Any] = {"error": None, "cases": []}
        try:
            found["cases"] = [_measure(subject, args, count) for count in rows]
            if args.sweep and subject.retune is not None:
                found["sweep"] = _sweep(subject, args, rows)
        except Exception as e:
            found["error"] = f"{type(e).__name__}: {str(e)[:400]}"
        parts = group.allgather(f"results of {name}", found)
        return merge([p.value for p in parts], link_gbps=args.link_gbps, sweep=SWEEP)
    except DeepEpMissing as e:
        return {"ok": False, "absent": True, "error": str(e)}
    except RankError as e:
        return {"ok": False, "error": str(e)}
    finally:
        if subject is not None:
            subject.close()


def _measure(subject: Subject, args: argparse.Namespace, count: int) -> dict[str, Any]:
    """This rank's numbers for `count` rows on every rank."""
    config, device = subject.transport.config, torch.device("cuda", torch.cuda.current_device())
    every = [
        make_tokens(config, r, count, device, routing=args.routing, path=args.routing_file)
        for r in range(config.world)
    ]
    own, gains = every[config.rank], make_gains(config, device)
    layer = _Layer(subject, own, gains, prequantized=args.prequantized)
    outs = [layer.whole().clone() for _ in range(3)]
    case: dict[str, Any] = {
        "rows": count,
        "rel_error": relative_error(outs[0], reference(config, own, gains)),
        "repeats": all(torch.equal(outs[0], o) for o in outs[1:]),
        "oracle_bits": torch.equal(outs[0], oracle(config, every, gains)[config.rank]),
        "bytes": wire_bytes(config, own.ids),
        "us": {},
    }
    timing = Timing(args.inner, args.replays)
    for part, run in layer.parts():
        case["us"][part] = round(_time(run, timing, subject), 2)
    again = layer.whole()
    case["repeats"] = case["repeats"] and torch.equal(again, outs[0])
    return case


class _Layer:
    """One layer's calls on one rank's tokens."""

    def __init__(
        self, subject: Subject, tokens: Tokens, gains: torch.Tensor, *, prequantized: bool
    ) -> None:
        self.subject, self.tokens, self.gains = subject, tokens, gains
        self.sent: tuple[torch.Tensor, torch.Tensor | None] = (tokens.x, None)
        if prequantized:
            self.sent = quantize_ref(tokens.x)
        self.out = torch.empty_like(tokens.x)
        self.received = self.dispatch()
        self.y = tokens.x.new_empty(self.received.ids.numel(), tokens.x.shape[1])
        self.whole_after_dispatch()

    def dispatch(self) -> Any:
        t = self.tokens
        self.received = self.subject.transport.dispatch(*self.sent, t.ids, t.weights)
        return self.received

    def combine(self) -> None:
        t = self.tokens
        self.subject.transport.combine(self.out, self.y, self.received, t.ids, t.shared)

    def both(self) -> None:
        self.dispatch()
        self.combine()

    def whole_after_dispatch(self) -> torch.Tensor:
        run_experts(self.subject.transport.config, self.received, self.gains, self.y)
        self.combine()
        self.subject.finish()
        return self.out

    def whole(self) -> torch.Tensor:
        """With its experts, for checking."""
        self.dispatch()
        return self.whole_after_dispatch()

    def parts(self) -> list[tuple[str, Callable[[], object]]]:
        found: list[tuple[str, Callable[[], object]]] = [("both", self.both)]
        if self.subject.separable:
            found += [("dispatch", self.dispatch), ("combine", self.combine)]
        if self.subject.sum_alone is not None:
            alone = self.subject.sum_alone
            found.append(("sum", lambda: alone(self.y, self.received)))
        return found


def _time(run: Callable[[], object], timing: Timing, subject: Subject) -> float:
    """Median microseconds of one call inside a graph."""
    run()
    subject.finish()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(timing.inner):
            run()
    graph.replay()
    subject.finish()
    begin, end = _event(), _event()
    times: list[float] = []
    for _ in range(timing.replays):
        begin.record()
        graph.replay()
        end.record()
        subject.finish()
        times.append(begin.elapsed_time(end) * 1e3 / timing.inner)
    return median(times)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _sweep(subject: Subject, args: argparse.Namespace, rows: list[int]) -> list[list[float]]:
    """`both` of each tuning in `SWEEP` for each number of rows."""
    assert subject.retune is not None
    found = []
    device = torch.device("cuda", torch.cuda.current_device())
    gains = make_gains(subject.transport.config, device)
    for change in SWEEP:
        subject.retune(replace(RdepTuning(), **change))
        line = []
        for count in rows:
            config = subject.transport.config
            own = make_tokens(
                config, config.rank, count, device, routing=args.routing, path=args.routing_file
            )
            layer = _Layer(subject, own, gains, prequantized=args.prequantized)
            line.append(round(_time(layer.both, Timing(args.inner, args.replays), subject), 2))
        found.append(line)
    return found


if __name__ == "__main__":
    sys.exit(main())
