"""Driver calls that raise, through ctypes alone: a device, its memory, streams, code and graphs."""

from __future__ import annotations

import ctypes

from capture_cache.errors import CudaError
from capture_cache.libcuda import DEFAULT_REMEDY, REMEDIES, LibCuda

TYPE_CHECKING = False  # as typing's, which would keep the driver waiting
if TYPE_CHECKING:
    from typing import Any

_PINNED, _ON_DEVICE, _READ_WRITE = 1, 1, 3  # of allocations, locations and access
_FILE_HANDLE = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_PORTABLE_MAPPED = 3  # CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP
_NON_BLOCKING = 1
_QUIET_EVENT = 3  # CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING
_COMPUTE_MAJOR, _COMPUTE_MINOR, _NUM_SMS, _MAX_SHARED = 75, 76, 16, 97  # CUdevice_attribute
_NOT_READY = 600


class Driver:
    """Driver calls that raise, and the primary context of one device once it is opened.

    As `capture_cache.arena.Memory` it makes arenas.

    Args:
        lib: a `LibCuda`; tests pass a recording one.
    """

    def __init__(self, lib: Any = None) -> None:
        self.lib: Any = LibCuda() if lib is None else lib
        self.ordinal = 0
        self.context = 0
        self._word = ctypes.c_uint64()
        self._out = ctypes.addressof(self._word)

    def check(self, status: int, doing: str) -> None:
        """Raises CudaError unless `status` is success."""
        if status:
            name = self.error_name(status)
            raise CudaError(name, doing, REMEDIES.get(name, DEFAULT_REMEDY))

    def error_name(self, status: int) -> str:
        text = ctypes.c_char_p()
        self.lib.cuGetErrorName(status, ctypes.addressof(text))
        return text.value.decode() if text.value else f"CUDA error {status}"

    # -- device ------------------------------------------------------------------------------------

    def init(self) -> None:
        """Initialise the driver, which takes some 100 ms; from any thread.

        Raises:
            CudaError: no device, or a driver that does not work.
        """
        self.check(self.lib.cuInit(0), "initialising CUDA")

    def num_devices(self) -> int:
        return self._int(self.lib.cuDeviceGetCount, "counting devices")

    def open(self, ordinal: int) -> None:
        """Retain the device's primary context and make it this thread's."""
        self.check(self.lib.cuDeviceGet(self._out, ordinal), f"opening device {ordinal}")
        self.ordinal = ordinal
        self.context = self._new(
            self.lib.cuDevicePrimaryCtxRetain, ordinal, doing="retaining the context"
        )
        self.make_current()

    def adopt(self) -> None:
        """Use the calling thread's context, which belongs to somebody else: never close this."""
        self.context = self._new(self.lib.cuCtxGetCurrent, doing="asking for the current context")

    def make_current(self) -> None:
        """Make the context the calling thread's."""
        self.check(self.lib.cuCtxSetCurrent(self.context), "setting the context")

    def close(self) -> None:
        """Release the context. Idempotent."""
        if self.context:
            self.context = 0
            self.check(self.lib.cuDevicePrimaryCtxRelease_v2(self.ordinal), "releasing the context")

    def device_name(self, ordinal: int) -> str:
        text = ctypes.create_string_buffer(128)
        self.check(self.lib.cuDeviceGetName(ctypes.addressof(text), 128, ordinal), "naming it")
        return text.value.decode()

    def compute_capability(self, ordinal: int) -> tuple[int, int]:
        return self.attribute(_COMPUTE_MAJOR, ordinal), self.attribute(_COMPUTE_MINOR, ordinal)

    def num_sms(self, ordinal: int) -> int:
        return self.attribute(_NUM_SMS, ordinal)

    def cuda_version(self) -> str:
        """The CUDA version that the driver serves, such as "13.0"."""
        version = self._int(self.lib.cuDriverGetVersion, "asking for the driver's version")
        return f"{version // 1000}.{version % 1000 // 10}"

    @property
    def arch(self) -> str:
        """Of the opened device, such as "sm_90"."""
        major, minor = self.compute_capability(self.ordinal)
        return f"sm_{major}{minor}"

    @property
    def name(self) -> str:
        """Of the opened device."""
        return self.device_name(self.ordinal)

    @property
    def max_shared_bytes(self) -> int:
        """Shared memory that a block of the opened device may ask for."""
        return self.attribute(_MAX_SHARED, self.ordinal)

    def pci_bus(self) -> str:
        """Where the opened device sits: the same for every process."""
        text = ctypes.create_string_buffer(32)
        status = self.lib.cuDeviceGetPCIBusId(ctypes.addressof(text), 32, self.ordinal)
        self.check(status, "asking for the PCI bus")
        return text.value.decode()

    def attribute(self, which: int, ordinal: int) -> int:
        return self._int(self.lib.cuDeviceGetAttribute, "asking for an attribute", which, ordinal)

    # -- memory, as `capture_cache.arena.Memory` wants it ------------------------------------------

    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes of device memory."""
        pair = (ctypes.c_size_t * 2)()
        at = ctypes.addressof(pair)
        self.check(self.lib.cuMemGetInfo_v2(at, at + 8), "asking for free memory")
        return pair[0], pair[1]

    def granularity(self) -> int:
        placement = self._placement()
        return self._new(
            self.lib.cuMemGetAllocationGranularity,
            *(ctypes.addressof(placement), 0),
            doing="asking for the mapping granularity",
        )

    def reserve(self, nbytes: int, hint: int) -> int:
        """Reserve addresses, at `hint` if the driver will."""
        doing = f"reserving {nbytes} bytes of addresses at {hint:#x}"
        return self._new(self.lib.cuMemAddressReserve, nbytes, 0, hint, 0, doing=doing)

    def unreserve(self, address: int, nbytes: int) -> None:
        self.check(self.lib.cuMemAddressFree(address, nbytes), "freeing reserved addresses")

    def create(self, nbytes: int, *, shareable: bool = False) -> int:
        """Physical memory, which `export` can pass on if it is shareable; returns a handle."""
        placement = self._placement(_FILE_HANDLE if shareable else 0)
        others = " that other ranks can map" if shareable else ""
        return self._new(
            self.lib.cuMemCreate,
            *(nbytes, ctypes.addressof(placement), 0),
            doing=f"allocating {nbytes} bytes{others}",
        )

    def export(self, handle: int) -> int:
        """Shareable memory as an open file, the caller's to close."""
        fd = ctypes.c_int(-1)
        call = self.lib.cuMemExportToShareableHandle
        status = call(ctypes.addressof(fd), handle, _FILE_HANDLE, 0)
        self.check(status, "exporting memory as a file")
        return fd.value

    def import_file(self, fd: int, doing: str) -> int:
        """A handle of memory that another process exported; the file may be closed then."""
        call = self.lib.cuMemImportFromShareableHandle
        return self._new(call, fd, _FILE_HANDLE, doing=doing)

    def release(self, handle: int) -> None:
        self.check(self.lib.cuMemRelease(handle), "releasing device memory")

    def map(self, address: int, nbytes: int, handle: int) -> None:
        """Map `handle` at reserved addresses, readable and writable from this device."""
        self.check(self.lib.cuMemMap(address, nbytes, 0, handle, 0), "mapping device memory")
        access = (ctypes.c_int * 3)(_ON_DEVICE, self.ordinal, _READ_WRITE)
        status = self.lib.cuMemSetAccess(address, nbytes, ctypes.addressof(access), 1)
        try:
            self.check(status, "giving the device access to its memory")
        except CudaError:
            self.unmap(address, nbytes)
            raise

    def unmap(self, address: int, nbytes: int) -> None:
        self.check(self.lib.cuMemUnmap(address, nbytes), "unmapping device memory")

    def host_alloc(self, nbytes: int) -> int:
        """Pinned host memory, at the same address for the host and for every device."""
        doing = f"pinning {nbytes} bytes"
        address = self._new(self.lib.cuMemHostAlloc, nbytes, _PORTABLE_MAPPED, doing=doing)
        seen = self._new(self.lib.cuMemHostGetDevicePointer_v2, address, 0, doing=doing)
        if seen != address:
            self.host_free(address)
            raise CudaError(
                "no unified addressing",
                f"mapping pinned memory (host {address:#x}, device {seen:#x})",
                "use a 64-bit system with unified addressing",
            )
        return address

    def host_free(self, address: int) -> None:
        self.check(self.lib.cuMemFreeHost(address), "freeing pinned memory")

    def upload(self, address: int, data: Any) -> None:
        """Copy a contiguous numpy array to the device; waits."""
        status = self.lib.cuMemcpyHtoD_v2(address, data.ctypes.data, data.nbytes)
        self.check(status, f"copying {data.nbytes} bytes to the device")

    def download(self, data: Any, address: int) -> None:
        """Copy device memory into a contiguous numpy array; waits."""
        status = self.lib.cuMemcpyDtoH_v2(data.ctypes.data, address, data.nbytes)
        self.check(status, f"copying {data.nbytes} bytes from the device")

    def fill(self, address: int, byte: int, nbytes: int, stream: int) -> None:
        self.check(self.lib.cuMemsetD8Async(address, byte, nbytes, stream), "filling memory")

    def fill_now(self, address: int, byte: int, nbytes: int, doing: str) -> None:
        """Fill, and wait for all of the device's work."""
        self.check(self.lib.cuMemsetD8_v2(address, byte, nbytes), doing)
        self.synchronize(doing)

    def synchronize(self, doing: str) -> None:
        """Wait for all of the device's work; raises what failed."""
        self.check(self.lib.cuCtxSynchronize(), doing)

    def _placement(self, handle_types: int = 0) -> Any:
        # CUmemAllocationProp: type, handle types, location (type, device), then nothing asked for.
        return (ctypes.c_int * 8)(_PINNED, handle_types, _ON_DEVICE, self.ordinal, 0, 0, 0, 0)

    def copy_async(self, address: int, source: int, nbytes: int, stream: int) -> None:
        """Copy from pinned host memory; does not wait."""
        status = self.lib.cuMemcpyHtoDAsync_v2(address, source, nbytes, stream)
        if status:
            self.check(status, f"copying {nbytes} bytes to {address:#x}")

    # -- streams -----------------------------------------------------------------------------------

    def create_stream(self) -> int:
        return self._new(self.lib.cuStreamCreate, _NON_BLOCKING, doing="making a stream")

    def destroy_stream(self, stream: int) -> None:
        self.check(self.lib.cuStreamDestroy_v2(stream), "destroying a stream")

    def create_event(self) -> int:
        """One that is waited for without spinning, and keeps no time."""
        return self._new(self.lib.cuEventCreate, _QUIET_EVENT, doing="making an event")

    def destroy_event(self, event: int) -> None:
        self.check(self.lib.cuEventDestroy_v2(event), "destroying an event")

    def record_event(self, event: int, stream: int) -> None:
        self.check(self.lib.cuEventRecord(event, stream), "recording an event")

    def wait_event(self, event: int, doing: str) -> None:
        """Wait for what was recorded last; at once if nothing was."""
        self.check(self.lib.cuEventSynchronize(event), doing)

    def wait(self, stream: int, doing: str) -> None:
        """Wait for all work on `stream`; raises what failed."""
        self.check(self.lib.cuStreamSynchronize(stream), doing)

    def check_stream(self, stream: int, doing: str) -> None:
        """Raises CudaError if work on `stream` has failed; a busy stream is fine."""
        status = self.lib.cuStreamQuery(stream)
        if status != _NOT_READY:
            self.check(status, doing)

    # -- helpers -----------------------------------------------------------------------------------

    def _new(self, call: Any, *arguments: int | bytes, doing: str) -> int:
        """A call whose first argument receives a handle or address."""
        word = ctypes.c_uint64()
        self.check(call(ctypes.addressof(word), *arguments), doing)
        return word.value

    def _int(self, call: Any, doing: str, *arguments: int) -> int:
        value = ctypes.c_int()
        self.check(call(ctypes.addressof(value), *arguments), doing)
        return value.value

    # -- code --------------------------------------------------------------------------------------

    def load_library(self, data: bytes, doing: str) -> int:
        """Load a cubin or fat binary; the driver keeps a copy."""
        at = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
        return self._new(self.lib.cuLibraryLoadData, at, 0, 0, 0, 0, 0, 0, doing=doing)

    def unload_library(self, library: int) -> None:
        self.check(self.lib.cuLibraryUnload(library), "unloading device code")

    def kernel(self, library: int, name: str) -> int:
        doing = f"finding kernel {name}"
        return self._new(self.lib.cuLibraryGetKernel, library, name.encode(), doing=doing)

    def launch_kernel(
        self, kernel: int, grid: int, block: int, pointers: tuple[int, ...], stream: int
    ) -> None:
        """Launch a kernel that takes pointers alone, over one dimension."""
        values = (ctypes.c_uint64 * len(pointers))(*pointers)
        first = ctypes.addressof(values)
        table = (ctypes.c_void_p * len(pointers))(*(first + 8 * i for i in range(len(pointers))))
        sizes = (grid, 1, 1, block, 1, 1, 0)
        status = self.lib.cuLaunchKernel(kernel, *sizes, stream, ctypes.addressof(table), 0)
        self.check(status, f"launching a kernel over {grid} blocks")

    def set_kernel_attribute(self, kernel: int, which: int, value: int, name: str) -> None:
        status = self.lib.cuKernelSetAttribute(which, value, kernel, self.ordinal)
        self.check(status, f"setting attribute {which} of kernel {name} to {value}")

    def prefer_shared(self, kernel: int, name: str) -> None:
        status = self.lib.cuKernelSetCacheConfig(kernel, 1, self.ordinal)
        self.check(status, f"preferring shared memory for kernel {name}")

    # -- graphs ------------------------------------------------------------------------------------

    def instantiate(self, graph: int, doing: str) -> int:
        return self._new(self.lib.cuGraphInstantiateWithFlags, graph, 0, doing=doing)

    def launch(self, graph: int, stream: int, doing: str) -> None:
        """Launch an instantiated graph."""
        status = self.lib.cuGraphLaunch(graph, stream)
        if status:
            self.check(status, doing)

    def upload_graph(self, graph: int, stream: int) -> None:
        """Have an instantiated graph on the device before its first launch; does not wait."""
        self.check(self.lib.cuGraphUpload(graph, stream), "uploading a graph")

    def new_graph(self) -> int:
        return self._new(self.lib.cuGraphCreate, 0, doing="making a graph")

    def drop_graph(self, graph: int) -> None:
        self.check(self.lib.cuGraphDestroy(graph), "dropping a graph")

    def drop_exec(self, graph: int) -> None:
        self.check(self.lib.cuGraphExecDestroy(graph), "dropping an instantiated graph")
