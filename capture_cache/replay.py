"""An instantiated graph and the cheapest way to launch it: one driver call, its arguments ready.

Invariant: the exec belongs to this object; whoever captured the graph may drop it.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from capture_cache.restore_driver import Driver


class GraphExec:
    """One executable graph, launched on one stream of the calling thread's context.

    Args:
        graph: a CUgraph handle; it is copied.
        stream: a CUstream handle.
        lib: driver functions; by default those of the machine.

    Attributes:
        handle: the CUgraphExec.
    Raises:
        CudaError: the driver cannot instantiate it.
    """

    def __init__(self, graph: int, stream: int, *, lib: Any = None) -> None:
        self._driver = Driver(lib)
        self._driver.adopt()
        self._thread = get_ident()
        self.handle = self._driver.instantiate(graph, "instantiating a graph")
        # Keeps the interpreter's lock: the call takes microseconds, and taking the lock back from
        # another thread of a busy server could take milliseconds. Against a library that does
        # nothing a call takes 0.12 us; cuda-python's own, its arguments ready too, 0.16 us.
        self._call = self._driver.lib.cuGraphLaunch
        self._args = (ctypes.c_void_p(self.handle), ctypes.c_void_p(stream))

    def launch(self) -> None:
        """Launch and return; any thread may call it.

        Raises:
            CudaError: the driver refuses, or an earlier launch has failed.
        """
        if get_ident() != self._thread:
            # Another thread may have no context yet; looking its identity up costs next to nothing.
            self._driver.make_current()
            self._thread = get_ident()
        status = self._call(*self._args)
        if status:
            self._driver.check(status, "launching a graph")

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
            handle, self.handle = self.handle, 0
            self._driver.drop_exec(handle)
