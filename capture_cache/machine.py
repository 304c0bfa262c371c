"""Facts about this machine and installation, without a context, torch or triton.

They go into fingerprints, so each is a plain value that two processes find alike.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from capture_cache.errors import CudaError
from capture_cache.fingerprint import Value
from capture_cache.libcuda import nvml_release
from capture_cache.restore_driver import Driver

ROOT = Path(__file__).resolve().parent.parent
# Packages whose version can change the code that is captured.
PACKAGES = (
    "torch",
    "triton",
    "flashinfer-python",
    "apache-tvm-ffi",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
)
# Files that decide what is captured and where it lies; every folder whole.
SOURCES = (
    "kernels",
    "barriers",
    "graphs",
    "capture_cache/arena.py",
    "capture_cache/bundle.py",
    "capture_cache/bundle_extract.py",
    "capture_cache/bundle_fatbin.py",
    "capture_cache/bundle_golden.py",
    "capture_cache/bundle_graph.py",
    "capture_cache/bundle_program.py",
    "capture_cache/captured_kernel.py",
    "capture_cache/cubin.py",
    "capture_cache/graph_reader.py",
    "capture_cache/kernel.py",
    "capture_cache/launch.py",
    "capture_cache/layout.py",
    "capture_cache/memory_ranges.py",
    "capture_cache/nvrtc.py",
    "capture_cache/restore.py",
    "runtime/assemble.py",
    "runtime/attention_tuning.py",
    "runtime/build.py",
    "runtime/golden.py",
    "runtime/record.py",
    "runtime/selection.py",
    "runtime/tuning.py",
)
_MODULE_VERSION = Path("/proc/driver/nvidia/version")
SOURCE_SUFFIXES = (".py", ".cu", ".cuh")


def here(*, on_device: bool, ordinal: int = 0) -> dict[str, Value]:
    """The part of a fingerprint that this machine and installation decide.

    Raises:
        CudaError: a GPU is asked for and there is none.
    """
    return (device_facts(ordinal) if on_device else twin_facts()) | installation()


def installation() -> dict[str, Value]:
    """Versions and sources that decide which code is captured; asks no device."""
    versions: dict[str, Value] = {package: package_version(package) for package in PACKAGES}
    return versions | {"sources": source_digest(ROOT, SOURCES)}


def absent_packages() -> frozenset[str]:
    """Fields that this installation cannot differ in: packages it has not got compile nothing.

    A player needs none of them; with them left out it compares what is there.
    """
    return frozenset(p for p in PACKAGES if package_version(p) is None)


def device_count() -> int:
    """GPUs that this process may use; 0 without a driver."""
    try:
        return _driver().num_devices()
    except CudaError:
        return 0


def device_facts(ordinal: int, driver: Driver | None = None) -> dict[str, Value]:
    """Chip and driver of one GPU.

    Args:
        driver: an initialised one; by default this machine's.

    Raises:
        CudaError: no driver, or no such device.
    """
    driver = driver or _driver()
    major, minor = driver.compute_capability(ordinal)
    return {
        "device": driver.device_name(ordinal),
        "compute capability": f"{major}.{minor}",
        "multiprocessors": driver.num_sms(ordinal),
        "driver": f"{driver_release()} (CUDA {driver.cuda_version()})",
    }


@functools.cache
def _driver() -> Driver:
    driver = Driver()
    driver.init()
    return driver


def driver_release() -> str:
    """The driver's release, such as "580.95.05": from the kernel module, else from NVML."""
    try:
        text = _MODULE_VERSION.read_text()
    except OSError:
        return nvml_release()
    found = re.search(r"Module\s+(?:for\s+\S+\s+)?([0-9]+(?:\.[0-9]+)+)", text)
    return found[1] if found else nvml_release()


def twin_facts() -> dict[str, Value]:
    """What stands in for a GPU where the CPU twin runs."""
    import platform

    return {
        "device": "cpu twin",
        "compute capability": platform.machine(),
        "multiprocessors": None,
        "driver": None,
    }


def package_version(package: str) -> str | None:
    """The installed version; None where the package is absent. Imports nothing of it.

    As `importlib.metadata` finds it, which takes 20 ms longer to import.
    """
    return _installed(tuple(sys.path)).get(_normal(package))


@functools.cache
def _installed(folders: tuple[str, ...]) -> dict[str, str]:
    """Versions by normal name; of a package that is there twice the first one counts."""
    found: dict[str, str] = {}
    for folder in folders:
        with contextlib.suppress(OSError):
            for entry in os.listdir(folder or "."):
                stem, _, kind = entry.rpartition(".")
                if kind in ("dist-info", "egg-info"):
                    name, _, version = stem.partition("-")
                    found.setdefault(_normal(name), version.partition("-py")[0])
    return found


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


@functools.cache
def source_digest(root: Path, parts: tuple[str, ...]) -> str:
    """sha256 over names and contents of source files, the same wherever `root` lies.

    Args:
        parts: files, or folders with all that is in them, relative to `root`.
    """
    digest = hashlib.sha256()
    for part in parts:
        for name in sorted(_sources(str(root), part)):
            with open(f"{root}/{name}", "rb", buffering=0) as file:
                data = file.read()
            digest.update(f"{name}\0{len(data)}\0".encode())
            digest.update(data)
    return digest.hexdigest()


def _sources(root: str, name: str) -> Iterable[str]:
    """Source files of a folder, or the one file that `name` is; relative to `root`."""
    if name.endswith(SOURCE_SUFFIXES):
        yield name
        return
    with os.scandir(f"{root}/{name}") as entries:
        for entry in entries:
            inner = f"{name}/{entry.name}"
            if entry.is_dir():
                if entry.name != "__pycache__":
                    yield from _sources(root, inner)
            elif entry.name.endswith(SOURCE_SUFFIXES):
                yield inner
