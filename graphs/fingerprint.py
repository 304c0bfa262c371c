"""The facts under which a capture is valid, gathered one by one.

What is not here (host name, paths, time, unrelated environment) must not invalidate a capture.
"""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

import torch

from capture_cache.driver import driver_version
from capture_cache.fingerprint import Fingerprint, Value
from capture_cache.layout import ArenaLayout
from graphs.buffers import StepConfig
from graphs.keys import Ladder
from graphs.model_config import ModelConfig
from graphs.model_source import ModelSource, model_digest

SCHEMA = 1
# Packages whose version can change the code that is captured.
PACKAGES = ("torch", "triton", "flashinfer-python", "apache-tvm-ffi", "cuda-bindings")


def fingerprint(
    source: ModelSource,
    model: ModelConfig,
    step: StepConfig,
    ladder: Ladder,
    layout: ArenaLayout,
    *,
    on_device: bool,
    kernels: str = "default",
) -> Fingerprint:
    """Every field is compared on load and shown, stored against current, when it differs.

    Args:
        kernels: how they were asked for; what follows from that is in the ledger.
    """
    facts: dict[str, Value] = {"schema": SCHEMA, **machine_facts(on_device)}
    facts |= {package: _version(package) for package in PACKAGES}
    facts |= {
        "sources": source_digest(),
        "model": source.name if source.path is None else model_digest(source.path),
        "model config": model.digest(),
        "ladder": str(ladder),
        "max rows": step.max_rows,
        "max seq len": step.max_seq_len,
        "page size": step.page_size,
        "num pages": step.num_pages,
        "attention": step.attention,
        "attention cut": step.cut,
        "ep size": step.ep_size,
        "pdl": step.pdl,
        "kernels": kernels,
        "prefetch": step.prefetch,
        "arena": layout.digest,
    }
    return Fingerprint.of(facts)


def toolchain_facts(on_device: bool) -> dict[str, Value]:
    """The machine, the libraries and our own sources: what any measurement here depends on."""
    facts = machine_facts(on_device) | {package: _version(package) for package in PACKAGES}
    return facts | {"sources": source_digest()}


def machine_facts(on_device: bool) -> dict[str, Value]:
    """The device, or the processor of a twin."""
    if not on_device:
        return {"device": "cpu twin", "processor": platform.machine()}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def source_digest() -> str:
    """sha256 over the source of everything that is captured or that lays it out."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for folder in ("kernels", "graphs", "barriers"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh"):
                digest.update(path.relative_to(root).as_posix().encode() + b"\0")
                digest.update(path.read_bytes())
    return digest.hexdigest()
