"""Dispatch and combine alone, every transport side by side, in CUDA graphs, checked first.

    torchrun --nproc-per-node 4 -m bench.transport_microbench --mode all --rows 8,32,64,128
    torchrun --nproc-per-node 2 -m bench.transport_microbench --mode rdep,deepep --rows 32

Times are of one layer: `dispatch` with quantisation, `combine` with the weighted sum of a rank's
own experts (`sum`), the exchange and the ordered sum, `both` of them one after the other. `net` is
both without `sum`, which a transport that is given partial sums does not do. A library is timed by
its own calls alone, tokens and sums prepared; its `step` is both as the decode step needs it. The
floor is the bytes of one copy of a token a rank each way, at the link's measured bandwidth, and no
latency at all.

Ranks meet in front of every call, and the meetings are taken off (`bench.transport_timing`).
Modes take turns, a round of replays each; told is the median over a rank's replays, of that the
mean and the highest of all ranks, and the range from the lowest p10 to the highest p90.

A library that hangs takes the device's context with it. So our own modes are measured at all sizes
before one is made ready, and again beside it; `deepep-normal` comes by itself, after the others.
Each mode and size is told as soon as it is measured (with --json: on stderr; with --lines: in a
file as well, behind a header that says how); where the context is lost, that is told and the
command ends with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import torch

from barriers.config import GroupConfig
from barriers.deepep import DeepEpMissing
from barriers.errors import RanksMissing
from barriers.group import RankGroup
from barriers.rdep import RdepTuning
from barriers.transport import DEEPEP, TransportConfig
from bench.routing import KINDS
from bench.transport_cases import make_gains, make_tokens
from bench.transport_layer import Layer, Plan, TimedLayer
from bench.transport_modes import LAST, MODES, SizesMissing, Subject, make_subject
from bench.transport_report import merge, print_mode
from bench.transport_timing import WARM_UP, Aligner
from capture_cache.command import error_line, exit_code
from capture_cache.driver import Device
from runtime.config import tell_ranks
from runtime.rank_command import command
from runtime.report import provenance

_MEET_S = 120.0  # for the slowest rank of a part
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


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 (a mode failed or was wrong), 2 (bad arguments)."""
    args = _parser().parse_args(argv)
    try:
        place = GroupConfig.from_env(os.environ)
        args.asked = () if args.mode == "all" else tuple(args.mode.split(","))
        args.mode = _modes(args.asked)
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
        plan = Plan(
            inner=args.inner,
            replays=args.replays,
            rounds=args.rounds,
            prequantized=args.prequantized,
            routing=args.routing,
            routing_file=args.routing_file,
        )
        make_tokens(config, 0, 1, torch.device("cpu"), routing=args.routing, path=args.routing_file)
        if not torch.cuda.is_available():
            raise ValueError(
                "transports are timed on GPUs, got none; tests/cpu checks them without"
            )
    except ValueError as e:
        print(error_line(e), file=sys.stderr)
        tell_ranks(str(e))
        return exit_code(e)
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", place.rank)))
    torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
    report: dict[str, Any] = {
        "config": {k: v for k, v in asdict(config).items() if k != "rank"},
        "routing": args.routing,
        "routing_file": args.routing_file and str(args.routing_file),
        "prequantized": args.prequantized,
        "replays": args.replays,
        "back_to_back": args.back_to_back,
    }
    with RankGroup(place, {"config": json.dumps(report["config"]), **_alike(args)}) as group:
        device = Device(torch.cuda.current_device())
        aligner = Aligner(
            group, device, deadline_ms=args.deadline_ms, back_to_back=args.back_to_back
        )
        make = partial(
            make_subject,
            config=config,
            group=group,
            device=device,
            deadline_ms=args.deadline_ms,
            tunings=[replace(RdepTuning(), **c) for c in (SWEEP if args.sweep else SWEEP[:1])],
        )
        if place.rank == 0 and args.lines is not None:
            _add_line(args.lines, {"header": {**report, **provenance(device.name)}})
        bench = Bench(args, plan, config, group, aligner, make)
        report["modes"] = modes = bench.run(args.mode, rows)
        if place.rank == 0 and args.json:
            print(json.dumps({**report, **provenance(device.name)}), flush=True)
        group.barrier("all is told")  # a rank that ends with 1 has the others ended
        wanted = [m for n, m in modes.items() if n in args.asked or not m.get("absent")]
        code = 0 if all(m["ok"] for m in wanted) else 1
        if bench.lost:
            os._exit(code)  # nothing can be given back: whatever tries fails, or waits for it
    return code


def _parser() -> argparse.ArgumentParser:
    parser = command("bench.transport_microbench", __doc__)
    add = parser.add_argument
    add("--mode", default="all", help=f"all, or some of {','.join(MODES)}")
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
    add("--replays", type=int, default=200, help="of each graph, in all rounds together")
    add("--rounds", type=int, default=5, help="turns that every mode gets")
    add("--back-to-back", action="store_true", help="ranks do not meet in front of every call")
    add("--deadline-ms", type=int, default=3000, help="of each wait of rdep and of each meeting")
    add("--link-gbps", type=float, default=LINK_GBPS, help="one way; for the floor")
    add(
        "--lines",
        type=Path,
        help="file that gets a header and a JSON line a mode and size, once measured",
    )
    add("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _alike(args: argparse.Namespace) -> dict[str, str]:
    """Options that decide which measurements a rank comes to, and what it does there."""
    own = ("json", "lines", "link_gbps")  # rank 0 alone goes by them
    return {f"--{n.replace('_', '-')}": str(v) for n, v in vars(args).items() if n not in own}


def _modes(asked: Sequence[str]) -> list[str]:
    """In the order in which they are measured; all of them where none is asked for."""
    unknown = [name for name in asked if name not in MODES]
    if unknown:
        raise ValueError(
            f"--mode must be all or some of {','.join(MODES)}, got {unknown[0]!r}; name them with "
            "commas between"
        )
    return [name for name in MODES if name in asked or not asked]


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


def _add_line(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


# -- all modes -----------------------------------------------------------------------------------


class ContextLost(RuntimeError):
    """The device takes no more work in this process, on one rank at least."""


class Bench:
    """The modes of a stage beside each other; sizes one after the other, modes in turns.

    Args:
        make: makes a mode ready, by its name; all ranks together.

    Attributes:
        lost: a mode ended the device's context; nothing of this process can be given back.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        plan: Plan,
        config: TransportConfig,
        group: RankGroup,
        aligner: Aligner,
        make: Callable[[str], Subject],
    ) -> None:
        self.args, self.plan, self.config = args, plan, config
        self.group, self.aligner, self._make = group, aligner, make
        self.lost = False
        self.failed: dict[str, dict[str, Any]] = {}  # verdicts on modes that are out
        self.subjects: dict[str, Subject] = {}
        # By mode and rows: what each rank found, rank by rank.
        self.found: dict[str, dict[int, list[dict[str, Any]]]] = {}
        self._swept: list[list[list[float]]] = []  # by rank
        self._kept: list[ExitStack] = []  # never closed, for there is no context to do it in

    def run(self, names: Sequence[str], rows: list[int]) -> dict[str, Any]:
        """What all ranks found, by mode. A failure is a result, not an end."""
        results: dict[str, Any] = {}
        ours = [n for n in names if n not in DEEPEP]
        beside = [n for n in names if n in DEEPEP and n not in LAST]
        for parts in ([ours, beside], [[n for n in names if n in LAST]]):
            if not self.lost:
                self._run_stage(parts, rows)
            for name in (n for part in parts for n in part):
                results[name] = self._verdict(name, rows)
                if self.group.rank == 0:
                    print_mode(name, {**results[name], "cases": ()}, self._told_to)
        if not self.lost:
            self.aligner.close()
        return results

    @property
    def _told_to(self) -> TextIO:
        return sys.stderr if self.args.json else sys.stdout

    def _run_stage(self, parts: Sequence[Sequence[str]], rows: list[int]) -> None:
        """Fill `found`: each part beside those before it."""
        held = ExitStack()
        try:
            for part in parts:
                for name in part:
                    self._set_up(name, held)
                if any(name in self.subjects for name in part):
                    for count in rows:
                        self._measure(count)
            if self.args.sweep and "rdep" in self.subjects:
                self._add_sweep(rows)
        except ContextLost:
            self.lost = True
            self._kept.append(held)
            return
        self.subjects.clear()
        held.close()

    def _merged(self, name: str, rows: Sequence[int]) -> dict[str, Any]:
        """One mode's numbers of all ranks at the sizes that were measured."""
        sizes = [found for count, found in self.found.get(name, {}).items() if count in rows]
        if not sizes:
            return {"ok": False}
        ranks: list[dict[str, Any]] = [{"cases": list(same)} for same in zip(*sizes, strict=True)]
        if name == "rdep" and self._swept:
            for part, theirs in zip(ranks, self._swept, strict=True):
                part["sweep"] = theirs
        return merge(ranks, link_gbps=self.args.link_gbps, sweep=SWEEP)

    def _verdict(self, name: str, rows: Sequence[int]) -> dict[str, Any]:
        """One mode's numbers, as far as they go, and what went wrong."""
        told = self._merged(name, rows)
        if name in self.failed:
            return told | self.failed[name]
        if set(rows) - self.found.get(name, {}).keys():
            culprit = list(self.failed)[-1]
            error = f"{culprit} ended the device's context before; give --mode without it"
            return told | {"ok": False, "error": error}
        return told

    def _tell(self, name: str, count: int) -> None:
        """One mode at one size, at once: whatever comes next may end this process."""
        if self.group.rank:
            return
        merged = self._merged(name, [count])
        print_mode(name, merged, self._told_to)
        if self.args.lines is not None:
            _add_line(self.args.lines, {"mode": name, **merged["cases"][0]})

    def _set_up(self, name: str, opened: ExitStack) -> None:
        def make() -> None:
            self.subjects[name] = self._make(name)

        try:
            self._try(name, "setting up", make)
        except (DeepEpMissing, SizesMissing) as e:  # alike on all ranks
            self.failed[name] = {"ok": False, "absent": True, "error": str(e)}
            return
        if name in self.subjects:
            opened.callback(self._close, name, self.subjects[name])

    def _close(self, name: str, subject: Subject) -> None:
        # A library that failed would wait for the other ranks in its end.
        if subject.upstream is None or name not in self.failed:
            subject.close()

    def _try(self, name: str, doing: str, act: Callable[[], None]) -> bool:
        """Did `act` do on every rank? If not the mode is out, and each rank says why.

        Raises:
            ContextLost: after a failure, a rank's device takes no more work; on all ranks.
        """
        errors = self._everywhere(f"{name}: {doing}", act)
        if errors:
            self.failed[name] = {"ok": False, "error": errors, "doing": doing}
            self.subjects.pop(name, None)
            useless = self._everywhere(f"{name}: settling", self.aligner.settle)
            if useless:
                self.failed[name]["context_lost"] = useless
                raise ContextLost(name)
            self.aligner.rearm()
        return not errors

    def _everywhere(self, what: str, act: Callable[[], None]) -> dict[str, str]:
        """Do `act` on all ranks; what went wrong, by rank."""
        error = None
        try:
            act()
        except (DeepEpMissing, SizesMissing, RanksMissing):
            raise  # alike on all ranks
        except Exception as e:
            error = f"{type(e).__name__}: {str(e)[:400]}"
        return {f"rank {r}": text for r, text in enumerate(self._gather(what, error)) if text}

    def _measure(self, count: int) -> None:
        """Every rank's numbers for `count` rows on every rank, by mode."""
        graphs = ExitStack()
        try:
            cases = self._cases(count, graphs)
        except ContextLost:
            self._kept.append(graphs)  # closing a graph would fail, too
            raise
        for name in self.subjects:
            parts = self._gather(f"{name}: {count}", cases[name])
            self.found.setdefault(name, {})[count] = parts
            self._tell(name, count)
        graphs.close()

    def _cases(self, count: int, graphs: ExitStack) -> dict[str, dict[str, Any]]:
        """This rank's numbers, by mode; `graphs` closes what was captured for them."""
        ready: dict[str, TimedLayer] = {}

        def prepare(name: str) -> None:
            ready[name] = TimedLayer(self.subjects[name], self.plan, count, self.aligner)
            graphs.callback(ready[name].close)

        for name in list(self.subjects):
            self._try(name, f"{count} rows", partial(prepare, name))
        meetings = self.aligner.capture_nothing(self.plan.inner)
        graphs.callback(meetings.close)
        for turn in range(self.plan.rounds + 1):  # the first one warms up
            replays = self.plan.share if turn else WARM_UP
            meetings.replay(replays, self.aligner.finish)
            for name in list(self.subjects):
                replay = partial(ready[name].replay, replays)
                self._try(name, f"{count} rows, round {turn}", replay)
            if turn == 0:
                for graph in (meetings, *(g for timed in ready.values() for g in timed.graphs)):
                    graph.times.clear()
        taken_off = 0.0 if self.args.back_to_back else median(meetings.times)
        cases: dict[str, dict[str, Any]] = {}

        def conclude(name: str) -> None:
            cases[name] = ready[name].case(taken_off)

        for name in list(self.subjects):
            self._try(name, f"{count} rows again", partial(conclude, name))
        return cases

    def _gather(self, what: str, value: Any) -> list[Any]:
        return [part.value for part in self.group.allgather(what, value, timeout_s=_MEET_S)]

    def _add_sweep(self, rows: list[int]) -> None:
        lines: list[list[float]] = []
        if self._try("rdep", "sweep", lambda: lines.extend(self._sweep(rows))):
            self._swept = self._gather("sweep", lines)

    def _sweep(self, rows: list[int]) -> list[list[float]]:
        """`both` of each tuning in `SWEEP` for each number of rows."""
        subject, found = self.subjects["rdep"], []
        assert subject.retune is not None
        gains = make_gains(self.config, self.aligner.device)
        meetings = self.aligner.capture_nothing(self.plan.inner)
        meetings.replay(WARM_UP + self.plan.share, self.aligner.finish)
        taken_off = 0.0 if self.args.back_to_back else median(meetings.times[WARM_UP:])
        for change in SWEEP:
            subject.retune(replace(RdepTuning(), **change))
            line = []
            for count in rows:
                own = self.plan.tokens(self.config, self.config.rank, count, self.aligner.device)
                layer = Layer(subject, own, gains, prequantized=self.plan.prequantized)
                layer.both()
                subject.finish()
                graph = self.aligner.capture(layer.both, self.plan.inner)
                graph.replay(WARM_UP + self.plan.share, subject.finish)
                line.append(round(median(graph.times[WARM_UP:]) - taken_off, 2))
                graph.close()
            found.append(line)
        return found


if __name__ == "__main__":
    sys.exit(main())
