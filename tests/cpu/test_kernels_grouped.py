"""Products of routed experts: against their oracles, with skewed routing, and pair by pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kernels.triton.grouped_down import grouped_down, grouped_down_ref
from kernels.triton.grouped_gate_up import grouped_gate_up, grouped_gate_up_ref
from kernels.triton.grouped_plan import GroupedPlan
from kernels.triton.launch import Arg, JitLauncher, Launcher
from kernels.triton.weight_tiles import tiled_shape
from tests.cpu.test_kernels_linear import (
    BF16,
    F16,
    F32,
    FP8,
    compile_for_both,
    compiled,
    exact_in_tiles,
    guarded,
    meta,
    quantized,
    rand,
)

LAUNCH = JitLauncher()
I32 = torch.int32
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
# Pairs of each expert: none, one, and one less and one more than every tile height.
COUNTS = (0, 1, 15, 16, 17, 0, 33, 65)


@dataclass
class Routing:
    """Which pairs each expert has; every other pair is padding."""

    counts: tuple[int, ...]
    top_k: int
    tokens: int

    def __post_init__(self) -> None:
        num_pairs, used = self.tokens * self.top_k, sum(self.counts)
        order = torch.randperm(num_pairs, generator=torch.Generator().manual_seed(5))
        self.listed = order[:used]
        self.pairs = torch.full((num_pairs,), 1 << 30, dtype=I32)  # never to be followed
        self.pairs[:used] = self.listed
        self.offsets = torch.tensor((0, *self.counts), dtype=I32).cumsum(0, dtype=I32)

    @property
    def num_pairs(self) -> int:
        return self.tokens * self.top_k


@dataclass
class Experts:
    """Weights of a layer's experts, plain or e4m3 with block scales."""

    gate_up: torch.Tensor
    gate_up_scale: torch.Tensor | None
    down: torch.Tensor
    down_scale: torch.Tensor | None

    @classmethod
    def random(cls, num: int, inter: int, hidden: int, dtype: torch.dtype) -> Experts:
        gate_up = rand(num, 2 * inter, hidden, seed=1) / hidden**0.5
        down = rand(num, hidden, inter, seed=2) / inter**0.5
        if dtype != FP8:
            return cls(guarded(gate_up.to(dtype)), None, guarded(down.to(dtype)), None)
        groups = lambda n: -(-n // 128)  # noqa: E731
        s1 = torch.rand(num, 2 * groups(inter), groups(hidden)) + 0.5
        s2 = torch.rand(num, groups(hidden), groups(inter)) + 0.5
        return cls(gate_up.to(FP8), s1, down.to(FP8), s2)


def _input(rows: int, cols: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    return quantized(rows, cols, 3) if dtype == FP8 else (rand(rows, cols, seed=3).to(dtype), None)


def _gate_up(
    run: str, x: torch.Tensor, xs: torch.Tensor | None, w: Experts, r: Routing
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Outputs full of ones (e4m3 0x38) where nothing was written."""
    inter = w.gate_up.shape[1] // 2
    out = torch.ones(r.num_pairs, inter).to(x.dtype)
    scale = None if xs is None else torch.ones(r.num_pairs, -(-inter // 128))
    args = (x, xs, w.gate_up, w.gate_up_scale, r.offsets, r.pairs)
    if run == "ref":
        grouped_gate_up_ref(*args, top_k=r.top_k, out=out, out_scale=scale)
    else:
        grouped_gate_up(LAUNCH, *args, top_k=r.top_k, out=out, out_scale=scale)
    return out, scale


def _down(
    run: str, h: torch.Tensor, hs: torch.Tensor | None, w: Experts, r: Routing
) -> torch.Tensor:
    dtype = F32 if h.dtype == FP8 else h.dtype
    out = torch.ones(r.num_pairs, w.down.shape[1], dtype=dtype)
    args = (h, hs, w.down, w.down_scale, r.offsets, r.pairs)
    if run == "ref":
        grouped_down_ref(*args, out=out)
    else:
        grouped_down(LAUNCH, *args, out=out)
    return out


def _same_codes(got: torch.Tensor, want: torch.Tensor) -> None:
    """e4m3 codes at most one apart, and few of those.

    Triton's interpreter drops the carry into the next power of two and rounds subnormals down; such
    codes are left to the device's tests.
    """
    a, b = got.view(torch.uint8).int(), want.view(torch.uint8).int()
    comparable = (b % 8 != 0) & (b & 0x78 != 0)
    apart = (a - b).abs()[comparable]
    assert comparable.float().mean() > 0.7
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.01


def _check(r: Routing, inter: int, hidden: int, dtype: torch.dtype) -> None:
    w = Experts.random(len(r.counts), inter, hidden, dtype)
    x, xs = _input(r.tokens, hidden, dtype)
    (got, got_scale), (want, want_scale) = (_gate_up(run, x, xs, w, r) for run in ("", "ref"))
    if dtype == FP8:
        assert got_scale is not None
        torch.testing.assert_close(got_scale, want_scale, rtol=1e-5, atol=0)
        _same_codes(got[r.listed], want[r.listed])
    else:
        torch.testing.assert_close(got, want, rtol=2e-3 if dtype == F16 else 1e-5, atol=1e-5)
    got_y, want_y = (_down(run, want, want_scale, w, r) for run in ("", "ref"))
    torch.testing.assert_close(got_y, want_y, rtol=2e-3 if dtype == F16 else 1e-5, atol=1e-4)
    untouched = torch.ones(r.num_pairs, dtype=torch.bool)
    untouched[r.listed] = False
    for out in (got, got_y, *([] if got_scale is None else [got_scale])):
        assert (out[untouched].float() == 1).all()


@pytest.mark.parametrize(
    ("dtype", "inter", "hidden"),
    [
        *((FP8, inter, hidden) for inter, hidden in ((128, 256), (96, 144), (130, 101))),
        *((F16, inter, hidden) for inter, hidden in ((96, 144), (130, 101))),
        (F32, 130, 101),
    ],
)
def test_counts_around_every_tile_height(dtype: torch.dtype, inter: int, hidden: int) -> None:
    _check(Routing(COUNTS, top_k=2, tokens=80), inter, hidden, dtype)


@pytest.mark.parametrize("dtype", [F16, FP8])
@pytest.mark.parametrize(
    "routing",
    [
        Routing((0, 0, 0, 140), top_k=4, tokens=35),  # every pair on one expert
        Routing((0, 0, 0), top_k=2, tokens=3),  # none anywhere
        Routing((0, 1, 0, 0, 2, 0, 0, 0, 1), top_k=2, tokens=2),  # more experts than pairs
        Routing((0, 0, 0, 0, 1), top_k=1, tokens=1),
    ],
    ids=["one expert", "idle", "compact", "single"],
)
def test_skewed_routing(routing: Routing, dtype: torch.dtype) -> None:
    if routing.listed.numel():
        _check(routing, 128, 128, dtype)
        return
    w = Experts.random(3, 128, 128, dtype)
    out, _ = _gate_up("", *_input(3, 128, dtype), w, routing)
    assert (out.float() == 1).all()


@pytest.mark.parametrize("dtype", [F16, FP8])
def test_a_pairs_bits_do_not_depend_on_its_company(dtype: torch.dtype) -> None:
    inter, hidden = 256, 300
    token = exact_in_tiles(1, hidden, seed=77)[0]
    step = 2.0**-6 if dtype == F16 else 1.0
    gate_up = exact_in_tiles(2 * inter, hidden, seed=1) * step
    down = exact_in_tiles(hidden, inter, seed=2)
    s1, s2 = torch.rand(1, 4, 3) * 1e-3, torch.rand(1, 3, 2)
    fp8 = dtype == FP8
    w = Experts(
        *(gate_up[None].to(dtype), s1 if fp8 else None),
        *(down[None].to(dtype), s2 if fp8 else None),
    )
    xs = torch.rand(1, 3)
    seen = []
    for count, tokens in ((1, 1), (17, 20), (33, 40), (70, 80)):
        r = Routing((count,), top_k=1, tokens=tokens)
        mine = int(r.listed[count - 1])
        x = exact_in_tiles(tokens, hidden, seed=count)
        x[mine] = token
        h, hs = _gate_up("", x.to(dtype), xs.expand(tokens, 3).contiguous() if fp8 else None, w, r)
        h_exact = exact_in_tiles(tokens, inter, seed=count)
        h_exact[mine] = exact_in_tiles(1, inter, seed=78)[0]
        y = _down(
            "", h_exact.to(dtype), xs[:, :2].expand(tokens, 2).contiguous() if fp8 else None, w, r
        )
        seen.append((h.view(torch.uint8)[mine], y[mine], None if hs is None else hs[mine]))
    for h, y, hs in seen:
        assert torch.equal(h, seen[0][0])
        assert torch.equal(y, seen[0][1])
        assert hs is None or torch.equal(hs, seen[0][2])


class Impatient(JitLauncher):
    """Polls a counter three times."""

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], *args: Arg, pdl: bool = False, **options: Any
    ) -> None:
        if "POLLS" in options:
            options["POLLS"] = 3
        super().__call__(kernel, grid, *args, pdl=pdl, **options)


def test_down_begins_with_experts_whose_hidden_activation_is_there() -> None:
    inter, hidden, chain = 256, 300, GroupedPlan(chain=2)
    r = Routing((3, 0, 17, 5), top_k=2, tokens=20)
    w = Experts.random(4, inter, hidden, FP8)
    x, xs = quantized(r.tokens, hidden, 3)
    ready, out = torch.zeros(4, dtype=I32), torch.ones(r.num_pairs, inter).to(FP8)
    scale = torch.ones(r.num_pairs, 2)
    args = (x, xs, w.gate_up, w.gate_up_scale, r.offsets, r.pairs)
    grouped_gate_up(
        LAUNCH, *args, top_k=2, out=out, out_scale=scale, ready=ready, plan=GroupedPlan(chain=1)
    )
    assert ready.tolist() == [inter] * 4  # the expert without pairs as well
    counted = torch.zeros(4, dtype=I32)
    grouped_gate_up_ref(*args, top_k=2, out=out, out_scale=scale, ready=counted)
    assert torch.equal(counted, ready)

    def down(launch: Launcher, plan: GroupedPlan) -> torch.Tensor:
        y = torch.full((r.num_pairs, hidden), 7.0)
        h = (out, scale, w.down, w.down_scale, r.offsets, r.pairs)
        grouped_down(launch, *h, top_k=2, out=y, ready=ready, plan=plan)
        return y

    want = down(LAUNCH, GroupedPlan())
    assert torch.equal(down(LAUNCH, chain), want)
    ready[2] = ready[0] = inter - 1  # of the last two, which chain, and of one that does not
    late = down(Impatient(), chain)
    mine = r.pairs[3:20].long()
    assert late[mine].isnan().all()
    others = torch.ones(r.num_pairs, dtype=torch.bool)
    others[mine] = False
    assert torch.equal(late[others], want[others])


def test_few_pairs_are_not_chained() -> None:
    r, w = Routing((0, 1, 0), top_k=1, tokens=1), Experts.random(3, 128, 128, F16)
    ready, out = torch.zeros(3, dtype=I32), torch.ones(1, 128).half()
    x = (rand(1, 128).half(), None, w.gate_up, None, r.offsets, r.pairs)
    plan = GroupedPlan(chain=3)
    grouped_gate_up(LAUNCH, *x, top_k=1, out=out, out_scale=None, ready=ready, plan=plan)
    y = torch.empty(1, 128).half()
    h = (out, None, w.down, None, r.offsets, r.pairs)
    grouped_down(Impatient(), *h, out=y, ready=ready, plan=plan)
    assert not ready.any()
    assert not y.isnan().any()
    grouped_down(Impatient(), *h, out=y, plan=plan)  # without counters
    assert not y.isnan().any()
    with pytest.raises(ValueError, match="a number of experts to chain, 0 for none"):
        GroupedPlan(chain=-1)
    with pytest.raises(ValueError, match=r"ready must be int32 \[3\], got torch.int32 \[2\]"):
        grouped_down(LAUNCH, *h, out=y, ready=ready[:2])


def test_oracle_follows_the_definition() -> None:
    inter, hidden = 130, 200
    r = Routing((2, 0, 3), top_k=2, tokens=3)
    w = Experts.random(3, inter, hidden, FP8)
    x, xs = quantized(3, hidden, 3)
    assert w.gate_up_scale is not None
    out, scale = _gate_up("ref", x, xs, w, r)
    assert scale is not None
    wide = x.float() * xs.repeat_interleave(128, 1)[:, :hidden]
    for expert, (begin, end) in enumerate(zip(r.offsets, r.offsets[1:], strict=False)):
        rows = w.gate_up[expert].float()
        at = torch.cat([torch.arange(inter) // 128, 2 + torch.arange(inter) // 128])
        rows = rows * w.gate_up_scale[expert][at].repeat_interleave(128, 1)[:, :hidden]
        for pair in r.pairs[begin:end].tolist():
            y = rows @ wide[pair // 2]
            h = y[:inter] * torch.sigmoid(y[:inter]) * y[inter:]
            for group in (slice(0, 128), slice(128, 130)):
                s = max(h[group].abs().max().item(), 1e-4) / 448
                assert scale[pair, group.start // 128].item() == pytest.approx(s, rel=1e-4)
            back = out[pair].float() * scale[pair].repeat_interleave(128)[:inter]
            torch.testing.assert_close(back, h, rtol=0.07, atol=scale[pair].max().item() * 2**-8)


def test_misuse_is_named() -> None:
    r = Routing((1, 1), top_k=2, tokens=2)
    w = Experts.random(2, 128, 128, F32)
    x, out = rand(2, 128), torch.empty(4, 128)

    def run(x: torch.Tensor = x, w1: torch.Tensor = w.gate_up, o: torch.Tensor = out) -> None:
        grouped_gate_up(
            LAUNCH, x, None, w1, None, r.offsets, r.pairs, top_k=2, out=o, out_scale=None
        )

    with pytest.raises(ValueError, match=r"activations must be \[at least 1, 128\]"):
        run(x=rand(2, 127))
    with pytest.raises(ValueError, match="of the activations' torch.float32, got torch.float16"):
        run(w1=w.gate_up.half())
    with pytest.raises(ValueError, match=r"out must be contiguous \[4, 128\] of torch.float32"):
        run(o=torch.empty(2, 128))
    with pytest.raises(ValueError, match=r"pairs must be int32 \[4\], got torch.int32 \[3\]"):
        grouped_down(LAUNCH, rand(4, 128), None, w.down, None, r.offsets, r.pairs[:3], out=out)
    x8, xs = quantized(2, 128, 0)
    w8 = Experts.random(2, 128, 128, FP8)
    with pytest.raises(ValueError, match=r"w_scale must be float32 \[2, 2, 1\] for FP8.* got None"):
        grouped_gate_up(
            *(LAUNCH, x8, xs, w8.gate_up, None, r.offsets, r.pairs),
            top_k=2,
            out=torch.empty(4, 128, dtype=FP8),
            out_scale=torch.empty(4, 1),
        )


def test_real_shapes_compile_without_spills() -> None:
    built = compiled("tests.cpu.test_kernels_grouped")
    assert {b["arch"] for b in built} == {90, 100}
    assert not [b for b in built if b["stack_bytes"] or b["shared_bytes"] > 227 * 1024]
    assert all(b["mma"] for b in built)


def _launch(
    launch: Launcher, tokens: int, experts: int, inter: int, hidden: int, top_k: int, *, fp8: bool
) -> None:
    dtype = FP8 if fp8 else BF16
    pairs, groups = tokens * top_k, lambda n: -(-n // 128)

    def scale(*shape: int) -> torch.Tensor | None:
        return meta(*shape) if fp8 else None

    lists = meta(experts + 1, dtype=I32), meta(pairs, dtype=I32)
    ready = meta(experts, dtype=I32)
    h, hs = meta(pairs, inter, dtype=dtype), scale(pairs, groups(inter))

    def weight(rows: int, cols: int) -> torch.Tensor:
        shape = tiled_shape(rows, cols, dtype.itemsize)
        return meta(experts, *shape, dtype=dtype)

    grouped_gate_up(
        *(launch, meta(tokens, hidden, dtype=dtype), scale(tokens, groups(hidden))),
        weight(2 * inter, hidden),
        scale(experts, 2 * groups(inter), groups(hidden)),
        *lists,
        top_k=top_k,
        out=h,
        out_scale=hs,
        ready=ready,
    )
    w, ws = weight(hidden, inter), scale(experts, groups(hidden), groups(inter))
    out = meta(pairs, hidden, dtype=BF16)
    grouped_down(launch, h, hs, w, ws, *lists, top_k=top_k, out=out, ready=ready)


def _real_shapes(launch: Launcher) -> None:
    _launch(launch, 256, 32, 2048, 7168, 8, fp8=True)  # DeepSeek-V3 on 8 ranks
    _launch(launch, 32, 64, 1408, 2048, 6, fp8=False)  # Moonlight


if __name__ == "__main__":
    compile_for_both(_real_shapes)
