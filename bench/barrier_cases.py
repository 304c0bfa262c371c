"""The cases of the barrier benchmark: right values under replay, then times, on all ranks alike."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from barriers.device_barrier import DeviceBarrier
from barriers.device_code import BARRIER_PARAMS, compile_barriers, load_kernels
from barriers.device_watch import DeviceWatch
from barriers.group import RankGroup
from barriers.symmetric import CONTROL_BYTES
from barriers.symmetric_device import DeviceMemory
from bench.rank_harness import DeviceGraph, DeviceStream, Numbers, RankBench
from capture_cache.driver import Device, check, cuda
from capture_cache.launch import LoadedKernel

CHAIN = 200  # barriers in a timed graph
ROUNDS = 20  # exchanges in a timed graph with work in between
REPEATS = 15
LITMUS_ROUNDS = 2  # exchanges in a replay of the litmus
LITMUS_WORDS = 2048  # uint32 that a rank sends each peer in a round
WORK_WORDS = 64
CHUNK = 1000  # replays between two looks at the result
JITTER_NS = 1000  # of one block in eight, so that ranks meet in ever other orders
LAG_NS = 20_000  # of the last rank, where the phase barrier is to be seen failing
FLIGHTS = 500
SCRATCH_BYTES = 4096  # counters of this rank, before the inboxes

SAFE = ("tag", "tag_relaxed", "epoch", "epoch_relaxed")
VARIANTS = ("tag_own_first", "tag_reset_late", "tag_without_release")
NODE, FLIGHT = "empty node", "one flight over the link"

_EXCHANGE = ("ptr", "i64", "i32", "i64", "i32", "i32", "ptr", "i32", "i32", "ptr")
_WARP_KERNELS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "ping_pong": (*BARRIER_PARAMS, "ptr"),
    "advance": ("ptr", "i32", "ptr"),
    "variant_phase": BARRIER_PARAMS,
    **{f"variant_{name}": BARRIER_PARAMS for name in VARIANTS},
    **{f"repeat_{name}": ("ptr", "i64", "i32", "i32") for name in ("tag", "tag_relaxed", "epoch")},
}
_BLOCK_KERNELS = {"exchange": _EXCHANGE, "exchange_tag": (*_EXCHANGE, "ptr")}
_BLOCK = 256

Launch = Callable[[int], None]  # of the i-th of a graph's parts


@dataclass(frozen=True)
class _Loaded:
    """Everything, loaded for one way of launching."""

    pdl: bool
    barriers: dict[str, DeviceBarrier]
    kernels: dict[str, LoadedKernel]

    @property
    def suffix(self) -> str:
        return ", pdl" if self.pdl else ""


class BarrierCases:
    """All cases; what they gave is in `bench.results`.

    Args:
        replays: of the payload litmus.
        deadline_ms: of every wait on the device.
        began, limit_s: as `RankBench` has them.
        shared_gpu: let ranks share a GPU.

    Raises:
        RankError: a rank could not set up; raised on all of them.
    """

    def __init__(
        self,
        group: RankGroup,
        device: Device,
        *,
        replays: int,
        deadline_ms: int,
        began: float,
        limit_s: float,
        shared_gpu: bool = False,
    ) -> None:
        self.group, self.device, self.replays = group, device, replays
        inboxes = 2 * group.world * LITMUS_WORDS * 4
        self.memory = DeviceMemory(group, device, SCRATCH_BYTES + inboxes, shared_gpu=shared_gpu)
        self.watch = DeviceWatch(self.memory, deadline_ms=deadline_ms)
        self.stream = DeviceStream()
        self.timeout_s = deadline_ms / 1000 + 5.0
        self.bench = RankBench(
            group, self.stream, self.watch, began=began, limit_s=limit_s, idle_s=self.timeout_s
        )
        # Counters in this rank's scratch.
        self.first_round = self.memory.payload
        self.blocks_done = self.memory.payload + 8
        self.errors = self.memory.payload + 16
        self.took_ns = self.memory.payload + 24
        self._load()
        group.barrier("everything is loaded", timeout_s=60.0)

    def run(self) -> None:
        """Every section; a case that fails is kept as an error and the next one goes on."""
        for section in (
            self._pieces,
            self._litmus,
            self._phase,
            self._chains,
            self._dependent,
            self._eager,
        ):
            self.bench.fresh()
            section()

    def _load(self) -> None:
        arch = self.device.arch
        ours, cases = compile_barriers("barriers.cu", arch), compile_barriers("barrier_ab.cu", arch)

        def load(pdl: bool) -> _Loaded:
            kernels = load_kernels(self.device, cases, _WARP_KERNELS, pdl=pdl)
            warps = _BLOCK // 32
            kernels |= load_kernels(self.device, cases, _BLOCK_KERNELS, num_warps=warps, pdl=pdl)
            barriers = {k: DeviceBarrier(self.memory, k, module=ours, pdl=pdl) for k in SAFE}
            return _Loaded(pdl, barriers, kernels)

        self.plain, self.pdl = load(False), load(True)
        spaced = compile_barriers("barriers.cu", arch, spacing=8)
        self.spaced = DeviceBarrier(self.memory, "tag", module=spaced)

    # ------------------------------------------------------------------ sections

    def _pieces(self) -> None:
        """What a barrier is made of: a launch, a flight over the link, the protocol alone."""
        for loaded in (self.plain, self.pdl):
            self._time_chain(NODE + loaded.suffix, self._kernel(loaded, "nothing"))
        self._time_flight()
        self.bench.fresh()
        memory = self.memory
        for kind in ("tag", "tag_relaxed", "epoch"):
            kernel = self.plain.kernels[f"repeat_{kind}"]
            values = (memory.base, memory.stride, self.group.world, CHAIN)

            def run(_: None, k: LoadedKernel = kernel, v: tuple[int, ...] = values) -> Numbers:
                took = self._timed(lambda: k.launch((1,), v, self.stream.handle))
                return {"one_us": statistics.median(took) / CHAIN}

            self.bench.case(f"{kind} within one kernel", lambda: None, run)

    def _litmus(self) -> None:
        """Right values under replay, with blocks delayed at random."""
        for kind in SAFE:
            replays = self.replays if kind in ("tag", "epoch") else -(-self.replays // 4)
            launch = self._exchange_then(self.plain, self._barrier(self.plain, kind))
            self._count_errors(f"litmus {kind}", self.plain, launch, replays)
        carried = self._carried(self.pdl, LITMUS_WORDS, JITTER_NS)
        self._count_errors("litmus tag in the last block, pdl", self.pdl, carried, self.replays)

    def _phase(self) -> None:
        """The count as a kernel argument: right when given anew, stale in a graph."""
        lag = LAG_NS if self.group.rank == self.group.world - 1 else 0
        one = self._exchange_then(self.plain, self._phase_barrier, jitter=lag)

        def eager(_: None) -> Numbers:
            self._reset_counters()
            for i in range(CHUNK):
                one(i)
                if i % 100 == 99:
                    self.stream.wait("phase, eager", self.timeout_s, self.watch)
            return {"errors": self._read(self.errors)}

        self.bench.case("phase, eager", lambda: None, eager)
        self._count_errors("phase under replay", self.plain, one, min(self.replays, 2 * CHUNK))

    def _chains(self) -> None:
        """A graph of barriers and nothing else."""
        for loaded in (self.plain, self.pdl):
            for kind in SAFE:
                self._time_chain(f"graph {kind}{loaded.suffix}", self._barrier(loaded, kind))
            for name in VARIANTS:
                launch = self._kernel(loaded, f"variant_{name}", self._where(0))
                self._time_chain(f"graph {name}{loaded.suffix}", launch)
        self._time_chain(
            "graph tag, words 32 bytes apart", lambda i: self.spaced.launch(self.stream.handle)
        )
        self.bench.fresh()
        self._time_chain("graph phase, first replay", self._phase_barrier, repeats=1, warm_up=0)

    def _dependent(self) -> None:
        """What a barrier adds where the work on both sides needs the peers' data."""
        for loaded in (self.plain, self.pdl):
            alone = self._exchange(loaded, "exchange", WORK_WORDS)
            work = self._time_chain(f"work{loaded.suffix}", alone, length=ROUNDS)
            subjects: dict[str, Launch] = {
                f"work + {kind}": self._exchange_then(
                    loaded, self._barrier(loaded, kind), jitter=0, words=WORK_WORDS
                )
                for kind in SAFE
            }
            subjects["work + tag in its last block"] = self._carried(loaded, WORK_WORDS, 0)
            for name, launch in subjects.items():
                result = self._time_chain(f"{name}{loaded.suffix}", launch, length=ROUNDS)
                if "one_us" in result and "one_us" in work:
                    result["added_us"] = round(result["one_us"] - work["one_us"], 3)

    def _eager(self) -> None:
        """Launched one by one from Python: the host's pace, not the barrier's."""
        for kind in ("tag", "epoch"):
            launch = self._barrier(self.plain, kind)

            def run(_: None, one: Launch = launch) -> Numbers:
                took = self._timed(lambda: _all(one, CHAIN), repeats=5)
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

        def run(graph: DeviceGraph) -> Numbers:
            took = self._timed(graph.launch, repeats=repeats, warm_up=warm_up)
            return {
                "one_us": statistics.median(took) / length,
                "least_us": took[0] / length,
                "greatest_us": took[-1] / length,
            }

        return self.bench.case(name, lambda: self.stream.capture(lambda: _all(launch, length)), run)

    def _time_flight(self) -> None:
        """Ranks 0 and 1 throw a word to and fro; the others look on."""
        rank, world, memory = self.group.rank, self.group.world, self.memory
        plays, peer = rank < 2, 1 if rank == 0 else world - 1
        values = (memory.base, memory.stride, world, peer, int(rank == 0), FLIGHTS, self.took_ns)
        kernel = self.plain.kernels["ping_pong"]

        def run(_: None) -> Numbers:
            self._reset_counters()
            if plays:
                kernel.launch((1,), values, self.stream.handle)
            self.stream.wait(FLIGHT, self.timeout_s, self.watch)
            # A sum over ranks: only rank 0 tells. Two flights a round, in nine tenths of them.
            took_us = self._read(self.took_ns) / 1e3 if rank == 0 else 0.0
            return {"one": took_us / (2 * (FLIGHTS - FLIGHTS // 10))}

        result = self.bench.case(FLIGHT, lambda: None, run)
        if "one" in result:
            result["one_us"] = round(result.pop("one"), 3)

    def _count_errors(self, name: str, loaded: _Loaded, launch: Launch, replays: int) -> None:
        """Replay `launch(0), launch(1), …, advance` and count wrong words."""
        values = (self.first_round, LITMUS_ROUNDS, self.watch.step_address)
        advance = self._kernel(loaded, "advance", values)

        def body() -> None:
            _all(launch, LITMUS_ROUNDS)
            advance(0)

        def run(graph: DeviceGraph) -> Numbers:
            self._reset_counters()
            began = time.perf_counter()
            for done in range(0, replays, CHUNK):
                for _ in range(min(CHUNK, replays - done)):
                    graph.launch()
                self.stream.wait(name, self.timeout_s, self.watch)
            took = time.perf_counter() - began
            return {
                "errors": self._read(self.errors),
                "replays": replays / self.group.world,  # summed over ranks
                "replay_us": 1e6 * took / replays,
            }

        self.bench.fresh()
        self.bench.case(name, lambda: self.stream.capture(body), run)

    def _timed(
        self, launch: Callable[[], None], *, repeats: int = REPEATS, warm_up: int = 2
    ) -> list[float]:
        return self.stream.timed(
            launch,
            repeats=repeats,
            warm_up=warm_up,
            timeout_s=self.timeout_s,
            watch=self.watch,
        )

    # ------------------------------------------------------------------ what is launched

    def _barrier(self, loaded: _Loaded, kind: str) -> Launch:
        barrier = loaded.barriers[kind]
        return lambda i: barrier.launch(self.stream.handle)

    def _kernel(self, loaded: _Loaded, name: str, values: tuple[int, ...] = ()) -> Launch:
        kernel = loaded.kernels[name]
        return lambda i: kernel.launch((1,), values, self.stream.handle)

    def _where(self, last: int) -> tuple[int, ...]:
        """Arguments of a barrier kernel outside of layers."""
        return (self.memory.base, self.memory.stride, self.group.world, -1, 0, last)

    def _phase_barrier(self, i: int) -> None:
        kernel = self.plain.kernels["variant_phase"]
        kernel.launch((1,), self._where(i + 1), self.stream.handle)

    def _exchange(
        self,
        loaded: _Loaded,
        name: str,
        words: int,
        jitter: int = 0,
        tail: tuple[int, ...] = (),
    ) -> Launch:
        memory, group, kernel = self.memory, self.group, loaded.kernels[name]
        inbox = CONTROL_BYTES + SCRATCH_BYTES
        where = (memory.base, memory.stride, group.world, inbox, words, group.rank)
        grid = (-(-words // _BLOCK), group.world - 1)

        def launch(i: int) -> None:
            values = (*where, self.first_round, i, jitter, self.errors, *tail)
            kernel.launch(grid, values, self.stream.handle)

        return launch

    def _exchange_then(
        self,
        loaded: _Loaded,
        barrier: Launch,
        *,
        jitter: int = JITTER_NS,
        words: int = LITMUS_WORDS,
    ) -> Launch:
        exchange = self._exchange(loaded, "exchange", words, jitter)

        def launch(i: int) -> None:
            exchange(i)
            barrier(i)

        return launch

    def _carried(self, loaded: _Loaded, words: int, jitter: int) -> Launch:
        """An exchange whose last block runs the tag barrier."""
        return self._exchange(loaded, "exchange_tag", words, jitter, (self.blocks_done,))

    # ------------------------------------------------------------------ counters

    def _reset_counters(self) -> None:
        cu = cuda()
        at = cu.CUdeviceptr(self.memory.payload)
        check(cu.cuMemsetD8(at, 0, SCRATCH_BYTES), "zeroing the counters")
        check(cu.cuCtxSynchronize(), "zeroing the counters")

    def _read(self, address: int) -> float:
        cu, value = cuda(), ctypes.c_uint64()
        at = cu.CUdeviceptr(address)
        check(cu.cuMemcpyDtoH(ctypes.addressof(value), at, 8), "reading a counter")
        return float(value.value)


def _all(launch: Launch, length: int) -> None:
    for i in range(length):
        launch(i)
