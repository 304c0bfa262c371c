"""The driver through cuda-python, for what a capture does beside torch, and a device of our own.

Nothing is loaded before the first call: a machine without a driver can import this. What a restore
needs goes through `restore_driver` instead, without cuda-python.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from typing import Any

from capture_cache.errors import CudaError
from capture_cache.libcuda import DEFAULT_REMEDY, REMEDIES, nvml_release
from capture_cache.restore_driver import Driver


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
        raise CudaError(status.name, doing, remedy or REMEDIES.get(status.name, DEFAULT_REMEDY))
    return values[0] if len(values) == 1 else (tuple(values) or None)


class Device(Driver):
    """One GPU: its retained primary context (the one that torch uses), its facts, its memory.

    Raises:
        CudaError: no driver, or no such device.
    """

    def __init__(self, ordinal: int = 0) -> None:
        super().__init__()
        self.init()
        self.open(ordinal)


def memory_info() -> tuple[int, int]:
    """(free, total) bytes of the current context's device."""
    free, total = check(cuda().cuMemGetInfo(), "asking for free memory")
    return int(free), int(total)


def driver_version() -> str:
    """The driver's release and the CUDA version it serves, as "580.95.05 (CUDA 13.0)"."""
    version = int(check(cuda().cuDriverGetVersion(), "asking for the driver's version"))
    return f"{nvml_release()} (CUDA {version // 1000}.{version % 1000 // 10})"


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
