"""Each kernel family on the device at DeepSeek-V3's shapes: against its oracle, then in a graph.

Inputs are made on the CPU, where the oracle runs. The same launch is then captured, its inputs are
overwritten in place, and the replay must give the bits of an eager launch on the new inputs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.triton import expert_lists, linear, router, routing, settle, state
from kernels.triton.grouped_down import grouped_down
from kernels.triton.grouped_gate_up import grouped_gate_up
from kernels.triton.grouped_plan import GroupedPlan
from kernels.triton.launch import Launcher
from kernels.triton.linear_plan import FEW_TOKENS, MEASURED_FEW, LinearPlan
from kernels.triton.tiles import sum_parts
from tests.gpu.kernel_cases import BY_TOKEN, CASES, Case
from tests.gpu.kernel_inputs import (
    BF16,
    DEVICE,
    F32,
    FP8,
    HEADS,
    HIDDEN,
    I32,
    INTER,
    TOKENS,
    VALUE,
    Arguments,
    fp8_linear,
    randn,
    weight,
)
from tests.row_state import LENGTH, Device, random_steps
from tests.tiles import as_tiles

# ------------------------------------------------------------------ running a case


def on_device(arguments: Arguments) -> Arguments:
    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(move(v) for v in value)
        return value.to(DEVICE) if isinstance(value, torch.Tensor) else value

    return {k: move(v) for k, v in arguments.items()}


def copied(case: Case, arguments: Arguments) -> Arguments:
    """With outputs of their own."""
    return arguments | {name: arguments[name].clone() for name in case.outputs}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


def assert_close(name: str, got: torch.Tensor, want: torch.Tensor, step: float) -> None:
    got = got.cpu()
    if step == 0:
        assert torch.equal(bits(got), bits(want)), name
        return
    a, b = got.float(), want.float()
    assert torch.equal(a.isnan(), b.isnan()), name
    a, b = a.nan_to_num(), b.nan_to_num()
    if got.dtype == FP8:
        assert (a != b).float().mean() <= 0.02, name
    limit = step * (b.abs() + b.square().mean().sqrt()) + 1e-30
    worst = ((a - b).abs() / limit).max()
    assert worst <= 1, f"{name}: {float(worst):.2f} times the limit"


def run(case: Case, launch: Launcher, arguments: Arguments) -> Arguments:
    arguments = on_device(arguments)
    case.kernel(launch, **arguments)
    return arguments


class Captured:
    """A launch in a graph over arguments that stay where they are."""

    def __init__(self, case: Case, launch: Launcher, arguments: Arguments) -> None:
        self.arguments = on_device(arguments)
        self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            case.kernel(launch, **self.arguments)  # whatever is lazy happens here
        self.stream.synchronize()
        with torch.cuda.graph(self.graph, stream=self.stream):
            case.kernel(launch, **self.arguments)

    def replay(self, arguments: Arguments) -> Arguments:
        """Overwrite all arguments in place, outputs included, and replay."""
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                self.arguments[name].copy_(value)
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            self.graph.replay()
        self.stream.synchronize()
        return self.arguments


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", CASES)
def test_kernel_matches_its_oracle_and_replays(name: str, tokens: int, launcher: Launcher) -> None:
    case = CASES[name]
    first, second = case.make(0, tokens), case.make(100, tokens)
    want = copied(case, first)
    case.ref(**want)
    got = run(case, launcher, first)
    for output, step in case.outputs.items():
        assert_close(output, got[output], want[output], step)

    want = run(case, launcher, copied(case, second))
    replayed = Captured(case, launcher, first).replay(second)
    for output in case.outputs:
        assert torch.equal(bits(replayed[output]), bits(want[output])), f"{output} after a replay"


@pytest.mark.parametrize("name", BY_TOKEN)
def test_a_tokens_bits_do_not_depend_on_how_many_there_are(name: str, launcher: Launcher) -> None:
    case, whole = CASES[name], CASES[name].make(0, 130)
    by_token = [k for k, v in whole.items() if isinstance(v, torch.Tensor) and len(v) == 130]
    want = run(case, launcher, copied(case, whole))["out"].cpu()
    for tokens in (1, 2, 8, 15, 16, 17, 33, 64, 65, 129):
        some = whole | {k: whole[k][:tokens].contiguous() for k in by_token}
        got = run(case, launcher, copied(case, some))["out"].cpu()
        assert torch.equal(bits(got), bits(want[:tokens].clone())), f"{tokens} tokens"


class Experts:
    """Lists, gate_up and down as a step launches them, over buffers that stay where they are."""

    def __init__(self, experts: int, top_k: int, tokens: int) -> None:
        made, rows = {"device": DEVICE}, tokens * top_k
        self.top_k = top_k
        self.x = torch.zeros(tokens, HIDDEN, **made).to(FP8)
        self.x_scale = torch.ones(tokens, HIDDEN // 128, **made)
        self.ids = torch.zeros(tokens, top_k, dtype=I32, **made)
        self.gate_up = as_tiles(torch.randn(experts, 2 * INTER, HIDDEN, **made).to(FP8))
        self.down = as_tiles(torch.randn(experts, HIDDEN, INTER, **made).to(FP8))
        self.scales = [
            torch.rand(experts, n // 128, k // 128, **made) / k**0.5
            for n, k in ((2 * INTER, HIDDEN), (HIDDEN, INTER))
        ]
        self.h = torch.zeros(rows, INTER, **made).to(FP8)
        self.h_scale = torch.zeros(rows, INTER // 128, **made)
        self.y = torch.zeros(rows, HIDDEN, dtype=BF16, **made)
        self.lists = {"offsets": torch.zeros(experts + 1, dtype=I32, **made)}
        self.lists["pairs"] = torch.zeros(rows, dtype=I32, **made)
        self.ready = torch.zeros(experts, dtype=I32, **made)

    def run(self, launch: Launcher, plans: tuple[GroupedPlan, ...]) -> None:
        expert_lists.align(launch, self.ids, expert_start=0, ready=self.ready, **self.lists)
        common = {**self.lists, "top_k": self.top_k, "ready": self.ready}
        grouped_gate_up(
            launch, self.x, self.x_scale, self.gate_up, self.scales[0],
            **common, out=self.h, out_scale=self.h_scale, plan=plans[0],
        )  # fmt: skip
        grouped_down(
            launch, self.h, self.h_scale, self.down, self.scales[1],
            **common, out=self.y, plan=plans[1],
        )  # fmt: skip


@pytest.mark.parametrize(("experts", "tokens"), [(12, 32), (3, 64), (24, 4)])
def test_down_may_begin_before_gate_up_has_ended(
    experts: int, tokens: int, launcher: Launcher
) -> None:
    torch.manual_seed(0)
    layer = Experts(experts, 3, tokens)
    plain = (GroupedPlan(), GroupedPlan())
    chained = (GroupedPlan(chain=1), GroupedPlan(chain=5, prefetch=1))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        layer.run(launcher, plain)
        layer.run(launcher, chained)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(8):  # one behind the other: counters of the one before are still full
                layer.h.view(torch.uint8).fill_(0xFF)  # NaN
                layer.run(launcher, chained)
    for seed in range(20):
        torch.manual_seed(seed)
        layer.x.copy_(torch.randn(tokens, HIDDEN, device=DEVICE).to(FP8))
        layer.ids.copy_(torch.randint(-1, experts - seed % 2, layer.ids.shape, dtype=I32))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            layer.run(launcher, plain)
            want = layer.y.clone()
            layer.y.fill_(float("nan"))
            graph.replay()
        stream.synchronize()
        used = layer.lists["pairs"][: int(layer.lists["offsets"][-1])].long()
        assert torch.equal(bits(layer.y[used]), bits(want[used])), f"seed {seed}"


O_PROJECTION = (HIDDEN, HEADS * VALUE)
LINEAR_PLANS = [
    LinearPlan(64, 4, unroll=2),
    LinearPlan(128, 2, per_sm=3),
]


@pytest.mark.parametrize("plan", LINEAR_PLANS, ids=str)
def test_a_plan_gives_every_token_its_bits(plan: LinearPlan, launcher: Launcher) -> None:
    whole = fp8_linear(*O_PROJECTION, tiled=True)(0, 130)
    wanted = torch.empty(130, HIDDEN, dtype=BF16)
    linear.linear_fp8_ref(whole["xq"], whole["xs"], whole["w"], whole["ws"], out=wanted)
    seen = []
    for tokens in (130, 1, 2, 15, 17, 33, 64, 65, 129):
        some = {"xq": whole["xq"][:tokens], "xs": whole["xs"][:tokens].contiguous()}
        parts = torch.full((plan.splits, tokens, HIDDEN), float("nan"))
        some |= {"w": whole["w"], "ws": whole["ws"], "out": parts}
        case = Case(linear.linear_fp8, linear.linear_fp8_ref, lambda *_: {}, {"out": 0})
        seen.append(run(case, launcher, some | {"plan": plan})["out"].cpu())
        assert torch.equal(bits(seen[-1]), bits(seen[0][:, :tokens])), f"{tokens} tokens"
    assert_close("out", sum_parts(seen[0], BF16), wanted, 2**-7)
    same = LinearPlan(128, plan.splits)
    other = run(case, launcher, some | {"plan": same, "out": torch.zeros_like(parts)})
    assert torch.equal(bits(other["out"]), bits(seen[-1]))


@pytest.mark.parametrize(("n", "k"), sorted(MEASURED_FEW))
def test_the_plan_for_few_tokens_gives_the_bits_of_that_for_many(
    n: int, k: int, launcher: Launcher
) -> None:
    torch.manual_seed(0)
    made, few = {"device": DEVICE}, FEW_TOKENS
    w, x = torch.randn(n, k, **made).to(FP8), torch.randn(130, k, **made).to(FP8)
    ws, xs = torch.rand(n // 128, k // 128, **made) / k**0.5, torch.rand(130, k // 128, **made)

    def run(tokens: int) -> torch.Tensor:
        out = torch.full((tokens, n), float("nan"), dtype=BF16, **made)
        linear.linear_fp8(
            launcher, x[:tokens], xs[:tokens], w, ws, out=out, workspace=torch.empty(1, **made)
        )
        return out

    whole = run(130)
    assert not whole.isnan().any()
    for tokens in (1, 8, 16, few - 1, few, few + 1, 64, 65, 129):
        assert torch.equal(bits(run(tokens)), bits(whole[:tokens])), f"{tokens} tokens"


@pytest.mark.parametrize("experts", [32, 64, 256, 384])
def test_the_router_loses_nothing_and_goes_by_the_token_alone(
    experts: int, launcher: Launcher
) -> None:
    x, w = randn(0, 130, HIDDEN).to(DEVICE), weight(experts, HIDDEN, dtype=F32).to(DEVICE)

    def run(tokens: int, plan: router.RouterPlan | None = None) -> torch.Tensor:
        parts = router.router_parts(experts, HIDDEN)
        out = torch.full((parts, tokens, experts), float("nan"), device=DEVICE)
        router.router(launcher, x[:tokens], w, out=out, plan=plan)
        return out

    whole = run(130)
    exact = x.double() @ w.double().T
    error = (whole.double().sum(0) - exact).norm() / exact.norm()
    # Tensor cores cut sums off where fp32 rounds them: 3e-7, against 1e-7 of IEEE additions.
    assert error < 6e-7, f"{float(error):.1e}"
    for tokens in (1, 2, 8, 15, 16, 17, 32, 33, 64, 65, 129):
        assert torch.equal(bits(run(tokens)), bits(whole[:, :tokens])), f"{tokens} tokens"
    default = router.router_plan(experts, HIDDEN)
    for warps, block_n in ((8, default.block_n), (4, 16), (4, 32)):
        if (block_n < 64) == (default.block_n < 64):
            plan = router.RouterPlan(block_n, default.block_k, warps)
            assert torch.equal(bits(run(33, plan)), bits(whole[:, :33])), plan


@pytest.mark.parametrize(("experts", "groups", "kept"), [(32, 8, 4), (256, 8, 4), (384, 1, 1)])
def test_a_tokens_choice_goes_by_the_token_alone(
    experts: int, groups: int, kept: int, launcher: Launcher
) -> None:
    parts = randn(0, 56, 130, experts, dtype=F32, std=0.1).to(DEVICE)
    bias = randn(1, experts, dtype=F32, std=0.1).to(DEVICE)

    def run(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        made = {"dtype": I32, "device": DEVICE}
        ids = torch.zeros(tokens, 9, **made)
        weights = torch.zeros(tokens, 9, device=DEVICE)
        routing.route(
            launcher,
            parts[:, :tokens].contiguous(),
            bias,
            torch.arange(tokens, **made),
            **{"num_groups": groups, "topk_groups": kept, "top_k": 8, "normalize": True},
            scaling=2.5,
            shared_id=experts,
            out_ids=ids,
            out_weights=weights,
        )
        return ids, weights

    whole = run(130)
    for tokens in (1, 2, 15, 16, 31, 32, 33, 64, 65, 129):
        for got, want in zip(run(tokens), whole, strict=True):
            assert torch.equal(bits(got), bits(want[:tokens])), f"{tokens} tokens"


# ------------------------------------------------------------------ the row state


@pytest.mark.parametrize("seed", range(8))
def test_steps_of_the_row_state_are_the_oracles(seed: int, launcher: Launcher) -> None:
    dumps = []
    for device in (Device(12, 5), Device(12, 5, launcher, DEVICE)):
        random_steps(device, seed)
        dumps.append(device.dump())
    for name, tensor in dumps[0].items():
        assert torch.equal(bits(dumps[1][name]), bits(tensor)), name
    begin, end = device.ring[0, 2:6].clone().view(torch.int64).tolist()
    assert 0 < begin <= end


def test_a_slot_stays_whole_whenever_the_host_tells_of_a_launch(launcher: Launcher) -> None:
    """The host writes LAUNCHED over and over while the warps of settle read it."""
    rows, at = 256, state.HEADER + 256  # the entries' tokens
    device = Device(rows, rows, launcher, DEVICE, max_rows=rows)
    device.limit.fill_(LENGTH)
    device.lists["sample_row"].copy_(torch.arange(rows))
    device.lists["sample_pos"].zero_()
    told, seen = device.mailbox.numpy()[-1, state.LAUNCHED :].data, set()
    for turn in range(1, 1001):
        device.step.zero_()
        device.out_token.fill_(turn)
        torch.cuda.synchronize()
        torch.cuda._sleep(400_000)
        device.settle()
        settled = torch.cuda.Event()
        settled.record()
        while not settled.query():
            for _ in range(50):
                told[0], told[0] = 2, 1
        left = int((device.pending[at : at + rows] == turn).sum())
        published = int((device.ring[0, at : at + rows] == turn).sum())
        assert sorted((left, published)) == [0, rows], f"turn {turn}: {left} left, {published} not"
        assert (int(device.ring_step[0]) == 1) == (published == rows), turn
        device.ring_step.zero_()
        seen.add(left)
    assert seen == {0, rows}


def test_stamps_rise(launcher: Launcher) -> None:
    stamps = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    for i in range(8):
        settle.stamp(launcher, stamps, i)
    torch.cuda.synchronize()
    times = stamps.tolist()
    assert times == sorted(times)
    assert times[0] > 0
