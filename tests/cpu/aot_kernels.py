"""Kernels for the compiler's tests, and a program that compiles them.

It runs in a process of its own because the test process has Triton's interpreter switched on. It
prints one JSON object.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from capture_cache.cubin import kernel_facts
from capture_cache.errors import CaptureError, CompileError
from capture_cache.kernel import CompiledKernel, ParamBlock, TensorMapSpec
from capture_cache.store import Store
from graphs.aot import AotLauncher
from graphs.compile import Compiled, CompileRequest, KernelCompiler, RecordingLauncher, compile_all
from kernels.triton.launch import Launcher, TensorMap


@triton.jit
def scale_add(
    x_ptr,  # *fp32 [n]
    y_ptr,  # *bf16 [n]
    n,
    scale,
    flag,
    BLOCK: tl.constexpr,
    OUT: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n) * scale
    if flag:
        x += 1
    tl.store(y_ptr + i, x.to(OUT), i < n)


@triton.jit
def gemm_nt(
    a_desc,  # fp8 [M, K]
    w_desc,  # fp8 [N, K]
    out_ptr,  # *fp32 [M, N]
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    row, col = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc += tl.dot(a_desc.load([row, k]), w_desc.load([col, k]).T)
    at = (row + tl.arange(0, BM))[:, None] * N + (col + tl.arange(0, BN))[None, :]
    tl.store(out_ptr + at, acc)


@triton.jit
def spilling(x_ptr, K, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a = tl.load(x_ptr + at)
    b = tl.load(x_ptr + at + BLOCK * BLOCK)
    for _ in range(K):
        a, b = tl.exp(a) + b, tl.exp(b) + a
    tl.store(x_ptr + at, a + b)


@triton.jit
def hidden_scratch(x_ptr, M, N, BLOCK: tl.constexpr):
    desc = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [BLOCK, BLOCK])
    desc.store([0, 0], desc.load([BLOCK, 0]) + 1)


@triton.jit
def wrong(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), undefined_name)  # noqa: F821


def step(launch: Launcher, device: str = "meta", scale: float = 0.5) -> None:
    """What a decode step is to the compiler: a function that launches."""
    x = torch.empty(1000, dtype=torch.float32, device=device)
    y = torch.empty(1000, dtype=torch.bfloat16, device=device)
    launch(scale_add, (1,), x, y, 1000, scale, True, pdl=True, BLOCK=1024, OUT=tl.bfloat16)
    launch(scale_add, (2,), x, y, 1000, scale, False, pdl=True, BLOCK=1024, OUT=tl.bfloat16)
    a = torch.empty(64, 512, dtype=torch.float8_e4m3fn, device=device)
    w = torch.empty(256, 512, dtype=torch.float8_e4m3fn, device=device)
    out = torch.empty(64, 256, dtype=torch.float32, device=device)
    blocks = TensorMap(a, (64, 128)), TensorMap(w, (128, 128))
    launch(gemm_nt, (1, 2), *blocks, out, 256, 512, BM=64, BN=128, BK=128, num_warps=4)


def _spill(launch: Launcher) -> None:
    x = torch.empty(2, 64, 64, dtype=torch.float32, device="meta")
    launch(spilling, (1,), x, 10, BLOCK=64, num_warps=1)


def _hidden(launch: Launcher) -> None:
    x = torch.empty(128, 128, dtype=torch.float32, device="meta")
    launch(hidden_scratch, (1,), x, 128, 128, BLOCK=32)


def _wrong(launch: Launcher) -> None:
    launch(wrong, (1,), torch.empty(64, device="meta"), BLOCK=64)


def record(run: Callable[[Launcher], None]) -> list[CompileRequest]:
    launcher = RecordingLauncher()
    run(launcher)
    return launcher.requests


class FakeDevice:
    """Stands for a GPU: packs as the real one, and remembers what would have been launched."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.encoded: list[tuple[Any, ...]] = []

    def load(self, kernel: CompiledKernel) -> FakeKernel:
        return FakeKernel(self, kernel)

    def encode(
        self, spec: TensorMapSpec, address: int, shape: tuple[int, int], row_pitch: int
    ) -> bytes:
        self.encoded.append((spec.block, address, shape, row_pitch))
        return b"\x01" * 128


class FakeKernel:
    def __init__(self, device: FakeDevice, kernel: CompiledKernel) -> None:
        self.device, self.kernel, self._block = device, kernel, ParamBlock(kernel.params)

    def launch(self, grid: tuple[int, ...], values: Any, stream: int) -> None:
        self._block.pack(values)
        params = [self._block.read(i).hex() for i in range(len(values))]
        self.device.launches.append(
            {"kernel": self.kernel.name, "grid": grid, "stream": stream, "params": params}
        )


def _message(error: type[Exception], run: Callable[[], object]) -> str:
    try:
        run()
    except error as e:
        return str(e)
    raise AssertionError(f"{error.__name__} was not raised")


def _rows(rows: list[Compiled]) -> list[dict[str, Any]]:
    return [r.to_json() for r in rows]


def _launching(store: Store) -> dict[str, Any]:
    """The same step on (pretended) device tensors, from what was compiled on meta tensors."""
    device = FakeDevice()
    compiler = KernelCompiler(store, 90)
    launcher = AotLauncher(
        compiler, num_sms=132, backend=device, stream=lambda: 77, visible=lambda t: True
    )
    step(launcher, "cpu")
    launcher.freeze()
    step(launcher, "cpu", scale=2.0)

    def other_block() -> None:
        x = torch.empty(1000)
        launcher(scale_add, (1,), x, x, 1000, 0.5, True, BLOCK=512, OUT=tl.float32)

    x = torch.empty(8)
    strict = AotLauncher(compiler, num_sms=132, backend=device, stream=lambda: 0)
    return {
        "compiled": launcher.num_compiled,
        "loaded": launcher.num_loaded,
        "used": launcher.used,
        "launches": device.launches,
        "frozen": _message(CaptureError, other_block),
        "host_tensor": _message(
            ValueError,
            lambda: strict(scale_add, (1,), x, x, 8, 0.5, True, BLOCK=1024, OUT=tl.float32),
        ),
    }


def _damage(store: Store) -> dict[str, Any]:
    """Flip one bit of a stored kernel, and ask for it."""
    request = record(step)[0]
    compiler = KernelCompiler(store, 90)
    path = store.root / "kernels" / "sm_90" / compiler.key(request.spec) / "cubin"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compile_all([request], compiler, jobs=1)
    return {
        "compiled": compiler.compiled,
        "warning": str(caught[0].message),
        "same_code": path.read_bytes() == good,
    }


def _survivors(deadline: float) -> int:
    """Compiling processes that are still there; they get until `deadline` to end."""
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(multiprocessing.active_children())


def main(root: str) -> dict[str, Any]:
    """Everything the tests look at."""
    store = Store(Path(root))
    report: dict[str, Any] = {}
    for arch in (90, 100):
        first, second = KernelCompiler(store, arch), KernelCompiler(store, f"sm_{arch}")
        names: list[str] = []
        rows = compile_all(record(step), first, jobs=1, progress=names.append)
        again = compile_all(record(step), second, jobs=1)
        report[f"sm_{arch}"] = {
            "first": [first.compiled, first.loaded],
            "second": [second.compiled, second.loaded],
            "names": names,
            "rows": _rows(rows),
            "again": _rows(again),
        }
    code = store.load_kernel("sm_90", report["sm_90"]["rows"][-1]["key"])
    assert code is not None
    report["facts"] = kernel_facts(code.files["cubin"])["gemm_nt"].param_bytes
    report["launching"] = _launching(store)
    report["damage"] = _damage(store)
    compiler = KernelCompiler(store, 90)
    report["spill"] = _rows(compile_all(record(_spill), compiler, jobs=1))
    requests = record(_hidden) + record(_wrong) + record(step)
    report["failure"] = _message(CompileError, lambda: compile_all(requests, compiler, jobs=1))
    fresh = KernelCompiler(Store(Path(root) / "parallel"), 90)
    report["parallel"] = _rows(compile_all(record(step), fresh, jobs=2))
    stuck = KernelCompiler(Store(Path(root) / "stuck"), 90)
    report["stuck"] = _message(
        CompileError, lambda: compile_all(record(step), stuck, jobs=2, timeout_s=0.01)
    )
    report["orphans"] = _survivors(time.monotonic() + 10)
    report["cuda"] = torch.cuda.is_initialized()
    return report


if __name__ == "__main__":
    # By name, because a compiling process would know this module by another.
    from tests.cpu import aot_kernels

    print(json.dumps(aot_kernels.main(sys.argv[1])))
