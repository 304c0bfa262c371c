"""The router's product: kernel against oracle, exact in its pieces, and what it compiles to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.triton.launch import JitLauncher, Launcher
from kernels.triton.router import RouterPlan, router, router_parts, router_plan, router_ref
from tests.cpu.test_kernels_linear import compile_for_both, compiled, exact_in_tiles, meta

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAUNCH = JitLauncher()
POISON = 1e30
# Experts by hidden size: DeepSeek-V3's share of a rank and its whole, Kimi-K2, Moonlight.
REAL = [(32, 7168), (128, 7168), (256, 7168), (384, 7168), (64, 2048)]


def _rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _router(x: torch.Tensor, w: torch.Tensor, plan: RouterPlan | None = None) -> torch.Tensor:
    (t, k), n = x.shape, w.shape[0]
    parts = router_parts(n, k) if plan is None else -(-k // plan.block_k)
    wide = torch.full((parts * t * n + 7,), POISON)
    out = wide[: parts * t * n].view(parts, t, n)
    router(LAUNCH, x, w, out=out, plan=plan)
    assert (wide[-7:] == POISON).all()
    return out.clone()


@pytest.mark.parametrize(("n", "k"), [(32, 256), (5, 70), (70, 600), (130, 101)])
@pytest.mark.parametrize(("t", "dtype"), [(1, BF16), (17, BF16), (65, BF16), (16, F16), (33, F32)])
def test_the_parts_add_up_to_the_product(n: int, k: int, t: int, dtype: torch.dtype) -> None:
    x, w = _rand(t, k).to(dtype), _rand(n, k, seed=1)
    want = torch.full((router_parts(n, k), t, n), POISON)
    router_ref(x, w, out=want)
    torch.testing.assert_close(_router(x, w).sum(0), want.sum(0), rtol=1e-5, atol=1e-4)
    exact = x.double() @ w.double().T
    torch.testing.assert_close(want.sum(0).double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_no_bit_of_weight_or_token_is_dropped(dtype: torch.dtype) -> None:
    """One product a result: it is exact, so what remains is its one rounding to fp32."""
    x, w = torch.zeros(3, 64, dtype=dtype), torch.zeros(16, 64)
    x[:, 9] = _rand(3).to(dtype)
    w[:, 9] = _rand(16) * torch.logspace(-20, 20, 16)
    w[0, 9], w[1, 9] = 1 + 2.0**-23, -(2 - 2.0**-23)
    got = _router(x, w).sum(0)
    exact = x[:, 9:10].double() * w[:, 9].double()
    # Of x in two or three pieces the partial results are rounded, too.
    assert ((got.double() - exact).abs() <= exact.abs() * 2.0**-22).all()
    if dtype == BF16:
        one = torch.zeros(1, 64, dtype=BF16)
        one[0, 9] = 1
        assert torch.equal(_router(one, w).sum(0)[0], w[:, 9])


def test_a_tokens_bits_do_not_depend_on_the_others() -> None:
    # Products that are exact within a tile: the interpreter's BLAS goes by the tile's shape.
    x, w = exact_in_tiles(70, 300, 0).bfloat16(), exact_in_tiles(40, 300, 1)
    whole = _router(x, w)
    for t in (1, 15, 16, 17, 33, 64, 65):
        assert torch.equal(_router(x[:t], w), whole[:, :t])


def test_x_and_w_may_be_columns_of_wider_buffers() -> None:
    x, w = _rand(4, 70).bfloat16(), _rand(9, 70)
    wide_x, wide_w = torch.full((4, 77), POISON).bfloat16(), torch.full((9, 80), POISON)
    wide_x[:, :70], wide_w[:, :70] = x, w
    assert torch.equal(_router(wide_x[:, :70], wide_w[:, :70]), _router(x, w))


@pytest.mark.parametrize(("n", "k"), REAL)
def test_the_plan_gives_a_chip_work_and_the_reader_few_parts(n: int, k: int) -> None:
    plan, parts = router_plan(n, k), router_parts(n, k)
    assert parts <= 64
    assert -(-n // plan.block_n) * parts >= 64


@pytest.mark.parametrize("block_n", [16, 32, 64])
def test_tiles_of_any_height_give_sums_that_no_order_rounds(block_n: int) -> None:
    x, w = exact_in_tiles(2, 256, 0).bfloat16(), exact_in_tiles(40, 256, 1)
    plan = router_plan(40, 256)
    assert torch.equal(_router(x, w, replace(plan, block_n=block_n)), _router(x, w, plan))


def test_misuse_is_named() -> None:
    x, w = _rand(4, 256).bfloat16(), _rand(8, 256)
    with pytest.raises(ValueError, match="leaves 2 parts, got room for 3"):
        router(LAUNCH, x, w, out=torch.empty(3, 4, 8))
    with pytest.raises(ValueError, match="w and out of float32, got torch.bfloat16, torch.bfloat"):
        router(LAUNCH, x, w.bfloat16(), out=torch.empty(2, 4, 8))
    with pytest.raises(ValueError, match=r"out must be \[parts, 4, 8\]"):
        router(LAUNCH, x, w, out=torch.empty(2, 4, 9))
    with pytest.raises(ValueError, match=r"expected, got \[4, 256\], \[8, 255\]"):
        router(LAUNCH, x, w[:, :255], out=torch.empty(2, 4, 8))
    with pytest.raises(ValueError, match="last stride of 1"):
        router(LAUNCH, x, _rand(256, 8).T, out=torch.empty(2, 4, 8))
    with pytest.raises(ValueError, match="block_n 16, 32 or 64"):
        RouterPlan(48)
    with pytest.raises(ValueError, match="power of two of at least 16, got 96"):
        RouterPlan(16, 96)


def test_real_shapes_compile_without_spills() -> None:
    built = compiled("tests.cpu.test_kernels_router")
    assert {b["arch"] for b in built} == {90, 100}
    assert not [b for b in built if b["stack_bytes"]]
    # Every program of a step's rows is on the chip at once: two to an SM.
    assert not [b for b in built if b["shared_bytes"] > 113 * 1024 or b["registers"] > 255]
    assert not [b for b in built if not b["mma"]]


def _real_shapes(launch: Launcher) -> None:
    tokens = [(t, BF16) for t in (1, 32, 128)] + [(128, F16), (128, F32)]
    # One shape of each plan: another number of experts under the same plan makes no other tile.
    for n, k in {router_plan(*shape): shape for shape in REAL}.values():
        for t, dtype in tokens:
            router(launch, meta(t, k, dtype=dtype), meta(n, k), out=meta(router_parts(n, k), t, n))


if __name__ == "__main__":
    compile_for_both(_real_shapes)
