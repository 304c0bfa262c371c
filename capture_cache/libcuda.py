"""The driver library through ctypes alone: cuda-python takes longer to import.

Two views of one library. Calls that return at once keep Python's lock: a thread that adds a
thousand nodes while another polls the ring would else wait for the lock after each of them. Calls
that may take a while let it go.

Addresses are passed as integers, results written to memory that the caller owns.
"""

from __future__ import annotations

import ctypes

from capture_cache.errors import CudaError

TYPE_CHECKING = False  # as typing's, which would keep the driver waiting
if TYPE_CHECKING:
    from typing import Any

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
DEFAULT_REMEDY = "look the name up in the CUDA driver API reference"

_P, _U, _U64, _I = ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int
# Every function used, with its arguments. Quick ones keep Python's lock.
QUICK: dict[str, tuple[Any, ...]] = {
    "cuCtxGetCurrent": (_P,),
    "cuCtxSetCurrent": (_P,),
    "cuDeviceGet": (_P, _I),
    "cuDeviceGetAttribute": (_P, _I, _I),
    "cuDeviceGetCount": (_P,),
    "cuDeviceGetName": (_P, _I, _I),
    "cuDeviceGetPCIBusId": (_P, _I, _I),
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
    "cuGraphAddNode_v2": (_P, _P, _P, _P, ctypes.c_size_t, _P),
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
    "cuCtxSynchronize": (),
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
    "cuMemExportToShareableHandle": (_P, _U64, _I, _U64),
    "cuMemFreeHost": (_P,),
    "cuMemHostAlloc": (_P, ctypes.c_size_t, _U),
    "cuMemImportFromShareableHandle": (_P, _P, _I),
    "cuMemMap": (_U64, ctypes.c_size_t, ctypes.c_size_t, _U64, _U64),
    "cuMemRelease": (_U64,),
    "cuMemSetAccess": (_U64, ctypes.c_size_t, _P, ctypes.c_size_t),
    "cuMemUnmap": (_U64, ctypes.c_size_t),
    "cuEventSynchronize": (_P,),
    "cuMemsetD8_v2": (_U64, ctypes.c_ubyte, ctypes.c_size_t),
    "cuMemcpyHtoDAsync_v2": (_U64, _P, ctypes.c_size_t, _P),
    "cuMemcpyDtoH_v2": (_P, _U64, ctypes.c_size_t),
    "cuMemcpyHtoD_v2": (_U64, _P, ctypes.c_size_t),
    "cuStreamDestroy_v2": (_P,),
    "cuStreamSynchronize": (_P,),
}


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
