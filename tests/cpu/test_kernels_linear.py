"""Dense products: against their oracles, at tile boundaries, and row by row."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.triton.launch import Arg, JitLauncher, Launcher, TensorMap, kernel_spec
from kernels.triton.linear import linear, linear_fp8, linear_fp8_ref, linear_ref
from kernels.triton.linear_plan import FEW_TOKENS, LinearPlan, linear_plan, linear_workspace_elems
from kernels.triton.tiles import sum_parts, tile_source
from kernels.triton.weight_tiles import tiled_shape

F32, BF16, F16, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn
ROOT = Path(__file__).resolve().parents[2]
LAUNCH = JitLauncher()
POISON = 777.0
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
# N and K of DeepSeek-V3's projections; the last two are the head and the fp32 router.
FP8_SHAPES = [
    *((2112, 7168), (2176, 7168), (24576, 1536), (7168, 16384)),
    *((4096, 7168), (7168, 2048), (36864, 7168), (7168, 18432)),
]
PLAIN_SHAPES = [(129280, 7168), (2112, 7168), (7168, 2048)]
ROUTER = (256, 7168)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def guarded(w: torch.Tensor) -> torch.Tensor:
    """`w`, followed in memory by infinities: one of them times a masked zero warns."""
    buffer = torch.full((w.numel() + 64 * w.shape[-1],), float("inf"), dtype=w.dtype)
    buffer[: w.numel()] = w.flatten()
    return buffer[: w.numel()].view(w.shape)


def quantized(rows: int, cols: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values and row scales that differ from group to group."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, -(-cols // 128), generator=generator) + 0.5
    return rand(rows, cols, seed=seed).to(FP8), scale


def weight(n: int, k: int, seed: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    q, _ = quantized(n, k, seed)
    return q, quantized(-(-n // 128), k, seed + 1)[1]


def _workspace(t: int, n: int, k: int, *, fp8: bool) -> torch.Tensor:
    elems = max(linear_workspace_elems(t, n, k, elem_bytes=b) for b in ((1,) if fp8 else (2, 4)))
    return torch.full((elems + 5,), POISON)


def _plain(x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype = F32) -> torch.Tensor:
    """The kernel's result, written into a wider buffer that must stay clean."""
    (t, k), n = x.shape, w.shape[0]
    wide = torch.full((t + 2, n + 3), POISON, dtype=out_dtype)
    space = _workspace(t, n, k, fp8=False)
    linear(LAUNCH, x, w, out=wide[:t, :n], workspace=space)
    assert (wide[t:] == POISON).all()
    assert (wide[:t, n:] == POISON).all()
    assert (space[-5:] == POISON).all()
    return wide[:t, :n].clone()


def _fp8(
    x: tuple[torch.Tensor, torch.Tensor], w: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    (t, k), n = x[0].shape, w[0].shape[0]
    wide = torch.full((t + 2, n + 3), POISON)
    space = _workspace(t, n, k, fp8=True)
    linear_fp8(LAUNCH, *x, *w, out=wide[:t, :n], workspace=space)
    assert (wide[t:] == POISON).all()
    assert (wide[:t, n:] == POISON).all()
    assert (space[-5:] == POISON).all()
    return wide[:t, :n].clone()


@pytest.mark.parametrize(("n", "k"), [(64, 256), (70, 600), (130, 101)])
@pytest.mark.parametrize(
    ("t", "dtypes"),
    [
        *((t, (F16, F16)) for t in (1, 15, 16, 17, 33)),
        *((t, (F32, F32)) for t in (1, 16, 33)),
        *((t, (dtype, F32)) for t, dtype in ((15, BF16), (17, F16))),
    ],
)
def test_plain_product(t: int, dtypes: tuple[torch.dtype, torch.dtype], n: int, k: int) -> None:
    x, w = (
        guarded(rand(rows, k, seed=rows).to(dtype))
        for rows, dtype in zip((t, n), dtypes, strict=True)
    )
    want = torch.empty(t, n)
    linear_ref(x, w, out=want)
    torch.testing.assert_close(_plain(x, w), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("t", "n", "k"),
    [
        *((t, 70, 1100) for t in (1, 15, 16, 17, 33, 65, 129)),
        *((t, n, k) for t in (1, 17, 33) for n, k in ((128, 256), (200, 112), (130, 101))),
    ],
)
def test_fp8_product(t: int, n: int, k: int) -> None:
    x, w = quantized(t, k, 0), weight(n, k)
    want = torch.empty(t, n)
    linear_fp8_ref(*x, *w, out=want)
    torch.testing.assert_close(_fp8(x, w), want, rtol=1e-5, atol=1e-3)


def test_fp8_oracle_scales_each_block() -> None:
    x, w = quantized(3, 140, 0), weight(130, 140)
    want = torch.zeros(3, 130)
    for n in range(130):
        for k in range(140):
            scaled = x[0][:, k].float() * x[1][:, k // 128]
            want[:, n] += scaled * w[0][n, k].float() * w[1][n // 128, k // 128]
    got = torch.empty(3, 130)
    linear_fp8_ref(*x, *w, out=got)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pitch", [320, 301])
def test_x_may_be_columns_of_a_wider_buffer(pitch: int) -> None:
    buffer = rand(17, pitch).half()
    x, w = buffer[:, 32:288], rand(70, 256, seed=1).half()
    assert isinstance(tile_source(x, (16, 64)), TensorMap) == (pitch == 320)
    want = torch.empty(17, 70)
    linear_ref(x, w, out=want)
    torch.testing.assert_close(_plain(x, w), want, rtol=1e-5, atol=1e-4)
    wide = rand(17, pitch).to(FP8)
    xq, xs = wide[:, 32:288], quantized(17, 512, 3)[1][:, 1:3]
    wq = weight(70, 256)
    linear_fp8_ref(xq, xs, *wq, out=want)
    torch.testing.assert_close(_fp8((xq, xs), wq), want, rtol=1e-5, atol=1e-3)


def exact_in_tiles(rows: int, k: int, seed: int) -> torch.Tensor:
    """Small integers: sums inside a tile are exact, so that only the order *between* tiles counts.

    The interpreter leaves the order inside a tile to BLAS, where it depends on the tile's height.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (rows, k), generator=generator).float()


@pytest.mark.parametrize("kind", ["fp16", "fp32", "fp8"])
def test_a_rows_bits_do_not_depend_on_the_others(kind: str) -> None:
    n, k = 70, 1100  # split along K in every format
    groups = -(-k // 128)
    scales = torch.rand(256, groups, generator=torch.Generator().manual_seed(3)) + 0.1
    spread = 2.0 ** (torch.arange(groups) * 7 % 25 - 12)  # far enough apart that sums round
    spread = spread.repeat_interleave(128)[:k]
    w = exact_in_tiles(n, k, seed=1)

    def run(t: int) -> torch.Tensor:
        x = exact_in_tiles(t, k, seed=t)
        x[0] = x[-1] = exact_in_tiles(1, k, seed=99)[0]
        if kind == "fp8":
            xs = scales[:t].clone()
            xs[-1] = xs[0]
            return _fp8((x.to(FP8), xs), (w.to(FP8), scales[200:201]))
        dtype = F16 if kind == "fp16" else F32
        return _plain((x * spread).to(dtype), w.to(dtype))

    sizes = (1, 17, 33) if kind == "fp32" else (1, 17, 40, 130)  # a tile height each
    rows = [row for t in sizes for out in [run(t)] for row in (out[0], out[-1])]
    assert all(torch.equal(row, rows[0]) for row in rows)


@pytest.mark.parametrize("fp8", [True, False])
def test_k_splits_can_be_left_to_the_reader(fp8: bool) -> None:
    n, k = 70, 1100
    splits = linear_plan(n, k, elem_bytes=1 if fp8 else 2).splits
    assert splits > 1
    parts, oracle = torch.full((2, splits, 5, n), POISON)
    if fp8:
        x, w = quantized(5, k, 0), weight(n, k)
        linear_fp8(LAUNCH, *x, *w, out=parts)
        linear_fp8_ref(*x, *w, out=oracle)
        want = _fp8(x, w)
    else:
        x16, w16 = rand(5, k).half(), rand(n, k, seed=1).half()
        linear(LAUNCH, x16, w16, out=parts)
        linear_ref(x16, w16, out=oracle)
        want = _plain(x16, w16)
    assert torch.equal(sum_parts(parts, F32), want)
    torch.testing.assert_close(sum_parts(oracle, F32), want, rtol=1e-5, atol=1e-3)
    short = torch.empty(1, 5, n)
    with pytest.raises(ValueError, match=r"has \d parts, got room for 1; size it"):
        linear(LAUNCH, rand(5, k).half(), rand(n, k).half(), out=short)


@pytest.mark.parametrize(("unroll", "per_sm", "block_n"), [(2, 2, 64), (1, 3, 64), (3, 1, 128)])
@pytest.mark.parametrize("n", [70, 300])
def test_a_plan_of_the_same_splits_gives_the_same_bits(
    unroll: int, per_sm: int, block_n: int, n: int
) -> None:
    (xq, xs), (wq, ws) = quantized(17, 1100, 0), weight(n, 1100)
    default = linear_plan(n, 1100, elem_bytes=1)
    space = torch.empty(default.splits * 17 * n)
    results = []
    for plan in (None, LinearPlan(block_n, default.splits, unroll, per_sm)):
        results.append(torch.empty(17, n))
        linear_fp8(LAUNCH, xq, xs, wq, ws, out=results[-1], workspace=space, plan=plan)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-4)
    with pytest.raises(ValueError, match="64 or 128 and at least one"):
        LinearPlan(48, 1)
    with pytest.raises(ValueError, match="1 to 3 programs"):
        LinearPlan(64, 1, per_sm=4)


def test_output_is_rounded_once() -> None:
    x, w = rand(5, 600).half(), rand(70, 600, seed=1).half()
    assert torch.equal(_plain(x, w, F16), _plain(x, w).half())


def test_tiles_may_suit_the_tokens_and_splits_may_not() -> None:
    for n, k in FP8_SHAPES:
        plans = [linear_plan(n, k, elem_bytes=1, tokens=t) for t in (1, FEW_TOKENS, 64, None)]
        assert len({p.splits for p in plans}) == 1
        assert plans[-1] == plans[-2]
    few, many = (
        linear_plan(36864, 7168, elem_bytes=1, tokens=t) for t in (FEW_TOKENS, FEW_TOKENS + 1)
    )
    assert few != many


@pytest.mark.parametrize(("n", "k"), [*FP8_SHAPES, *PLAIN_SHAPES, ROUTER, (576, 2048), (16, 64)])
@pytest.mark.parametrize("fp8", [True, False])
def test_plan_fills_the_chip_or_does_not_split(n: int, k: int, fp8: bool) -> None:
    plan = linear_plan(n, k, elem_bytes=1 if fp8 else 2)
    block_n, splits = plan.block_n, plan.splits
    programs = -(-n // block_n) * splits
    least_k = 512 if fp8 else 256
    assert splits == 1 or k // splits >= least_k
    assert programs >= 112 or k // (splits + 1) < least_k
    assert linear_workspace_elems(3, n, k, elem_bytes=1 if fp8 else 2) == (
        3 * splits * n if splits > 1 else 0
    )


def test_misuse_is_named() -> None:
    x, w, out = rand(4, 600), rand(70, 600), torch.empty(4, 70)
    with pytest.raises(ValueError, match=r"split in 2 along K and needs 560 .* got none"):
        linear(LAUNCH, x.half(), w.half(), out=out)
    with pytest.raises(ValueError, match="got 559 of torch.float32"):
        linear(LAUNCH, x.half(), w.half(), out=out, workspace=torch.empty(559))
    with pytest.raises(ValueError, match=r"out must be \[4, 70\]"):
        linear(LAUNCH, x, w, out=torch.empty(5, 70))
    with pytest.raises(ValueError, match="float16 or float32, got torch.bfloat16"):
        linear(LAUNCH, x.half(), w.bfloat16(), out=out)
    with pytest.raises(ValueError, match=r"expected, got \[4, 600\], \[70, 599\]"):
        linear(LAUNCH, x, w[:, :599], out=out)
    with pytest.raises(ValueError, match="last stride of 1"):
        linear(LAUNCH, rand(600, 4).T, w, out=out)
    (xq, xs), (wq, ws) = quantized(4, 600, 0), weight(70, 600)
    with pytest.raises(ValueError, match=r"xs must be float32 \[4, 5\]"):
        linear_fp8(LAUNCH, xq, xs[:, :4], wq, ws, out=out)
    with pytest.raises(ValueError, match="w must be float8_e4m3fn"):
        linear_fp8(LAUNCH, xq, xs, w, ws, out=out)


def test_real_shapes_compile_without_spills() -> None:
    built = compiled("tests.cpu.test_kernels_linear")
    assert {(b["kernel"], b["arch"]) for b in built} == {
        (kernel, arch)
        for kernel in (
            "_linear_kernel",
            "_linear_fp8_kernel",
            "_linear_fp32_kernel",
        )
        for arch in (90, 100)
    }
    # Triton 3.7 keeps one scale in memory on sm_100; the kernels are tuned for sm_90.
    stack = {90: 0, 100: 16}
    assert not [b for b in built if b["stack_bytes"] > stack[b["arch"]]]
    assert not [b for b in built if b["shared_bytes"] > 227 * 1024]
    # An fp32 product is IEEE fp32 everywhere; the others are on tensor cores.
    assert not [b for b in built if (b["mma"] == "") != (b["kernel"] == "_linear_fp32_kernel")]


def compiled(module: str) -> list[dict[str, Any]]:
    """What `python -m module` compiled, in a process without Triton's interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    built: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return built


class CompileLauncher:
    """Compiles what would have been launched on `meta` tensors, once each."""

    num_sms = 132
    pdl = 0

    def __init__(self, arch: int, skip: tuple[str, ...] = ()) -> None:
        self.arch, self.skip = arch, skip
        self.built: dict[str, dict[str, Any]] = {}

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *args: Arg,
        num_warps: int = 4,
        num_stages: int = 3,
        pdl: bool = False,
        **constexprs: Any,
    ) -> None:
        spec = kernel_spec(
            kernel, args, constexprs, num_warps=num_warps, num_stages=num_stages, pdl=pdl
        )
        if spec.name in self.skip or spec.digest in self.built:
            return
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        aligned: dict[Any, Any] = {(i,): [["tt.divisibility", 16]] for i in spec.aligned}
        made = triton.compile(
            ASTSource(kernel, dict(spec.signature), constexprs, aligned),
            target=GPUTarget("cuda", self.arch, 32),
            options={"num_warps": num_warps, "num_stages": num_stages},
        )
        mma = re.search(r"(wgmma|tcgen05|mma)\.(mma|sync)\S*", made.asm["ptx"])
        self.built[spec.digest] = {
            "kernel": spec.name,
            "arch": self.arch,
            "shared_bytes": made.metadata.shared,
            "mma": mma[0] if mma else "",
            **_registers(made.asm["cubin"]),
        }


def _registers(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        run = subprocess.run(
            [tool, "-res-usage", f.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", run.stdout)
    assert found, run.stdout
    return {"registers": int(found[1]), "stack_bytes": int(found[2])}


def compile_for_both(step: Callable[[Launcher], None], skip: tuple[str, ...] = ()) -> None:
    """Compile all that `step` launches, for sm_90 and sm_100, and print what came of it."""
    built = []
    for arch in (90, 100):
        launch = CompileLauncher(arch, skip)
        step(launch)
        built += launch.built.values()
    print(json.dumps(built))


def meta(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _real_shapes(launch: Launcher) -> None:
    space = meta(1 << 30)
    # One tile shape each: 128 rows split and unsplit, 64 rows, every height along the tokens.
    for t, at in ((16, 0), (32, 5), (64, 2), (128, 3)):
        n, k = FP8_SHAPES[at]
        xs, ws = meta(t, k // 128), meta(-(-n // 128), k // 128)
        x, w = meta(t, k, dtype=FP8), meta(n, k, dtype=FP8)
        linear_fp8(launch, x, xs, w, ws, out=meta(t, n, dtype=BF16), workspace=space)
        if n % 128 == 0:
            tiles = meta(*tiled_shape(n, k, 1), dtype=FP8)
            linear_fp8(launch, x, xs, tiles, ws, out=meta(t, n, dtype=BF16), workspace=space)
    for (n, k), t in zip(PLAIN_SHAPES, (32, 64, 128), strict=True):
        x, w = meta(t, k, dtype=BF16), meta(n, k, dtype=BF16)
        linear(launch, x, w, out=meta(t, n), workspace=space)
        if n % 128 == 0:
            tiles = meta(*tiled_shape(n, k, 2), dtype=BF16)
            linear(launch, x, tiles, out=meta(t, n), workspace=space)
    x = meta(64, ROUTER[1], dtype=BF16)
    linear(launch, x, meta(*ROUTER), out=meta(64, ROUTER[0]), workspace=space)


if __name__ == "__main__":
    compile_for_both(_real_shapes, skip=("_sum_splits_kernel", "_sum_many_splits_kernel"))
