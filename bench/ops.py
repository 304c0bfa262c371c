"""`python -m bench.ops`: every operation of a decode layer at its real shapes, beside its floor.

A step over one dense and one expert layer is taken apart. Each kernel that can do an operation is
checked first: against the oracle, for bits that do not change when it runs again, and for bits that
depend on neither a token's index and neighbours nor (products) on how many there are. Then it is
timed in a CUDA graph, over weights or KV that are rotated past L2. The floor is what must be read
from HBM at the speed of a plain read; what works in L2 alone has none. On the CPU the oracles
themselves are checked, against each operation's definition in float64, and nothing is timed.

Exit code: 0; 1 if a kernel of ours is wrong; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.ops_alternatives import alternative
from bench.ops_contenders import OTHERS, OURS, Contender, Unable, contenders, missing
from bench.ops_machine import ROUTINGS, Machine, Setting
from bench.ops_specs import (
    UNCHECKED,
    Result,
    prefix,
    results,
    rotated,
    scratch,
    turned,
)
from capture_cache.errors import CaptureError
from graphs.calls import Call, op_names
from graphs.candidates import PLANS, Candidate, candidates
from graphs.choices import KernelChoices, site_of, tokens_of
from graphs.floor import READ_BYTES_PER_S
from graphs.ops import Ops
from graphs.select import choose_site
from graphs.timing import Timer, Timing
from runtime.cli import Bar, command, console, print_json, run
from runtime.config import DEVICES
from runtime.report import provenance

BY_ROUTING = ("align", "grouped_gate_up", "grouped_down", "combine")
# Between them they take every branch of the step.
CPU_OVERRIDES = ((), ("quantization=fp8", "qk_nope_head_dim=64", "qk_rope_head_dim=64"))
DEPENDS = "a token's bits depend on its index, its neighbours or how many there are"
TABLE_WIDTH = 140
# What other libraries raise for shapes that they do not take, or where they are half installed.
REFUSALS = (
    *(ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError),
    *(AssertionError, ImportError),
)
TWIN_NOTE = "CPU twin: the oracles were checked against float64; nothing was timed"


@dataclass(frozen=True)
class Measured:
    """One kernel at one shape.

    Attributes:
        error: relative, against the oracle; None where there is nothing to compare with.
        verdict: "ok", "unchecked", "refused" or what is wrong.
        exact: a token's bits are those that it gets elsewhere; None where that was not tried.
        time: None if it was not timed.
        floor_bytes: that any kernel must read.
        why: of a verdict that is not ok, or what the time leaves out.
    """

    op: str
    rows: int
    ctx_len: int
    experts: int
    routing: str
    kernel: str
    library: str
    error: float | None
    verdict: str
    exact: bool | None
    time: Timing | None
    floor_bytes: int
    floor_us: float | None
    why: str

    @property
    def wrong(self) -> bool:
        return self.library == OURS and self.verdict not in ("ok", "unchecked", "refused")

    def to_json(self) -> dict[str, Any]:
        us = None if self.time is None else self.time.us
        return asdict(self) | {"us": us}


def parser() -> argparse.ArgumentParser:
    p = command("bench.ops", __doc__)
    add = p.add_argument
    add("--model", "--model-path", help="preset or HF directory; default deepseek-v3, tiny on CPU")
    add("--override", action="append", default=[], metavar="KEY=VALUE", help="of the model config")
    add("--rows", help="step tokens; default 1,8,16,32,64,128 (CPU: 3)")
    add("--experts", help="local experts; default 32,64 (CPU: the model's)")
    add("--ctx-len", help="KV tokens a row holds; default 2000,32000 (CPU: 100)")
    add("--routing", default=",".join(ROUTINGS), help="of tokens to experts; default both")
    add("--ops", help="only these operations, such as linear_fp8,mla_decode")
    add("--others", default=",".join(OTHERS), help="libraries to compare with, or none")
    add("--quick", action="store_true", help="32 rows, 32 experts, context 2000, even routing")
    add("--replays", type=int, default=9, help="timed replays of each graph")
    add("--bandwidth", type=float, help="device read bandwidth for the floor, TB/s")
    add("--device", choices=DEVICES, default="auto")
    add("--store", help="directory of compiled kernels")
    add("--out", help="directory for ops.json")
    add("--json", action="store_true", help="print one JSON object as the last line")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    plan = Plan.of(args)
    if args.out:
        try:
            Path(args.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {args.out} cannot be a folder: {error.strerror}") from error
    start = time.perf_counter()
    for library, why in missing(plan.others).items():
        console.print(f"{library:11} {why}")
    bench = OpsBench(plan, args.replays, args.bandwidth)
    with Bar() as bar:
        for setting, routings, only in plan.settings():
            machine = Machine(setting, bar)
            try:
                bench.measure(machine, routings, only, bar)
            finally:
                machine.close()
    report = provenance(bench.device_name) | {
        "settings": plan.to_json(),
        "times_mean_something": plan.on_device,
        "missing": missing(plan.others),
        "read_bytes_per_s": bench.bandwidth,
        "seconds": time.perf_counter() - start,
        "wrong": sum(m.wrong for m in bench.found),
        "cases": [m.to_json() for m in bench.found],
    }
    _show(bench.found, plan.on_device, report["seconds"])
    if args.out:
        path = Path(args.out) / "ops.json"
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        console.print(f"wrote {path}")
        if plan.on_device:
            pins = Path(args.out) / "kernels.json"
            pins.write_text(json.dumps(bench.choices().to_json(), indent=1) + "\n")
            console.print(f"wrote {pins}, for --kernels")
    if args.json:
        print_json(report)
    return 1 if report["wrong"] else 0


@dataclass(frozen=True)
class Plan:
    """What is measured, settled before anything is built."""

    on_device: bool
    model: str
    overrides: tuple[str, ...]
    rows: tuple[int, ...]
    experts: tuple[int | None, ...]
    ctx_lens: tuple[int, ...]
    routings: tuple[str, ...]
    ops: tuple[str, ...]
    others: list[str]
    store: str | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Plan:
        """Raises ValueError: an option that is not of its form, or names what does not exist."""
        on_device = args.device != "cpu" and torch.cuda.is_available()
        if args.device == "cuda" and not on_device:
            raise ValueError("--device cuda: torch sees no CUDA device; use --device cpu")
        for name in ("rows", "experts", "ctx_len", "routing"):
            given = getattr(args, name) != parser().get_default(name)
            if args.quick and given:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"--quick chooses {option} itself; leave out one of them")
        rows, contexts = "1,8,16,32,64,128", "2000,32000"
        experts: str | None = "32,64"
        if args.quick:
            rows, experts, contexts, args.routing = "32", "32", "2000", "even"
        if not on_device:
            rows, contexts, experts = "3", "100", None
            torch.set_num_threads(1)
        if args.replays < 3:
            raise ValueError(f"--replays {args.replays}: expected at least 3, for a median")
        chosen = args.experts or experts
        return cls(
            on_device=on_device,
            model=args.model or ("deepseek-v3" if on_device else "tiny"),
            overrides=tuple(args.override),
            rows=_numbers("--rows", args.rows or rows),
            experts=(None,) if chosen is None else _numbers("--experts", chosen),
            ctx_lens=_numbers("--ctx-len", args.ctx_len or contexts),
            routings=_names("--routing", args.routing, ROUTINGS),
            ops=_names("--ops", args.ops, _known_ops()) if args.ops else (),
            others=list(_names("--others", args.others, tuple(OTHERS)))
            if args.others != "none"
            else [],
            store=args.store,
        )

    def settings(self) -> Iterator[tuple[Setting, tuple[str, ...], tuple[str, ...]]]:
        """(what to build, routings, operations of interest or () for all)."""
        changes = ((),) if self.on_device else CPU_OVERRIDES
        for more in changes:
            base = Setting(
                model=self.model,
                overrides=(*self.overrides, *more),
                experts=self.experts[0],
                ctx_len=self.ctx_lens[0],
                rows=self.rows,
                device="cuda" if self.on_device else "cpu",
                store=self.store,
            )
            for experts in self.experts:
                yield replace(base, experts=experts), self.routings, self.ops
            for ctx_len in self.ctx_lens[1:]:
                # Only attention reads the context.
                if not self.ops or "mla_decode" in self.ops:
                    yield replace(base, ctx_len=ctx_len), self.routings[:1], ("mla_decode",)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _known_ops() -> tuple[str, ...]:
    return tuple(op_names(Ops(None)))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"{option} must be positive numbers such as 8,32, got {text!r}")
    return tuple(sorted({int(p) for p in parts}))


def _names(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(p.strip() for p in text.split(","))
    unknown = [n for n in names if n not in known]
    if unknown:
        raise ValueError(f"{option} {','.join(unknown)}: expected some of {', '.join(known)}")
    return names


class OpsBench:
    """Checks and times; each operation once for each shape that it meets.

    Attributes:
        found: in the order of the steps.
    """

    def __init__(self, plan: Plan, replays: int, bandwidth_tb: float | None) -> None:
        self.plan, self._replays = plan, replays
        self.device_name = torch.cuda.get_device_name() if plan.on_device else "CPU twin"
        known = READ_BYTES_PER_S.get(self.device_name)
        self.bandwidth = bandwidth_tb * 1e12 if bandwidth_tb else known
        self.found: list[Measured] = []
        # Times by (site, tokens), then by candidate; candidates by site, the default first.
        self._timed: dict[tuple[str, int], dict[str, Timing]] = {}
        self._candidates: dict[str, list[Candidate]] = {}
        self._seen: set[tuple[Any, ...]] = set()
        self._oracles = Ops(None)

    def measure(
        self,
        machine: Machine,
        routings: tuple[str, ...],
        only: tuple[str, ...],
        progress: Callable[..., None],
    ) -> None:
        """Every operation of interest of every number of rows."""
        total = len(machine.setting.rows) * len(routings)
        for rows in machine.setting.rows:
            for routing in routings:

                def visit(call: Call, rows: int = rows, routing: str = routing) -> None:
                    if only and call.op not in only:
                        return
                    shown = routing if call.op in BY_ROUTING else ""
                    key = (call.signature, shown, machine.setting.overrides)
                    if key not in self._seen:
                        self._seen.add(key)
                        with machine.state_kept() if call.op in UNCHECKED else nullcontext():
                            self._visit(machine, call, rows, shown)

                machine.walk(rows, routing, visit)
                progress("measure", total, f"{rows} rows {routing}")

    def _visit(self, machine: Machine, call: Call, rows: int, routing: str) -> None:
        wanted = self._reference(machine, call)
        all_bits: dict[str, list[Result]] = {}
        timer = machine.timer(self._replays)
        for who in contenders(call, machine.ops, machine.engine.model_config, self.plan.others):
            checked = self._check(call, who, wanted, all_bits)
            timing = None
            if self.plan.on_device and checked["verdict"] in ("ok", "unchecked"):
                timing, checked = self._time(machine, call, who, rows, timer, checked)
            if timing is not None and who.library == OURS and call.op in PLANS:
                site, tokens = site_of(call), tokens_of(call)
                self._candidates.setdefault(site, candidates(call))
                # Of two routings the second counts: experts' tiles are chosen for the uneven one.
                self._timed.setdefault((site, tokens), {})[who.name] = timing
            floor_bytes = machine.floors.bytes(call)
            self.found.append(
                Measured(
                    op=machine.label(call),
                    rows=rows,
                    ctx_len=machine.setting.ctx_len,
                    experts=machine.engine.model_config.num_experts,
                    routing=routing,
                    kernel=who.name,
                    library=who.library,
                    time=timing,
                    floor_bytes=floor_bytes,
                    floor_us=floor_bytes / self.bandwidth * 1e6
                    if self.bandwidth and floor_bytes
                    else None,
                    **checked,
                )
            )

    def choices(self) -> KernelChoices:
        """What a capture would choose by these times; `--kernels` takes it as pins."""
        sites = {}
        for site, found in self._candidates.items():
            counts = sorted(tokens for name, tokens in self._timed if name == site)

            def timed(candidate: Candidate, tokens: int, site: str = site) -> Timing | None:
                return self._timed.get((site, tokens), {}).get(candidate.name)

            sites[site] = choose_site(found, counts, timed)
        return KernelChoices(sites, None, "bench.ops")

    def _reference(self, machine: Machine, call: Call) -> list[Result] | None:
        """What the results must be; None where nothing says so."""
        if not machine.on_device or call.op in UNCHECKED:
            return alternative(call)
        held = [t.clone() for t in scratch(call)]
        # Oracles make their own small tensors on the default device.
        with torch.device("cuda"):
            getattr(self._oracles, call.op)(*call.args, **call.kwargs)
        wanted = results(call)
        _put_back(call, held)
        return wanted

    def _check(
        self,
        call: Call,
        who: Contender,
        wanted: list[Result] | None,
        all_bits: dict[str, list[Result]],
    ) -> dict[str, Any]:
        checked: dict[str, Any] = {"error": None, "exact": None, "why": who.note}
        if call.op in UNCHECKED:
            return checked | {"verdict": "unchecked"}
        try:
            got = _outcome(call, who)
            again = _outcome(call, who)
        except REFUSALS as error:
            return checked | _refused(who, error)
        if wanted is None or not got:
            return checked | {"verdict": "unchecked"}
        errors = [g.error(w) for g, w in zip(got, wanted, strict=True)]
        checked["error"] = max(errors)
        bad = [g.name for g, e in zip(got, errors, strict=True) if not e <= g.tolerance]
        if bad:
            return checked | {"verdict": "wrong", "why": f"differs from the oracle in {bad}"}
        if not _same(got, again):
            return checked | {"verdict": "unstable", "why": "two runs gave different bits"}
        try:
            checked["exact"] = self._exact(call, who, got)
        except REFUSALS as error:
            if who.library == OURS:
                return checked | _refused(who, error)
            # It takes this shape and not that of a token alone: nothing to compare.
            checked["why"] = f"refuses one token: {_first_line(error)}"
        if who.bits is not None:
            if checked["exact"] is False:
                return checked | {"verdict": "inexact", "why": DEPENDS}
            if not _same(got, all_bits.setdefault(who.bits, got)):
                why = f"bits are not those of the others named {who.bits!r}"
                return checked | {"verdict": "inexact", "why": why}
        return checked | {"verdict": "ok"}

    def _exact(self, call: Call, who: Contender, got: list[Result]) -> bool | None:
        """Whether each token gets its bits at another index beside other neighbours, and the first
        one also alone; None where neither has a meaning."""
        other = turned(call)
        if other is None:
            return None
        again, lines = other
        moved = [Result(r.name, r.value[lines]) for r in got]
        if not _same(_outcome(again, who), moved):
            return False
        alone = prefix(call, 1)
        return alone is None or torch.equal(_outcome(alone, who)[0].value, got[0].value[:1])

    def _time(
        self,
        machine: Machine,
        call: Call,
        who: Contender,
        rows: int,
        timer: Timer,
        checked: dict[str, Any],
    ) -> tuple[Timing | None, dict[str, Any]]:
        held = [t.clone() for t in scratch(call)]
        calls = rotated(
            call, machine.floors, machine.cache_bytes, rows, machine.engine.config.max_rows
        )
        try:
            return timer([who.bind(c) for c in calls]), checked
        except (*REFUSALS, CaptureError) as error:
            return None, checked | _refused(who, error)
        finally:
            _put_back(call, held)


def _outcome(call: Call, who: Contender) -> list[Result]:
    """Results of one run; inputs that it overwrote are put back."""
    held = [t.clone() for t in scratch(call)]
    returned = who.bind(call)()
    if who.note.endswith("unchecked"):
        return []
    found = [Result("out", returned)] if isinstance(returned, torch.Tensor) else results(call)
    _put_back(call, held)
    return found


def _refused(who: Contender, error: Exception) -> dict[str, str]:
    """The row of a kernel that does not run: ours must."""
    failed = who.library == OURS and not isinstance(error, Unable)
    return {"verdict": "failed" if failed else "refused", "why": _first_line(error)}


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:120]


def _put_back(call: Call, held: list[torch.Tensor]) -> None:
    for tensor, was in zip(scratch(call), held, strict=True):
        tensor.copy_(was)


def _same(a: list[Result], b: list[Result]) -> bool:
    return all(torch.equal(x.value, y.value) for x, y in zip(a, b, strict=True))


def _show(found: list[Measured], on_device: bool, seconds: float) -> None:
    table = Table(title=f"operations of a decode layer ({seconds:.0f} s)")
    names = ("operation", "rows", "case", "kernel", "error", "bits", "us", "spread", "floor", "of")
    for name in names:
        left = name in ("operation", "case", "kernel")
        table.add_column(name, justify="left" if left else "right")
    last = ""
    for m in found:
        where = " ".join(p for p in (f"{m.ctx_len}", f"E{m.experts}", m.routing) if p)
        head = (m.op, str(m.rows), where)
        shown = head if "|".join(head) != last else ("", "", "")
        last = "|".join(head)
        time_, floor = m.time, m.floor_us
        table.add_row(
            *shown,
            m.kernel + (f" ({m.why})" if m.why else ""),
            "-" if m.error is None else f"{m.error:.1e}",
            m.verdict if m.verdict != "ok" else {True: "exact", False: "vary", None: "ok"}[m.exact],
            "-" if time_ is None else f"{time_.us:.1f}",
            "-" if time_ is None else f"{time_.low:.1f}-{time_.high:.1f}",
            "-" if floor is None else f"{floor:.1f}",
            "-" if floor is None or time_ is None else f"{floor / time_.us:.0%}",
        )
    wide = Console(width=max(console.width, TABLE_WIDTH), quiet=console.quiet)
    wide.print(table)
    wrong = [m for m in found if m.wrong]
    for m in wrong:
        console.print(f"WRONG {m.op}, {m.rows} rows, {m.kernel}: {m.why} (error {m.error})")
    if not on_device:
        console.print(TWIN_NOTE)


if __name__ == "__main__":
    run(main)
