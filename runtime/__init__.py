"""The driver and the commands. Importing this package imports neither torch nor CUDA."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, whose import the first step need not wait for
if TYPE_CHECKING:
    from typing import Any

    from runtime.driver import Runtime, StepFailed
    from runtime.pages import OutOfPages, OutOfRows
    from runtime.sampling import SamplingParams, StepOutput

__all__ = ["OutOfPages", "OutOfRows", "Runtime", "SamplingParams", "StepFailed", "StepOutput"]

_HOME = {
    "Runtime": "driver",
    "StepFailed": "driver",
    "OutOfPages": "pages",
    "OutOfRows": "pages",
    "SamplingParams": "sampling",
    "StepOutput": "sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"runtime.{_HOME[name]}"), name)
