"""What benchmarks and tests of GPU ranks share: a stream, captured graphs, cases that cannot hang.

No torch. A case prepares, meets the other ranks, runs, and meets them again; an exception on one
rank makes the case an error on all of them, the signals are made new, and the next case goes on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from barriers.device_watch import DeviceWatch
from barriers.group import RankGroup
from capture_cache.driver import check, cuda

Numbers = dict[str, float]


class DeviceGraph:
    """An executable graph, on the stream that captured it."""

    def __init__(self, graph: Any, stream: Any) -> None:
        cu = cuda()
        self._stream = stream
        self._exec = check(cu.cuGraphInstantiate(graph, 0), "instantiating a graph")
        check(cu.cuGraphDestroy(graph), "dropping a captured graph")
        check(cu.cuGraphUpload(self._exec, stream), "uploading a graph")

    def launch(self) -> None:
        check(cuda().cuGraphLaunch(self._exec, self._stream), "launching a graph")

    def close(self) -> None:
        if self._exec is not None:
            exec_, self._exec = self._exec, None
            check(cuda().cuGraphExecDestroy(exec_), "destroying a graph")


class DeviceStream:
    """A stream of its own. `handle` is what kernels are launched on."""

    def __init__(self) -> None:
        cu = cuda()
        flags = int(cu.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._stream = check(cu.cuStreamCreate(flags), "creating a stream")
        self.handle = int(self._stream)

    def capture(self, launch: Callable[[], None]) -> DeviceGraph:
        """What `launch` launches on this stream, as a graph."""
        cu = cuda()
        mode = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        check(cu.cuStreamBeginCapture(self._stream, mode), "beginning a capture")
        try:
            launch()
        finally:  # also ends a capture that went wrong
            ended = cu.cuStreamEndCapture(self._stream)
        return DeviceGraph(check(ended, "ending a capture"), self._stream)

    def wait(self, doing: str, timeout_s: float, watch: DeviceWatch | None = None) -> None:
        """Wait until the stream is idle, looking at the barriers' record meanwhile.

        Raises:
            BarrierTimeout, StepMismatch: as `watch` says.
            CudaError: work on the stream failed.
            TimeoutError: it is not idle in time.
        """
        cu = cuda()
        deadline = time.monotonic() + timeout_s
        busy = cu.CUresult.CUDA_ERROR_NOT_READY
        while (result := cu.cuStreamQuery(self._stream))[0] == busy:
            if watch is not None:
                watch.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{doing}: the stream is not idle after {timeout_s} s")
        check(result, doing)
        if watch is not None:
            watch.check()

    def timed(
        self,
        launch: Callable[[], None],
        *,
        repeats: int,
        warm_up: int = 2,
        timeout_s: float,
        watch: DeviceWatch | None = None,
    ) -> list[float]:
        """Microseconds on the device of each of `repeats` calls of `launch`, sorted."""
        cu = cuda()
        for _ in range(warm_up):
            launch()
        self.wait("warming up", timeout_s, watch)
        flags = int(cu.CUevent_flags.CU_EVENT_DEFAULT)
        events = [check(cu.cuEventCreate(flags), "creating an event") for _ in range(repeats + 1)]
        check(cu.cuEventRecord(events[0], self._stream), "recording an event")
        for event in events[1:]:
            launch()
            check(cu.cuEventRecord(event, self._stream), "recording an event")
        self.wait("timing", timeout_s, watch)
        took = [
            1e3 * float(check(cu.cuEventElapsedTime(a, b), "reading a time"))
            for a, b in zip(events, events[1:], strict=False)
        ]
        for event in events:
            check(cu.cuEventDestroy(event), "destroying an event")
        return sorted(took)

    def close(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            check(cuda().cuStreamDestroy(stream), "destroying a stream")


class RankBench:
    """Runs cases on all ranks alike and keeps what they gave.

    Args:
        limit_s: no case starts later than this after `began` (`time.monotonic`); rank 0 decides.
        idle_s: longer than a stream can take to run dry.

    Attributes:
        results: by case name, numbers over all ranks, or {"error": …}; equal on every rank.
    """

    def __init__(
        self,
        group: RankGroup,
        stream: DeviceStream,
        watch: DeviceWatch,
        *,
        began: float,
        limit_s: float,
        idle_s: float,
    ) -> None:
        self.group, self.stream, self.watch = group, stream, watch
        self.results: dict[str, dict[str, Any]] = {}
        self._began, self._limit_s, self._idle_s = began, limit_s, idle_s

    def case(
        self,
        name: str,
        prepare: Callable[[], Any],
        run: Callable[[Any], Mapping[str, float]],
    ) -> dict[str, Any]:
        """One case.

        Args:
            prepare: compiles and captures; must not wait for another rank.
            run: gets what `prepare` gave; every rank enters it together. Times end in "_us" and are
                told as mean and max over ranks; everything else is added up.
        """
        late = self.group.rank == 0 and time.monotonic() - self._began > self._limit_s
        error, ready = (None, None) if late else _try(prepare)
        if self._meet(name, "prepare", {"error": error, "late": late}) is None:
            return self.results[name]
        error, numbers = _try(lambda: {k: float(v) for k, v in run(ready).items()})
        parts = self._meet(name, "run", {"error": error, "numbers": numbers})
        if parts is not None:
            self.results[name] = over_ranks([p["numbers"] for p in parts])
        if isinstance(ready, DeviceGraph):
            ready.close()
        return self.results[name]

    def fresh(self) -> None:
        """Zero all signals; every rank calls this between cases."""
        self.group.barrier("all are idle")
        self.watch.rearm()
        self.group.barrier("all are fresh")

    def _meet(self, name: str, what: str, told: dict[str, Any]) -> list[Any] | None:
        """Share what happened; None, with the error kept, if it went wrong anywhere."""
        parts = [p.value for p in self.group.allgather(f"{name}: {what}", told)]
        errors = {f"rank {r}": p["error"] for r, p in enumerate(parts) if p["error"]}
        if errors:
            self.results[name] = {"error": errors}
            self._recover()
            return None
        if parts[0].get("late"):
            self.results[name] = {"error": f"skipped: {self._limit_s:.0f} s are over"}
            return None
        return parts

    def _recover(self) -> None:
        """After a failure: end all waits, let every stream run dry, begin anew."""
        self.watch.abort()
        error, _ = _try(lambda: self.stream.wait("recovering", self._idle_s))
        self.group.agree("recovering", error)
        self.fresh()


def over_ranks(parts: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Times as mean and max, counts as sums."""
    out: dict[str, Any] = {}
    for key in parts[0]:
        values = [p[key] for p in parts]
        if key.endswith("_us"):
            out[key] = round(statistics.mean(values), 3)
            out[f"{key}_max"] = round(max(values), 3)
        else:
            out[key] = sum(values)
    return out


def _try(body: Callable[[], Any]) -> tuple[str | None, Any]:
    try:
        return None, body()
    except Exception as e:  # becomes the case's result; the bench goes on with the next
        return f"{type(e).__name__}: {e}"[:300], None
