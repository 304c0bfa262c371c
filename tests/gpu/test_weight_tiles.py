"""Weights in tiles at DeepSeek-V3's shapes: every product has the bits that it has in rows."""

from __future__ import annotations

import pytest
import torch

from kernels.triton.expert_lists import align
from kernels.triton.grouped_down import grouped_down
from kernels.triton.grouped_gate_up import grouped_gate_up
from kernels.triton.launch import Launcher
from kernels.triton.linear import linear, linear_fp8
from kernels.triton.linear_plan import linear_plan
from kernels.triton.random_init import fill_random
from kernels.triton.weight_tiles import as_rows, tiled_shape
from tests.gpu.kernel_inputs import BF16, DEVICE, F32, FP8, HIDDEN, I32, INTER
from tests.tiles import as_tiles

EXPERTS, TOP_K = 9, 4
# o, gate_up and down of a dense layer, and of the shared expert
SHAPES = ((7168, 16384), (36864, 7168), (7168, 18432), (4096, 7168), (7168, 2048))


def _codes(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(FP8)


def _scales(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, device=DEVICE) + 0.5


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_product_has_the_bits_that_it_has_in_rows(n: int, k: int, launcher: Launcher) -> None:
    torch.manual_seed(0)
    w, ws = _codes(n, k), _scales(n // 128, k // 128)
    tiles = as_tiles(w)
    for tokens in (1, 17, 33, 130):
        x, xs = _codes(tokens, k), _scales(tokens, k // 128)
        splits = linear_plan(n, k, elem_bytes=1).splits
        found = []
        for weight in (w, tiles):
            out = torch.full((tokens, n), float("nan"), dtype=BF16, device=DEVICE)
            space = torch.empty(splits * tokens * n, dtype=F32, device=DEVICE)
            linear_fp8(launcher, x, xs, weight, ws, out=out, workspace=space)
            found.append(out)
        assert not found[0].isnan().any()
        assert torch.equal(found[0].view(torch.uint8), found[1].view(torch.uint8)), tokens


def test_the_head_has_the_bits_that_it_has_in_rows(launcher: Launcher) -> None:
    torch.manual_seed(2)
    w = torch.randn(128 * 126, HIDDEN, dtype=BF16, device=DEVICE)
    tiles = as_tiles(w)
    for tokens in (1, 33, 130):
        x, found = torch.randn(tokens, HIDDEN, dtype=BF16, device=DEVICE), []
        for weight in (w, tiles):
            out = torch.full((tokens, w.shape[0]), float("nan"), device=DEVICE)
            linear(launcher, x, weight, out=out, workspace=torch.empty(1, device=DEVICE))
            found.append(out)
        assert not found[0].isnan().any()
        assert torch.equal(*found), tokens


@pytest.mark.parametrize("tokens", [1, 24, 150])
@pytest.mark.parametrize("dtype", [FP8, BF16])
def test_experts_have_the_bits_that_they_have_in_rows(
    tokens: int, dtype: torch.dtype, launcher: Launcher
) -> None:
    torch.manual_seed(1)
    fp8 = dtype == FP8
    gate_up, down = (
        (torch.randn(EXPERTS, n, k, device=DEVICE) / (1 if fp8 else k**0.5)).to(dtype)
        for n, k in ((2 * INTER, HIDDEN), (HIDDEN, INTER))
    )
    scales = (
        _scales(EXPERTS, 2 * INTER // 128, HIDDEN // 128) / HIDDEN if fp8 else None,
        _scales(EXPERTS, HIDDEN // 128, INTER // 128) / INTER if fp8 else None,
    )
    x = torch.randn(tokens, HIDDEN, device=DEVICE).to(dtype)
    xs = _scales(tokens, HIDDEN // 128) if fp8 else None
    ids = torch.randint(0, EXPERTS, (tokens, TOP_K), dtype=I32, device=DEVICE)
    rows, found = tokens * TOP_K, []
    for first, second in ((gate_up, down), (as_tiles(gate_up), as_tiles(down))):
        ready = torch.zeros(EXPERTS, dtype=I32, device=DEVICE)
        lists = {
            "offsets": torch.zeros(EXPERTS + 1, dtype=I32, device=DEVICE),
            "pairs": torch.zeros(rows, dtype=I32, device=DEVICE),
        }
        align(launcher, ids, expert_start=0, ready=ready, **lists)
        h = torch.zeros(rows, INTER, device=DEVICE).to(dtype)
        hs = torch.zeros(rows, INTER // 128, device=DEVICE) if fp8 else None
        y = torch.full((rows, HIDDEN), float("nan"), dtype=BF16, device=DEVICE)
        common = {**lists, "top_k": TOP_K, "ready": ready}
        grouped_gate_up(launcher, x, xs, first, scales[0], **common, out=h, out_scale=hs)
        grouped_down(launcher, h, hs, second, scales[1], **common, out=y)
        found.append((h, *([hs] if hs is not None else []), y))
    assert not found[0][-1].isnan().any()
    for in_rows, in_tiles in zip(*found, strict=True):
        assert torch.equal(in_rows.view(torch.uint8), in_tiles.view(torch.uint8))


def test_random_weights_are_the_same_in_tiles(launcher: Launcher) -> None:
    rows = torch.empty(2, 4096, 7168, device=DEVICE).to(FP8)
    tiles = torch.empty(2, *tiled_shape(4096, 7168, 1), device=DEVICE).to(FP8)
    for out in (rows, tiles):
        fill_random(launcher, out, seed=5, scale=448.0, offset=(1 << 32) - 77)
    assert torch.equal(as_rows(tiles).view(torch.uint8), rows.view(torch.uint8))
