"""DeepEP as transports, against a model of upstream: sums, row order, parity, the captured step."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from barriers import rdep_ref
from barriers.config import GroupConfig
from barriers.deepep import (
    DeepEpLowLatency,
    DeepEpMissing,
    DeepEpNormal,
    ParityError,
    check_sizes,
    load_buffer_class,
    outside_bytes,
)
from barriers.errors import RanksMissing
from barriers.group import RankGroup
from barriers.transport import Local, TransportConfig, received_shape
from bench import transport_microbench
from bench.transport_cases import (
    Tokens,
    make_gains,
    make_tokens,
    oracle,
    reference,
    run_experts,
)
from bench.transport_layer import Plan, TimedLayer
from bench.transport_modes import Calls, Subject, low_latency_calls, normal_calls
from bench.transport_timing import Spread
from capture_cache.arena import HostArena
from capture_cache.errors import CaptureError, CudaError
from graphs.buffers import transport_config
from graphs.capture import GraphSet, TwinBackend
from graphs.checkpoint import random_weights
from graphs.devices import bind_views
from graphs.keys import GraphKey
from graphs.ops import Ops
from graphs.prove import Prover
from graphs.rope import rope_table
from graphs.weights import add_part_views
from runtime.assemble import make_step
from runtime.config import RuntimeConfig
from runtime.ranks import Ranks
from runtime.selection import Selection, choose
from tests.cpu.fake_deepep import FakeBuffer, FrozenBackend

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = TransportConfig(rank=0, world=1, capacity=6, hidden=2048, num_experts=8, top_k=3)
MAX_ERROR = 3e-3
Transport = DeepEpLowLatency | DeepEpNormal


def allocate(config: TransportConfig, kind: type[Transport]) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype))
        for _, name, shape, dtype in kind.buffers(config)
    }


def make(config: TransportConfig, kind: type[Transport], group: object = None) -> Transport:
    """A warm transport over the model of upstream, as `open` makes it."""
    buffers = allocate(config, kind)
    if kind is DeepEpLowLatency:
        return DeepEpLowLatency.open(config, buffers, group)
    return DeepEpNormal.open(config, buffers, group, None)


@pytest.fixture(autouse=True)
def upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("deep_ep")
    package.Buffer = FakeBuffer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_ep", package)


@pytest.fixture
def low_latency() -> DeepEpLowLatency:
    transport = make(SMALL, DeepEpLowLatency)
    assert isinstance(transport, DeepEpLowLatency)
    return transport


def fake(transport: Transport) -> FakeBuffer:
    assert isinstance(transport.upstream, FakeBuffer)
    return transport.upstream


def layer(transport: Transport, t: Tokens, gains: torch.Tensor) -> torch.Tensor:
    """One layer with its experts; what nobody may read is NaN."""
    received = transport.dispatch(t.x, None, t.ids, t.weights)
    rows, choices = received.ids.shape
    config = transport.config
    assert (rows, choices) == received_shape(transport.name, config, t.x.shape[0])
    y = torch.empty(rows * choices, config.hidden, dtype=torch.bfloat16)
    run_experts(config, received, gains, y)
    out = torch.full_like(t.x, float("nan"))
    transport.combine(out, y, received, t.ids, t.shared)
    return out


# -- several ranks: every scenario in one start ---------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_agree_with_float64_whatever_the_order_of_rows(world: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank_main, args=(world, str(tmp_path / "store")), nprocs=world)


def _rank_main(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    package = ModuleType("deep_ep")
    package.Buffer = FakeBuffer  # type: ignore[attr-defined]
    sys.modules["deep_ep"] = package
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    group = dist.group.WORLD
    for kind in (DeepEpLowLatency, DeepEpNormal):
        for fp8 in (True, False):
            config = replace(SMALL, rank=rank, world=world, fp8=fp8)
            transport = make(config, kind, group)
            _check_sums(transport, f"{transport.name} fp8={fp8}")
            assert fake(transport).stale == 0
            transport.close()
            assert fake(transport).destroyed
    dist.barrier()
    dist.destroy_process_group()


def _check_sums(transport: Transport, what: str) -> None:
    config = transport.config
    gains = make_gains(config, CPU)
    for counts in ([6, 3, 5, 1], [1, 1, 6, 2]):
        every = [make_tokens(config, r, counts[r], CPU) for r in range(config.world)]
        for tokens in every:
            tokens.ids[-1, 1:] = -1
        own = every[config.rank]
        first = layer(transport, own, gains)
        error = rdep_ref.relative_error(first, reference(config, own, gains))
        assert error < MAX_ERROR, f"{what}: {error:.1e}"
        for _ in range(3):  # the rows lie in another order each time
            assert torch.equal(layer(transport, own, gains), first), what
        if transport.name == "deepep-normal":
            assert torch.equal(first, oracle(config, every, gains)[config.rank]), what
    busy = make_tokens(config, config.rank, 4, CPU)
    first = layer(transport, busy, gains)
    idle = make_tokens(config, config.rank, 1, CPU)
    idle.ids.fill_(-1)
    for alone in range(config.world):
        mine = alone == config.rank
        out = layer(transport, busy if mine else idle, gains)
        assert torch.equal(out, first if mine else idle.shared), f"{what}: idle neighbours"


# -- parity ---------------------------------------------------------------------------------------


def test_an_odd_number_of_layers_leaves_the_parity_alone(low_latency: DeepEpLowLatency) -> None:
    """Replays of 1 and 3 layers, with eager layers between: no call finds old flags."""
    upstream = fake(low_latency)
    gains, tokens = make_gains(SMALL, CPU), make_tokens(SMALL, 0, 4, CPU)
    backend = FrozenBackend(upstream)
    want = layer(low_latency, tokens, gains)
    outs: list[torch.Tensor] = []
    graphs = [
        backend.capture_live(
            GraphKey(count, 1),
            lambda count=count: outs.extend(  # type: ignore[misc]
                layer(low_latency, tokens, gains) for _ in range(count)
            ),
        )
        for count in (1, 3)
    ]
    for graph in (graphs[0], graphs[1], graphs[1], graphs[0]):
        graph.launch()
        outs.append(layer(low_latency, tokens, gains))
    assert upstream.stale == 0
    assert all(torch.equal(out, want) for out in outs)


def test_the_model_finds_an_odd_call(low_latency: DeepEpLowLatency) -> None:
    """The model is worth something: one call too many, and the next replay reads old flags."""
    upstream = fake(low_latency)
    gains, tokens = make_gains(SMALL, CPU), make_tokens(SMALL, 0, 4, CPU)
    graph = FrozenBackend(upstream).capture_live(
        GraphKey(1, 1), lambda: layer(low_latency, tokens, gains)
    )
    graph.launch()
    ids = torch.zeros(1, SMALL.top_k, dtype=torch.int64)
    upstream.low_latency_dispatch(tokens.x[:1], ids, 8, SMALL.num_experts)
    graph.launch()
    assert upstream.stale == 1


def test_calls_come_in_pairs(low_latency: DeepEpLowLatency) -> None:
    tokens = make_tokens(SMALL, 0, 2, CPU)
    arguments = (tokens.x, None, tokens.ids, tokens.weights)
    received = low_latency.dispatch(*arguments)
    before = list(fake(low_latency).calls)
    with pytest.raises(ParityError, match="dispatch after a dispatch without its combine"):
        low_latency.dispatch(*arguments)
    with pytest.raises(ParityError, match="a replay after a dispatch without its combine"):
        low_latency.require_settled("a replay")
    y = torch.zeros(received.ids.numel(), SMALL.hidden, dtype=torch.bfloat16)
    low_latency.combine(torch.empty_like(tokens.x), y, received, tokens.ids, None)
    low_latency.require_settled("a capture")
    with pytest.raises(ParityError, match="combine without a dispatch"):
        low_latency.combine(torch.empty_like(tokens.x), y, received, tokens.ids, None)
    assert fake(low_latency).calls == [*before, "low_latency_combine"], "upstream was called"


@pytest.mark.parametrize("failing", ["low_latency_dispatch", "low_latency_combine"])
def test_a_call_that_failed_is_not_forgotten(low_latency: DeepEpLowLatency, failing: str) -> None:
    """It may have flipped: nobody knows, so nothing may follow."""
    tokens, gains = make_tokens(SMALL, 0, 2, CPU), make_gains(SMALL, CPU)
    fake(low_latency).fail = {failing}
    with pytest.raises(RuntimeError, match="out of memory"):
        layer(low_latency, tokens, gains)
    fake(low_latency).fail = set()
    call = failing.removeprefix("low_latency_")
    with pytest.raises(ParityError, match=f"a {call} that failed.*start all ranks again"):
        layer(low_latency, tokens, gains)


# -- the captured step ----------------------------------------------------------------------------


def select(transport: str, *, fp8: bool, world: int = 1, on_device: bool = False) -> Selection:
    """A DeepSeek of 4 layers, the last with experts: an odd number of exchanges a step."""
    sizes = {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_attention_heads": 2,
        "q_lora_rank": 96,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 16,
        "vocab_size": 512,
        "hidden_size": 2048,
        "quantization": "fp8" if fp8 else "none",
    }
    options = RuntimeConfig(
        model="deepseek-v3",
        bs=4 * world,
        ladder="1,4,4+8",
        max_seq_len=64,
        page_size=16,
        layers=4,
        overrides=tuple(f"{k}={v}" for k, v in sizes.items()),
        device="auto" if on_device else "cpu",
        ep_size=world if on_device else None,
        transport="deepep" if on_device else "auto",
    )
    selection = choose(options, compile_only=on_device)
    return replace(selection, step=dataclasses.replace(selection.step, transport=transport))


def graphs_of(
    selection: Selection, transport: Transport, views: dict[str, torch.Tensor], backend: TwinBackend
) -> GraphSet:
    views["rope_table"].copy_(rope_table(selection.model, selection.step.max_seq_len))
    add_part_views(views)
    random_weights(selection.model, views, seed=0)
    for name in ("stop_ids", "mailbox"):
        views[name].fill_(-1)
    return GraphSet(make_step(selection, Ops(None), views, transport), selection.ladder, backend)


@pytest.fixture
def arena() -> Iterator[list[HostArena]]:
    opened: list[HostArena] = []
    yield opened
    for each in opened:
        each.close()


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("kind", [DeepEpLowLatency, DeepEpNormal])
def test_the_whole_step_is_captured_live_and_proved(
    kind: type[Transport], fp8: bool, arena: list[HostArena]
) -> None:
    selection = select(kind.name, fp8=fp8)
    arena.append(HostArena(selection.layout))
    views = bind_views(arena[0], selection.layout, "cpu")
    config = transport_config(selection.model, selection.step, selection.ladder.max_tokens)
    transport = (
        DeepEpLowLatency.open(config, views, None)
        if kind is DeepEpLowLatency
        else DeepEpNormal.open(config, views, None, None)
    )
    backend = FrozenBackend(fake(transport))
    graphs = graphs_of(selection, transport, views, backend)
    graphs.warm_up()
    graphs.capture()
    assert backend.live == sorted(selection.ladder.keys, reverse=True)
    assert graphs.live.startswith(transport.name)
    prover = Prover(graphs, replays=3)
    for key in selection.ladder.keys:
        prover.prove(key)
    with graphs.stamped(GraphKey(4, 4)):
        assert backend.live[-1] == GraphKey(4, 4)
    assert fake(transport).stale == 0


def test_no_capture_begins_or_ends_between_calls(arena: list[HostArena]) -> None:
    selection = select("deepep", fp8=True)
    arena.append(HostArena(selection.layout))
    views = bind_views(arena[0], selection.layout, "cpu")
    config = transport_config(selection.model, selection.step, selection.ladder.max_tokens)
    transport = DeepEpLowLatency.open(config, views, None)
    graphs = graphs_of(selection, transport, views, FrozenBackend(fake(transport)))
    graphs.warm_up()
    tokens = make_tokens(config, 0, 1, CPU)
    topk = tokens.ids.long()
    transport.send(tokens.x, topk, tokens.weights)
    with pytest.raises(ParityError, match=r"capturing key 4\+8 after a dispatch without"):
        graphs.capture()
    transport.collect(tokens.x, torch.zeros(16 * 12, 2048, dtype=torch.bfloat16))
    graphs.capture()
    transport.send(tokens.x, topk, tokens.weights)
    with pytest.raises(ParityError, match="a replay after a dispatch without"):
        graphs.replay(GraphKey(1, 1))


def test_storable_transports_are_captured_strictly(arena: list[HostArena]) -> None:
    """Without a transport that allocates, allocations in a capture stay forbidden."""
    selection = select("local", fp8=True)
    arena.append(HostArena(selection.layout))
    views = bind_views(arena[0], selection.layout, "cpu")
    config = transport_config(selection.model, selection.step, selection.ladder.max_tokens)

    class Strict(TwinBackend):
        def capture_live(self, *_: object) -> None:  # type: ignore[override]
            raise CaptureError("a pool for a step that needs none")

    graphs = graphs_of(selection, Local(config, None), views, Strict())  # type: ignore[arg-type]
    graphs.warm_up()
    graphs.capture()
    assert graphs.live == ""


LISTING = """
import json, sys
from runtime.assemble import list_kernels
from tests.cpu.test_deepep import select
requests = list_kernels(select(sys.argv[1], fp8=True, world=4, on_device=True), "sm_90", ["triton"])
print(json.dumps({r.spec.name: dict(r.spec.constexprs).get("TOP_K") for r in requests.requests}))
"""


@pytest.mark.parametrize(
    ("name", "top_k", "pairs"), [("deepep", 1, 4 * 4 * 12), ("deepep-normal", 8, 4 * 12 * 8)]
)
def test_every_kernel_of_a_capture_is_listed(name: str, top_k: int, pairs: int) -> None:
    """On a machine without upstream: experts see one choice a row, or K."""
    shapes = dict(_shapes(select(name, fp8=True, world=4, on_device=True)))
    assert shapes["expert_y"] == (pairs, 2048)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LISTING, name],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout.splitlines()[-1])
    assert listed["_gate_up_kernel"] == top_k
    assert ("_combine" in listed) == (name == "deepep-normal")


def _shapes(selection: Selection) -> Iterator[tuple[str, tuple[int, ...]]]:
    for place in selection.layout.places:
        yield place.entry.name, place.entry.shape


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("deepep", {"hidden": 1024}, "hidden .* got 1024 and 3; use --transport rdep"),
        ("deepep", {"top_k": 12, "num_experts": 16}, "top_k up to 11, got 2048 and 12"),
        ("deepep", {"capacity": 544}, "up to 511 tokens a rank.*544; give a --ladder"),
        ("deepep", {"act_dtype": "float32"}, "carries bfloat16, got float32"),
        ("deepep-normal", {"hidden": 2080}, "128 divides, got hidden 2080"),
        ("deepep-normal", {"act_dtype": "float16"}, "carries bfloat16, got float16"),
    ],
)
def test_sizes_without_kernels_are_refused(name: str, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sizes(name, replace(SMALL, **change))


def test_tokens_that_are_quantised_already_are_refused(low_latency: DeepEpLowLatency) -> None:
    tokens = make_tokens(SMALL, 0, 2, CPU)
    x, scale = rdep_ref.quantize_ref(tokens.x)
    with pytest.raises(ValueError, match="quantises by itself"):
        low_latency.dispatch(x, scale, tokens.ids, tokens.weights)


def test_the_pool_and_upstream_fit_in_what_is_set_aside() -> None:
    """At the launch point: upstream's own hint and two received copies."""
    config = replace(SMALL, world=4, capacity=64, hidden=7168, num_experts=256, top_k=8)
    hint = FakeBuffer.get_low_latency_rdma_size_hint(64, 7168, 4, 256)
    assert hint < outside_bytes("deepep", config) < 4 << 30
    assert outside_bytes("deepep-normal", config) > 1 << 30


@pytest.mark.parametrize(
    ("present", "got"), [(None, "No module named"), (ModuleType("deep_ep"), "without")]
)
def test_absence_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, present: ModuleType | None, got: str
) -> None:
    if present is None:
        monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
        monkeypatch.setattr(sys, "path", [])
    else:
        monkeypatch.setitem(sys.modules, "deep_ep", present)
    with pytest.raises(DeepEpMissing, match=f"{got}.*github.com/deepseek-ai/DeepEP"):
        load_buffer_class()


# -- a rank's side --------------------------------------------------------------------------------


class LeavingGroup:
    """A group whose other ranks may be gone."""

    def __init__(self, *, gone: bool) -> None:
        self.gone = gone

    def barrier(self, what: str, timeout_s: float | None = None) -> None:
        assert what == "closing deepep"
        assert timeout_s == 0.5
        if self.gone:
            raise RanksMissing("rank 1 left during closing deepep", (1,))


@pytest.mark.parametrize("gone", [False, True])
def test_upstream_is_closed_with_the_others_or_not_at_all(
    low_latency: DeepEpLowLatency, gone: bool
) -> None:
    """Its end is a barrier without a deadline."""
    ranks = Ranks(GroupConfig(0, 1, "test-deepep-close"), {}, deadline_s=0.5)
    ranks.group = LeavingGroup(gone=gone)  # type: ignore[assignment]
    ranks._close_together(low_latency)
    assert fake(low_latency).destroyed is not gone


def test_a_second_runtime_has_a_process_group_of_its_own() -> None:
    for _ in range(2):
        ranks = Ranks(GroupConfig(0, 1, "test-deepep-group"), {}, deadline_s=5.0)
        ranks._connect("gloo")
        group = dist.group.WORLD
        assert dist.get_world_size(group) == 1
        ranks._connect("gloo")
        assert dist.group.WORLD is group
        ranks.close()
        assert not dist.is_initialized()


# -- as it is timed -------------------------------------------------------------------------------


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
