"""A MoE layer with real FP8 experts over every transport, against float64.

    torchrun --standalone --nproc-per-node N -m tests.ep.moe_error [--json] [--store DIR]

DeepSeek-V3's shapes: random e4m3 experts (`tests.ep.moe_layer`), the decode step's own grouped
products, the transport's dispatch and combine. Each rank's output must be within 3e-3 of float64,
NaN is infinitely far, and no expert may touch a pair that no live token chose. Transports whose
package is not here are skipped, and say so. Exit 1 on a failure; with --json one object last.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from barriers.config import GroupConfig
from barriers.deepep import DeepEpMissing
from barriers.group import RankGroup
from barriers.rdep_ref import quantize_ref, relative_error
from barriers.transport import DEEPEP, Local, Transport, TransportConfig, received_shape
from bench.routing import expert_ids
from bench.transport_cases import Tokens, make_tokens
from bench.transport_modes import SizesMissing, make_subject
from capture_cache.driver import Device
from capture_cache.store import Store
from graphs.aot import AotLauncher
from graphs.compile import CompileRequest, KernelCompiler, RecordingLauncher, compile_all
from graphs.ops import Ops
from kernels.triton.overlap import MODES
from runtime.report import provenance
from runtime.selection import DEFAULT_PDL
from tests.ep.moe_layer import (
    HIDDEN_SLACK,
    Experts,
    Reference,
    Weights,
    check_touched,
    hidden_of,
    quantize_deepep_ref,
    reference,
    run_layer,
    warm_up,
)

MAX_ERROR = 3e-3  # of bf16 sums
DEADLINE_MS = 30_000  # a transport's own small kernels are compiled as it runs
MEET_S = 300.0
NAMES = ("local", "rdep", "nccl", "deepep", "deepep-normal")
# As in DeepSeek-V3: weights of a token's experts add up to 2.5, and what they give together is as
# large as what the shared expert gives. (Alone, a large shared part would hide the routed ones.)
SCALING, SHARED = 2.5, 0.6
CPU = torch.device("cpu")
CASES = ("random", "uneven", "padded", "one rank", "zipf", "nobody")


def tokens_of(config: TransportConfig, case: str, device: torch.device) -> list[Tokens]:
    """The tokens of every rank in a case."""
    capacity, world, top_k = config.capacity, config.world, config.top_k
    counts = [capacity] * world
    if case in ("uneven", "padded"):
        counts = [max(1, capacity - 5 * r) for r in range(world)]
    every = [make_tokens(config, r, n, device, seed=3) for r, n in enumerate(counts)]
    for rank, t in enumerate(every):
        t.shared.mul_(SHARED)
        t.weights.mul_(SCALING)
        if case == "padded":
            t.ids[1::3] = -1
            if rank % 2:
                t.ids[:] = -1  # an idle rank
        elif case == "one rank":  # half of its tokens to one expert
            first = (world - 1) * config.local_experts
            t.ids[:] = first + torch.arange(top_k, device=device) % config.local_experts
            t.ids[::2, 1:] = -1
            t.ids[:, config.local_experts :] = -1
        elif case == "zipf":
            ids = expert_ids(
                "zipf", tokens=len(t), num_experts=config.num_experts, top_k=top_k, seed=rank
            )
            t.ids[:] = ids.to(device)
        elif case == "nobody":
            t.ids[:] = -1
    return every


class Checker:
    """Checks transports of one world, the same references for all of them."""

    def __init__(self, config: TransportConfig, experts: Experts) -> None:
        self.config, self.experts = config, experts
        self.weights: Weights = experts.make(config.expert_start, config.local_experts)
        self._known: dict[tuple[str, bool], tuple[list[Tokens], Reference]] = {}

    def check(self, transport: Transport, case: str, finish: Callable[[], None]) -> dict[str, Any]:
        """This rank's numbers; raises AssertionError."""
        every, want = self._case(case, transport.takes_act)
        own = every[self.config.rank]
        outs = []
        for _ in range(2):
            out, received, buffers = run_layer(self.experts.ops, transport, self.weights, own)
            finish()
            check_touched(self.config, every, received, buffers)
            outs.append(out)
        error = relative_error(outs[0], want.out)
        assert error < MAX_ERROR, f"{case}: relative error {error:.2e}, expected {MAX_ERROR}"
        assert want.hidden_excess < HIDDEN_SLACK, f"{case}: hidden off by {want.hidden_excess:.1e}"
        assert torch.equal(*outs), f"{case}: runs differ"
        padded = (own.ids < 0).all(1)
        assert torch.equal(outs[0][padded], own.shared[padded]), f"{case}: a padded row was summed"
        return {
            "tokens": len(own),
            "pairs": want.pairs,
            "error": error,
            "hidden_excess": max(0.0, want.hidden_excess),
        }

    def prepare(self, names: Sequence[str]) -> None:
        """Make every reference that these transports are held against."""
        for takes_act in {name == "deepep" for name in names}:
            for case in CASES:
                self._case(case, takes_act)

    def _case(self, case: str, takes_act: bool) -> tuple[list[Tokens], Reference]:
        """`takes_act`: the transport quantises; only DeepEP's low-latency one does."""
        if (case, takes_act) not in self._known:
            every = tokens_of(self.config, case, self.experts.device)
            quantize = quantize_deepep_ref if takes_act else quantize_ref
            want = reference(self.experts, every[self.config.rank], quantize)
            self._known[case, takes_act] = every, want
        return self._known[case, takes_act]


def list_kernels(
    names: Sequence[str], config: TransportConfig, inter: int, launcher: AotLauncher
) -> list[CompileRequest]:
    """What weights, references and transports will launch of the decode step, run by nobody."""
    recorder = RecordingLauncher(launcher.arch, num_sms=launcher.num_sms, pdl=launcher.pdl)
    meta = torch.device("meta")
    experts = Experts(Ops(recorder), config, inter, meta)
    one, hidden = experts.make(0, 1), config.hidden
    # A kernel's height goes by the number of tokens, its code by whether 16 divides that.
    for count in sorted({1, 16, 17, 32, 33, 48, config.capacity}):
        q = torch.empty(count, hidden, dtype=torch.float8_e4m3fn, device=meta)
        hidden_of(experts, one, q, torch.empty(count, config.groups, device=meta))
    local = experts.make(config.expert_start, config.local_experts)
    counts = {len(tokens_of(config, case, CPU)[config.rank]) for case in ("random", "uneven")}
    for name in names:
        for count in counts:
            shape = received_shape({"nccl": "allgather"}.get(name, name), config, count)
            warm_up(experts.ops, local, hidden, *shape)
    return recorder.requests


def make(
    name: str, config: TransportConfig, ops: Ops, group: RankGroup, device: Device
) -> tuple[Transport, Callable[[], None], Callable[[], None]]:
    """A transport, what waits for it, and what gives it back; all ranks together."""
    if name == "local":
        return Local(config, ops.launch), torch.cuda.synchronize, lambda: None
    subject = make_subject(name, config, group, device, deadline_ms=DEADLINE_MS)
    group.barrier(f"{name} is made")
    return subject.transport, subject.finish, subject.close


def run_all(
    names: list[str], checker: Checker, group: RankGroup, device: Device
) -> dict[str, dict[str, Any]]:
    """Every transport's verdict, the same on all ranks."""
    told: dict[str, dict[str, Any]] = {}
    for name in names:
        began = time.monotonic()
        try:
            made, finish, close = make(name, checker.config, checker.experts.ops, group, device)
        except (DeepEpMissing, SizesMissing) as e:  # alike on all ranks
            told[name] = {"skipped": str(e)}
            continue
        numbers: dict[str, Any] = {}
        error = None
        try:
            for case in CASES:
                numbers[case] = checker.check(made, case, finish)
        except Exception as e:  # told below, for every rank
            error = f"{type(e).__name__}: {str(e)[:500]}"
        told[name] = _verdict(group, name, numbers, error)
        told[name]["seconds"] = round(time.monotonic() - began, 1)
        if not told[name]["ok"] and name in DEEPEP:
            break  # its end is a meeting, and the device may be lost
        close()
    return told


def _verdict(
    group: RankGroup, name: str, numbers: dict[str, Any], error: str | None
) -> dict[str, Any]:
    parts = group.allgather(f"{name} told", [numbers, error], timeout_s=MEET_S)
    errors = {f"rank {r}": p.value[1] for r, p in enumerate(parts) if p.value[1]}
    if errors:
        return {"ok": False, "errors": errors}
    cases = {}
    for case in CASES:
        same = [p.value[0][case] for p in parts]
        cases[case] = {
            "tokens": [n["tokens"] for n in same],
            "pairs": sum(n["pairs"] for n in same),
            "error": max(n["error"] for n in same),
            "hidden_excess": max(n["hidden_excess"] for n in same),
        }
    return {"ok": True, "worst": max(c["error"] for c in cases.values()), "cases": cases}


def _show(told: dict[str, dict[str, Any]], world: int) -> None:
    for name, verdict in told.items():
        if "skipped" in verdict:
            line = f"SKIPPED: {verdict['skipped']}"
        elif verdict["ok"]:
            each = ", ".join(f"{c} {n['error']:.2e}" for c, n in verdict["cases"].items())
            line = f"ok, worst {verdict['worst']:.2e} ({each}), {verdict['seconds']} s"
        else:
            line = f"FAILED: {verdict['errors']}"
        print(f"{name} on {world} ranks: {line}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ep.moe_error")
    add = parser.add_argument
    add("--transports", help=f"some of {','.join(NAMES)}; default: those of this world")
    add("--capacity", type=int, default=64, help="tokens a rank")
    add("--hidden", type=int, default=7168)
    add("--inter", type=int, default=2048, help="width of an expert")
    add("--num-experts", type=int, default=256)
    add("--topk", type=int, default=8)
    add("--store", type=Path, help="of compiled kernels; default: a temporary one")
    add("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    names = NAMES if args.transports is None else args.transports.split(",")
    if unknown := set(names) - set(NAMES):
        parser.error(f"--transports must be some of {','.join(NAMES)}, got {unknown.pop()!r}")
    if not torch.cuda.is_available():
        parser.error("expected GPUs, got none; tests/cpu/test_moe_error.py is its form without")
    place = GroupConfig.from_env(os.environ)
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", place.rank)))
    torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
    config = TransportConfig(
        rank=place.rank,
        world=place.world,
        capacity=args.capacity,
        hidden=args.hidden,
        num_experts=args.num_experts,
        top_k=args.topk,
    )
    names = [n for n in names if n != "local" or place.world == 1]
    with RankGroup(place) as group, tempfile.TemporaryDirectory() as scratch:
        device = Device(torch.cuda.current_device())
        store = Store(args.store or Path(group.allgather("store", scratch)[0].value))
        launcher = AotLauncher(
            KernelCompiler(store, device.arch),
            num_sms=device.num_sms(device.ordinal),
            pdl=MODES[DEFAULT_PDL],
        )
        experts = Experts(Ops(launcher), config, args.inter, torch.device("cuda", device.ordinal))
        if place.rank == 0:
            compile_all(list_kernels(names, config, args.inter, launcher), launcher.compiler)
        group.barrier("compiled", timeout_s=MEET_S)
        checker = Checker(config, experts)
        checker.prepare([n for n in names if place.world > 1 or n not in DEEPEP])
        group.barrier("ready", timeout_s=MEET_S)
        told = run_all(names, checker, group, device)
        group.barrier("all is told", timeout_s=MEET_S)
    failed = any(not v.get("ok", True) for v in told.values())
    if place.rank == 0:
        _show(told, place.world)
        if args.json:
            sizes = {k: v for k, v in vars(args).items() if k in ("hidden", "inter", "topk")}
            sizes |= {"num_experts": args.num_experts, "capacity": args.capacity}
            record = {"ranks": place.world, "sizes": sizes, "limit": MAX_ERROR, "transports": told}
            print(json.dumps({**record, **provenance(torch.cuda.get_device_name())}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
