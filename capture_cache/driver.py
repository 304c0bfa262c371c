"""The CUDA driver calls that we make, each failure turned into a named error.

Nothing is loaded before the first call: a machine without a driver can import this. No call here
waits for the device except `wait_stream`, which has a deadline.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections import Counter
from typing import Any

from capture_cache.errors import CudaError

REMEDIES = {
    "CUDA_ERROR_OUT_OF_MEMORY": "free device memory or lower --num-pages, --max-seq-len or --bs",
    "CUDA_ERROR_NO_DEVICE": "no GPU is visible: check CUDA_VISIBLE_DEVICES, or use --device cpu",
    "CUDA_ERROR_INVALID_DEVICE": "choose a device that exists (see nvidia-smi)",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "reboot, or reload the NVIDIA kernel module",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the code is for another chip: capture again on this one",
    "CUDA_ERROR_INVALID_IMAGE": "the code is damaged: delete it from the store and capture again",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "update the driver, or compile with an older toolkit",
    "CUDA_ERROR_NOT_FOUND": "the code holds no kernel of that name: delete it and capture again",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": "the kernel needs more registers or shared memory than a "
    "multiprocessor has; lower its warps, stages or block",
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": "that call is forbidden during capture: run it in "
    "preflight",
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": "an earlier call broke the capture: capture again",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "a kernel went out of bounds and the context is lost: restart; "
    "compute-sanitizer names the kernel",
}
_DEFAULT_REMEDY = "look the name up in the CUDA driver API reference"


@functools.cache
def cuda() -> Any:
    """The driver bindings, initialised.

    Raises:
        CudaError: no bindings, no driver or no device.
    """
    try:
        from cuda.bindings import driver

        result = driver.cuInit(0)
    except (ImportError, RuntimeError) as e:
        raise CudaError(
            type(e).__name__,
            "loading the CUDA driver",
            "install the NVIDIA driver and the package cuda-python, or use --device cpu",
        ) from e
    check(result, "initialising CUDA")
    return driver


def check(result: tuple[Any, ...], doing: str, remedy: str | None = None) -> Any:
    """The value, values or nothing that a driver call returned beside its success.

    Args:
        result: as cuda-python returns it, the CUresult first.
        doing: what the call was for.

    Raises:
        CudaError: the call failed.
    """
    status, *values = result
    if int(status) != 0:
        raise CudaError(status.name, doing, remedy or REMEDIES.get(status.name, _DEFAULT_REMEDY))
    return values[0] if len(values) == 1 else (tuple(values) or None)


class Device:
    """One GPU: its retained primary context (the one that torch uses), its facts, its memory.

    Raises:
        CudaError: no driver, or no such device.
    """

    def __init__(self, ordinal: int = 0) -> None:
        cu = cuda()
        self.ordinal = ordinal
        self._device = check(cu.cuDeviceGet(ordinal), f"opening device {ordinal}")
        self._context = check(cu.cuDevicePrimaryCtxRetain(self._device), "retaining the context")
        self.make_current()
        major = self._attribute("COMPUTE_CAPABILITY_MAJOR")
        self.arch = f"sm_{major}{self._attribute('COMPUTE_CAPABILITY_MINOR')}"
        self.num_sms = self._attribute("MULTIPROCESSOR_COUNT")
        self.max_shared_bytes = self._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        name = check(cu.cuDeviceGetName(128, self._device), "naming the device")
        self.name = name.split(b"\0")[0].decode()

    def make_current(self) -> None:
        """Make its context the calling thread's."""
        check(cuda().cuCtxSetCurrent(self._context), "setting the context")

    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes of device memory."""
        self.make_current()
        return memory_info()

    def close(self) -> None:
        """Release the context; others who retained it keep it. Idempotent."""
        if self._context is not None:
            self._context = None
            check(cuda().cuDevicePrimaryCtxRelease(self._device), "releasing the context")

    def _attribute(self, name: str) -> int:
        cu = cuda()
        which = getattr(cu.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(check(cu.cuDeviceGetAttribute(which, self._device), f"asking for {name}"))

    # -- virtual memory, as `capture_cache.arena.Memory` wants it ----------------------------------

    def granularity(self) -> int:
        """Bytes that physical memory and its mappings must be multiples of."""
        cu = cuda()
        which = cu.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        result = cu.cuMemGetAllocationGranularity(self._placement(), which)
        return int(check(result, "asking for the mapping granularity"))

    def reserve(self, nbytes: int, hint: int) -> int:
        """Reserve addresses, at `hint` if the driver will."""
        cu = cuda()
        result = cu.cuMemAddressReserve(nbytes, 0, cu.CUdeviceptr(hint), 0)
        return int(check(result, f"reserving {nbytes} bytes of addresses at {hint:#x}"))

    def unreserve(self, address: int, nbytes: int) -> None:
        cu = cuda()
        check(cu.cuMemAddressFree(cu.CUdeviceptr(address), nbytes), "freeing reserved addresses")

    def create(self, nbytes: int) -> Any:
        """Physical memory; returns a handle."""
        return check(cuda().cuMemCreate(nbytes, self._placement(), 0), f"allocating {nbytes} bytes")

    def release(self, handle: Any) -> None:
        check(cuda().cuMemRelease(handle), "releasing device memory")

    def map(self, address: int, nbytes: int, handle: Any) -> None:
        """Map `handle` at reserved addresses, readable and writable from this device."""
        cu = cuda()
        check(cu.cuMemMap(cu.CUdeviceptr(address), nbytes, 0, handle, 0), "mapping device memory")
        access = cu.CUmemAccessDesc()
        access.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = self.ordinal
        access.flags = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        try:
            result = cu.cuMemSetAccess(cu.CUdeviceptr(address), nbytes, [access], 1)
            check(result, "giving the device access to its memory")
        except CudaError:
            self.unmap(address, nbytes)
            raise

    def unmap(self, address: int, nbytes: int) -> None:
        cu = cuda()
        check(cu.cuMemUnmap(cu.CUdeviceptr(address), nbytes), "unmapping device memory")

    def host_alloc(self, nbytes: int) -> int:
        """Pinned host memory, at the same address for the host and for every device."""
        cu = cuda()
        flags = cu.CU_MEMHOSTALLOC_PORTABLE | cu.CU_MEMHOSTALLOC_DEVICEMAP
        address = int(check(cu.cuMemHostAlloc(nbytes, flags), f"pinning {nbytes} bytes"))
        seen = check(cu.cuMemHostGetDevicePointer(address, 0), "mapping pinned memory")
        if int(seen) != address:
            self.host_free(address)
            raise CudaError(
                "no unified addressing",
                f"mapping pinned memory (host {address:#x}, device {int(seen):#x})",
                "use a 64-bit system with unified addressing",
            )
        return address

    def host_free(self, address: int) -> None:
        check(cuda().cuMemFreeHost(address), "freeing pinned memory")

    def _placement(self) -> Any:
        cu = cuda()
        placement = cu.CUmemAllocationProp()
        placement.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        placement.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        placement.location.id = self.ordinal
        return placement


def memory_info() -> tuple[int, int]:
    """(free, total) bytes of the current context's device."""
    free, total = check(cuda().cuMemGetInfo(), "asking for free memory")
    return int(free), int(total)


def driver_version() -> str:
    """The driver's release and the CUDA version it serves, as "580.95.05 (CUDA 13.0)"."""
    version = int(check(cuda().cuDriverGetVersion(), "asking for the driver's version"))
    return f"{nvml_release()} (CUDA {version // 1000}.{version % 1000 // 10})"


def nvml_release() -> str:
    """The driver's release, such as "580.95.05"."""
    text = ctypes.create_string_buffer(96)
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")  # comes with every driver
    except OSError:
        nvml = None
    if nvml is None or nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, len(text)):
        text.value = b"unknown release"
    return text.value.decode()


def wait_stream(stream: int, timeout_s: float, doing: str) -> None:
    """Wait until `stream` is idle.

    Raises:
        CudaError: it is not within `timeout_s`, or work on it failed.
    """
    cu = cuda()
    deadline = time.monotonic() + timeout_s
    busy = cu.CUresult.CUDA_ERROR_NOT_READY
    while (result := cu.cuStreamQuery(cu.CUstream(stream)))[0] == busy:
        if time.monotonic() > deadline:
            raise CudaError(
                f"no end within {timeout_s} s",
                doing,
                "look for a kernel that spins, or a late rank",
            )
        time.sleep(0.0002)
    check(result, doing)


def graph_nodes(graph: int) -> dict[str, int]:
    """Number of nodes of a captured graph by type, as {"kernel": 274, "memcpy": 1}.

    Args:
        graph: a CUgraph handle, such as torch's `CUDAGraph.raw_cuda_graph()`.
    """
    cu = cuda()
    handle = cu.CUgraph(graph)
    _, count = check(cu.cuGraphGetNodes(handle), "counting the nodes of a graph")
    nodes, _ = check(cu.cuGraphGetNodes(handle, count), "listing the nodes of a graph")
    prefix = "CU_GRAPH_NODE_TYPE_"
    types = (check(cu.cuGraphNodeGetType(n), "asking for a node's type") for n in nodes[:count])
    return dict(Counter(t.name.removeprefix(prefix).lower() for t in types))
