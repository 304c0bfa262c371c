"""CUDA C++ to device code with NVRTC: in memory, stored by content, and without a GPU."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from capture_cache.cubin import KernelFacts, kernel_facts
from capture_cache.errors import CompileError, CorruptBundle, CudaError
from capture_cache.kernel import CUBIN
from capture_cache.store import Store


@dataclass(frozen=True)
class CudaModule:
    """A compiled CUDA C++ source.

    Attributes:
        kernels: facts of every `__global__` function, by symbol name.
        cached: it came from the store.
    """

    cubin: bytes
    arch: str
    kernels: Mapping[str, KernelFacts]
    cached: bool


def nvrtc_version() -> tuple[int, int]:
    """Raises CudaError where the library is missing."""
    nvrtc = _nvrtc()
    result, major, minor = nvrtc.nvrtcVersion()
    _check(nvrtc, result, "asking NVRTC for its version")
    return int(major), int(minor)


def compile_cuda(
    source: str,
    arch: str,
    options: Sequence[str] = (),
    *,
    headers: Mapping[str, str] | None = None,
    store: Store | None = None,
) -> CudaModule:
    """Compile `source` for `arch`, or take it from `store`.

    Args:
        source: CUDA C++; kernels `extern "C"` so that they keep their names.
        arch: "sm_90", "sm_90a", …
        options: NVRTC's own, such as "-DN=4".
        headers: text of included files, by the name in the `#include`.
        store: where to look first, and to keep the result.

    Raises:
        CompileError: the source does not compile; holds NVRTC's log.
        CudaError: NVRTC is missing.
        StoreError: the store cannot be written.
    """
    arguments = [f"--gpu-architecture={arch}", "--std=c++17", *options]
    parts = [source, arguments, sorted((headers or {}).items()), nvrtc_version()]
    digest = hashlib.sha256(json.dumps(["nvrtc", *parts]).encode()).hexdigest()
    stored = _stored(store, arch, digest)
    if stored is not None:
        return CudaModule(stored, arch, kernel_facts(stored), cached=True)
    cubin = _compile(source, arguments, headers or {})
    facts = kernel_facts(cubin)
    if store is not None:
        meta = {"kind": "nvrtc", "kernels": {name: asdict(f) for name, f in facts.items()}}
        cubin = store.publish_kernel(arch, digest, meta, {CUBIN: cubin}).files[CUBIN]
    return CudaModule(cubin, arch, facts, cached=False)


def _stored(store: Store | None, arch: str, digest: str) -> bytes | None:
    if store is None:
        return None
    try:
        loaded = store.load_kernel(arch, digest)
    except CorruptBundle as e:
        warnings.warn(f"compiling again: {e}", RuntimeWarning, stacklevel=3)
        return None
    return None if loaded is None else loaded.files[CUBIN]


def _compile(source: str, arguments: Sequence[str], headers: Mapping[str, str]) -> bytes:
    nvrtc = _nvrtc()
    names = [name.encode() for name in headers]
    texts = [text.encode() for text in headers.values()]
    result, program = nvrtc.nvrtcCreateProgram(
        source.encode(), b"source.cu", len(names), texts, names
    )
    _check(nvrtc, result, "creating an NVRTC program")
    try:
        encoded = [a.encode() for a in arguments]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if int(result) != 0:
            raise CompileError(
                f"CUDA source does not compile with {' '.join(arguments)}; correct it:\n"
                + _read(nvrtc, program, "nvrtcGetProgramLog").rstrip(b"\0").decode()
            )
        return _read(nvrtc, program, "nvrtcGetCUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(nvrtc: Any, program: Any, what: str) -> bytes:
    result, size = getattr(nvrtc, f"{what}Size")(program)
    _check(nvrtc, result, f"{what}Size")
    data = bytearray(size)
    (result,) = getattr(nvrtc, what)(program, data)
    _check(nvrtc, result, what)
    return bytes(data)


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as e:
        raise CudaError(
            type(e).__name__,
            "loading NVRTC",
            "install the package nvidia-cuda-nvrtc or a CUDA toolkit",
        ) from e
    return nvrtc


def _check(nvrtc: Any, result: Any, doing: str) -> None:
    if int(result) != 0:
        raise CudaError(nvrtc.nvrtcResult(int(result)).name, doing, "see the NVRTC documentation")
