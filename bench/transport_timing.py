"""Microseconds of one call inside a graph, with the ranks side by side in front of every call.

A replay is: meet, stamp, n times (meet, call), stamp. The same without the calls is taken off, so
what is told is what a call adds to a chain in which all ranks begin together: its own time and its
wait for the slowest rank, but neither the hosts' launches nor what an earlier call left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

from barriers.device_barrier import DeviceBarrier
from barriers.device_watch import DeviceWatch
from barriers.group import RankGroup
from barriers.symmetric_device import DeviceMemory
from capture_cache.driver import Device, wait_stream
from kernels.triton.launch import JitLauncher
from kernels.triton.settle import stamp

WARM_UP = 5  # replays that are not counted
_WAIT_S = 20.0  # for the device, beyond every deadline
_CHUNK = 20  # replays between two looks at the device


@dataclass(frozen=True)
class Spread:
    """Of one rank's replays, us a call."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, times: list[float], taken_off: float) -> Spread:
        cuts = quantiles(times, n=10) if len(times) > 1 else times * 9
        low, middle, high = (t - taken_off for t in (cuts[0], median(times), cuts[-1]))
        return cls(round(middle, 2), round(low, 2), round(high, 2))


class Aligner:
    """A barrier of its own for the ranks of a benchmark, and the graphs it is in.

    Args:
        deadline_ms: of each meeting.
        back_to_back: no meeting in front of calls, only of replays: what piles up stays in.

    All ranks make theirs together.
    """

    def __init__(
        self, group: RankGroup, device: Device, *, deadline_ms: int, back_to_back: bool = False
    ) -> None:
        self.back_to_back, self._group = back_to_back, group
        self.device = torch.device("cuda", device.ordinal)
        self._launch = JitLauncher(device.num_sms(device.ordinal))
        with ExitStack() as opened:
            memory = DeviceMemory(group, device, 0)
            opened.callback(memory.close)
            self._watch = DeviceWatch(memory, deadline_ms=deadline_ms)
            opened.callback(self._watch.close)
            opened.callback(torch.cuda.synchronize)
            self._barrier = DeviceBarrier(memory)
            opened.callback(self._barrier.close)
            for index in range(2):  # compiled before any capture; 1 has a variant of its own
                stamp(self._launch, torch.zeros(2, dtype=torch.int64, device=self.device), index)
            torch.cuda.synchronize()
            group.barrier("aligner is made")
            self.close = opened.pop_all().close

    def new_pool(self) -> Any:
        """Memory for a graph whose calls allocate."""
        return torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]

    def meet(self) -> None:
        """Launch a barrier on the current stream; capture-safe."""
        self._barrier.launch(torch.cuda.current_stream().cuda_stream)

    def finish(self) -> None:
        """Wait for the device, for a bounded time; raises what went wrong there."""
        stream = torch.cuda.current_stream().cuda_stream
        wait_stream(stream, _WAIT_S, "waiting for ranks to meet")
        self._watch.check()

    def settle(self) -> None:
        """After a failure: wait for the device; raises CudaError if it is of no more use."""
        wait_stream(torch.cuda.current_stream().cuda_stream, _WAIT_S, "recovering")

    def rearm(self) -> None:
        """Ranks may have missed a meeting: begin anew; all together, once all have settled."""
        self._watch.rearm()
        self._group.barrier("all are fresh")

    def capture(self, call: Callable[[], object], inner: int, pool: Any = None) -> TimedGraph:
        """A graph of `inner` calls that have run before."""
        stamps = torch.zeros(2, dtype=torch.int64, device=self.device)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, stream=stream, pool=pool, capture_error_mode="thread_local"):
            self.meet()
            stamp(self._launch, stamps, 0)
            for _ in range(inner):
                if not self.back_to_back:
                    self.meet()
                call()
            stamp(self._launch, stamps, 1)
        return TimedGraph(graph, stamps, inner)

    def capture_nothing(self, inner: int) -> TimedGraph:
        """What is taken off: the meetings alone."""
        return self.capture(lambda: None, inner)


class TimedGraph:
    """A captured chain of calls and the times of its replays."""

    def __init__(self, graph: Any, stamps: torch.Tensor, inner: int) -> None:
        self._graph, self._stamps, self._inner = graph, stamps, inner
        self.times: list[float] = []

    def replay(self, count: int, finish: Callable[[], None]) -> None:
        """Add the times of `count` replays, us a call; ranks replay alike.

        Args:
            finish: waits for the device and raises what went wrong there.
        """
        kept = torch.zeros(count, 2, dtype=torch.int64, device=self._stamps.device)
        for i in range(count):
            self._graph.replay()
            kept[i].copy_(self._stamps)
            if i % _CHUNK == _CHUNK - 1:
                finish()
        finish()
        took = (kept[:, 1] - kept[:, 0]).tolist()
        self.times += [ns / 1e3 / self._inner for ns in took]

    def close(self) -> None:
        """Give the graph's memory back."""
        self._graph.reset()
