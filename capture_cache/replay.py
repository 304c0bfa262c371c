"""An instantiated graph and the cheapest way to launch it: one driver call, its arguments ready.

Invariant: the exec belongs to this object; whoever captured the graph may drop it.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from capture_cache.driver import check, cuda


class GraphExec:
    """One executable graph, launched on one stream.

    Args:
        graph: a CUgraph handle; it is copied.
        stream: a CUstream handle.

    Attributes:
        handle: the CUgraphExec.
    Raises:
        CudaError: the driver cannot instantiate it.
    """

    def __init__(self, graph: int, stream: int) -> None:
        cu = cuda()
        exec_ = check(cu.cuGraphInstantiate(cu.CUgraph(graph), 0), "instantiating a graph")
        self.handle = int(exec_)
        self._call = _graph_launch()
        self._args = (ctypes.c_void_p(self.handle), ctypes.c_void_p(stream))
        self._context = check(cu.cuCtxGetCurrent(), "asking for the current context")
        self._thread = get_ident()

    def launch(self) -> None:
        """Launch and return; any thread may call it.

        Raises:
            CudaError: the driver refuses, or an earlier launch has failed.
        """
        if get_ident() != self._thread:
            # Another thread may have no context yet; looking its identity up costs next to nothing.
            check(cuda().cuCtxSetCurrent(self._context), "setting the context")
            self._thread = get_ident()
        status = self._call(*self._args)
        if status:
            check((cuda().CUresult(status),), "launching a graph")

    @contextmanager
    def timed(self) -> Iterator[list[int]]:
        """Within it every launch appends the ns that the driver's call took to what is yielded."""
        plain, taken, clock = self._call, list[int](), time.perf_counter_ns

        def call(graph: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
            began = clock()
            status: int = plain(graph, stream)
            taken.append(clock() - began)
            return status

        self._call = call
        try:
            yield taken
        finally:
            self._call = plain

    def close(self) -> None:
        """Destroy the exec; no launch of it may be running. Idempotent."""
        if self.handle:
            cu, handle, self.handle = cuda(), self.handle, 0
            check(cu.cuGraphExecDestroy(cu.CUgraphExec(handle)), "destroying a graph")


@functools.cache
def _graph_launch() -> Any:
    cuda()  # the driver is loaded; this finds the same library
    # PyDLL keeps the interpreter's lock: the call takes microseconds, and taking the lock back from
    # another thread of a busy server could take milliseconds. Against a library that does nothing a
    # call takes 0.12 us; cuda-python's own, its arguments ready too, 0.16 us.
    function = ctypes.PyDLL("libcuda.so.1").cuGraphLaunch
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function
