"""Barriers between the GPUs of one node, side by side: right first, then how fast.

    torchrun --standalone --nproc-per-node N -m bench.rdep_barrier_ab [--json] [--replays 100000]

Checks: in every replay each rank writes values made from the round to its peers, passes the barrier,
and its peers compare them on the device; the phase barrier must be seen to fail at that under replay.
Times: eager, in a graph, in a graph with work in between that needs the peers' data, and in one kernel;
torch's symmetric-memory barrier and NCCL's 16-byte all-reduce beside them in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from barriers.config import GroupConfig
from barriers.device_barrier import BARRIER_PARAMS, DeviceBarrier, DeviceWatch
from barriers.device_code import compile_barriers, load_kernels
from barriers.errors import RankError
from barriers.group import RankGroup
from barriers.symmetric import CONTROL_BYTES
from barriers.symmetric_device import DeviceMemory
from bench.rank_harness import DeviceGraph, DeviceStream, Numbers, RankBench
from capture_cache.driver import Device, check, cuda
from capture_cache.launch import LoadedKernel
from capture_cache.nvrtc import nvrtc_version

CHAIN = 200  # barriers in a timed graph
ROUNDS = 20  # exchanges in a timed graph with dependent work
REPEATS = 15
LITMUS_ROUNDS = 2  # exchanges in a replay of the litmus
LITMUS_WORDS = 2048  # uint32 a rank sends each peer in a round
CHUNK = 1000  # replays between two looks at the result
JITTER_NS = 1000  # of one block in eight, so that ranks meet in ever other orders
LAG_NS = 20_000  # of the last rank, where the phase barrier is to be seen failing
SCRATCH_BYTES = 4096  # counters of this rank, before the inboxes
SAFE = ("tag", "tag_relaxed", "epoch", "epoch_relaxed")
VARIANTS = ("tag_own_first", "tag_reset_late", "tag_without_release")

_EXCHANGE = ("ptr", "i64", "i32", "i64", "i32", "i32", "ptr", "i32", "i32", "ptr")
_REPEAT = ("ptr", "i64", "i32", "i32")
_AB_WARP: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "ping_pong": BARRIER_PARAMS,
    "advance": ("ptr", "i32", "ptr"),
    "variant_phase": BARRIER_PARAMS,
    **{f"variant_{name}": BARRIER_PARAMS for name in VARIANTS},
    **{f"repeat_{name}": _REPEAT for name in ("tag", "tag_relaxed", "epoch")},
}
_AB_BLOCK = {"exchange": _EXCHANGE, "exchange_tag": (*_EXCHANGE, "ptr")}

Launch = Callable[[int], None]  # of the i-th barrier of a graph


@dataclass(frozen=True)
class _Set:
    """Everything loaded for one way of launching."""

    barriers: dict[str, DeviceBarrier]
    kernels: dict[str, LoadedKernel]


class BarrierBench:
    """All cases; the results are in `bench.results`."""

    def __init__(self, group: RankGroup, args: argparse.Namespace, began: float) -> None:
        self.group, self.replays = group, args.replays
        self.device = Device(int(os.environ.get("LOCAL_RANK", group.rank)))
        inboxes = 2 * group.world * LITMUS_WORDS * 4
        self.memory = DeviceMemory(
            group, self.device, SCRATCH_BYTES + inboxes, shared_gpu=args.shared_gpu
        )
        self.watch = DeviceWatch(self.memory, deadline_ms=args.deadline_ms)
        self.stream = DeviceStream()
        self.timeout_s = args.deadline_ms / 1000 + 5.0
        self.bench = RankBench(
            group,
            self.stream,
            self.watch,
            began=began,
            limit_s=args.limit_s,
            idle_s=self.timeout_s,
        )
        self.plain, self.pdl = self._load(False), self._load(True)
        self.spaced = DeviceBarrier(self.memory, "tag", spacing=8)
        # Counters in this rank's scratch: round of a replay's begin, blocks done, errors.
        self.first_round = self.memory.payload
        self.blocks_done = self.memory.payload + 8
        self.errors = self.memory.payload + 16
        group.barrier("everything is loaded")

    def _load(self, pdl: bool) -> _Set:
        module = compile_barriers("barrier_ab.cu", self.device.arch)
        kernels = load_kernels(self.device, module, _AB_WARP, pdl=pdl)
        kernels |= load_kernels(self.device, module, _AB_BLOCK, num_warps=8, pdl=pdl)
        return _Set({k: DeviceBarrier(self.memory, k, pdl=pdl) for k in SAFE}, kernels)

    def run(self) -> None:
        """All sections, the shortest and most telling first."""
        for section in (
            self._pieces,
            self._litmus,
            self._phase,
            self._chains,
            self._dependent,
            self._eager,
        ):
            self._forget()
            section()

    # ------------------------------------------------------------------ sections

    def _pieces(self) -> None:
        """What a barrier is made of: a launch, a flight over the link, the protocol alone."""
        memory, world = self.memory, self.group.world
        for name, loaded in (("node", self.plain), ("node, pdl", self.pdl)):
            nothing = loaded.kernels["nothing"]
            self._time_chain(name, lambda i, k=nothing: k.launch((1,), (), self.stream.handle))
        rounds, rank = 500, self.group.rank
        if rank in (0, 1):
            peer = 1 if rank == 0 else world - 1
            values = (memory.base, memory.stride, world, peer, int(rank == 0), rounds)
            grid = (1,)
        else:
            values, grid = (0, 0, 0, 0, 0, 0), (0,)  # looks on
        pong = self.plain.kernels["ping_pong"]
        self._forget()
        self._time_kernel(
            "one flight (ranks 0 and 1)",
            lambda: pong.launch(grid, values, self.stream.handle),
            2 * rounds,
            once=True,  # its words count up: a second launch would find them satisfied
            mine=rank in (0, 1),
        )
        self._forget()
        for kind in ("tag", "tag_relaxed", "epoch"):
            kernel = self.plain.kernels[f"repeat_{kind}"]
            values3 = (memory.base, memory.stride, world, CHAIN)
            self._time_kernel(
                f"{kind} within one kernel",
                lambda k=kernel, v=values3: k.launch((1,), v, self.stream.handle),
                CHAIN,
            )

    def _litmus(self) -> None:
        """Right values under replay, with blocks delayed at random."""
        for kind in SAFE:
            barrier = self.plain.barriers[kind]
            self._count_errors(
                f"litmus {kind}",
                lambda i, b=barrier: self._exchange_then(i, lambda i: self._launch(b)),
                self.replays if kind in ("tag", "epoch") else self.replays // 4,
            )
        fused = self.pdl.kernels["exchange_tag"]
        self._count_errors(
            "litmus tag in the last block, pdl",
            lambda i: self._exchange(fused, i, jitter=JITTER_NS, tail=(self.blocks_done,)),
            self.replays,
            loaded=self.pdl,
        )

    def _phase(self) -> None:
        """The count as a kernel argument: right when given anew, stale in a graph."""
        lag = LAG_NS if self.group.rank == self.group.world - 1 else 0

        def eager() -> Numbers:
            self._reset_counters()
            for i in range(CHUNK):
                self._exchange(self.plain.kernels["exchange"], i, jitter=lag)
                self._launch_phase(i)
                if i % 100 == 99:
                    self.stream.wait("phase, eager", self.timeout_s, self.watch)
            return {"errors": self._read_errors(), "rounds": CHUNK / self.group.world}

        self.bench.case("phase, eager", lambda: None, lambda _: eager())
        self._forget()
        self._count_errors(
            "phase under replay",
            lambda i: (
                self._exchange(self.plain.kernels["exchange"], i, jitter=lag),
                self._launch_phase(i),
            ),
            min(self.replays, 2000),
        )

    def _chains(self) -> None:
        """A graph of barriers and nothing else."""
        for loaded, suffix in ((self.plain, ""), (self.pdl, ", pdl")):
            for kind in SAFE:
                barrier = loaded.barriers[kind]
                self._time_chain(f"graph {kind}{suffix}", lambda i, b=barrier: self._launch(b))
            for name in VARIANTS:
                kernel = loaded.kernels[f"variant_{name}"]
                self._time_chain(
                    f"graph {name}{suffix}", lambda i, k=kernel: self._launch_variant(k, 0)
                )
        self._time_chain("graph tag, words 32 bytes apart", lambda i: self._launch(self.spaced))
        self._forget()
        self._time_chain("graph phase, first replay", self._launch_phase, repeats=1, warm_up=0)

    def _dependent(self) -> None:
        """What a barrier adds where the work on both sides needs the peers' data."""
        for loaded, suffix in ((self.plain, ""), (self.pdl, ", pdl")):
            exchange = loaded.kernels["exchange"]

            def alone(i: int, k: LoadedKernel = exchange) -> None:
                self._exchange(k, i, words=64)

            work = self._time_chain(f"work{suffix}", alone, length=ROUNDS)
            for kind in SAFE:
                barrier = loaded.barriers[kind]

                def both(i: int, k: LoadedKernel = exchange, b: DeviceBarrier = barrier) -> None:
                    self._exchange(k, i, words=64)
                    self._launch(b)

                self._added(f"work + {kind}{suffix}", both, work)
            fused = loaded.kernels["exchange_tag"]

            def carried(i: int, k: LoadedKernel = fused) -> None:
                self._exchange(k, i, words=64, tail=(self.blocks_done,))

            self._added(f"work + tag in its last block{suffix}", carried, work)

    def _eager(self) -> None:
        """Launched one by one from Python: the host's pace, not the barrier's."""
        for kind in ("tag", "epoch"):
            barrier = self.plain.barriers[kind]

            def run(_: None, b: DeviceBarrier = barrier) -> Numbers:
                def chain() -> None:
                    for _ in range(CHAIN):
                        self._launch(b)

                took = self.stream.timed(
                    chain, repeats=5, timeout_s=self.timeout_s, watch=self.watch
                )
                return {"one_us": statistics.median(took) / CHAIN}

            self.bench.case(f"eager {kind}", lambda: None, run)

    # ------------------------------------------------------------------ kinds of case

    def _time_chain(
        self,
        name: str,
        launch: Launch,
        *,
        length: int = CHAIN,
        repeats: int = REPEATS,
        warm_up: int = 2,
    ) -> dict[str, Any]:
        """A graph of `length` launches; median, least and greatest of its replays, per launch."""

        def prepare() -> DeviceGraph:
            return self.stream.capture(lambda: [launch(i) for i in range(length)] and None)

        def run(graph: DeviceGraph) -> Numbers:
            took = self.stream.timed(
                graph.launch,
                repeats=repeats,
                warm_up=warm_up,
                timeout_s=self.timeout_s,
                watch=self.watch,
            )
            return {
                "one_us": statistics.median(took) / length,
                "least_us": took[0] / length,
                "greatest_us": took[-1] / length,
            }

        return self.bench.case(name, prepare, run)

    def _time_kernel(
        self,
        name: str,
        launch: Callable[[], None],
        parts: int,
        *,
        once: bool = False,
        mine: bool = True,
    ) -> None:
        """One launch that does `parts` things; time of one."""

        def run(_: None) -> Numbers:
            took = self.stream.timed(
                launch,
                repeats=1 if once else REPEATS,
                warm_up=0 if once else 2,
                timeout_s=self.timeout_s,
                watch=self.watch,
            )
            # Ranks that look on must not pull the mean down.
            return {"one": statistics.median(took) / parts if mine else 0.0, "ranks": float(mine)}

        result = self.bench.case(name, lambda: None, run)
        if "one" in result:
            result["one_us"] = round(result.pop("one") / result["ranks"], 3)

    def _added(self, name: str, launch: Launch, work: dict[str, Any]) -> None:
        result = self._time_chain(name, launch, length=ROUNDS)
        if "one_us" in result and "one_us" in work:
            result["added_us"] = round(result["one_us"] - work["one_us"], 3)

    def _count_errors(
        self, name: str, launch: Launch, replays: int, *, loaded: _Set | None = None
    ) -> None:
        """Replay `launch(0), launch(1), …, advance` and count wrong words."""
        advance = (loaded or self.plain).kernels["advance"]

        def body() -> None:
            for i in range(LITMUS_ROUNDS):
                launch(i)
            step = self.watch.step_address
            advance.launch((1,), (self.first_round, LITMUS_ROUNDS, step), self.stream.handle)

        def run(graph: DeviceGraph) -> Numbers:
            self._reset_counters()
            began = time.perf_counter()
            for done in range(0, replays, CHUNK):
                for _ in range(min(CHUNK, replays - done)):
                    graph.launch()
                self.stream.wait(name, self.timeout_s, self.watch)
            took = time.perf_counter() - began
            world = self.group.world
            return {
                "errors": self._read_errors(),
                "replays": replays / world,
                "replay_us": 1e6 * took / max(1, replays),
            }

        self._forget()
        self.bench.case(name, lambda: self.stream.capture(body), run)

    # ------------------------------------------------------------------ launches

    def _launch(self, barrier: DeviceBarrier) -> None:
        barrier.launch(self.stream.handle)

    def _launch_variant(self, kernel: LoadedKernel, last: int) -> None:
        memory = self.memory
        values = (memory.base, memory.stride, self.group.world, -1, 0, last)
        kernel.launch((1,), values, self.stream.handle)

    def _launch_phase(self, i: int) -> None:
        self._launch_variant(self.plain.kernels["variant_phase"], i + 1)

    def _exchange(
        self,
        kernel: LoadedKernel,
        i: int,
        *,
        jitter: int = 0,
        words: int = LITMUS_WORDS,
        tail: tuple[int, ...] = (),
    ) -> None:
        memory, group = self.memory, self.group
        inbox = CONTROL_BYTES + SCRATCH_BYTES
        where = (memory.base, memory.stride, group.world, inbox, words, group.rank)
        values = (*where, self.first_round, i, jitter, self.errors, *tail)
        kernel.launch((-(-words // 256), group.world - 1), values, self.stream.handle)

    def _exchange_then(self, i: int, barrier: Launch) -> None:
        self._exchange(self.plain.kernels["exchange"], i, jitter=JITTER_NS)
        barrier(i)

    # ------------------------------------------------------------------ counters

    def _forget(self) -> None:
        self.bench.fresh()

    def _reset_counters(self) -> None:
        cu = cuda()
        at = cu.CUdeviceptr(self.memory.payload)
        check(cu.cuMemsetD8(at, 0, SCRATCH_BYTES), "zeroing the counters")
        check(cu.cuCtxSynchronize(), "zeroing the counters")

    def _read_errors(self) -> float:
        cu, value = cuda(), ctypes.c_uint64()
        address = cu.CUdeviceptr(self.errors)
        check(cu.cuMemcpyDtoH(ctypes.addressof(value), address, 8), "reading the errors")
        return float(value.value)


# ------------------------------------------------------------------------ others' barriers


def time_others(rank: int, device: int) -> dict[str, Numbers | dict[str, str]]:
    """torch's symmetric-memory barrier and NCCL's all-reduce of 16 bytes, in graphs of torch's."""
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(device)
    place = torch.device("cuda", device)
    results: dict[str, Numbers | dict[str, str]] = {}

    def timed(name: str, call: Callable[[], Any], length: int) -> None:
        try:
            results[name] = _time_torch(call, length)
        except Exception as e:  # one library's absence is a line in the table, not the end
            results[name] = {"error": f"{type(e).__name__}: {e}"[:300]}

    from datetime import timedelta

    dist.init_process_group("nccl", device_id=place, timeout=timedelta(seconds=20))
    small = torch.zeros(4, device=place)
    dist.all_reduce(small)
    torch.cuda.synchronize()
    timed("NCCL all-reduce of 16 bytes", lambda: dist.all_reduce(small), 50)

    def make_handle() -> Any:
        import torch.distributed._symmetric_memory as symmetric

        buffer = symmetric.empty(1024, dtype=torch.float32, device=place)
        return buffer, symmetric.rendezvous(buffer, dist.group.WORLD)

    try:
        buffer, handle = make_handle()
        timed("torch symmetric memory", lambda: handle.barrier(channel=0), CHAIN)
        del buffer
    except Exception as e:
        results["torch symmetric memory"] = {"error": f"{type(e).__name__}: {e}"[:300]}
    return results


def _time_torch(call: Callable[[], Any], length: int) -> Numbers:
    import torch
    import torch.distributed as dist

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(length):
            call()
    graph.replay()
    torch.cuda.synchronize()
    dist.barrier()
    took = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        took.append(begin.elapsed_time(end) * 1e3 / length)
    worst = torch.tensor([statistics.median(took)], device="cuda")
    mean = worst.clone()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    dist.all_reduce(mean)
    return {
        "one_us": round(float(mean) / dist.get_world_size(), 3),
        "one_us_max": round(float(worst), 3),
    }


# ------------------------------------------------------------------------------- report


def judge(results: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong; empty if every check held."""
    wrong = []
    for name, result in results.items():
        if name.startswith("litmus") or name == "phase, eager":
            if "error" in result:
                wrong.append(f"{name}: did not finish")
            elif result["errors"]:
                wrong.append(f"{name}: {result['errors']:.0f} wrong words")
    replayed = results.get("phase under replay", {})
    if not replayed.get("errors"):
        wrong.append("phase under replay: expected to fail, was not seen to")
    return wrong


def floor_us(results: dict[str, dict[str, Any]]) -> float | None:
    """An empty node and one flight over the link: what no barrier in a graph can beat."""
    parts = [results.get(n, {}).get("one_us") for n in ("node", "one flight (ranks 0 and 1)")]
    return None if None in parts else round(sum(p for p in parts if p is not None), 3)


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'case':42} {'us':>8} {'max':>8} {'added':>8}  checks"]
    for name, r in results.items():
        if "error" in r:
            lines.append(f"{name:42} {'-':>8} {'-':>8} {'-':>8}  {r['error']}")
            continue
        cells = [r.get("one_us", r.get("replay_us")), r.get("one_us_max", r.get("replay_us_max"))]
        shown = [f"{c:8.3f}" if c is not None else f"{'-':>8}" for c in (*cells, r.get("added_us"))]
        checks = f"{r['errors']:.0f} errors" if "errors" in r else ""
        if "replays" in r:
            checks += f" in {r['replays']:.0f} replays"
        lines.append(f"{name:42} {' '.join(shown)}  {checks}")
    return "\n".join(lines)


def report(
    about: dict[str, Any], results: dict[str, dict[str, Any]], args: argparse.Namespace
) -> int:
    """Print the table, the verdict and the JSON; returns the exit code."""
    wrong = judge(results)
    everything = {**about, "floor_us": floor_us(results), "wrong": wrong, "results": results}
    print(f"{about['gpus']} x {about['gpu']}, commit {about['commit']}")
    print(table(results))
    print(f"floor (an empty node and one flight): {everything['floor_us']} us")
    print("\n".join(f"WRONG: {w}" for w in wrong) or "every check held")
    if args.out:
        Path(args.out).write_text(json.dumps(everything, indent=1))
    if args.json:
        print(json.dumps(everything))
    sys.stdout.flush()
    return int(bool(wrong))


def describe(device: Device, world: int) -> dict[str, Any]:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "bench": "rdep_barrier_ab",
        "command": " ".join(["python -m bench.rdep_barrier_ab", *sys.argv[1:]]),
        "commit": found.stdout.strip() or "unknown",
        "gpu": device.name,
        "gpus": world,
        "driver": device.driver_version,
        "nvrtc": ".".join(map(str, nvrtc_version())),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.rdep_barrier_ab", description=__doc__)
    parser.add_argument("--replays", type=int, default=100_000, help="of the payload litmus")
    parser.add_argument("--deadline-ms", type=int, default=2000, help="of every wait")
    parser.add_argument("--limit-s", type=float, default=45.0, help="no case starts after this")
    parser.add_argument("--no-torch", action="store_true", help="leave out torch and NCCL")
    parser.add_argument("--shared-gpu", action="store_true", help="let ranks share a GPU (a test)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--out", help="write the JSON to this file, too")
    args = parser.parse_args(argv)
    if args.replays < 1 or args.deadline_ms < 1 or args.limit_s <= 0:
        parser.error("--replays, --deadline-ms and --limit-s must be positive")
    return args


def main(argv: list[str] | None = None) -> int:
    args, began = parse(argv), time.monotonic()
    config = GroupConfig.from_env(os.environ, timeout_s=40.0)
    if config.world < 2:
        print("this needs ranks: torchrun --standalone --nproc-per-node N -m bench.rdep_barrier_ab")
        return 2
    group = RankGroup(config, {"bench": f"{args.replays} {args.deadline_ms} {args.no_torch}"})
    bench = BarrierBench(group, args, began)
    about, results = describe(bench.device, group.world), bench.bench.results

    def out_of_time() -> None:
        if group.rank == 0:
            results["torch and NCCL"] = {"error": "did not end in time"}
            report(about, results, args)
        os._exit(1)  # a library's wait cannot be ended otherwise

    last_resort = threading.Timer(args.limit_s + 12.0, out_of_time)
    last_resort.daemon = True
    last_resort.start()
    try:
        bench.run()
        if not args.no_torch:
            group.barrier("others' barriers")
            results.update(time_others(group.rank, bench.device.ordinal))
    except (RankError, ImportError, RuntimeError) as e:
        results["the run"] = {"error": f"ended early: {type(e).__name__}: {e}"[:500]}
    last_resort.cancel()
    code = report(about, results, args) if group.rank == 0 else 0
    sys.stdout.flush()
    os._exit(code)  # without the tear-down of libraries, which may wait for other ranks


if __name__ == "__main__":
    sys.exit(main())
