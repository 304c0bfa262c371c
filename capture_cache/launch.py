"""Launching compiled kernels: loaded once, then packed and launched as often as is wanted.

Tensor maps are encoded as Triton's own launcher encodes them (triton/backends/nvidia/driver.c,
fillTMADescriptor): no interleave, 128-byte L2 promotion, zeros out of bounds.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

from capture_cache.driver import check, cuda
from capture_cache.errors import CudaError
from capture_cache.kernel import TENSOR_MAP_BYTES, CompiledKernel, ParamBlock, TensorMapSpec
from capture_cache.restore_driver import Driver

_DEFAULT_SHARED_BYTES = 48 << 10  # what a kernel gets without asking
_L2_PROMOTION_128B = 2
_WARP = 32


class LoadedKernel:
    """A kernel in a device's context, ready to launch.

    Raises:
        CudaError: code for another chip, or more shared memory than the device has.
    """

    def __init__(self, device: Driver, kernel: CompiledKernel) -> None:
        cu = cuda()
        self.kernel = kernel
        self._block = ParamBlock(kernel.params)
        if kernel.arch != device.arch:
            raise CudaError(
                "wrong architecture",
                f"loading kernel {kernel.name} of {kernel.arch} on {device.name} ({device.arch})",
                "capture again on this chip",
            )
        doing = f"loading kernel {kernel.name}"
        self._library = check(
            cu.cuLibraryLoadData(kernel.cubin, None, None, 0, None, None, 0), doing
        )
        symbol = check(cu.cuLibraryGetKernel(self._library, kernel.name.encode()), doing)
        self._function = check(cu.cuKernelGetFunction(symbol), doing)
        self._allow_shared(device)
        self._config = self._make_config()

    def launch(
        self, grid: tuple[int, ...], values: Sequence[int | float | bytes], stream: int
    ) -> None:
        """Launch over `grid` on `stream`; an empty grid launches nothing.

        Args:
            grid: one to three dimensions, in clusters where the kernel has several blocks each.
            values: one for each of `kernel.params`; a tensor map as its 128 bytes.
            stream: a CUstream handle.

        Raises:
            CudaError: the driver refuses.
            ValueError: values that are not what the kernel takes.
        """
        x, y, z = (*grid, 1, 1)[:3]
        if x * y * z == 0:
            return
        self._block.pack(values)
        config = self._config
        config.gridDimX, config.gridDimY, config.gridDimZ = x * self.kernel.num_ctas, y, z
        config.hStream = stream
        status = cuda().cuLaunchKernelEx(config, self._function, self._block.address, 0)
        check(status, f"launching kernel {self.kernel.name} over {grid}")

    def resources(self) -> dict[str, int]:
        """What the driver says it takes: registers, local_bytes, static_shared_bytes."""
        return {
            "registers": self._attribute("NUM_REGS"),
            "local_bytes": self._attribute("LOCAL_SIZE_BYTES"),
            "static_shared_bytes": self._attribute("SHARED_SIZE_BYTES"),
        }

    @property
    def handle(self) -> int:
        """The CUfunction."""
        return int(self._function)

    def close(self) -> None:
        """Unload the code; no graph that holds it may run again. Idempotent."""
        if self._library is not None:
            library, self._library = self._library, None
            check(cuda().cuLibraryUnload(library), f"unloading kernel {self.kernel.name}")

    def _attribute(self, name: str) -> int:
        cu = cuda()
        which = getattr(cu.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")
        return int(check(cu.cuFuncGetAttribute(which, self._function), f"asking for {name}"))

    def _allow_shared(self, device: Driver) -> None:
        wanted = self.kernel.shared_bytes
        static = self._attribute("SHARED_SIZE_BYTES")
        if wanted + static <= _DEFAULT_SHARED_BYTES:
            return
        cu = cuda()
        doing = f"giving kernel {self.kernel.name} {wanted} bytes of shared memory beside {static}"
        if wanted + static > device.max_shared_bytes:
            raise CudaError(
                "too much shared memory",
                doing,
                f"the device has {device.max_shared_bytes}: lower its stages or block",
            )
        prefer = cu.CUfunc_cache.CU_FUNC_CACHE_PREFER_SHARED
        check(cu.cuFuncSetCacheConfig(self._function, prefer), doing)
        which = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(cu.cuFuncSetAttribute(self._function, which, wanted), doing)

    def _make_config(self) -> Any:
        cu, kernel = cuda(), self.kernel
        config, attributes = cu.CUlaunchConfig(), []
        config.blockDimX, config.blockDimY, config.blockDimZ = _WARP * kernel.num_warps, 1, 1
        config.sharedMemBytes = kernel.shared_bytes
        if kernel.pdl:
            attribute = cu.CUlaunchAttribute()
            attribute.id = (
                cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            )
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if kernel.num_ctas > 1:
            attribute = cu.CUlaunchAttribute()
            attribute.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x = kernel.num_ctas
            attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
            attributes.append(attribute)
        if attributes:
            config.attrs = attributes
            config.numAttrs = len(attributes)
        return config


def encode_tensor_map(
    spec: TensorMapSpec, address: int, shape: tuple[int, int], row_pitch: int
) -> bytes:
    """The 128-byte descriptor of a 2-D row-major tensor.

    Args:
        address: of element (0, 0) on the device, a multiple of 16.
        shape: (rows, cols).
        row_pitch: elements from one row to the next; in bytes a multiple of 16.

    Raises:
        ValueError: the tensor breaks one of these rules.
        CudaError: the driver refuses the descriptor.
    """
    rows, cols = shape
    pitch_bytes = row_pitch * spec.elem_bytes
    if rows < 1 or cols < 1 or address % 16 or pitch_bytes % 16:
        raise ValueError(
            "a tensor map needs a shape of at least 1x1, a base and a row pitch that are multiples "
            f"of 16 bytes, got {shape}, {address:#x}, {pitch_bytes} bytes; pad the rows"
        )
    # The driver wants 64-byte alignment of what it fills; cuda-python's own object has less.
    memory = ctypes.create_string_buffer(TENSOR_MAP_BYTES + 64)
    aligned = -(-ctypes.addressof(memory) // 64) * 64
    status = _encode_tiled()(
        aligned,
        spec.elem_type,
        2,
        address,
        (ctypes.c_uint64 * 2)(cols, rows),  # innermost first, as everything below
        (ctypes.c_uint64 * 2)(pitch_bytes, pitch_bytes * rows),
        (ctypes.c_uint32 * 2)(spec.block[1], spec.block[0]),
        (ctypes.c_uint32 * 2)(1, 1),
        0,
        spec.swizzle,
        _L2_PROMOTION_128B,
        0,
    )
    check(
        (cuda().CUresult(status),),
        f"encoding a tensor map for {shape} at {address:#x}, pitch {pitch_bytes} bytes, {spec}",
    )
    return ctypes.string_at(aligned, TENSOR_MAP_BYTES)


@functools.cache
def _encode_tiled() -> Any:
    cuda()  # the driver is loaded; this finds the same library
    function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [
        *(pointer, number, ctypes.c_uint32, pointer),
        *(pointer, pointer, pointer, pointer),
        *(number, number, number, number),
    ]
    function.restype = number
    return function


class Loader:
    """What a launcher needs of one device: kernels loaded, tensor maps encoded."""

    def __init__(self, device: Driver) -> None:
        self.device = device

    def load(self, kernel: CompiledKernel) -> LoadedKernel:
        """Raises as `LoadedKernel`."""
        return LoadedKernel(self.device, kernel)

    def encode(
        self, spec: TensorMapSpec, address: int, shape: tuple[int, int], row_pitch: int
    ) -> bytes:
        """Raises as `encode_tensor_map`."""
        return encode_tensor_map(spec, address, shape, row_pitch)
