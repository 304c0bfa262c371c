"""Weights in tiles: the same matrix, the same results to the bit, and only where they fit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from graphs.model_config import ModelConfig
from graphs.presets import PRESETS
from graphs.weights import TensorSpec, weight_table
from kernels.triton import overlap
from kernels.triton.grouped_down import grouped_down, grouped_down_ref
from kernels.triton.grouped_gate_up import grouped_gate_up, grouped_gate_up_ref
from kernels.triton.grouped_plan import GroupedPlan
from kernels.triton.launch import JitLauncher, TensorMap
from kernels.triton.linear import linear, linear_fp8, linear_fp8_ref, linear_ref
from kernels.triton.linear_plan import LinearPlan
from kernels.triton.random_init import fill_random, fill_random_ref
from kernels.triton.tiles import prefetch_weight, tile_source
from kernels.triton.weight_tiles import (
    as_rows,
    extents,
    group_of_rows,
    in_tiles,
    put_rows,
    tiled_shape,
)

FP8, F32, I32 = torch.float8_e4m3fn, torch.float32, torch.int32
LAUNCH = JitLauncher()
HIDDEN, INTER, EXPERTS, TOKENS, TOP_K = 256, 128, 3, 20, 2
TILED = {
    *("o", "gate_up", "down", "shared_gate_up", "shared_down"),
    *("experts_gate_up", "experts_down", "head"),
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def _codes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 4).to(FP8)


def _scales(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def _tiled(rows: torch.Tensor, *, aligned: bool = True) -> torch.Tensor:
    """The same weights in tiles; `aligned` is what the bulk copy engine asks for."""
    *lead, n, k = rows.shape
    size = rows.element_size()
    memory = torch.empty(rows.numel() + 32, dtype=rows.dtype)
    first = -memory.data_ptr() // size % (16 // size) + (0 if aligned else 1)
    tiles = memory[first : first + rows.numel()].view(*lead, *tiled_shape(n, k, size))
    for target, matrix in zip(tiles.view(-1, *tiles.shape[-4:]), rows.view(-1, n, k), strict=True):
        put_rows(target, 0, matrix)
    return tiles


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16])
def test_a_matrix_comes_back_from_its_tiles(dtype: torch.dtype) -> None:
    rows = torch.arange(2 * 384 * 256).view(2, 384, 256).float().remainder(97).to(dtype)
    tiles = _tiled(rows)
    assert in_tiles(tiles)
    assert not in_tiles(rows)
    assert extents(tuple(tiles.shape)) == tuple(rows.shape)
    assert torch.equal(_bytes(as_rows(tiles)), _bytes(rows))
    assert as_rows(rows) is rows
    cols = 128 // dtype.itemsize
    assert torch.equal(_bytes(tiles[1, 2, 1]), _bytes(rows[1, 256:, cols : 2 * cols]))


def test_rows_are_written_in_groups_where_they_lie() -> None:
    rows, new = _codes(384, 256), _codes(128, 256, seed=1)
    tiles = _tiled(rows)
    put_rows(tiles, 128, new)
    assert torch.equal(_bytes(as_rows(tiles)), _bytes(torch.cat([rows[:128], new, rows[256:]])))
    group = group_of_rows(tiles, 128, 128)
    assert group.data_ptr() == tiles.data_ptr() + 128 * 256
    assert (group.numel(), group.is_contiguous()) == (128 * 256, True)
    for begin, count in ((64, 128), (0, 100)):
        with pytest.raises(ValueError, match="128 rows"):
            put_rows(tiles, begin, new[:count])
        with pytest.raises(ValueError, match="128 rows"):
            group_of_rows(tiles, begin, count)
    plain = torch.zeros(384, 256).to(FP8)
    put_rows(plain, 5, new)
    assert torch.equal(_bytes(plain[5:133]), _bytes(new))
    assert torch.equal(_bytes(group_of_rows(plain, 5, 7)), _bytes(new[:7]))


@pytest.mark.parametrize(("rows", "cols"), [(130, 256), (128, 200)])
def test_a_matrix_of_partial_tiles_stays_in_rows(rows: int, cols: int) -> None:
    with pytest.raises(ValueError, match=f"{rows}x{cols}; keep it in rows"):
        tiled_shape(rows, cols, 1)


@pytest.mark.parametrize("tokens", [1, 20, 70])
@pytest.mark.parametrize("plan", [None, LinearPlan(64, 2, unroll=2), LinearPlan(128, 1)])
def test_a_product_has_the_bits_that_it_has_in_rows(tokens: int, plan: LinearPlan | None) -> None:
    n, k = 256, 640
    x, xs = _codes(tokens, k), _scales(tokens, k // 128)
    w, ws = _codes(n, k, seed=1), _scales(n // 128, k // 128, seed=1)
    found = []
    for weight in (w, _tiled(w), _tiled(w, aligned=False)):
        out, space = torch.full((tokens, n), 7.0), torch.zeros(4 * tokens * n)
        linear_fp8(LAUNCH, x, xs, weight, ws, out=out, workspace=space, plan=plan)
        want = torch.empty_like(out)
        linear_fp8_ref(x, xs, weight, ws, out=want)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-2)
        found.append(out)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("aligned", [True, False])
def test_a_16_bit_product_has_the_bits_that_it_has_in_rows(aligned: bool) -> None:
    tokens, n, k = 20, 256, 320
    x, w = (_codes(rows, k, seed=rows).to(torch.float16) for rows in (tokens, n))
    found, want = [], torch.empty(tokens, n)
    for weight in (w, _tiled(w, aligned=aligned)):
        out = torch.full((tokens, n), 7.0)
        linear(LAUNCH, x, weight, out=out, workspace=torch.zeros(8 * tokens * n))
        linear_ref(x, weight, out=want)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-2)
        found.append(out)
    if aligned:
        assert torch.equal(*found)
    else:  # the interpreter multiplies with numpy, whose bits depend on strides
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("counts", [(0, 20, 20), (3, 0, 1)])
@pytest.mark.parametrize("aligned", [True, False])
def test_experts_have_the_bits_that_they_have_in_rows(
    counts: tuple[int, ...], aligned: bool
) -> None:
    gate_up, down = _codes(EXPERTS, 2 * INTER, HIDDEN), _codes(EXPERTS, HIDDEN, INTER, seed=1)
    gate_up_scale, down_scale = _scales(EXPERTS, 2, 2) / 400, _scales(EXPERTS, 2, 1, seed=1) / 40
    offsets = torch.tensor((0, *counts), dtype=I32).cumsum(0, dtype=I32)
    pairs = torch.randperm(TOKENS * TOP_K, generator=torch.Generator().manual_seed(2)).to(I32)
    x, xs = _codes(TOKENS, HIDDEN, seed=3), _scales(TOKENS, 2, seed=3)
    found = []
    for first, second in (
        (gate_up, down),
        (_tiled(gate_up, aligned=aligned), _tiled(down, aligned=aligned)),
    ):
        assert isinstance(tile_source(first.view(-1, first.shape[-1]), (128, 128)), TensorMap) == (
            aligned or first is gate_up
        )
        results = []
        for plan in (GroupedPlan(), GroupedPlan(block_n=64), None):
            h = torch.zeros(TOKENS * TOP_K, INTER).to(FP8)
            hs = torch.zeros(TOKENS * TOP_K, 1)
            y, ready = torch.zeros(TOKENS * TOP_K, HIDDEN), torch.zeros(EXPERTS, dtype=I32)
            lists = (offsets, pairs)
            kinds = {"top_k": TOP_K, "out": h, "out_scale": hs, "ready": ready}
            if plan is None:
                grouped_gate_up_ref(x, xs, first, gate_up_scale, *lists, **kinds)
                grouped_down_ref(h, hs, second, down_scale, *lists, top_k=TOP_K, out=y)
            else:
                grouped_gate_up(LAUNCH, x, xs, first, gate_up_scale, *lists, **kinds)
                options = {"top_k": TOP_K, "out": y, "plan": plan}
                grouped_down(LAUNCH, h, hs, second, down_scale, *lists, **options)
            results += [h, hs, y, ready]
        found.append(results)
    for in_rows, in_tiles_ in zip(*found, strict=True):
        if aligned:
            assert torch.equal(_bytes(in_rows), _bytes(in_tiles_))
        else:  # the interpreter multiplies tiles with numpy, whose bits depend on their strides
            torch.testing.assert_close(in_rows.float(), in_tiles_.float(), rtol=0.1, atol=1e-3)


@triton.jit
def _prefetch_kernel(w, row, col, end_row, COLS: tl.constexpr, SPAN: tl.constexpr):
    prefetch_weight(w, row, col, end_row, COLS, COLS, 64, SPAN, 128, True)


@triton.jit
def _mark(at, wanted):
    tl.store(at, tl.full(at.shape, 1, tl.uint8), mask=wanted != 0)


@pytest.mark.parametrize(("row", "col"), [(0, 0), (192, 128), (320, 256)])
def test_what_is_asked_for_ahead_is_what_is_loaded(
    row: int, col: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 rows, two tiles wide, where there are two; of each 32 bytes the first is marked."""
    monkeypatch.setattr(overlap, "_ask", _mark)
    memory = torch.zeros(512 * 384, dtype=torch.uint8)  # the matrix, and what lies behind it
    tiles = memory[: 384 * 384].view(tiled_shape(384, 384, 1))
    _prefetch_kernel[(1,)](memory, row, col, 384, COLS=384, SPAN=256)
    want = torch.zeros(384, 384, dtype=torch.uint8)
    want[row : row + 64, col : col + 256 : 32] = 1
    assert torch.equal(as_rows(tiles), want)
    assert not memory[384 * 384 :].any()


def test_other_tiles_than_ours_are_refused() -> None:
    w = torch.zeros(1, 2, 4, 64, 64).to(FP8)  # as many elements, but not our tiles
    with pytest.raises(ValueError, match="tiles must be 128 rows of 128 bytes"):
        _down(w)
    with pytest.raises(ValueError, match="1 or 2 bytes an element, .* of torch.float32"):
        linear(LAUNCH, torch.zeros(1, 64), torch.zeros(1, 2, 128, 32), out=torch.zeros(1, 128))
    part = torch.zeros(2, 4, 128, 64, dtype=torch.float16)[:, :2]
    with pytest.raises(ValueError, match="contiguous, got .* with strides"):
        linear(LAUNCH, torch.zeros(1, 128).half(), part, out=torch.zeros(1, 256))


@pytest.mark.parametrize("shape", [(128, 256), (1, 2, 128, 128)])
def test_one_matrix_is_not_taken_for_those_of_experts(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \[E, rows, K\], or that in tiles, got"):
        _down(torch.zeros(shape).to(FP8))


def test_halves_that_end_within_a_tile_are_refused() -> None:
    w = torch.zeros(1, *tiled_shape(384, 128, 2), dtype=torch.float16)
    lists = (torch.zeros(2, dtype=I32), torch.zeros(2, dtype=I32))
    sizes = {"top_k": 1, "out": torch.zeros(2, 192).half(), "out_scale": None}
    with pytest.raises(ValueError, match="whole tiles of 128 rows, got 384 .* keep such weights"):
        grouped_gate_up(LAUNCH, torch.zeros(2, 128).half(), None, w, None, *lists, **sizes)


def _down(w: torch.Tensor) -> None:
    lists = (torch.zeros(2, dtype=I32), torch.zeros(2, dtype=I32))
    operands = (_codes(2, 256), _scales(2, 2), w, _scales(1, 1, 2))
    grouped_down(LAUNCH, *operands, *lists, out=torch.zeros(2, 128))


@pytest.mark.parametrize("shape", [(384, 256), (3, 128, 384)])
def test_random_weights_are_the_same_in_tiles(shape: tuple[int, ...]) -> None:
    rows = torch.empty(shape).to(FP8)
    fill_random_ref(rows, seed=11, scale=400.0, offset=5)
    for fill in (lambda *a, **k: fill_random(LAUNCH, *a, **k), fill_random_ref):
        tiles = torch.empty(*shape[:-2], *tiled_shape(*shape[-2:], 1)).to(FP8)
        fill(tiles, seed=11, scale=400.0, offset=5)
        assert torch.equal(_bytes(as_rows(tiles)), _bytes(rows))


def _leaves(preset: str, **overrides: object) -> dict[str, TensorSpec]:
    """The last layer of each kind and what lies outside of layers."""
    table = weight_table(ModelConfig.from_hf(PRESETS[preset], overrides=overrides))
    return {name.split(".", 2)[-1]: spec for name, spec in table.items()}


@pytest.mark.parametrize("quantization", ["fp8", "none"])
def test_what_lies_in_tiles(quantization: str) -> None:
    leaves = _leaves("deepseek-v3", quantization=quantization)
    assert {leaf for leaf, spec in leaves.items() if len(spec.shape) >= 4} == TILED
    cols = 128 if quantization == "fp8" else 64
    assert leaves["experts_down"].shape == (256, 56, 2048 // cols, 128, cols)
    assert leaves["experts_down"].extents == (256, 7168, 2048)
    assert leaves["o"].shape == (56, 16384 // cols, 128, cols)
    assert leaves["head"].shape == (1010, 112, 128, 64)  # never quantised


def test_what_does_not_fit_tiles_stays_in_rows() -> None:
    wide = _leaves("tiny", quantization="fp8", hidden_size=256)
    assert {n for n, s in wide.items() if len(s.shape) >= 4} >= {"experts_gate_up", "experts_down"}
    width = {"intermediate_size": 192, "moe_intermediate_size": 192}
    # 192 rows of gate end within a tile, as 192 columns of down do in FP8: 16-bit tiles have 64.
    narrow = _leaves("tiny", quantization="fp8", hidden_size=256, **width)
    assert all(len(s.shape) < 4 for n, s in narrow.items() if n.endswith(("gate_up", "down")))
    plain = _leaves("tiny", quantization="none", hidden_size=256, **width)
    assert len(plain["experts_gate_up"].shape) == 3
    assert plain["experts_down"].shape[1:] == (2, 3, 128, 64)
    assert len(_leaves("tiny", quantization="none", dtype="float32")["o"].shape) == 2
    assert len(_leaves("tiny", vocab_size=1000)["head"].shape) == 2
