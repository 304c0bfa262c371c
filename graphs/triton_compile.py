"""One Triton kernel to device code: what is asked of the compiler, and what is accepted from it."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from capture_cache.cubin import kernel_facts
from capture_cache.errors import CompileError
from capture_cache.kernel import CompiledKernel, TensorMapSpec, param_bytes
from kernels.cuda.source import CudaKernel
from kernels.triton.launch import KernelSpec

PTXAS_TIMEOUT_S = 600
# Triton's metadata numbers element types as PTX does; the driver's enumeration differs in three.
_DEVICE_TO_HOST_ELEM = {8: 10, 9: 8, 10: 9}
_HIDDEN_PARAMS = ("ptr", "ptr")  # global and profile scratch, null for the kernels we accept
_DESCRIPTOR_PARAMS = ("tensormap", "i32", "i32", "i64", "i64")  # map, shape, strides


@functools.cache
def toolchain(arch_number: int) -> str:
    """Everything beside a kernel's specification that decides its code: versions and knobs."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", arch_number, 32))
    facts = {
        "triton": triton.__version__,
        "ptxas": backend.hash(),
        "options": backend.parse_options({}).hash(),
        "environment": dict(get_cache_invalidating_env_vars()),
    }
    return json.dumps(facts, sort_keys=True)


def require_compilable(kernel: Any) -> None:
    """Raises CompileError unless `kernel` is CUDA C++, or Triton that can be compiled."""
    if isinstance(kernel, CudaKernel):
        return
    if not hasattr(kernel, "cache_key") or not hasattr(kernel, "fn"):
        raise CompileError(
            f"expected a @triton.jit kernel, got {getattr(kernel, '__name__', kernel)} as "
            f"{type(kernel).__name__}; unset TRITON_INTERPRET to compile"
        )


def compile_kernel(
    spec: KernelSpec, kernel: Any, constexprs: Mapping[str, Any], arch_number: int
) -> CompiledKernel:
    """Compile one launch's kernel for compute capability `arch_number` (90, 100).

    Args:
        constexprs: the real values; `spec` has them as text where they are no plain numbers.

    Raises:
        CompileError: it does not compile, or to something that cannot be captured.
    """
    require_compilable(kernel)
    arch = f"sm_{arch_number}"
    who = f"kernel {spec.name} for {arch} with {dict(spec.constexprs)}, {spec.num_warps} warps"
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=kernel,
        signature=dict(spec.signature),
        constexprs=dict(constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in spec.aligned},
    )
    options: dict[str, Any] = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    if spec.pdl:
        options["launch_pdl"] = True
    try:
        with _private_cache():
            target = GPUTarget("cuda", arch_number, 32)
            compiled = triton.compile(source, target=target, options=options)
            made, ptx = _describe(compiled, spec, arch), compiled.asm["ptx"]
    except CompileError as e:
        raise CompileError(f"{who}: {e}") from e
    except Exception as e:  # of many kinds: Triton's front end, its passes, ptxas
        raise CompileError(f"{who} does not compile: {type(e).__name__}: {e}") from e
    return made if made.local_bytes == 0 else _with_spills(made, ptx, arch_number)


@contextmanager
def _private_cache() -> Iterator[None]:
    """Triton without its own cache, and code without source paths, which differ by machine."""
    from triton import knobs

    with (
        tempfile.TemporaryDirectory(prefix="lockstep-triton-") as folder,
        knobs.cache.scope(),
        knobs.compilation.scope(),
    ):
        knobs.cache.dir = folder
        knobs.compilation.disable_line_info = True
        yield


def _describe(compiled: Any, spec: KernelSpec, arch: str) -> CompiledKernel:
    meta, cubin = compiled.metadata, compiled.asm["cubin"]
    if meta.global_scratch_size or meta.profile_scratch_size:
        raise CompileError(
            f"it wants {meta.global_scratch_size} + {meta.profile_scratch_size} bytes of scratch "
            "memory per block that its caller does not know of (a tensor descriptor made on the "
            "device, or a profiler?); pass a TensorMap instead"
        )
    if meta.launch_cooperative_grid:
        raise CompileError("cooperative launches are not supported; use a barrier of ours")
    maps = tuple(_tensor_map(m) for m in meta.tensordesc_meta or ())
    params = (*_param_kinds(spec), *_HIDDEN_PARAMS)
    facts = kernel_facts(cubin)[meta.name]
    if facts.param_bytes != param_bytes(params) or params.count("tensormap") != len(maps):
        raise CompileError(
            f"its code takes parameters of {facts.param_bytes} bytes, we pass "
            f"{param_bytes(params)} with {len(maps)} tensor maps; this Triton "
            f"({meta.triton_version}) lowers them otherwise: use 3.6"
        )
    return CompiledKernel(
        name=meta.name,
        arch=arch,
        cubin=cubin,
        num_warps=meta.num_warps,
        num_ctas=meta.num_ctas,
        pdl=spec.pdl,
        shared_bytes=meta.shared,
        params=params,
        tensor_maps=maps,
        registers=facts.registers,
        local_bytes=facts.local_bytes,
        spill_bytes=0,
    )


def _param_kinds(spec: KernelSpec) -> tuple[str, ...]:
    """The kinds of a kernel's own parameters, descriptors taken apart."""
    kinds: list[str] = []
    for _, kind in spec.signature:
        if kind.startswith("tensordesc"):
            kinds.extend(_DESCRIPTOR_PARAMS)
        elif kind != "constexpr":
            kinds.append("ptr" if kind.startswith("*") else kind)
    return tuple(kinds)


def _tensor_map(meta: Mapping[str, Any]) -> TensorMapSpec:
    if len(meta["block_size"]) != 2 or meta["fp4_padded"]:
        raise CompileError(f"only plain 2-D tensor maps are supported, got {meta}")
    rows, cols = meta["block_size"]
    elem = meta["elem_type"]
    return TensorMapSpec(
        elem_type=_DEVICE_TO_HOST_ELEM.get(elem, elem),
        elem_bytes=meta["elem_size"],
        swizzle=meta["swizzle"],
        block=(rows, cols),
    )


def _with_spills(kernel: CompiledKernel, ptx: str, arch_number: int) -> CompiledKernel:
    """Ask ptxas how much of the stack is spills: the code itself does not say."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory(prefix="lockstep-ptxas-") as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [get_ptxas(arch_number).path, "-v", str(path), "-o", str(path.with_suffix(".o"))]
        command.append(f"--gpu-name={sm_arch_from_capability(arch_number)}")
        log = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=PTXAS_TIMEOUT_S
        ).stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    return replace(kernel, spill_bytes=sum(spills))
