"""A bundle's device code in the driver: libraries, kernels, their attributes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from capture_cache.bundle import Function, Program, Table
from capture_cache.bundle_files import BundleFiles
from capture_cache.restore_driver import Driver

_MAX_DYNAMIC_SHARED, _CARVEOUT, _NONPORTABLE_CLUSTER = 8, 9, 14  # CUfunction_attribute


class Code:
    """The kernels of a program, each loaded when it is first wanted; for several threads."""

    def __init__(self, driver: Driver, files: BundleFiles) -> None:
        self._driver, self._files = driver, files
        self._libraries: dict[int, int] = {}
        self._lock = threading.Lock()
        program = files.program
        self._kernels = np.zeros(max(1, len(program.functions)), np.uint64)
        counts = [len(f.params) for f in program.functions] or [0]
        self.num_params = np.array(counts, np.int64)
        self.first_param = np.cumsum(self.num_params) - self.num_params
        self.offsets = np.array([o for f in program.functions for o, _ in f.params], np.uint64)

    @property
    def num_libraries(self) -> int:
        return len(self._libraries)

    def name(self, function: int) -> str:
        return self._files.program.functions[function].name

    def kernels(self, functions: Table) -> Table:
        """CUkernel handles, uint64, of function indices.

        Raises:
            CudaError: code that the driver refuses.
        """
        handles: Table = self._kernels[functions]
        if not handles.all():
            with self._lock:
                for index in set(functions.tolist()):
                    if not self._kernels[index]:
                        self._kernels[index] = self._load(self._files.program.functions[index])
            handles = self._kernels[functions]
        return handles

    def close(self) -> None:
        """Unload all code; no graph that uses it may run again. Idempotent."""
        while self._libraries:
            self._driver.unload_library(self._libraries.popitem()[1])
        self._kernels[:] = 0

    def _load(self, function: Function) -> int:
        driver, name = self._driver, function.name
        library = self._libraries.get(function.module)
        if library is None:
            data = self._files.code(function.module)
            library = driver.load_library(data, f"loading the code of kernel {name}")
            self._libraries[function.module] = library
        kernel = driver.kernel(library, name)
        for which, value in (
            (_MAX_DYNAMIC_SHARED, function.max_dynamic_shared),
            (_CARVEOUT, function.carveout),
            (_NONPORTABLE_CLUSTER, 1 if function.nonportable_cluster else -1),
        ):
            if value >= 0:
                driver.set_kernel_attribute(kernel, which, value, name)
        if function.prefer_shared:
            driver.prefer_shared(kernel, name)
        return kernel


def symbol_table(program: Program, find: Callable[[str], int]) -> Table:
    """Addresses, uint64, of a program's symbols; `find` raises for a name that it does not know."""
    return np.array([find(s.name) for s in program.symbols] or [0], np.uint64)
