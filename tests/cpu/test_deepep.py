"""DeepEP as transports, against a model of upstream: sums, row order, parity, the captured step."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

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
from bench.transport_cases import make_gains, make_tokens, oracle, reference
from graphs.keys import GraphKey
from runtime.ranks import Ranks
from tests.cpu.fake_deepep import FakeBuffer, FrozenBackend
from tests.cpu.gloo_ranks import run_gloo_ranks
from tests.cpu.upstream import CPU, MAX_ERROR, SMALL, Transport, fake, install, layer, make


@pytest.fixture(autouse=True)
def upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


@pytest.fixture
def low_latency() -> DeepEpLowLatency:
    transport = make(SMALL, DeepEpLowLatency)
    assert isinstance(transport, DeepEpLowLatency)
    return transport


# -- several ranks: every scenario in one start ---------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_agree_with_float64_whatever_the_order_of_rows(world: int, tmp_path: Path) -> None:
    run_gloo_ranks(world, _rank_main, world, str(tmp_path / "store"))


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
