"""Transports and their oracle: `local` in this process, `allgather` in three gloo processes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from barriers import rdep_ref
from barriers.allgather import AllGather
from barriers.transport import (
    Local,
    Received,
    TransportConfig,
    resolve,
    wire_buffers,
)
from bench import (
    routing,
    transport_cases,
    transport_layer,
    transport_microbench,
    transport_modes,
    transport_report,
)
from tests.cpu.gloo_ranks import run_gloo_ranks

SMALL = TransportConfig(
    rank=0, world=1, capacity=6, hidden=144, num_experts=12, top_k=4, act_dtype="bfloat16"
)
MAX_ERROR = 3e-3  # three bf16 roundings: of an expert's output, of a partial sum, of the sum


class Case:
    """Seeded inputs of all ranks; `tokens` gives each rank's T, ids -1 a padded token."""

    def __init__(self, config: TransportConfig, tokens: list[int], *, seed: int = 1) -> None:
        act = getattr(torch, config.act_dtype)
        self.config = config
        self.xs, self.ids, self.weights, self.shared = [], [], [], []
        for rank, count in enumerate(tokens):
            generator = torch.Generator().manual_seed(100 * seed + rank)
            self.xs.append(torch.randn(count, config.hidden, generator=generator).to(act))
            self.shared.append(torch.randn(count, config.hidden, generator=generator).to(act))
            ids = routing.expert_ids(
                "random",
                tokens=count,
                num_experts=config.num_experts,
                top_k=config.top_k,
                seed=10 * seed + rank,
            )
            self.ids.append(ids)
            self.weights.append(routing.expert_weights(count, config.top_k, seed=rank))

    def oracle(self) -> list[torch.Tensor]:
        """act [T, H] of each rank, with every rounding."""
        sent = rdep_ref.dispatch_ref(self.config, self.xs, self.ids, self.weights)
        partials = []
        for config, received in zip(rdep_ref.ranks_of(self.config), sent, strict=True):
            y = rdep_ref.experts_ref(config, received, expert)
            partials.append(rdep_ref.partial_ref(config, received, y))
        return rdep_ref.combine_ref(self.config, partials, self.ids, self.shared)

    def fp64(self, rank: int) -> torch.Tensor:
        return rdep_ref.moe_fp64(
            self.config,
            self.xs[rank],
            self.ids[rank],
            self.weights[rank],
            expert,
            self.shared[rank],
        )


def expert(e: int, tokens: torch.Tensor) -> torch.Tensor:
    """A different linear map for each expert, mixing columns."""
    gain = torch.linspace(-2.0, 2.0, tokens.shape[1], dtype=torch.float64) + 0.1 * e
    return tokens * gain + tokens.roll(e + 1, dims=1)


def zeros(config: TransportConfig, cls: type[AllGather]) -> dict[str, torch.Tensor]:
    # 0x7f in every byte: a large number or NaN wherever a transport forgets to write.
    tensors = {}
    for _, name, shape, dtype in cls.buffers(config):
        tensor = torch.zeros(shape, dtype=getattr(torch, dtype))
        if tensor.dtype is not torch.bool:
            tensor.view(torch.uint8).fill_(0x7F)
        tensors[name] = tensor
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world": 9}, "1 to 8 ranks"),
        ({"rank": 3, "world": 2}, "rank 3 of 2"),
        ({"num_experts": 10, "world": 4}, "10 experts do not divide among 4 ranks"),
        ({"top_k": 17, "num_experts": 32, "world": 2}, "top_k must be 1 to 16, got 17"),
        ({"hidden": 100, "world": 2}, "multiple of 16, got 100"),
        ({"capacity": 0}, "at least 1 token"),
        ({"act_dtype": "float64"}, "got 'float64'"),
    ],
)
def test_config_refuses(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_resolve_auto() -> None:
    assert resolve("auto", world=1, on_device=True) == "local"
    assert resolve("auto", world=4, on_device=True) == "rdep"
    assert resolve("auto", world=4, on_device=False) == "allgather"
    assert resolve("deepep", world=2, on_device=True) == "deepep"


@pytest.mark.parametrize(
    ("name", "world", "on_device", "message"),
    [
        ("nvshmem", 2, True, "one of auto, local"),
        ("local", 2, True, "serves one rank, got 2"),
        ("rdep", 2, False, "needs GPUs"),
        ("deepep", 1, True, "2, 4 or 8 ranks of a node, got 1"),
        ("deepep-normal", 3, True, "2, 4 or 8 ranks of a node, got 3"),
    ],
)
def test_resolve_refuses(name: str, world: int, on_device: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(name, world=world, on_device=on_device)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("fp8", [True, False])
def test_oracle_agrees_with_float64(world: int, fp8: bool) -> None:
    config = replace(SMALL, world=world, num_experts=24, fp8=fp8)
    case = Case(config, [(3 * r + 5) % 7 for r in range(world)])
    for rank, out in enumerate(case.oracle()):
        if out.shape[0]:
            assert rdep_ref.relative_error(out, case.fp64(rank)) < MAX_ERROR, (rank, world)


def test_oracle_sends_only_to_owners() -> None:
    config = replace(SMALL, world=3)
    case = Case(config, [2, 0, 1])
    case.ids[0][0] = torch.tensor([0, 1, 2, 3])  # all of rank 0
    case.ids[0][1] = -1
    sent = rdep_ref.dispatch_ref(config, case.xs, case.ids, case.weights)
    assert sent[0].ids[0].tolist() == [0, 1, 2, 3]
    for received in sent[1:]:
        assert (received.ids[:2] == -1).all()
        assert not received.x[:2].float().any()
    assert (sent[0].ids[1] == -1).all()


def test_nan_is_an_infinite_error() -> None:
    assert rdep_ref.relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


@pytest.mark.parametrize("fp8", [True, False])
def test_local_copies_nothing_and_agrees_with_float64(fp8: bool) -> None:
    config = replace(SMALL, fp8=fp8)
    case = Case(config, [5])
    x, scale = rdep_ref.quantize_ref(case.xs[0]) if fp8 else (case.xs[0], None)
    transport = Local(config, None)
    received = transport.dispatch(x, scale, case.ids[0], case.weights[0])
    assert received.x is x
    y = rdep_ref.experts_ref(config, received, expert)
    out = torch.empty_like(case.xs[0])
    transport.combine(out, y, received, case.ids[0], case.shared[0])
    assert rdep_ref.relative_error(out, case.fp64(0)) < MAX_ERROR


def test_local_refuses_more_ranks_and_unquantised_tokens() -> None:
    with pytest.raises(ValueError, match="one rank, got 2"):
        Local(replace(SMALL, world=2), None)
    case, transport = Case(SMALL, [2]), Local(SMALL, None)
    with pytest.raises(ValueError, match="takes e4m3 tokens with scales"):
        transport.dispatch(case.xs[0], None, case.ids[0], case.weights[0])


def test_dispatch_names_the_wrong_argument() -> None:
    case, transport = Case(SMALL, [7]), Local(SMALL, None)
    x, scale = rdep_ref.quantize_ref(case.xs[0])
    with pytest.raises(ValueError, match="7 tokens do not fit the capacity 6"):
        transport.dispatch(x, scale, case.ids[0], case.weights[0])
    with pytest.raises(ValueError, match="ids must be torch.int32"):
        transport.dispatch(x[:2], scale[:2], case.ids[0][:2].long(), case.weights[0][:2])
    received = Received(x, scale, case.ids[0], case.weights[0])
    with pytest.raises(ValueError, match=r"out must be torch.bfloat16 \(3, 144\)"):
        transport.combine(torch.empty(3, 144), x, received, case.ids[0], None)


# -- allgather: eight processes, every scenario in one start -------------------------------------

WORLDS = (2, 3, 4, 8)
FORMATS = ((True, "bfloat16"), (False, "bfloat16"), (False, "float32"), (True, "float16"))


@pytest.mark.slow
def test_allgather_ranks(tmp_path: Path) -> None:
    run_gloo_ranks(max(WORLDS), _rank_main, str(tmp_path / "store"))


def _rank_main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    ranks = max(WORLDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    groups = {world: dist.new_group(list(range(world))) for world in WORLDS}
    for world, group in groups.items():
        if rank >= world:
            continue
        for fp8, act in FORMATS if world == 3 else FORMATS[:1]:
            config = replace(SMALL, rank=rank, world=world, num_experts=24, fp8=fp8, act_dtype=act)
            _check_all(config, group)
    _check_refusals(replace(SMALL, rank=rank, world=ranks, num_experts=24), dist.group.WORLD)
    dist.barrier()
    dist.destroy_process_group()


def _check_all(config: TransportConfig, group: object) -> None:
    transport = AllGather(config, zeros(config, AllGather), group, None)
    full = [6, 4, 5, 1, 0, 6, 3, 2][: config.world]
    for step, tokens in enumerate(
        [full, [0] * config.world, [1] + [0] * (config.world - 1), [0, *full[1:]], full]
    ):
        _check_step(transport, Case(config, tokens, seed=1 + step % 4), f"{config} {tokens}")
    one_rank = Case(config, full)
    for ids in one_rank.ids:  # everything on the last rank, half of it on one expert
        ids[:] = config.num_experts - 1 - torch.arange(config.top_k)
        ids[::2, 1:] = -1
    _check_step(transport, one_rank, "all on one rank")
    padded = Case(config, full)
    for ids in padded.ids:
        ids[1:] = -1
    out = _check_step(transport, padded, "padding")
    if config.fp8:
        again = _run(transport, padded, prequantized=True)[1]
        assert torch.equal(again, out), "who quantises changed a token"
    assert torch.equal(out[1:], padded.shared[config.rank][1:]), "a padded row was summed"
    _check_neighbours(transport)


def _run(
    transport: AllGather, case: Case, *, prequantized: bool = False
) -> tuple[Received, torch.Tensor]:
    rank = transport.config.rank
    x, ids, weights = case.xs[rank], case.ids[rank], case.weights[rank]
    sent = rdep_ref.quantize_ref(x) if prequantized else (x, None)
    received = transport.dispatch(*sent, ids, weights)
    y = rdep_ref.experts_ref(transport.config, received, expert)
    y.view(-1, transport.config.hidden)[(received.ids.flatten() < 0)] = float("nan")
    out = torch.full_like(x, float("nan"))
    transport.combine(out, y, received, ids, case.shared[rank])
    return received, out


def _check_step(transport: AllGather, case: Case, what: str) -> torch.Tensor:
    rank = transport.config.rank
    received, out = _run(transport, case)
    want = rdep_ref.dispatch_ref(case.config, case.xs, case.ids, case.weights)[rank]
    assert torch.equal(received.ids, want.ids), what
    listed = want.ids >= 0
    assert torch.equal(received.weights[listed], want.weights[listed]), what
    rows = listed.any(1)
    got_rows, want_rows = (t.view(torch.uint8)[rows] for t in (received.x, want.x))
    assert torch.equal(got_rows, want_rows), what
    assert torch.equal(out, case.oracle()[rank]), what
    return out


def _check_neighbours(transport: AllGather) -> None:
    """Rank 0's bits with everybody busy, with everybody else idle, and at other rows."""
    config = transport.config
    busy = Case(config, [3] * config.world)
    alone = Case(config, [3] + [0] * (config.world - 1))
    moved = Case(config, [3] * config.world)
    for part in (moved.xs, moved.ids, moved.weights, moved.shared):
        part[0] = torch.cat([part[0].flip(0), part[0][:2]])
    outs = [_run(transport, case)[1] for case in (busy, alone, moved)]
    if config.rank == 0:
        assert torch.equal(outs[0], outs[1]), "idle neighbours changed a token"
        assert torch.equal(outs[0], outs[2][:3].flip(0)), "the row changed a token"


def _check_refusals(config: TransportConfig, group: object) -> None:
    with pytest.raises(ValueError, match=f"this is rank {config.rank} of {config.world}"):
        AllGather(replace(config, rank=0, world=2), {}, group, None)


def test_wire_buffers_depend_on_the_config_alone() -> None:
    first = list(wire_buffers(replace(SMALL, world=4, rank=0), "peers"))
    assert first == list(wire_buffers(replace(SMALL, world=4, rank=3), "peers"))
    shapes = {name: (shape, dtype) for _, name, shape, dtype in first}
    assert shapes["ep_recv_x"] == ((24, 144), "float8_e4m3fn")
    assert shapes["ep_recv_scale"] == ((24, 2), "float32")
    assert shapes["ep_partial"] == ((24, 144), "bfloat16")


# -- what transports are benchmarked with --------------------------------------------------------


@pytest.mark.parametrize("fp8", [True, False])
def test_benchmark_oracle_agrees_with_its_float64_reference(fp8: bool) -> None:
    config = replace(SMALL, world=2, fp8=fp8)
    cpu = torch.device("cpu")
    tokens = [transport_cases.make_tokens(config, r, 5, cpu, seed=3) for r in range(2)]
    gains = transport_cases.make_gains(config, cpu)
    for rank, out in enumerate(transport_cases.oracle(config, tokens, gains)):
        reference = transport_cases.reference(config, tokens[rank], gains)
        assert rdep_ref.relative_error(out, reference) < MAX_ERROR


def test_wire_bytes_count_a_token_once_a_rank() -> None:
    config = replace(SMALL, world=3, rank=1)
    ids = torch.tensor([[0, 1, 2, 3], [0, 4, 8, 9], [4, 5, 6, 7], [-1, -1, -1, -1]]).int()
    sent, got = transport_cases.wire_bytes(config, ids)
    copies = 1 + 2  # to rank 0; to ranks 0 and 2; own; none
    assert sent == copies * (144 + 2 * 4 + 16) + 2 * 4 * 16
    assert got == copies * 144 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "rdep,deep"], "got 'deep'"),
        (["--rows", "8,x"], "--rows must be positive numbers"),
        (["--decode-batch-size", "0"], "--decode-batch-size 0 does not divide among 1 ranks"),
        (["--num-experts", "4"], "top_k must be 1 to 4, got 8"),
        (["--plain", "--prequantized"], "choose one"),
        (["--routing", "file"], "--routing-file"),
        (["--inner", "5"], "an even number of calls"),
        (["--rounds", "9", "--replays", "8"], "one replay a round"),
    ],
)
def test_microbench_refuses(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert transport_microbench.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_microbench_merges_ranks() -> None:
    def spread(median: float) -> dict[str, float]:
        return {"median": median, "p10": median - 0.5, "p90": median + 2}

    case = {"rows": 8, "rel_error": 1e-3, "repeats": True, "oracle_bits": True, "bytes": (353, 353)}
    ranks = [
        {"cases": [{**case, "us": {"both": spread(both), "sum": spread(1.0)}}]}
        for both in (4.0, 6.0)
    ]
    merged = transport_report.merge(ranks, link_gbps=353.0, sweep=())
    assert merged["ok"]
    assert merged["cases"][0]["both_us"] == {"mean": 5.0, "max": 6.0, "p10": 3.5, "p90": 8.0}
    assert merged["cases"][0]["net_us"] == {"mean": 4.0, "max": 5.0}
    ranks[1]["cases"][0]["rel_error"] = float("inf")
    assert not transport_report.merge(ranks, link_gbps=353.0, sweep=())["ok"]


def test_microbench_tells_no_speed_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    spread = {"median": 4.0, "p10": 3.5, "p90": 4.5}
    alone = {"rows": 8, "rel_error": 1e-3, "repeats": True, "oracle_bits": True, "bytes": (0, 0)}
    nothing_left = {**alone, "bytes": (353, 353), "us": {"both": {**spread, "median": -0.1}}}
    ranks = [{"cases": [{**alone, "us": {"both": spread}}, nothing_left]}]
    merged = transport_report.merge(ranks, link_gbps=353.0, sweep=())
    assert [case["gb_per_s"] for case in merged["cases"]] == [None, None]
    transport_report.print_mode("rdep", merged, sys.stdout)
    assert [line.count("  - GB/s") for line in capsys.readouterr().out.splitlines()] == [1, 1]


def test_microbench_lines_are_json_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    transport_microbench._add_line(path, {"header": {"routing": "zipf"}})
    transport_microbench._add_line(path, {"mode": "rdep", "rows": 8})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"header": {"routing": "zipf"}}, {"mode": "rdep", "rows": 8}]


def _subject(transport: Local) -> transport_modes.Subject:
    return transport_modes.Subject(transport, lambda: None, lambda: None)


@pytest.mark.parametrize("kind", routing.KINDS)
def test_a_layer_of_every_routing_is_near_float64(tmp_path: Path, kind: str) -> None:
    """What the benchmark checks before it times, on the twin."""
    path = tmp_path / "ids.npy"
    np.save(path, np.array([[3, 1, 0, 2], [11, 5, 6, 7], [8, 9, 10, 4]]))
    how = {"inner": 2, "replays": 2, "rounds": 1, "prequantized": True}
    plan = transport_layer.Plan(**how, routing=kind, routing_file=path)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    own, gains = plan.tokens(SMALL, 0, 5, cpu), transport_cases.make_gains(SMALL, cpu)
    if kind == "file":
        assert own.ids[:, 0].tolist() == [3, 11, 8, 3, 11], "in a circle"
    layer = transport_layer.Layer(_subject(Local(SMALL, None)), own, gains, prequantized=True)
    want = transport_cases.reference(SMALL, own, gains)
    assert rdep_ref.relative_error(layer.whole(), want) < MAX_ERROR
    assert torch.equal(layer.whole(), layer.whole())


def test_ranks_take_other_rows_of_a_recording(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.stack([np.roll(np.arange(12), i)[:4] for i in range(12)]))
    config, cpu = replace(SMALL, world=3), torch.device("cpu")
    made = [
        transport_cases.make_tokens(config, rank, 4, cpu, routing="file", path=path).ids
        for rank in range(3)
    ]
    assert torch.equal(torch.cat(made), torch.from_numpy(np.load(path)).int())


@pytest.mark.parametrize("kind", routing.KINDS)
def test_microbench_takes_every_routing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.stack([np.random.default_rng(i).permutation(256)[:8] for i in range(40)]))
    more = ["--routing-file", str(path)] if kind == "file" else []
    if torch.cuda.is_available():
        pytest.skip("it would run")
    assert transport_microbench.main(["--routing", kind, *more]) == 2
    assert "timed on GPUs" in capsys.readouterr().err


# -- routing to benchmark with -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "zipf"])
def test_routing_never_repeats_and_is_seeded(kind: str) -> None:
    draw = {"tokens": 300, "num_experts": 64, "top_k": 8}
    ids = routing.expert_ids(kind, seed=3, **draw)
    assert ids.dtype == torch.int32
    assert tuple(ids.shape) == (300, 8)
    assert 0 <= int(ids.min()) <= int(ids.max()) < 64
    ordered = ids.sort(1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all()
    assert torch.equal(ids, routing.expert_ids(kind, seed=3, **draw))
    assert not torch.equal(ids, routing.expert_ids(kind, seed=4, **draw))


def test_zipf_is_skewed_and_random_is_not() -> None:
    draw = {"tokens": 2000, "num_experts": 64, "top_k": 4, "seed": 0}
    busiest = {}
    for kind in ("random", "zipf"):
        counts = routing.expert_ids(kind, **draw).flatten().bincount(minlength=64)
        busiest[kind] = int(counts.max()) / float(counts.float().mean())
    assert busiest["random"] < 1.5
    assert busiest["zipf"] > 4


def test_routing_file_is_read_in_a_circle(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.array([[0, 1], [2, 3], [4, 5]]))
    draw = {"tokens": 2, "num_experts": 8, "top_k": 2, "path": path}
    assert routing.expert_ids("file", seed=0, **draw).tolist() == [[0, 1], [2, 3]]
    assert routing.expert_ids("file", seed=1, **draw).tolist() == [[4, 5], [0, 1]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), dtype=np.int32), "expected \\[N, 2\\]"),
        (np.zeros((2, 2)), "expected integers"),
        (np.array([[0, 9]]), "ids must lie in 0..7"),
        (np.array([[0, 1], [3, 3]]), "row 1 names an expert twice"),
    ],
)
def test_routing_file_refuses(tmp_path: Path, array: np.ndarray, message: str) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, array)
    with pytest.raises(ValueError, match=message):
        routing.expert_ids("file", tokens=2, num_experts=8, top_k=2, seed=0, path=path)


def test_routing_refuses() -> None:
    with pytest.raises(ValueError, match="--routing must be one of"):
        routing.expert_ids("sorted", tokens=2, num_experts=8, top_k=2, seed=0)
    with pytest.raises(ValueError, match="--routing-file"):
        routing.expert_ids("file", tokens=2, num_experts=8, top_k=2, seed=0)
    with pytest.raises(ValueError, match="9 choices without repeats"):
        routing.expert_ids("random", tokens=2, num_experts=8, top_k=9, seed=0)
