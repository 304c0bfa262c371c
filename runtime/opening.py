"""The first things a restore begins, kept light: the driver and the context take 200 ms to make.

A program that wants its first step soon makes an `Opening` before it imports anything heavier, and
hands it to `Runtime.load`.
"""

from __future__ import annotations

import threading

from capture_cache.errors import CudaError
from capture_cache.restore_driver import Driver

TYPE_CHECKING = False  # as typing's, which would keep the driver waiting
if TYPE_CHECKING:
    from typing import Any


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
    """

    def __init__(self, ordinal: int = 0, lib: Any = None) -> None:
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
