"""The launcher of device runs: kernels come from the store, launches go to the driver directly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch

from capture_cache.driver import Device
from capture_cache.errors import CaptureError
from capture_cache.kernel import CompiledKernel, TensorMapSpec
from capture_cache.launch import Loader
from graphs.compile import KernelCompiler
from graphs.triton_compile import require_compilable
from kernels.triton.launch import Arg, KernelSpec, TensorMap, kernel_spec
from kernels.triton.overlap import OFF

_NO_SCRATCH = (0, 0)  # Triton's two hidden pointers


class Loaded(Protocol):
    """A kernel that can be launched (`capture_cache.launch.LoadedKernel`)."""

    kernel: CompiledKernel

    @property
    def handle(self) -> int: ...

    def launch(
        self, grid: tuple[int, ...], values: Sequence[int | float | bytes], stream: int
    ) -> None: ...


class Backend(Protocol):
    """Where kernels run (`capture_cache.launch.Loader`)."""

    def load(self, kernel: CompiledKernel) -> Loaded: ...
    def encode(
        self, spec: TensorMapSpec, address: int, shape: tuple[int, int], row_pitch: int
    ) -> bytes: ...


class AotLauncher:
    """Launches ahead-of-time compiled kernels on torch's current stream.

    After its first launch a kernel costs no lookup on disk, no allocation and no synchronisation,
    so launches may be captured. `freeze()` forbids anything else.

    Args:
        compiler: finds kernels in the store and compiles what is missing.
        num_sms: multiprocessors of the device.
        pdl: how kernels overlap; a mode of `kernels.triton.overlap`.
        backend: loads and launches; by default torch's current device.
        stream: handle of the stream to launch on; by default torch's current one.
        visible: whether kernels may be given a tensor; by default, on the GPU or in pinned memory.
    """

    def __init__(
        self,
        compiler: KernelCompiler,
        *,
        num_sms: int,
        pdl: int = OFF,
        backend: Backend | None = None,
        stream: Callable[[], int] | None = None,
        visible: Callable[[torch.Tensor], bool] | None = None,
    ) -> None:
        self.compiler = compiler
        self.arch, self.num_sms, self.pdl = compiler.arch, num_sms, pdl
        self.frozen = False
        self._given_backend = backend
        self._stream = stream or _current_stream
        self._visible = visible or _on_device_or_pinned
        self._kernels: dict[KernelSpec, Loaded] = {}
        self._maps: dict[tuple[Any, ...], bytes] = {}

    @property
    def kernels(self) -> Mapping[KernelSpec, CompiledKernel]:
        """What has been launched so far."""
        return {spec: loaded.kernel for spec, loaded in self._kernels.items()}

    @property
    def handles(self) -> dict[int, CompiledKernel]:
        """What has been launched so far, by the driver's handle (CUfunction)."""
        return {loaded.handle: loaded.kernel for loaded in self._kernels.values()}

    @property
    def used(self) -> list[tuple[str, str]]:
        """(arch, key) in the store of what has been launched so far."""
        return [(k.arch, self.compiler.key(spec)) for spec, k in self.kernels.items()]

    @property
    def num_compiled(self) -> int:
        """Kernels that were not in the store."""
        return self.compiler.compiled

    @property
    def num_loaded(self) -> int:
        """Kernels that were in the store."""
        return self.compiler.loaded

    def freeze(self) -> None:
        """From now on a kernel that has not been launched before is an error: capture begins."""
        self.frozen = True

    def thaw(self) -> None:
        """Allow new kernels again."""
        self.frozen = False

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
        """Launch; as `Launcher`.

        Raises:
            CaptureError: frozen, and the kernel has not been launched before.
            CompileError, StoreError: it cannot be compiled or stored.
            CudaError: the driver refuses it.
            ValueError: a tensor that the device cannot see, or that no tensor map can describe.
        """
        require_compilable(kernel)
        spec = kernel_spec(
            kernel, args, constexprs, num_warps=num_warps, num_stages=num_stages, pdl=pdl
        )
        loaded = self._kernels.get(spec) or self._load(spec, kernel, constexprs)
        loaded.launch(grid, self._values(loaded.kernel, args), self._stream())

    def _load(self, spec: KernelSpec, kernel: Any, constexprs: Mapping[str, Any]) -> Loaded:
        if self.frozen:
            raise CaptureError(self._unexpected(spec))
        loaded = self._backend.load(self.compiler.compile(spec, kernel, constexprs))
        self._kernels[spec] = loaded
        return loaded

    @cached_property
    def _backend(self) -> Backend:
        return self._given_backend or Loader(Device(torch.cuda.current_device()))

    def _values(self, kernel: CompiledKernel, args: tuple[Arg, ...]) -> list[int | float | bytes]:
        values: list[int | float | bytes] = []
        maps = iter(kernel.tensor_maps)
        # CUDA C++ takes what it is given: no shape beside a tensor map, no scratch.
        plain = len(kernel.params) == len(args)
        for arg in args:
            if isinstance(arg, torch.Tensor):
                values.append(self._address(arg, kernel.name))
            elif isinstance(arg, TensorMap):
                parts = self._descriptor(next(maps), arg.tensor, kernel.name)
                values.extend(parts[:1] if plain else parts)
            else:
                values.append(arg)
        return values if plain else [*values, *_NO_SCRATCH]

    def _descriptor(
        self, spec: TensorMapSpec, tensor: torch.Tensor, who: str
    ) -> tuple[bytes, int, int, int, int]:
        address = self._address(tensor, who)
        if tensor.dim() != 2 or tensor.stride(1) != 1:
            raise ValueError(
                f"kernel {who}: a tensor map needs 2-D row-major data, got shape "
                f"{tuple(tensor.shape)}, strides {tensor.stride()}; make it contiguous"
            )
        rows, cols = tensor.shape
        pitch = tensor.stride(0)
        key = (spec, address, rows, cols, pitch)
        encoded = self._maps.get(key)
        if encoded is None:
            encoded = self._maps[key] = self._backend.encode(spec, address, (rows, cols), pitch)
        return encoded, rows, cols, pitch, 1

    def _address(self, tensor: torch.Tensor, who: str) -> int:
        if self._visible(tensor):
            return tensor.data_ptr()
        raise ValueError(
            f"kernel {who}: expected tensors on the GPU or in the arena's pinned memory, got "
            f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; take it from the arena"
        )

    def _unexpected(self, spec: KernelSpec) -> str:
        """What was asked for, and how it differs from the nearest kernel that exists."""
        asked = _facts(spec)
        near = [_facts(s) for s in self._kernels if s.name == spec.name]
        closest = min(near, key=lambda n: len(asked.items() - n.items()), default=None)
        if closest is None:
            difference = "it was never launched before"
        else:
            changed = sorted(k for k, v in asked.items() if closest.get(k) != v)
            difference = "differs in " + ", ".join(
                f"{k} {closest.get(k)} → {asked[k]}" for k in changed
            )
        return (
            f"kernel {spec.name} would have to be compiled or loaded during capture "
            f"({difference}); run this step in preflight first"
        )


def _facts(spec: KernelSpec) -> dict[str, str]:
    facts = {name: kind for name, kind in spec.signature if kind != "constexpr"}
    facts |= {name: repr(value) for name, value in spec.constexprs}
    names = [name for name, _ in spec.signature]
    facts["aligned"] = ",".join(names[i] for i in spec.aligned)
    return facts | {
        "num_warps": str(spec.num_warps),
        "num_stages": str(spec.num_stages),
        "pdl": str(spec.pdl),
        "source": spec.source_hash[:12],
    }


def _on_device_or_pinned(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda or tensor.is_pinned()


def _current_stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)
