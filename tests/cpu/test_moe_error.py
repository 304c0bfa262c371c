"""A MoE layer with real FP8 experts on the twin, against float64, on 1, 2, 4 and 8 ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from barriers.allgather import AllGather
from barriers.rdep_ref import quantize_ref
from barriers.transport import Local, TransportConfig
from graphs.ops import Ops
from kernels.triton.launch import JitLauncher
from tests.cpu.gloo_ranks import run_gloo_ranks
from tests.ep import moe_error, moe_layer

CPU = torch.device("cpu")
SIZES = TransportConfig(rank=0, world=1, capacity=7, hidden=384, num_experts=16, top_k=4)
INTER = 256
WORLDS = (1, 2, 4, 8)


def _checker(config: TransportConfig) -> moe_error.Checker:
    return moe_error.Checker(config, moe_layer.Experts(Ops(None), config, INTER, CPU))


def _nothing() -> None:
    """The twin is done when a call returns."""


def test_one_rank_is_near_float64() -> None:
    checker = _checker(SIZES)
    for case in moe_error.CASES:
        told = checker.check(Local(SIZES, None), case, _nothing)
        assert (told["error"] < 1e-6) == (case == "nobody"), "one rounding is not seen"


@pytest.mark.slow
def test_every_world_is_near_float64(tmp_path: Path) -> None:
    run_gloo_ranks(max(WORLDS), _rank_main, str(tmp_path / "store"))


def _rank_main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    ranks = max(WORLDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    groups = {world: dist.new_group(list(range(world))) for world in WORLDS}
    for world, group in groups.items():
        if rank >= world:
            continue
        config = replace(SIZES, rank=rank, world=world)
        buffers = {
            name: torch.zeros(shape, dtype=getattr(torch, dtype))
            for _, name, shape, dtype in AllGather.buffers(config)
        }
        checker, transport = _checker(config), AllGather(config, buffers, group, None)
        for case in moe_error.CASES:
            checker.check(transport, case, _nothing)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("case", ["random", "padded"])
def test_the_kernels_are_near_float64(case: str) -> None:
    """Interpreted; and what they give of one expert alone is what they give of it among others."""
    small = replace(SIZES, capacity=4, hidden=256, num_experts=4, top_k=2)
    launcher = JitLauncher()
    checker = moe_error.Checker(small, moe_layer.Experts(Ops(launcher), small, 128, CPU))
    moe_layer.warm_up(checker.experts.ops, checker.weights, small.hidden, 4, 2)
    assert checker.check(Local(small, launcher), case, _nothing)["error"] > 1e-4


# ------------------------------------------------------------------ what the check would find


class Wrong(Local):
    """A transport that does one thing wrong."""

    def __init__(self, fault: str) -> None:
        super().__init__(SIZES, None)
        self.fault = fault

    def dispatch(self, x, scale, ids, weights, **where):  # type: ignore[no-untyped-def]
        if self.fault == "pads":
            ids = ids.clamp_min(0)
        if self.fault == "swaps":
            ids = ids.flip(0).contiguous()
        if self.fault == "weighs":
            weights = weights * 1.01
        return super().dispatch(x, scale, ids, weights, **where)

    def combine(self, out, y, received, ids, shared, **where):  # type: ignore[no-untyped-def]
        super().combine(out, y, received, ids, shared, **where)
        if self.fault == "nan":
            out[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("pads", "pairs are listed"),
        ("swaps", "relative error"),
        ("weighs", "relative error"),
        ("nan", "relative error inf"),
    ],
)
def test_a_wrong_transport_is_found_out(fault: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        _checker(SIZES).check(Wrong(fault), "padded", _nothing)


def test_an_expert_that_touches_an_unlisted_pair_is_found_out() -> None:
    every = moe_error.tokens_of(SIZES, "padded", CPU)
    experts = moe_layer.Experts(Ops(None), SIZES, INTER, CPU)
    weights = experts.make(0, SIZES.num_experts)
    _, received, buffers = moe_layer.run_layer(experts.ops, Local(SIZES, None), weights, every[0])
    moe_layer.check_touched(SIZES, every, received, buffers)
    unlisted = int((received.ids.flatten() < 0).nonzero()[0])
    buffers[-1][unlisted] = 0.0
    with pytest.raises(AssertionError, match="1 pairs too many"):
        moe_layer.check_touched(SIZES, every, received, buffers)


def test_a_hidden_activation_that_is_off_is_found_out() -> None:
    class Off(Ops):
        def __init__(self) -> None:
            super().__init__(None)
            right = self.grouped_gate_up

            def wrong(*args, out_scale, **rest):  # type: ignore[no-untyped-def]
                right(*args, out_scale=out_scale, **rest)
                out_scale *= 1.02

            self.grouped_gate_up = wrong

    experts = moe_layer.Experts(Off(), SIZES, INTER, CPU)
    with pytest.raises(AssertionError, match="hidden off by"):
        moe_error.Checker(SIZES, experts).check(Local(SIZES, None), "random", _nothing)


def test_an_expert_is_the_same_whoever_makes_it() -> None:
    experts = moe_layer.Experts(Ops(None), SIZES, INTER, CPU)
    several, one = experts.make(4, 3), experts.make(5, 1)
    assert torch.equal(several.down_scale[1], one.down_scale[0])
    for name in ("gate_up", "down"):
        mine, theirs = getattr(several, name)[1], getattr(one, name)[0]
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    assert not torch.equal(several.down_scale[0], several.down_scale[1])


def test_deepeps_rule_differs_from_ours_where_values_lie_halfway() -> None:
    x = torch.randn(64, SIZES.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0] = 0.0
    ours, theirs = quantize_ref(x), moe_layer.quantize_deepep_ref(x)
    torch.testing.assert_close(ours[1], theirs[1], rtol=2e-7, atol=0)
    differ = (ours[0].view(torch.uint8) != theirs[0].view(torch.uint8)).float().mean()
    assert 1e-5 < differ < 2e-3
    step = theirs[0].float().abs() / 8 + 2**-9
    assert ((ours[0].float() - theirs[0].float()).abs() <= step).all()
