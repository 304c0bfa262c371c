"""How a kernel is launched, without saying by whom.

Every launcher function in this folder takes a `Launcher` first and calls it once per kernel. The
same code then runs under Triton's own JIT or interpreter (`JitLauncher`), from code compiled ahead
and loaded through the driver, or on `meta` tensors to list what has to be compiled (both in
`graphs`).

Invariants: a launch is fully described by (kernel, argument types and alignment, constexprs, warps,
stages, pdl); nothing here allocates device memory or synchronises.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from kernels.cuda.source import CudaKernel
from kernels.triton.overlap import OFF

TRITON_TYPES: dict[torch.dtype, str] = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}
ALIGNMENT = 16  # bytes: the only pointer and integer fact a kernel is specialised on


@dataclass(frozen=True)
class TensorMap:
    """A 2-D row-major tensor to be read or written through the bulk copy engine in fixed blocks.

    Args:
        tensor: [rows, cols], last stride 1, row pitch and base multiples of 16 bytes.
        block: elements (rows, cols) moved by one copy.
    """

    tensor: torch.Tensor
    block: tuple[int, int]


Arg = torch.Tensor | TensorMap | int | float


class Launcher(Protocol):
    """Launches `kernel` over `grid` on the current stream.

    `args` are the kernel's run-time arguments in order, `constexprs` its compile-time ones by name.

    Attributes:
        arch: of the device, such as "sm_90".
        num_sms: multiprocessors of the device.
        pdl: how kernels overlap; a mode of `kernels.triton.overlap`.
    """

    arch: str
    num_sms: int
    pdl: int

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *args: Arg,
        num_warps: int = 4,
        num_stages: int = 3,
        pdl: bool = False,
        **constexprs: Any,
    ) -> None: ...


class JitLauncher:
    """Triton's own launcher: the interpreter in tests (`TRITON_INTERPRET=1`), JIT in
    experiments."""

    def __init__(self, num_sms: int = 132, arch: str = "sm_90", pdl: int = OFF) -> None:
        self.num_sms, self.arch, self.pdl = num_sms, arch, pdl

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
        from triton.tools.tensor_descriptor import TensorDescriptor

        real = [
            TensorDescriptor(a.tensor, list(a.tensor.shape), list(a.tensor.stride()), list(a.block))
            if isinstance(a, TensorMap)
            else a
            for a in args
        ]
        options = {"launch_pdl": True} if pdl else {}
        kernel[grid](*real, num_warps=num_warps, num_stages=num_stages, **options, **constexprs)


class Ordinary:
    """Another launcher's launches, each of which waits for all that comes before it."""

    def __init__(self, inner: Launcher) -> None:
        self._inner = inner
        self.arch, self.num_sms, self.pdl = inner.arch, inner.num_sms, OFF

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], *args: Arg, pdl: bool = False, **options: Any
    ) -> None:
        """As `Launcher`; kernels ask `overlap(launch)`, so none comes with `pdl`."""
        assert not pdl
        self._inner(kernel, grid, *args, **options)


@dataclass(frozen=True)
class KernelSpec:
    """Everything that decides the machine code of one kernel.

    Attributes:
        name: of the kernel function.
        source_hash: of the function's source and of all that it refers to; see `source_hash`.
        signature: (argument, type) pairs, constexprs included as "constexpr", in kernel order.
        aligned: indices of arguments whose address or value is a multiple of 16; Triton's only.
        constexprs: (name, value) pairs, sorted.
        is_cuda: of CUDA C++, which has no stages.
    """

    name: str
    source_hash: str
    signature: tuple[tuple[str, str], ...]
    aligned: tuple[int, ...]
    constexprs: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    pdl: bool
    is_cuda: bool = field(default=False, repr=False)

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()


def kernel_spec(
    kernel: Any,
    args: tuple[Arg, ...],
    constexprs: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int,
    pdl: bool,
) -> KernelSpec:
    """Describe one launch; the same on `meta` tensors as on a device with 16-byte-aligned bases.

    Raises:
        TypeError: the arguments do not fit the kernel's parameters.
    """
    names: list[str] = list(kernel.arg_names)
    runtime_names = [n for n in names if n not in constexprs]
    unknown = sorted(set(constexprs) - set(names))
    if len(runtime_names) != len(args) or unknown:
        raise TypeError(
            f"{kernel.__name__} takes {runtime_names} at run time, got {len(args)} arguments"
            + (f"; no such parameters: {unknown}" if unknown else "")
        )
    types = {n: "constexpr" for n in constexprs}
    aligned: list[int] = []
    for name, arg in zip(runtime_names, args, strict=True):
        types[name], is_aligned = _describe(arg)
        if is_aligned:
            aligned.append(names.index(name))
    return KernelSpec(
        name=kernel.__name__,
        source_hash=source_hash(kernel),
        signature=tuple((n, types[n]) for n in names),
        aligned=() if isinstance(kernel, CudaKernel) else tuple(aligned),
        constexprs=tuple(sorted((k, constexpr_value(v)) for k, v in constexprs.items())),
        num_warps=num_warps,
        num_stages=num_stages,
        pdl=pdl,
        is_cuda=isinstance(kernel, CudaKernel),
    )


@functools.cache
def source_hash(kernel: Any) -> str:
    """sha256 of a kernel's source, of the kernels it calls and of the global constants they use.

    Triton's own `cache_key` depends on which of several kernels was hashed first, and so differs
    between processes; this does not, nor does it on where in its file a kernel stands.
    """
    if isinstance(kernel, CudaKernel):
        return kernel.source_hash()
    found: dict[str, str] = {}
    _collect_sources(kernel, found)
    text = "\0".join(f"{name}\0{source}" for name, source in sorted(found.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _collect_sources(kernel: Any, found: dict[str, str]) -> None:
    name = f"{kernel.fn.__module__}.{kernel.fn.__qualname__}"
    if name in found:
        return
    found[name] = kernel.src
    scope = kernel.fn.__globals__
    for node in ast.walk(ast.parse(kernel.src)):
        if isinstance(node, ast.Name):
            used = scope.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used = getattr(scope.get(node.value.id), node.attr, None)
        else:
            continue
        if isinstance(used, tl.constexpr):
            found[f"{name}:{ast.unparse(node)}"] = repr(used.value)
        elif isinstance(used, triton.JITFunction) and not used.fn.__module__.startswith("triton."):
            _collect_sources(used, found)


def constexpr_value(value: Any) -> Any:
    """A constexpr as a plain, printable value (a `tl.dtype` by its name)."""
    return value if isinstance(value, int | float | bool | str | type(None)) else str(value)


def _describe(arg: Arg) -> tuple[str, bool]:
    if isinstance(arg, TensorMap):
        block = ", ".join(str(b) for b in arg.block)
        return f"tensordesc<{TRITON_TYPES[arg.tensor.dtype]}[{block}]>", False
    if isinstance(arg, torch.Tensor):
        # A meta tensor has no address: its arena base is aligned, so its offset decides.
        at = (
            arg.storage_offset() * arg.element_size()
            if arg.device.type == "meta"
            else arg.data_ptr()
        )
        return f"*{TRITON_TYPES[arg.dtype]}", at % ALIGNMENT == 0
    if isinstance(arg, bool):
        return "i1", False
    if isinstance(arg, int):
        return ("i32" if -(2**31) <= arg < 2**31 else "i64"), arg % ALIGNMENT == 0
    return "fp32", False
