"""The driver calls of a restore, through ctypes alone: cuda-python takes longer to import.

Two views of one library. Calls that return at once keep Python's lock: a thread that adds a
thousand nodes while another polls the ring would else wait for the lock after each of them. Calls
that may take a while let it go.

Addresses are passed as integers, results written to memory that the caller owns.
"""

from __future__ import annotations

import ctypes
from typing import Any

from capture_cache.driver import REMEDIES
from capture_cache.errors import CudaError

_P, _U, _U64, _I = ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int
# Every function used, with its arguments. Quick ones keep Python's lock.
QUICK: dict[str, tuple[Any, ...]] = {
    "cuCtxSetCurrent": (_P,),
    "cuDeviceGet": (_P, _I),
    "cuDeviceGetAttribute": (_P, _I, _I),
    "cuDeviceGetCount": (_P,),
    "cuDeviceGetName": (_P, _I, _I),
    "cuDriverGetVersion": (_P,),
    "cuEventCreate": (_P, _U),
    "cuEventDestroy_v2": (_P,),
    "cuEventRecord": (_P, _P),
    "cuFuncGetAttribute": (_P, _I, _P),
    "cuFuncGetName": (_P, _P),
    "cuFuncGetParamInfo": (_P, ctypes.c_size_t, _P, _P),
    "cuGetErrorName": (_I, _P),
    "cuGraphAddDependencies_v2": (_P, _P, _P, _P, ctypes.c_size_t),
    "cuGraphAddEmptyNode": (_P, _P, _P, ctypes.c_size_t),
    "cuGraphAddKernelNode_v2": (_P, _P, _P, ctypes.c_size_t, _P),
    "cuGraphAddMemcpyNode": (_P, _P, _P, ctypes.c_size_t, _P, _P),
    "cuGraphAddMemsetNode": (_P, _P, _P, ctypes.c_size_t, _P, _P),
    "cuGraphCreate": (_P, _U),
    "cuGraphGetEdges_v2": (_P, _P, _P, _P, _P),
    "cuGraphGetNodes": (_P, _P, _P),
    "cuGraphKernelNodeGetAttribute": (_P, _I, _P),
    "cuGraphKernelNodeGetParams_v2": (_P, _P),
    "cuGraphKernelNodeSetAttribute": (_P, _I, _P),
    "cuGraphLaunch": (_P, _P),
    "cuGraphMemcpyNodeGetParams": (_P, _P),
    "cuGraphMemsetNodeGetParams": (_P, _P),
    "cuGraphNodeGetType": (_P, _P),
    "cuKernelGetFunction": (_P, _P),
    "cuKernelSetAttribute": (_I, _I, _P, _I),
    "cuKernelSetCacheConfig": (_P, _I, _I),
    "cuLaunchKernel": (_P, *[_U] * 7, _P, _P, _P),
    "cuLibraryGetKernel": (_P, _P, ctypes.c_char_p),
    "cuMemAddressReserve": (_P, ctypes.c_size_t, ctypes.c_size_t, _U64, _U64),
    "cuMemAddressFree": (_U64, ctypes.c_size_t),
    "cuMemGetAllocationGranularity": (_P, _P, _I),
    "cuMemGetInfo_v2": (_P, _P),
    "cuMemHostGetDevicePointer_v2": (_P, _P, _U),
    "cuMemsetD8Async": (_U64, ctypes.c_ubyte, ctypes.c_size_t, _P),
    "cuPointerGetAttribute": (_P, _I, _U64),
    "cuStreamCreate": (_P, _U),
    "cuStreamQuery": (_P,),
}
SLOW: dict[str, tuple[Any, ...]] = {
    "cuDevicePrimaryCtxRelease_v2": (_I,),
    "cuDevicePrimaryCtxRetain": (_P, _I),
    "cuGraphDestroy": (_P,),
    "cuGraphExecDestroy": (_P,),
    "cuGraphInstantiateWithFlags": (_P, _P, _U64),
    "cuGraphUpload": (_P, _P),
    "cuInit": (_U,),
    "cuLibraryLoadData": (_P, _P, _P, _P, _U, _P, _P, _U),
    "cuLibraryUnload": (_P,),
    "cuMemCreate": (_P, ctypes.c_size_t, _P, _U64),
    "cuMemFreeHost": (_P,),
    "cuMemHostAlloc": (_P, ctypes.c_size_t, _U),
    "cuMemMap": (_U64, ctypes.c_size_t, ctypes.c_size_t, _U64, _U64),
    "cuMemRelease": (_U64,),
    "cuMemSetAccess": (_U64, ctypes.c_size_t, _P, ctypes.c_size_t),
    "cuMemUnmap": (_U64, ctypes.c_size_t),
    "cuEventSynchronize": (_P,),
    "cuMemcpyHtoDAsync_v2": (_U64, _P, ctypes.c_size_t, _P),
    "cuMemcpyDtoH_v2": (_P, _U64, ctypes.c_size_t),
    "cuMemcpyHtoD_v2": (_U64, _P, ctypes.c_size_t),
    "cuStreamDestroy_v2": (_P,),
    "cuStreamSynchronize": (_P,),
}
_DEFAULT_REMEDY = "look the name up in the CUDA driver API reference"
_PINNED, _ON_DEVICE, _READ_WRITE = 1, 1, 3  # of allocations, locations and access
_PORTABLE_MAPPED = 3  # CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP
_NON_BLOCKING = 1
_QUIET_EVENT = 3  # CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING
_COMPUTE_MAJOR, _COMPUTE_MINOR, _NUM_SMS = 75, 76, 16  # CUdevice_attribute
_NOT_READY = 600
_ATTRIBUTE_BYTES = 64


class LibCuda:
    """`libcuda`, its functions with their argument types.

    Raises:
        CudaError: there is no driver, or one that is too old for a function.
    """

    def __init__(self, name: str = "libcuda.so.1") -> None:
        doing = "loading the CUDA driver"
        try:
            for library, table in ((ctypes.PyDLL(name), QUICK), (ctypes.CDLL(name), SLOW)):
                for function, arguments in table.items():
                    call = getattr(library, function)
                    call.argtypes, call.restype = arguments, ctypes.c_int
                    setattr(self, function, call)
        except OSError as e:
            raise CudaError("no driver", doing, "install it, or use --device cpu") from e
        except AttributeError as e:
            raise CudaError(str(e), doing, "update the driver to release 580 or later") from e


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
            raise CudaError(name, doing, REMEDIES.get(name, _DEFAULT_REMEDY))

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

    def create(self, nbytes: int) -> int:
        """Physical memory; returns a handle."""
        placement = self._placement()
        return self._new(
            self.lib.cuMemCreate,
            *(nbytes, ctypes.addressof(placement), 0),
            doing=f"allocating {nbytes} bytes",
        )

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

    def _placement(self) -> Any:
        # CUmemAllocationProp: type, handle types, location (type, device), then nothing asked for.
        return (ctypes.c_int * 8)(_PINNED, 0, _ON_DEVICE, self.ordinal, 0, 0, 0, 0)

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

    # -- reading a captured graph ------------------------------------------------------------------

    def graph_nodes(self, graph: int) -> list[int]:
        """Handles of all nodes."""
        count, doing = ctypes.c_size_t(), "listing the nodes of a graph"
        at = ctypes.addressof(count)
        self.check(self.lib.cuGraphGetNodes(graph, 0, at), doing)
        handles = (ctypes.c_uint64 * max(1, count.value))()
        self.check(self.lib.cuGraphGetNodes(graph, ctypes.addressof(handles), at), doing)
        return list(handles)[: count.value]

    def graph_edges(self, graph: int) -> list[tuple[int, int, bytes]]:
        """(from, to, CUgraphEdgeData) of all edges."""
        count, doing = ctypes.c_size_t(), "listing the edges of a graph"
        at, get = ctypes.addressof(count), self.lib.cuGraphGetEdges_v2
        self.check(get(graph, 0, 0, 0, at), doing)
        n = max(1, count.value)
        first, last, data = (
            (ctypes.c_uint64 * n)(),
            (ctypes.c_uint64 * n)(),
            (ctypes.c_char * 8 * n)(),
        )
        arrays = (ctypes.addressof(a) for a in (first, last, data))
        self.check(get(graph, *arrays, at), doing)
        raw = bytes(data)
        return [(first[i], last[i], raw[8 * i : 8 * i + 8]) for i in range(count.value)]

    def node_type(self, node: int) -> int:
        value = ctypes.c_int()
        status = self.lib.cuGraphNodeGetType(node, ctypes.addressof(value))
        self.check(status, "asking for a node's type")
        return value.value

    def kernel_node_params(self, node: int) -> bytes:
        """CUDA_KERNEL_NODE_PARAMS; its pointers are valid as long as the graph is."""
        return self._struct(self.lib.cuGraphKernelNodeGetParams_v2, node, 72)

    def memcpy_node_params(self, node: int, nbytes: int) -> bytes:
        """CUDA_MEMCPY3D."""
        return self._struct(self.lib.cuGraphMemcpyNodeGetParams, node, nbytes)

    def memset_node_params(self, node: int, nbytes: int) -> bytes:
        """CUDA_MEMSET_NODE_PARAMS."""
        return self._struct(self.lib.cuGraphMemsetNodeGetParams, node, nbytes)

    def node_attribute(self, node: int, which: int) -> bytes:
        """CUlaunchAttributeValue; empty where the driver knows no such attribute."""
        memory = ctypes.create_string_buffer(_ATTRIBUTE_BYTES)
        status = self.lib.cuGraphKernelNodeGetAttribute(node, which, ctypes.addressof(memory))
        return b"" if status else memory.raw

    def try_kernel_node(self, graph: int, params: bytes) -> int:
        """Add a kernel node from CUDA_KERNEL_NODE_PARAMS; 0 where the driver refuses."""
        memory, node = ctypes.create_string_buffer(params, len(params)), ctypes.c_uint64()
        out, at = ctypes.addressof(node), ctypes.addressof(memory)
        return 0 if self.lib.cuGraphAddKernelNode_v2(out, graph, 0, 0, at) else node.value

    def function_of(self, kernel: int) -> int:
        return self._new(self.lib.cuKernelGetFunction, kernel, doing="resolving a kernel")

    def function_name(self, function: int) -> str:
        at = self._new(self.lib.cuFuncGetName, function, doing="asking for a kernel's name")
        return ctypes.string_at(at).decode()

    def param_info(self, function: int) -> list[tuple[int, int]]:
        """(offset, bytes) of each parameter."""
        pair, found = (ctypes.c_size_t * 2)(), list[tuple[int, int]]()
        at = ctypes.addressof(pair)
        while not self.lib.cuFuncGetParamInfo(function, len(found), at, at + 8):
            found.append((pair[0], pair[1]))
        return found

    def function_attribute(self, function: int, which: int) -> int:
        value = ctypes.c_int()
        status = self.lib.cuFuncGetAttribute(ctypes.addressof(value), which, function)
        self.check(status, f"asking for attribute {which} of a kernel")
        return value.value

    def is_address(self, value: int, attribute: int) -> bool:
        """Whether the driver knows `value` as an address of device or pinned memory."""
        return not self.lib.cuPointerGetAttribute(self._out, attribute, value)

    def _struct(self, call: Any, node: int, nbytes: int) -> bytes:
        memory = ctypes.create_string_buffer(nbytes + 64)
        self.check(call(node, ctypes.addressof(memory)), "asking for a node's parameters")
        return memory.raw[:nbytes]
