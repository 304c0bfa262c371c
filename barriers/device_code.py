"""The CUDA C++ of this package: its text, and its kernels compiled and loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from importlib import resources

from barriers.device_watch import STATE_AT, State
from barriers.watch import Record
from capture_cache.kernel import CompiledKernel, param_bytes
from capture_cache.launch import LoadedKernel
from capture_cache.nvrtc import CudaModule, compile_cuda
from capture_cache.restore_driver import Driver
from capture_cache.store import Store

BARRIER_PARAMS = ("ptr", "i64", "i32", "i32", "i32", "i32")  # of every kernel of barriers.cu
# What every source is compiled with: where the host and barrier.cuh find each other's words.
STATE_DEFINES = {
    "LOCKSTEP_STATE_AT": STATE_AT,
    "LOCKSTEP_STATE_BYTES": ctypes.sizeof(State),
    "LOCKSTEP_RECORD_BYTES": ctypes.sizeof(Record),
}


def cuda_source(name: str) -> str:
    """The text of a file of `barriers/cuda`."""
    return (resources.files("barriers") / "cuda" / name).read_text()


def cuda_headers() -> dict[str, str]:
    """Every header of `barriers/cuda`, by the name in an `#include`."""
    folder = resources.files("barriers") / "cuda"
    return {f.name: f.read_text() for f in folder.iterdir() if f.name.endswith(".cuh")}


def compile_barriers(
    name: str, arch: str, *, spacing: int = 1, store: Store | None = None
) -> CudaModule:
    """Compile a source of `barriers/cuda`; needs no GPU. Raises as `compile_cuda`.

    Args:
        spacing: words from one rank's signal to the next, 1 to 8; the same on all ranks.
    """
    return compile_with(name, arch, {"LOCKSTEP_SPACING": spacing}, store=store)


def compile_with(
    name: str, arch: str, defines: Mapping[str, int], *, store: Store | None = None
) -> CudaModule:
    """Compile a source of `barriers/cuda` with its own constants. Raises as `compile_cuda`."""
    options = [f"-D{k}={v}" for k, v in (STATE_DEFINES | dict(defines)).items()]
    return compile_cuda(cuda_source(name), arch, options, headers=cuda_headers(), store=store)


def load_kernels(
    device: Driver,
    module: CudaModule,
    kinds: Mapping[str, tuple[str, ...]],
    *,
    num_warps: int = 1,
    pdl: bool = False,
) -> dict[str, LoadedKernel]:
    """Load kernels of a module.

    Args:
        kinds: by kernel name, the kinds of its parameters (`capture_cache.kernel.PARAM_KINDS`).
        num_warps: of a block.
        pdl: launch with programmatic dependent launch.

    Raises:
        ValueError: `kinds` is not what a kernel takes.
        CudaError: as `LoadedKernel`.
    """
    loaded = {}
    for name, params in kinds.items():
        facts = module.kernels[name]
        if facts.param_bytes != param_bytes(params):
            raise ValueError(
                f"kernel {name} takes parameters of {facts.param_bytes} bytes, got kinds {params}; "
                "correct the kinds"
            )
        loaded[name] = LoadedKernel(
            device,
            CompiledKernel(
                name=name,
                arch=module.arch,
                cubin=module.cubin,
                num_warps=num_warps,
                num_ctas=1,
                pdl=pdl,
                shared_bytes=0,
                params=params,
                tensor_maps=(),
                registers=facts.registers,
                local_bytes=facts.local_bytes,
                spill_bytes=0,
            ),
        )
    return loaded
