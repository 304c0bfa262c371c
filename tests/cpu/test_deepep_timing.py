"""DeepEP as the benchmark times it: right and even, and whatever ends it ends nothing else."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from barriers.config import GroupConfig
from barriers.deepep import DeepEpLowLatency, DeepEpNormal
from barriers.group import RankGroup
from bench import transport_microbench
from bench.transport_layer import Plan, TimedLayer
from bench.transport_modes import Calls, Subject, low_latency_calls, normal_calls
from bench.transport_timing import Spread
from capture_cache.errors import CudaError
from tests.cpu.fake_deepep import FakeBuffer
from tests.cpu.upstream import CPU, MAX_ERROR, SMALL, Transport, fake, install, make


@pytest.fixture(autouse=True)
def upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def _nothing() -> None:
    """What the meetings alone enclose."""


class CountedGraph:
    """A chain of calls that takes as many microseconds a call as upstream has been called.

    As a device's graph it keeps nothing alive: whoever captured it has to keep its tensors.
    """

    def __init__(self, call: Callable[[], object], inner: int, upstream: FakeBuffer) -> None:
        bound = hasattr(call, "__self__")
        self._call: Callable[[], Callable[[], object] | None]
        self._call = weakref.WeakMethod(call) if bound else weakref.ref(call)  # type: ignore[arg-type]
        self._inner, self._upstream = inner, upstream
        self.times: list[float] = []

    def replay(self, count: int, finish: Callable[[], None]) -> None:
        for _ in range(count):
            before = len(self._upstream.calls)
            for _ in range(self._inner):
                call = self._call()
                assert call is not None, "a graph is replayed whose tensors are freed"
                call()
            self.times.append((len(self._upstream.calls) - before) / self._inner)
        finish()

    def close(self) -> None:
        """Nothing is held."""


class CpuAligner:
    """Stands where the barrier between GPUs would.

    Attributes:
        upstream: whose calls are counted.
        pools: how many captures asked for memory of their own.
        gone: the device takes no more work.
    """

    device = CPU

    def __init__(self, upstream: FakeBuffer) -> None:
        self.upstream = upstream
        self.pools = 0
        self.gone = False
        self.closed = False

    def new_pool(self) -> int:
        self.pools += 1
        return self.pools

    def finish(self) -> None:
        """Everything has run already."""

    def settle(self) -> None:
        if self.gone:
            raise CudaError("CUDA_ERROR_LAUNCH_FAILED", "recovering", "start again")

    def rearm(self) -> None:
        """Nobody missed a meeting."""

    def close(self) -> None:
        assert not self.gone
        self.closed = True

    def capture(self, call: Callable[[], object], inner: int, pool: object) -> CountedGraph:
        return CountedGraph(call, inner, self.upstream)

    def capture_nothing(self, inner: int) -> CountedGraph:
        return CountedGraph(_nothing, inner, self.upstream)


@pytest.mark.parametrize(
    ("kind", "alone", "calls"),
    [
        (DeepEpLowLatency, low_latency_calls, {"both": 2, "step": 2}),
        # A combine alone would read the handle of another graph.
        (DeepEpNormal, normal_calls, {"both": 2, "dispatch": 1, "step": 2}),
    ],
)
def test_a_timed_layer_is_right_and_even(
    kind: type[Transport], alone: Callable[..., dict[str, Calls]], calls: dict[str, int]
) -> None:
    """Upstream's calls alone beside the step's; whatever is repeated, parity and result stay."""
    transport = make(SMALL, kind)
    upstream = fake(transport)
    subject = Subject(transport, lambda: None, transport.close, upstream=partial(alone, transport))
    plan = Plan(
        inner=2, replays=3, rounds=1, prequantized=True, routing="random", routing_file=None
    )
    aligner = CpuAligner(upstream)
    timed = TimedLayer(subject, plan, 4, aligner)  # type: ignore[arg-type]
    assert aligner.pools == len(calls)
    timed.replay(3)
    case = timed.case(taken_off=0.0)
    assert case["repeats"]
    assert case["rel_error"] < MAX_ERROR
    assert {part: us["median"] for part, us in case["us"].items()} == calls
    assert upstream.stale == 0
    assert upstream.index == 0


class Bench:
    """A benchmark of one rank, `rdep` and a library both played by the model of upstream.

    Attributes:
        library: the mode that may fail.
        made: names of the modes that were made ready, in order.
        closed: names of those that gave everything back.
    """

    def __init__(self, name: str) -> None:
        self.made: list[str] = []
        self.closed: list[str] = []
        self.library = "deepep-normal"
        self.dispatches = 0  # of the library, since it was made
        self.fails_at = 0  # which dispatch of the library fails, counted from its making
        self.loses_context = False
        self.aligner = CpuAligner(fake(make(SMALL, DeepEpNormal)))
        args = transport_microbench._parser().parse_args(["--json"])
        args.replays, args.rounds = 2, 1
        plan = Plan(2, 2, 1, prequantized=True, routing="random", routing_file=None)
        group = RankGroup(GroupConfig(0, 1, name))
        self.bench = transport_microbench.Bench(
            args,
            plan,
            SMALL,
            group,
            self.aligner,  # type: ignore[arg-type]
            self._make,
        )

    def _make(self, name: str) -> Subject:
        self.made.append(name)
        transport = make(SMALL, DeepEpNormal)
        assert isinstance(transport, DeepEpNormal)
        upstream = fake(transport)
        self.aligner.upstream, calls = upstream, len(upstream.calls)

        def finish() -> None:
            if name != self.library:
                return
            self.dispatches = upstream.calls[calls:].count("dispatch")
            if self.fails_at and self.dispatches >= self.fails_at:
                self.aligner.gone = self.loses_context
                raise CudaError("CUDA_ERROR_LAUNCH_FAILED", "waiting", "start again")

        def close() -> None:
            self.closed.append(name)

        return Subject(transport, finish, close, upstream=partial(normal_calls, transport))

    def run(self, rows: list[int]) -> dict[str, Any]:
        return self.bench.run(["rdep", self.library], rows)


def test_a_mode_that_ends_the_context_leaves_the_others_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The fragile mode is made ready when the others are measured, told and given back."""
    bench = Bench("test-lost")
    bench.fails_at, bench.loses_context = 9, True
    modes = bench.run([2, 4])
    assert bench.bench.lost
    assert bench.made == ["rdep", "deepep-normal"]
    assert bench.closed == ["rdep"]
    assert modes["rdep"]["ok"]
    assert [c["rows"] for c in modes["rdep"]["cases"]] == [2, 4]
    failed = modes["deepep-normal"]
    assert not failed["ok"]
    assert "LAUNCH_FAILED" in failed["error"]["rank 0"]
    assert "rank 0" in failed["context_lost"]
    assert not bench.aligner.closed
    told = capsys.readouterr().err
    assert told.index("rdep ") < told.index("deepep-normal: FAILED")


def test_sizes_measured_before_a_failure_are_told() -> None:
    bench = Bench("test-later")
    bench.run([2])
    needed = bench.dispatches
    bench = Bench("test-later-again")
    bench.fails_at = needed + 2
    failed = bench.run([2, 4])["deepep-normal"]
    assert not bench.bench.lost
    assert not failed["ok"]
    assert [c["rows"] for c in failed["cases"]] == [2]
    assert failed["doing"] == "4 rows"
    assert bench.aligner.closed


def test_our_modes_are_measured_at_all_sizes_before_a_library_can_end_it(tmp_path: Path) -> None:
    bench = Bench("test-first")
    bench.library, bench.fails_at, bench.loses_context = "deepep", 1, True
    bench.bench.args.lines = tmp_path / "lines"
    modes = bench.run([2, 4])
    assert bench.bench.lost
    assert modes["rdep"]["ok"]
    assert [c["rows"] for c in modes["rdep"]["cases"]] == [2, 4]
    assert not modes["deepep"]["ok"]
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [(line["mode"], line["rows"]) for line in lines] == [("rdep", 2), ("rdep", 4)]
    assert lines == [{"mode": "rdep"} | case for case in modes["rdep"]["cases"]]


def test_our_modes_are_measured_again_beside_a_library(tmp_path: Path) -> None:
    bench = Bench("test-beside")
    bench.library = "deepep"
    bench.bench.args.lines = tmp_path / "lines"
    modes = bench.run([2, 4])
    assert modes["rdep"]["ok"]
    assert modes["deepep"]["ok"]
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    seen = [(line["mode"], line["rows"]) for line in lines]
    both = [("rdep", 2), ("deepep", 2), ("rdep", 4), ("deepep", 4)]
    assert seen == [("rdep", 2), ("rdep", 4), *both]


def test_combine_of_a_library_that_cannot_repeat_it_is_derived() -> None:
    case = Bench("test-derived").run([2])["deepep-normal"]["cases"][0]
    assert case["combine_us"] == {"mean": 1.0, "max": 1.0, "derived": True}


def test_a_spread_is_of_one_call() -> None:
    spread = Spread.of([3.0, 4.0, 5.0, 6.0, 30.0], taken_off=1.0)
    assert spread.median == 4.0
    assert spread.p10 < 3.0 < 5.0 < spread.p90
    assert Spread.of([3.0], taken_off=1.0) == Spread(2.0, 2.0, 2.0)
