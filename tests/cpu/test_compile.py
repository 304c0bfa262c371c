"""Ahead-of-time compilation: no GPU, no Triton cache, and nothing compiled twice."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from capture_cache.cubin import KernelFacts, kernel_facts
from capture_cache.errors import CompileError, CorruptBundle, CudaError
from capture_cache.kernel import PARAM_KINDS, CompiledKernel, ParamBlock, TensorMapSpec
from capture_cache.launch import encode_tensor_map
from capture_cache.nvrtc import compile_cuda, nvrtc_version
from capture_cache.store import Store
from graphs.compile import RecordingLauncher
from tests.cpu.aot_kernels import step

ROOT = Path(__file__).resolve().parents[2]
AXPY = """
extern "C" __global__ void axpy(float* y, const float* x, float a, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] += a * x[i] * SCALE;
}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def report(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `tests.cpu.aot_kernels` saw, in a process without Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    store = tmp_path_factory.mktemp("store")
    done = subprocess.run(
        [sys.executable, "-m", "tests.cpu.aot_kernels", str(store)],
        cwd=ROOT,
        env={**environment, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_compiled_once_then_found(report: dict[str, Any], arch: str) -> None:
    seen = report[arch]
    assert (seen["first"], seen["second"]) == ([2, 0], [0, 2])
    assert seen["names"] == ["scale_add", "gemm_nt"]
    assert [r["cached"] for r in seen["rows"]] == [False, False]
    assert [r["cached"] for r in seen["again"]] == [True, True]
    for first, again in zip(seen["rows"], seen["again"], strict=True):
        assert {**first, "seconds": 0, "cached": 0} == {**again, "seconds": 0, "cached": 0}


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_resources_are_known_without_a_gpu(report: dict[str, Any], arch: str) -> None:
    add, gemm = report[arch]["rows"]
    assert 8 <= add["registers"] <= 64
    assert 64 <= gemm["registers"] <= 255
    assert gemm["shared_bytes"] > 48 << 10
    assert add["spill_bytes"] == gemm["spill_bytes"] == 0
    assert add["local_bytes"] == gemm["local_bytes"] == 0


def test_spills_are_told(report: dict[str, Any]) -> None:
    (row,) = report["spill"]
    assert row["local_bytes"] > 0
    assert row["spill_bytes"] > 0


def test_several_processes_compile_the_same(report: dict[str, Any]) -> None:
    alone, together = report["sm_90"]["rows"], report["parallel"]
    for one, two in zip(alone, together, strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_compilers_that_hang_are_ended(report: dict[str, Any]) -> None:
    assert "no kernel finished within 0.01 s, of gemm_nt, scale_add" in report["stuck"]
    assert report["orphans"] == 0


def test_all_failures_are_named_and_the_rest_is_compiled(report: dict[str, Any]) -> None:
    message = report["failure"]
    assert "2 of 4 kernels do not compile for sm_90" in message
    assert "scratch memory per block" in message
    assert "pass a TensorMap instead" in message
    assert "undefined_name" in message
    assert "'BLOCK': 64" in message


def test_the_users_triton_cache_is_left_alone(report: dict[str, Any], home: Path) -> None:
    assert report["parallel"]
    assert list(home.iterdir()) == []


def test_compiling_touches_no_cuda(report: dict[str, Any]) -> None:
    assert report["cuda"] is False


def test_a_damaged_kernel_is_compiled_again_and_told(report: dict[str, Any]) -> None:
    assert report["damage"]["compiled"] == 1
    assert report["damage"]["same_code"]
    assert "compiling scale_add again" in report["damage"]["warning"]
    assert "expected sha256" in report["damage"]["warning"]


def test_a_step_on_tensors_finds_what_was_compiled_on_meta(report: dict[str, Any]) -> None:
    launching = report["launching"]
    assert (launching["compiled"], launching["loaded"]) == (0, 2)
    keys = [[r["arch"], r["key"]] for r in report["sm_90"]["rows"]]
    assert launching["used"] == keys


def test_parameters_are_packed_as_the_code_takes_them(report: dict[str, Any]) -> None:
    add, flagless, gemm = report["launching"]["launches"][:3]
    assert (add["grid"], add["stream"], gemm["grid"]) == ([1], 77, [1, 2])
    assert add["params"][2:] == ["e8030000", "0000003f", "01", "00" * 8, "00" * 8]
    assert flagless["params"][4] == "00"
    assert [len(p) // 2 for p in gemm["params"]] == report["facts"]
    mapped, rows, cols, pitch, one = gemm["params"][5:10]
    assert mapped == "01" * 128
    assert (rows, cols) == (struct.pack("<i", 256).hex(), struct.pack("<i", 512).hex())
    assert (pitch, one) == (struct.pack("<q", 512).hex(), struct.pack("<q", 1).hex())


def test_a_new_kernel_after_preflight_is_an_error(report: dict[str, Any]) -> None:
    message = report["launching"]["frozen"]
    assert "scale_add would have to be compiled or loaded during capture" in message
    assert "BLOCK 1024 → 512" in message
    assert "preflight" in message


def test_a_host_tensor_is_refused(report: dict[str, Any]) -> None:
    assert "on cpu; take it from the arena" in report["launching"]["host_tensor"]


def test_interpreted_kernels_are_refused() -> None:
    with pytest.raises(CompileError, match="unset TRITON_INTERPRET"):
        step(RecordingLauncher())


# -- parameters and records -----------------------------------------------------------------------


def test_parameters_are_aligned_and_bounded() -> None:
    kinds = ["i1", "ptr", "i32", "tensormap", "fp32", "i64"]
    block = ParamBlock(kinds)
    assert block.offsets == (0, 8, 16, 64, 192, 200)
    block.pack([True, 2**64 - 1, -5, bytes(range(128)), 0.25, -(2**63)])
    assert block.read(1) == b"\xff" * 8
    assert block.read(2) == struct.pack("<i", -5)
    assert block.read(3) == bytes(range(128))
    assert block.read(4) == struct.pack("<f", 0.25)
    pointers = (struct.Struct("<Q").size * len(kinds), block.address % 8)
    assert pointers == (48, 0)
    for bad in (
        [True],
        [0, 1, 2**31, b"", 0.0, 0],
        [0, -1, 0, b"", 0.0, 0],
        [0, 1, 0, b"", 1e99, 0],
    ):
        with pytest.raises(ValueError, match="expected 6 parameters"):
            block.pack(bad)


def test_a_kernel_record_of_another_shape_is_refused() -> None:
    kernel = CompiledKernel(
        *("k", "sm_90", b"code", 4, 1, False, 0, ("ptr", "tensormap")),
        (TensorMapSpec(0, 1, 3, (64, 128)),),
        *(32, 0, 0),
    )
    meta, files, path = kernel.meta(), {"cubin": b"code"}, Path("entry")
    assert CompiledKernel.from_meta(json.loads(json.dumps(meta)), files, path) == kernel
    for wrong in (
        {**meta, "params": ["ptr"]},
        {**meta, "params": ["ptr", "nonsense"]},
        {**meta, "tensor_maps": [1]},
        {**meta, "extra": 1},
        {k: v for k, v in meta.items() if k != "name"},
    ):
        with pytest.raises(CorruptBundle, match="compiled again"):
            CompiledKernel.from_meta(wrong, files, path)
    with pytest.raises(CorruptBundle):
        CompiledKernel.from_meta(meta, {}, path)


@pytest.mark.parametrize("image", [b"", b"\x7fELF\x02" + b"\0" * 10, b"\x7fELF\x02" + b"\0" * 200])
def test_what_is_no_device_code_is_refused(image: bytes) -> None:
    with pytest.raises(CompileError, match="expected a CUDA ELF image"):
        kernel_facts(image)


@pytest.mark.parametrize(
    ("address", "shape", "pitch"), [(8, (4, 16), 16), (16, (0, 16), 16), (16, (4, 16), 17)]
)
def test_tensors_that_no_map_describes_are_refused(
    address: int, shape: tuple[int, int], pitch: int
) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        encode_tensor_map(TensorMapSpec(0, 1, 3, (4, 16)), address, shape, pitch)


def test_every_argument_type_has_a_kind() -> None:
    from kernels.triton.launch import _describe

    for value in (True, 3, 2**40, 0.5):
        assert _describe(value)[0] in PARAM_KINDS
    assert _describe(torch.empty(1))[0].startswith("*")


# -- CUDA C++ -------------------------------------------------------------------------------------


@pytest.fixture
def nvrtc() -> None:
    try:
        nvrtc_version()
    except CudaError as e:
        pytest.skip(str(e))


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_cuda_source_is_compiled_once(tmp_path: Path, arch: str) -> None:
    store = Store(tmp_path)
    first = compile_cuda(AXPY, arch, ["-DSCALE=2"], store=store)
    again = compile_cuda(AXPY, arch, ["-DSCALE=2"], store=store)
    other = compile_cuda(AXPY, arch, ["-DSCALE=3"], store=store)
    assert (first.cached, again.cached, other.cached) == (False, True, False)
    assert first.cubin == again.cubin != other.cubin
    facts = first.kernels["axpy"]
    assert isinstance(facts, KernelFacts)
    assert facts.param_bytes == (8, 8, 4, 4)
    assert facts.registers > 0


@pytest.mark.usefixtures("nvrtc")
def test_headers_are_part_of_the_key(tmp_path: Path) -> None:
    source = '#include "scale.h"\n' + AXPY
    store = Store(tmp_path)
    one, two = (
        compile_cuda(source, "sm_90a", headers={"scale.h": f"#define SCALE {n}\n"}, store=store)
        for n in (2, 3)
    )
    assert one.cubin != two.cubin


@pytest.mark.usefixtures("nvrtc")
def test_a_wrong_source_shows_the_compilers_log() -> None:
    with pytest.raises(CompileError, match=r'source\.cu\(4\): error: identifier "SCALE"'):
        compile_cuda(AXPY, "sm_90a")
