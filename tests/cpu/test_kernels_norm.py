"""Embedding, RMSNorm, SwiGLU, FP8 quantisation; run as a program, the compile check it starts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from kernels.triton import activation, expert_lists, expert_sum, norm, routing, sample
from kernels.triton.launch import JitLauncher, KernelSpec, kernel_spec

F32, BF16, F16, FP8, I32 = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int32,
)
WIDTHS = [1, 127, 128, 129, 300, 1025]
LAUNCH = JitLauncher()


def _rand(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g).to(dtype)


def _quantized(rows: int, width: int) -> dict[str, torch.Tensor]:
    groups = triton.cdiv(width, 128)
    return {"out_q": torch.zeros(rows, width).to(FP8), "out_scale": torch.zeros(rows, groups)}


def _same_quantized(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(got["out_scale"], want["out_scale"], rtol=1e-6, atol=0)
    a, b = got["out_q"].float(), want["out_q"].float()
    # A quotient on the edge between two e4m3 values may fall either way, by one step.
    assert (a != b).float().mean() <= 0.01
    torch.testing.assert_close(a, b, rtol=0.125, atol=2**-9)


def _add_rmsnorm(*args: Any, **kwargs: Any) -> None:
    norm.add_rmsnorm(LAUNCH, *args, **kwargs)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("width", [1, 1024, 1025])
def test_embed(width: int, dtype: torch.dtype) -> None:
    table = _rand(11, width, dtype=dtype)
    tok_id = torch.tensor([3, -1, 0, 10, -1], dtype=I32)
    out = torch.empty(5, width, dtype=dtype)
    want = torch.empty_like(out)
    for poison in (0, 1):
        flag = torch.tensor([poison], dtype=I32)
        norm.embed(LAUNCH, tok_id, table, flag, out=out)
        norm.embed_ref(tok_id, table, flag, out=want)
        assert torch.equal(out[[0, 2, 3]], table[[3, 0, 10]])
        assert out[[1, 4]].isnan().all() if poison else (out[[1, 4]] == 0).all()
        torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("with_delta", [False, True])
def test_add_rmsnorm(width: int, dtype: torch.dtype, with_delta: bool) -> None:
    x, weight = _rand(3, width, dtype=dtype), _rand(width, dtype=dtype, seed=1)
    delta = _rand(3, width, dtype=dtype, seed=2) if with_delta else None
    x_want, out, want = x.clone(), torch.empty_like(x), torch.empty_like(x)
    q, q_want = _quantized(3, width), _quantized(3, width)
    norm.add_rmsnorm(LAUNCH, x, delta, weight, eps=1e-6, out=out, **q)
    norm.add_rmsnorm_ref(x_want, delta, weight, eps=1e-6, out=want, **q_want)
    assert torch.equal(x, x_want)
    step = {F32: 1e-6, BF16: 2**-7, F16: 2**-10}[dtype]
    torch.testing.assert_close(out, want, rtol=step, atol=1e-6)
    if dtype != F32:  # another order of roundings would differ in a quarter of the elements
        assert (out != want).float().mean() <= 0.01
    # Compared with the quantisation of what the kernel itself wrote.
    activation.quantize_ref(out, **q_want)
    _same_quantized(q, q_want)


def test_add_rmsnorm_writes_only_what_it_is_given() -> None:
    x, weight = _rand(2, 200), _rand(200)
    wide = torch.full((2, 256), 7.0)
    q, both = _quantized(2, 200), _quantized(2, 200)
    norm.add_rmsnorm(LAUNCH, x.clone(), None, weight, eps=1e-6, out=wide[:, :200])
    norm.add_rmsnorm(LAUNCH, x.clone(), None, weight, eps=1e-6, **q)
    norm.add_rmsnorm(LAUNCH, x.clone(), None, weight, eps=1e-6, out=x.clone(), **both)
    assert (wide[:, 200:] == 7).all()
    assert torch.equal(q["out_q"].view(torch.uint8), both["out_q"].view(torch.uint8))


@pytest.mark.parametrize("fn", [_add_rmsnorm, norm.add_rmsnorm_ref])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_norm_adds_up_the_parts_of_a_product(fn: Any, dtype: torch.dtype) -> None:
    x, weight = _rand(4, 300, dtype=dtype), _rand(300, dtype=dtype, seed=1)
    parts = _rand(3, 4, 300, seed=2)
    whole = ((parts[0] + parts[1]) + parts[2]).to(dtype)
    got, want = (torch.empty_like(x) for _ in range(2))
    x_want = x.clone()
    fn(x, parts, weight, eps=1e-6, out=got)
    fn(x_want, whole, weight, eps=1e-6, out=want)
    assert torch.equal(x, x_want)
    assert torch.equal(got, want)


@pytest.mark.parametrize("fn", [_add_rmsnorm, norm.add_rmsnorm_ref])
def test_a_norm_adds_up_the_experts_of_a_token(fn: Any) -> None:
    x, weight = _rand(4, 300, dtype=BF16), _rand(300, dtype=BF16, seed=1)
    y, ids, weights = _rand(12, 300, dtype=BF16), torch.ones(4, 3, dtype=I32), _rand(4, 3)
    ids[2], y[6:9] = -1, float("nan")  # a padded token's results are never read
    delta = torch.empty_like(x)
    expert_sum.combine_ref(y, ids, weights, None, out=delta)
    got, want = (torch.empty_like(x) for _ in range(2))
    x_want = x.clone()
    fn(x, y, weight, eps=1e-6, choices=(ids, weights), out=got)
    fn(x_want, delta, weight, eps=1e-6, out=want)
    assert torch.equal(x, x_want)
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"delta \(12, 300\), got .*11, 300"):
        fn(x, y[:11], weight, eps=1e-6, choices=(ids, weights), out=got)
    with pytest.raises(ValueError, match="in parts must be float32"):
        fn(x, y.view(3, 4, 300), weight, eps=1e-6, out=got)


def test_rmsnorm_ref_is_the_published_one() -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

    oracle = DeepseekV3RMSNorm(192, eps=1e-5).to(BF16)
    oracle.weight.data = _rand(192, dtype=BF16)
    x = _rand(4, 192, dtype=BF16)
    out = torch.empty_like(x)
    norm.add_rmsnorm_ref(x, None, oracle.weight.data, eps=1e-5, out=out)
    assert torch.equal(out, oracle(x))


def test_add_rmsnorm_rows_are_independent() -> None:
    x, delta, weight = _rand(5, 300, dtype=BF16), _rand(5, 300, dtype=BF16), _rand(300, dtype=BF16)
    out, q = torch.empty_like(x), _quantized(5, 300)
    poisoned = x.clone()
    poisoned[[1, 4]] = float("nan")
    norm.add_rmsnorm(LAUNCH, poisoned, delta, weight, eps=1e-6, out=out, **q)
    for t in (0, 2, 3):
        alone, q1 = torch.empty(1, 300, dtype=BF16), _quantized(1, 300)
        norm.add_rmsnorm(
            LAUNCH, x[t : t + 1].clone(), delta[t : t + 1], weight, eps=1e-6, out=alone, **q1
        )
        assert torch.equal(out[t : t + 1], alone)
        assert torch.equal(q["out_q"][t : t + 1].view(torch.uint8), q1["out_q"].view(torch.uint8))
    assert out[[1, 4]].isnan().all()
    assert q["out_q"][[1, 4]].float().isnan().all()


@pytest.mark.parametrize("with_delta", [False, True])
def test_gather_add_rmsnorm(with_delta: bool) -> None:
    x, weight = _rand(4, 300, dtype=BF16), _rand(300, dtype=BF16)
    delta = _rand(4, 300, dtype=BF16, seed=2) if with_delta else None
    x[2] = float("nan")
    before, index = x.clone(), torch.tensor([3, -1, 0, 3], dtype=I32)
    out = torch.empty(4, 300, dtype=BF16)
    want, every = torch.empty_like(out), torch.empty_like(x)
    norm.gather_add_rmsnorm(LAUNCH, x, delta, index, weight, eps=1e-6, out=out)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    norm.gather_add_rmsnorm_ref(x, delta, index, weight, eps=1e-6, out=want)
    torch.testing.assert_close(out, want, rtol=2**-7, atol=0)
    norm.add_rmsnorm(LAUNCH, x, delta, weight, eps=1e-6, out=every)
    torch.testing.assert_close(out[[0, 2, 3]], every[[3, 0, 3]], rtol=2**-7, atol=0)
    assert torch.equal(out[0], out[3])
    assert (out[1] == 0).all()


@pytest.mark.parametrize("width", [*WIDTHS, 1024])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_quantize(width: int, dtype: torch.dtype) -> None:
    wide = _rand(3, width + 5, dtype=dtype)
    wide[1, : min(width, 128)] = 0
    wide[2] *= 1e30
    got, want = _quantized(3, width), _quantized(3, width)
    activation.quantize(LAUNCH, wide[:, :width], **got)
    activation.quantize_ref(wide[:, :width], **want)
    _same_quantized(got, want)
    assert torch.equal(got["out_scale"], want["out_scale"])
    assert got["out_scale"][1, 0] == torch.tensor(1e-4) / 448
    scale = got["out_scale"].repeat_interleave(128, 1)[:, :width]
    torch.testing.assert_close(
        got["out_q"].float() * scale, wide[:, :width].float(), rtol=2**-4, atol=1e-4
    )


def test_quantize_keeps_nan_and_its_group_apart() -> None:
    x = _rand(1, 256)
    clean, got = _quantized(1, 256), _quantized(1, 256)
    activation.quantize(LAUNCH, x, **clean)
    x[0, 200] = float("nan")
    activation.quantize(LAUNCH, x, **got)
    assert got["out_q"][0, 200].float().isnan()
    assert torch.equal(got["out_q"][0, :128].float(), clean["out_q"][0, :128].float())


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("width", "pitch"), [(1, 1), (128, 128), (129, 160), (1025, 1025)])
def test_silu_mul(width: int, pitch: int, dtype: torch.dtype) -> None:
    gate_up = _rand(3, 2 * pitch, dtype=dtype) * 4
    if pitch > width:  # the gap belongs to nobody
        gate_up[:, width:pitch] = float("nan")
        gate_up[:, pitch + width :] = float("nan")
    wide = torch.full((3, width + 2), 7.0, dtype=dtype)
    out, want = wide[:, :width], torch.empty(3, width, dtype=dtype)
    q, q_want, q_only = (_quantized(3, width) for _ in range(3))
    activation.silu_mul(LAUNCH, gate_up, out=out, **q)
    activation.silu_mul(LAUNCH, gate_up, **q_only)
    activation.silu_mul_ref(gate_up, out=want, **q_want)
    step = {F32: 1e-6, BF16: 2**-7, F16: 2**-10}[dtype]
    torch.testing.assert_close(out, want, rtol=step, atol=1e-6)
    _same_quantized(q, q_want)
    assert torch.equal(q["out_q"].view(torch.uint8), q_only["out_q"].view(torch.uint8))
    assert (wide[:, width:] == 7).all()


def test_wrong_arguments_are_named() -> None:
    x, weight = _rand(2, 128), _rand(128)
    with pytest.raises(ValueError, match="pass at least one"):
        norm.add_rmsnorm(LAUNCH, x, None, weight, eps=1e-6)
    with pytest.raises(ValueError, match="pass at least one"):
        activation.silu_mul(LAUNCH, x)
    with pytest.raises(ValueError, match=r"must be \[128\]"):
        norm.add_rmsnorm(LAUNCH, x, None, weight[:64], eps=1e-6, out=x.clone())
    wide = torch.empty(1, 16385, device="meta")
    with pytest.raises(ValueError, match="at most 16384"):
        norm.add_rmsnorm(LAUNCH, wide, None, wide[0], eps=1e-6, out=wide)
    with pytest.raises(ValueError, match=r"must be \(2, 128\) and \(2, 1\)"):
        activation.quantize(LAUNCH, x, **_quantized(2, 129))
    with pytest.raises(ValueError, match=r"\[2, 2\*P\]"):
        activation.silu_mul(LAUNCH, x, out=_rand(2, 65))


def test_kernels_compile_for_every_chip_without_spills(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[2])
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": root}
    run = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=250
    )
    assert run.returncode == 0, run.stderr
    built = json.loads(run.stdout.splitlines()[-1])
    assert {b["arch"] for b in built} == {90, 100}
    assert {b["kernel"] for b in built} == {
        *("_embed", "_add_rmsnorm", "_gather_add_rmsnorm", "_quantize", "_silu_mul"),
        *("_route", "_align", "_combine", "_greedy_chunk", "_greedy_merge"),
    }
    bad = [b for b in built if b["spilled_bytes"] or b["registers"] > 128]
    assert not bad


class _Lister:
    """A launcher that only remembers what would be launched."""

    num_sms = 132
    pdl = 1

    def __init__(self) -> None:
        self.seen: dict[str, tuple[Any, KernelSpec]] = {}

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *args: Any,
        num_warps: int = 4,
        num_stages: int = 3,
        pdl: bool = False,
        **constexprs: Any,
    ) -> None:
        spec = kernel_spec(
            kernel, args, constexprs, num_warps=num_warps, num_stages=num_stages, pdl=pdl
        )
        self.seen[spec.digest] = (kernel, spec)


def _meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _launch_real_sizes(launch: Any) -> None:
    """DeepSeek-V3 with 32 rows; the routers of Kimi-K2 and Moonlight; a vocabulary of Kimi-K2."""
    rows, hidden, vocab = 32, 7168, 129280
    x, idx, weight = _meta(rows, hidden), _meta(rows, dtype=I32), _meta(hidden)
    q = {"out_q": _meta(rows, hidden, dtype=FP8), "out_scale": _meta(rows, 56, dtype=F32)}
    norm.embed(launch, idx, _meta(vocab, hidden), idx[:1], out=x)
    norm.add_rmsnorm(launch, x, x, weight, eps=1e-6, out=x, **q)
    for parts, width in ((2, hidden), (4, hidden), (8, 4096), (14, 2048)):
        split = _meta(parts, rows, width, dtype=F32)
        norm.add_rmsnorm(launch, x[:, :width], split, weight[:width], eps=1e-6, out=x[:, :width])
    for top_k in (6, 9, 12):
        choices = _meta(rows, top_k, dtype=I32), _meta(rows, top_k, dtype=F32)
        experts = _meta(rows * top_k, hidden)
        norm.add_rmsnorm(launch, x, experts, weight, eps=1e-6, choices=choices, **q)
    wide = _meta(rows, norm.MAX_WIDTH)
    norm.add_rmsnorm(launch, wide, wide, wide[0], eps=1e-6, out=wide)
    norm.gather_add_rmsnorm(launch, x, x, idx, weight, eps=1e-6, out=x)
    activation.quantize(launch, x, **q)
    activation.silu_mul(launch, _meta(rows, 2 * hidden), out=x, **q)
    for experts, groups, kept, top_k in ((256, 8, 4, 8), (384, 1, 1, 8), (64, 1, 1, 6)):
        bias, out = _meta(experts, dtype=F32), _meta(rows, top_k, dtype=F32)
        routing.route(
            launch,
            _meta(rows, experts, dtype=F32),
            bias,
            idx,
            num_groups=groups,
            topk_groups=kept,
            top_k=top_k,
            normalize=True,
            scaling=2.5,
            out_ids=_meta(rows, top_k, dtype=I32),
            out_weights=out,
        )
    for tokens in (1, rows, 768):
        ids = _meta(tokens, 8, dtype=I32)
        expert_lists.align(
            launch, ids, expert_start=0, offsets=_meta(257, dtype=I32), pairs=_meta(tokens * 8)
        )
    pair = _meta(rows, 8, dtype=F32)
    expert_sum.combine(launch, _meta(rows * 8, hidden), _meta(rows, 8, dtype=I32), pair, x, out=x)
    for size in (vocab, 163840):
        part = _meta(rows, sample.num_chunks(size), dtype=F32)
        logits, logprob = _meta(rows, size, dtype=F32), _meta(rows, dtype=F32)
        sample.greedy(
            launch,
            logits,
            idx,
            part_max=part,
            part_arg=part.to(I32),
            part_sum=part,
            out_token=idx,
            out_logprob=logprob,
        )


def _compile(kernel: Any, spec: KernelSpec, arch: int) -> dict[str, Any]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name, _ in spec.signature]
    source = ASTSource(
        kernel,
        dict(spec.signature),
        {(names.index(name),): value for name, value in spec.constexprs},
        {(i,): [["tt.divisibility", 16]] for i in spec.aligned},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(built.asm["cubin"])
        f.flush()
        usage = subprocess.run(
            [tool, "-res-usage", f.name], capture_output=True, text=True, check=True
        ).stdout
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": spec.name,
        "arch": arch,
        "registers": found["REG"],
        "spilled_bytes": found["STACK"] + found["LOCAL"],
    }


if __name__ == "__main__":
    lister = _Lister()
    _launch_real_sizes(lister)
    print(json.dumps([_compile(k, s, a) for k, s in lister.seen.values() for a in (90, 100)]))
