"""One CUDA C++ kernel to device code, as `graphs.triton_compile` does it for Triton's."""

from __future__ import annotations

import json
import re
from typing import Any

from capture_cache.errors import CompileError
from capture_cache.kernel import CompiledKernel, TensorMapSpec, param_bytes
from capture_cache.nvrtc import compile_cuda, nvrtc_version
from kernels.cuda.source import DEFINED, CudaKernel, cuda_headers
from kernels.triton.launch import KernelSpec

SWIZZLE_128B = 3  # CU_TENSOR_MAP_SWIZZLE_128B
_ELEMENTS = {"bf16": (9, 2)}  # CUtensorMapDataType, bytes
_WGMMA = "a"  # the suffix of an architecture whose own instructions are used


def cuda_toolchain() -> str:
    """Everything beside a kernel's specification that decides its code."""
    return json.dumps({"nvrtc": nvrtc_version()})


def compile_cuda_kernel(spec: KernelSpec, kernel: CudaKernel, arch_number: int) -> CompiledKernel:
    """Compile one launch's kernel for compute capability `arch_number`.

    Raises:
        CompileError: it does not compile, or takes other parameters than it is launched with.
    """
    arch = f"sm_{arch_number}"
    chosen: dict[str, Any] = dict(spec.constexprs)
    options = [f"-D{DEFINED}{name}={value}" for name, value in chosen.items()]
    options.append(f"-D{DEFINED}SHARED={kernel.shared_bytes}")
    module = compile_cuda(kernel.source(), arch + _WGMMA, options, headers=cuda_headers())
    facts = module.kernels[kernel.name]
    types = [kind for _, kind in spec.signature if kind != "constexpr"]
    params = tuple(_param(kind) for kind in types)
    if facts.param_bytes != param_bytes(params):
        raise CompileError(
            f"kernel {kernel.name} takes parameters of {facts.param_bytes} bytes, got {types}; "
            "correct the launch"
        )
    return CompiledKernel(
        name=kernel.name,
        arch=arch,
        cubin=module.cubin,
        num_warps=spec.num_warps,
        num_ctas=int(chosen[kernel.cluster]),
        pdl=spec.pdl,
        shared_bytes=kernel.shared_bytes,
        params=params,
        tensor_maps=tuple(_tensor_map(kind) for kind in types if kind.startswith("tensordesc")),
        registers=facts.registers,
        local_bytes=facts.local_bytes,
        spill_bytes=facts.local_bytes,
    )


def _param(kind: str) -> str:
    if kind.startswith("tensordesc"):
        return "tensormap"
    return "ptr" if kind.startswith("*") else kind


def _tensor_map(kind: str) -> TensorMapSpec:
    match = re.fullmatch(r"tensordesc<(\w+)\[(\d+), (\d+)\]>", kind)
    if match is None or match[1] not in _ELEMENTS:
        raise CompileError(f"a tensor map must be of {', '.join(_ELEMENTS)} and 2-D, got {kind}")
    elem_type, elem_bytes = _ELEMENTS[match[1]]
    return TensorMapSpec(elem_type, elem_bytes, SWIZZLE_128B, (int(match[2]), int(match[3])))
