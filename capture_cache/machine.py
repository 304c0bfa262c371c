"""Facts about this machine and installation, without a context, torch or triton.

They go into fingerprints, so each is a plain value that two processes find alike.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from capture_cache.driver import check, cuda, driver_version
from capture_cache.errors import CudaError
from capture_cache.fingerprint import Value

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
    "capture_cache/kernel.py",
    "capture_cache/launch.py",
    "capture_cache/layout.py",
    "capture_cache/nvrtc.py",
    "runtime/assemble.py",
    "runtime/build.py",
    "runtime/selection.py",
)
SOURCE_SUFFIXES = (".py", ".cu", ".cuh")


def here(*, on_device: bool, ordinal: int = 0) -> dict[str, Value]:
    """The part of a fingerprint that this machine and installation decide.

    Raises:
        CudaError: a GPU is asked for and there is none.
    """
    facts = device_facts(ordinal) if on_device else twin_facts()
    facts |= {package: package_version(package) for package in PACKAGES}
    return facts | {"sources": source_digest(ROOT, SOURCES)}


def absent_packages() -> frozenset[str]:
    """Fields that this installation cannot differ in: packages it has not got compile nothing.

    A player needs none of them; with them left out it compares what is there.
    """
    return frozenset(p for p in PACKAGES if package_version(p) is None)


def device_count() -> int:
    """GPUs that this process may use; 0 without a driver."""
    try:
        return int(check(cuda().cuDeviceGetCount(), "counting devices"))
    except CudaError:
        return 0


def device_facts(ordinal: int) -> dict[str, Value]:
    """Chip and driver of one GPU.

    Raises:
        CudaError: no driver, or no such device.
    """
    cu = cuda()
    device = check(cu.cuDeviceGet(ordinal), f"opening device {ordinal}")

    def attribute(name: str) -> int:
        which = getattr(cu.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(check(cu.cuDeviceGetAttribute(which, device), f"asking for {name}"))

    name = check(cu.cuDeviceGetName(128, device), "naming the device")
    major, minor = (attribute(f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
    return {
        "device": name.split(b"\0")[0].decode(),
        "compute capability": f"{major}.{minor}",
        "multiprocessors": attribute("MULTIPROCESSOR_COUNT"),
        "driver": driver_version(),
    }


def twin_facts() -> dict[str, Value]:
    """What stands in for a GPU where the CPU twin runs."""
    return {
        "device": "cpu twin",
        "compute capability": platform.machine(),
        "multiprocessors": None,
        "driver": None,
    }


def package_version(package: str) -> str | None:
    """The installed version; None where the package is absent. Imports nothing of it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def source_digest(root: Path, parts: tuple[str, ...]) -> str:
    """sha256 over names and contents of source files, the same wherever `root` lies.

    Args:
        parts: files, or folders with all that is in them, relative to `root`.
    """
    digest = hashlib.sha256()
    for path in _sources(root, parts):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def _sources(root: Path, parts: Iterable[str]) -> Iterable[Path]:
    for part in parts:
        whole = root / part
        found = sorted(whole.rglob("*")) if whole.is_dir() else [whole]
        yield from (path for path in found if path.suffix in SOURCE_SUFFIXES)
