"""GPU tests: a counted skip where there is no device, and one store of kernels for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.gpu.models import LADDERS, MODELS, options_of

# Kernels are imported by the fixtures: tests/cpu switches Triton's interpreter on before it imports
# them, and pytest may load this file first.
if TYPE_CHECKING:
    from graphs.aot import AotLauncher
    from runtime import Runtime

HERE = Path(__file__).parent
Load = Callable[..., "Runtime"]


def _unusable() -> str:
    """Why the tests of this folder cannot run in this process; empty if they can."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return (
            "Triton's interpreter is on for tests/cpu; run `python -m pytest tests/gpu` by itself"
        )
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _unusable()
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def arch() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, arch: str) -> Path:
    """A store with every kernel of every model and ladder here, compiled in parallel.

    A capture that finds one missing shows that `--compile-only` lists too little.
    """
    from capture_cache.store import Store
    from graphs.compile import KernelCompiler, compile_all
    from graphs.flashinfer_mla import FlashinferMla
    from graphs.hopper_mla import PAGE, HopperMla
    from runtime.assemble import list_kernels
    from runtime.config import RuntimeConfig
    from runtime.selection import choose

    path = tmp_path_factory.mktemp("store")
    requests = {}
    for name in MODELS:
        for ladder in LADDERS:
            chosen = options_of(name) | {"ladder": ladder, "store": str(path)}
            selection = choose(RuntimeConfig.of(**chosen), compile_only=True)
            kinds = ["triton"] if FlashinferMla.unfit(selection.model) else ["triton", "flashinfer"]
            if arch == "sm_90" and not HopperMla.unfit_here(selection.model, PAGE):
                kinds.append("hopper")
            listed = list_kernels(selection, arch, kinds).requests
            requests |= {request.spec: request for request in listed}
    compile_all(list(requests.values()), KernelCompiler(Store(path), arch))
    return path


@pytest.fixture(scope="session")
def launcher(store: Path, arch: str) -> AotLauncher:
    """Launches single kernels as a captured step does."""
    from capture_cache.store import Store
    from graphs.aot import AotLauncher
    from graphs.compile import KernelCompiler
    from kernels.triton.overlap import MODES
    from runtime.selection import DEFAULT_PDL

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    compiler = KernelCompiler(Store(store), arch)
    sms, mode = properties.multi_processor_count, MODES[DEFAULT_PDL]
    return AotLauncher(compiler, num_sms=sms, pdl=mode)


@pytest.fixture(scope="session")
def load(store: Path) -> Load:
    """Runtimes on the device; not proved unless a test asks for it."""
    from runtime import Runtime

    def load_model(name: str, **options: Any) -> Runtime:
        chosen = options_of(name) | {"store": str(store), "device": "cuda"}
        chosen |= {"verify": False, "bundle": False}
        return Runtime.load(**(chosen | options))

    return load_model


def flashinfer_reason(name: str) -> str:
    """Why flashinfer cannot take the model here; empty if it can."""
    from graphs.flashinfer_mla import FlashinferMla
    from graphs.model_config import ModelConfig, parse_overrides
    from graphs.presets import PRESETS

    chosen = options_of(name)
    overrides = parse_overrides(chosen.get("overrides", ()))
    model = ModelConfig.from_hf(PRESETS["tiny"], layers=chosen["layers"], overrides=overrides)
    usable, reason = FlashinferMla.available(model)
    return "" if usable else reason


@pytest.fixture
def needs() -> Callable[[str, str], None]:
    """Skips a test of a model with a kind of attention where the machine has no such kernel."""

    def check(name: str, attention: str) -> None:
        from graphs.planned_mla import no_hopper

        reasons = {
            "flashinfer": lambda: flashinfer_reason(name),
            "hopper": lambda: no_hopper("our own MLA"),
        }
        if reason := reasons.get(attention, str)():
            pytest.skip(reason)

    return check
