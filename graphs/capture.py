"""Turning a step into graphs: the lifecycle, preflight, and capture from the largest key down.

    created ──warm_up()──► warmed_up ──capture()──► captured ──close()──► closed

Each illegal move is a `CaptureError` that names the state and the call that leads out of it.
Nothing that was not captured can run: `replay` raises `NotCaptured`, and there is no eager
fall-back.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from capture_cache.driver import graph_nodes, memory_info
from capture_cache.errors import CaptureError
from capture_cache.replay import GraphExec
from graphs.branch import Branch, InLine, SideStream
from graphs.keys import GraphKey, Ladder, NotCaptured
from graphs.step import DecodeStep
from kernels.triton.settle import stamp

Progress = Callable[[str, GraphKey], None]


class StaleGraph(CaptureError):
    """A buffer lies elsewhere than when the graph was captured; replaying would read freed
    memory."""


class State(enum.Enum):
    CREATED = "created"
    WARMED_UP = "warmed_up"
    CAPTURED = "captured"
    CLOSED = "closed"


REMEDY = {
    State.CREATED: "call warm_up() first",
    State.WARMED_UP: "call capture() first",
    State.CAPTURED: "it is captured already; make a new GraphSet to capture again",
    State.CLOSED: "it is closed; make a new GraphSet",
}


@dataclass
class Captured:
    """One captured key.

    Attributes:
        graph: handle of the captured graph (CUgraph), as long as this lives; 0 on the CPU twin.
        nodes: graph nodes by type name (empty on the CPU twin).
        graph_bytes: device memory that instantiating the graph took.
        seconds: spent capturing and instantiating.
        executable: what `launch` launches; None on the CPU twin.
        owner: keeps `graph` alive.
    """

    key: GraphKey
    launch: Callable[[], None]
    graph: int = 0
    nodes: dict[str, int] = field(default_factory=dict)
    graph_bytes: int = 0
    seconds: float = 0.0
    executable: GraphExec | None = None
    owner: Any = None

    @contextmanager
    def timed(self) -> Iterator[list[int]]:
        """Within it every launch appends the ns that it spends in the driver's call (on the CPU
        twin: in the step) to what is yielded."""
        if self.executable is not None:
            with self.executable.timed() as taken:
                yield taken
            return
        plain, taken = self.launch, []

        def launch() -> None:
            began = time.perf_counter_ns()
            plain()
            taken.append(time.perf_counter_ns() - began)

        self.launch = launch
        try:
            yield taken
        finally:
            self.launch = plain

    def close(self) -> None:
        """Release the graph; no launch of it may be running. Idempotent."""
        if self.executable is not None:
            self.executable.close()


class GraphBackend(Protocol):
    """Where graphs are made: a CUDA device, or the twin that runs the step itself."""

    name: str

    @property
    def branch(self) -> Branch:
        """Where a part of a step may run beside the rest."""

    def on_stream(self) -> AbstractContextManager[Any]:
        """Within it, torch's own operations are ordered with replays."""

    def eager(self, run: Callable[[], None]) -> None:
        """Run once, outside any graph, and wait."""

    def capture(self, key: GraphKey, run: Callable[[], None]) -> Captured: ...

    def capture_live(self, key: GraphKey, run: Callable[[], None]) -> Captured:
        """`capture` of a step that allocates; its memory lives as long as such graphs do."""

    def synchronize(self) -> None: ...

    def check_alive(self) -> None:
        """Raise the device's error, if it has one, instead of waiting for a step that cannot
        come."""


class TwinBackend:
    """CPU twin: no CUDA graph, for correctness only. A "replay" runs the step's oracles."""

    name = "cpu"
    branch: Branch = InLine()

    def on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def eager(self, run: Callable[[], None]) -> None:
        run()

    def capture(self, key: GraphKey, run: Callable[[], None]) -> Captured:
        return Captured(key, run)

    def capture_live(self, key: GraphKey, run: Callable[[], None]) -> Captured:
        return self.capture(key, run)

    def synchronize(self) -> None:
        """Everything has run already."""

    def check_alive(self) -> None:
        """A CPU step cannot fail silently."""


class CudaBackend:
    """One stream of one device; every graph is captured and replayed on it."""

    name = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.branch: Branch = SideStream(device)
        self._pool: Any = None  # of graphs that allocate; one replays at a time, so they share it

    def on_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream)

    def eager(self, run: Callable[[], None]) -> None:
        with self.on_stream():
            run()
        self.stream.synchronize()

    def capture(self, key: GraphKey, run: Callable[[], None]) -> Captured:
        """Capture and instantiate; refuses a step that allocates.

        Raises:
            CaptureError: the step allocated, synchronised or compiled while being captured.
        """
        captured, allocations = self._capture(key, run, {})
        if allocations:
            captured.close()
            raise CaptureError(
                f"key {key}: the step made {allocations} allocations while being captured; "
                "every buffer of a step must lie in the arena"
            )
        return captured

    def capture_live(self, key: GraphKey, run: Callable[[], None]) -> Captured:
        """Capture and instantiate a step that may allocate; the largest key comes first.

        Raises:
            CaptureError: the step synchronised or compiled while being captured.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
        return self._capture(key, run, {"pool": self._pool})[0]

    def _capture(
        self, key: GraphKey, run: Callable[[], None], options: dict[str, Any]
    ) -> tuple[Captured, int]:
        """The graph, and how many allocations `run` made."""
        free, start = memory_info()[0], time.perf_counter()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.stream(self.stream):
            graph.capture_begin(**options, capture_error_mode="thread_local")
            before = self._num_allocations()  # beginning a capture may allocate torch's own state
            try:
                run()
            except BaseException as error:
                # The capture is void already; the first error says why.
                with suppress(RuntimeError):
                    graph.capture_end()
                raise CaptureError(f"key {key} could not be captured: {error}") from error
            after = self._num_allocations()
            graph.capture_end()
        # Instantiated by us and not by torch, whose replay takes 20 us of host time around 1 us of
        # driver call.
        handle = int(graph.raw_cuda_graph())
        executable = GraphExec(handle, self.stream.cuda_stream)
        captured = Captured(
            key,
            executable.launch,
            graph=handle,
            nodes=graph_nodes(handle),
            graph_bytes=max(0, free - memory_info()[0]),
            seconds=time.perf_counter() - start,
            executable=executable,
            owner=graph,
        )
        return captured, after - before

    def _num_allocations(self) -> int:
        """Allocations that torch has made on the device so far."""
        return int(torch.cuda.memory_stats(self.device).get("allocation.all.allocated", 0))

    def synchronize(self) -> None:
        self.stream.synchronize()

    def check_alive(self) -> None:
        self.stream.query()


class GraphSet:
    """All graphs of one runtime.

    Args:
        forbid_compile: called before capture so that a kernel that was not warmed up is an error.
    """

    def __init__(
        self,
        step: DecodeStep,
        ladder: Ladder,
        backend: GraphBackend,
        *,
        forbid_compile: Callable[[], None] = lambda: None,
    ) -> None:
        self.step, self.ladder, self.backend = step, ladder, backend
        self.state = State.CREATED
        self.graphs: dict[GraphKey, Captured] = {}
        self._forbid_compile = forbid_compile
        self.live = step.live  # why these graphs cannot be stored, or ""
        self._addresses: dict[str, int] = {}
        self._generation = -1

    def _expect(self, state: State, call: str) -> None:
        if self.state is not state:
            raise CaptureError(
                f"{call}() needs state {state.value}, got {self.state.value}: {REMEDY[self.state]}"
            )

    def _largest_first(self) -> Iterable[GraphKey]:
        return reversed(self.ladder.keys)

    def warm_up(self, progress: Progress = lambda *_: None) -> None:
        """Preflight: run every key twice eagerly on idle rows, so that everything lazy exists."""
        self._expect(State.CREATED, "warm_up")
        for key in self._largest_first():
            for _ in range(2):
                self.backend.eager(partial(self.step.run, key))
            progress("warm up", key)
        self.backend.eager(lambda: self._run_stamped(self.ladder.keys[0]))
        self.state = State.WARMED_UP

    def capture(self, progress: Progress = lambda *_: None) -> None:
        """Capture every key, the largest first, into the shared scratch.

        Raises:
            CaptureError: a key's step allocated, synchronised or compiled.
        """
        self._expect(State.WARMED_UP, "capture")
        self._forbid_compile()
        for key in self._largest_first():
            self.graphs[key] = self._capture(key, partial(self.step.run, key))
            progress("capture", key)
        self._addresses = self.step.buffers.addresses()
        self._generation = self.step.buffers.generation
        self.state = State.CAPTURED

    def _capture(self, key: GraphKey, run: Callable[[], None]) -> Captured:
        """A graph that leaves the transport's host state as it found it."""
        self.step.require_settled(f"capturing key {key}")
        capture = self.backend.capture_live if self.step.allocates else self.backend.capture
        captured = capture(key, run)
        self.step.require_settled(f"the capture of key {key}")
        return captured

    @contextmanager
    def stamped(self, key: GraphKey) -> Iterator[list[str]]:
        """Within it, replays of `key` take a graph with a timestamp after each part of the step.

        Yields:
            The names of the stamps, in order; `stamps[i]` holds the time in ns of the i-th.
        """
        self._expect(State.CAPTURED, "stamped")
        plain = self._graph(key)
        self.graphs[key] = self._capture(key, lambda: self._run_stamped(key))
        try:
            yield self.step.part_names()
        finally:
            self.backend.synchronize()
            self.graphs[key].close()
            self.graphs[key] = plain

    def _run_stamped(self, key: GraphKey) -> None:
        names: list[str] = []
        launch, stamps = self.step.ops.launch, self.step.buffers["stamps"]

        def mark(name: str) -> None:
            if launch is None:
                stamps[len(names)] = time.perf_counter_ns()
            else:
                stamp(launch, stamps, len(names))
            names.append(name)

        self.step.run(key, mark)

    def timed(self, key: GraphKey) -> AbstractContextManager[list[int]]:
        """`Captured.timed` of the graph of `key`.

        Raises:
            NotCaptured: no such graph.
            CaptureError: nothing is captured.
        """
        self._expect(State.CAPTURED, "timed")
        return self._graph(key).timed()

    def replay(self, key: GraphKey) -> None:
        """Launch the graph of `key`.

        Raises:
            NotCaptured: no such graph.
            StaleGraph: a buffer has moved since capture.
            CaptureError: nothing is captured.
        """
        graph = self.graphs.get(key)
        # No generation is right before all keys are captured, and close() leaves no graph.
        if graph is None or self.live or self.step.buffers.generation != self._generation:
            graph = self._checked(key)
        graph.launch()

    def _checked(self, key: GraphKey) -> Captured:
        """The graph of `key`, whatever may stand against its replay looked at."""
        self._expect(State.CAPTURED, "replay")
        if self.step.buffers.generation != self._generation:
            self._refuse_moved()
        if self.live:
            self.step.require_settled("a replay")
        return self._graph(key)

    def _graph(self, key: GraphKey) -> Captured:
        graph = self.graphs.get(key)
        if graph is None:
            raise NotCaptured(
                f"key {key} was not captured (ladder {self.ladder}); add it with --ladder"
            )
        return graph

    def _refuse_moved(self) -> None:
        now = self.step.buffers.addresses()
        for name, at in self._addresses.items():
            if now.get(name) != at:
                raise StaleGraph(
                    f"buffer {name!r} lay at {at:#x} when the graphs were captured and lies at "
                    f"{now.get(name, 0):#x} now; capture again"
                )
        raise StaleGraph(
            "the arena was laid out again since the graphs were captured; capture again"
        )

    def close(self) -> None:
        """Drop all graphs. Idempotent."""
        if self.state is not State.CLOSED:
            self.backend.synchronize()
            for graph in self.graphs.values():
                graph.close()
            self.graphs.clear()
            self.state = State.CLOSED
