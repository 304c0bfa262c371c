"""The first things a restore begins, kept light: the driver and the context take 200 ms to make.

A program that wants its first step soon makes an `Opening` before it imports anything heavier, and
hands it to `Runtime.load`.

Most of a context's time goes into its hardware queues, and more so where several processes make
theirs at once. A step needs few: one for each branch of its graph. So whoever is first to open the
driver here asks it for `CONNECTIONS` of them; what is set already stays.
"""

from __future__ import annotations

import ctypes
import os
import threading

from capture_cache.errors import CudaError
from capture_cache.restore_driver import Driver

TYPE_CHECKING = False  # as typing's, which would keep the driver waiting
if TYPE_CHECKING:
    from typing import Any

# Hardware queues to a device; the driver's own default is 8. A step's graph has at most two
# branches.
CONNECTIONS = 2
CONNECTIONS_VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"  # read by the driver as it is initialised


class NotRestored(RuntimeError):
    """There is nothing to restore, or it cannot be used; the message is the reason.

    Attributes:
        replace: what is stored must be replaced by the next capture.
    """

    def __init__(self, reason: str, *, replace: bool = False) -> None:
        super().__init__(reason)
        self.replace = replace


class Opening:
    """The driver and a device's primary context, made in a thread.

    Args:
        ordinal: of the device; with several ranks that of `RuntimeConfig.local_rank`.
        lib: driver functions; by default those of the machine.

    Attributes:
        connections: hardware queues that the driver was asked for, as the environment says it; None
            where nobody asked before it was opened, and it has its default.
    """

    def __init__(self, ordinal: int = 0, lib: Any = None) -> None:
        self.connections = _ask_for_connections(lib)  # not in the thread: it changes the process
        self._ordinal, self._lib = ordinal, lib
        self._driver: Driver | None = None
        self._failure: Exception | None = None
        self._initialised = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lockstep-open", daemon=True)
        self._thread.start()

    def wait_driver(self) -> Driver:
        """A driver that can be asked about devices; raises NotRestored."""
        self._initialised.wait()
        self._check()
        assert self._driver is not None
        return self._driver

    def wait_context(self) -> Driver:
        """The opened driver, its context current in this thread; raises NotRestored."""
        self._thread.join()
        driver = self.wait_driver()
        driver.make_current()
        return driver

    def close(self) -> None:
        """Release the context."""
        self._thread.join()
        if self._driver is not None:
            self._driver.close()

    def _run(self) -> None:
        try:
            driver = Driver(self._lib)
            driver.init()
            if driver.num_devices() <= self._ordinal:
                raise CudaError("no such device", f"opening device {self._ordinal}", "use another")
            self._driver = driver
            self._initialised.set()
            driver.open(self._ordinal)
        except CudaError as e:
            self._failure = e
        finally:
            self._initialised.set()

    def _check(self) -> None:
        if self._failure is not None:
            raise NotRestored(str(self._failure)) from self._failure


def _ask_for_connections(lib: Any) -> str | None:
    """Ask for `CONNECTIONS` where nobody has opened the driver, or asked; returns what holds."""
    if not _is_initialised(lib):
        os.environ.setdefault(CONNECTIONS_VARIABLE, str(CONNECTIONS))
    return os.environ.get(CONNECTIONS_VARIABLE)


def _is_initialised(lib: Any) -> bool:
    """Whether somebody in this process has opened the driver: then it is too late to ask."""
    if lib is None:
        try:
            lib = ctypes.CDLL("libcuda.so.1", os.RTLD_NOW | os.RTLD_NOLOAD)
        except OSError:  # nobody has even loaded it
            return False
    count, call = ctypes.c_int(), lib.cuDeviceGetCount
    call.argtypes = (ctypes.c_void_p,)
    return bool(call(ctypes.addressof(count)) == 0)
