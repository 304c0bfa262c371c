"""The driver and the commands. Importing this package imports neither torch nor CUDA.

All names here are imported when they are first asked for.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as typing's, whose import the first step need not wait for
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

    from barriers.errors import (
        BarrierAborted,
        BarrierTimeout,
        RankError,
        RankMismatch,
        RanksMissing,
        StepMismatch,
    )
    from capture_cache.errors import (
        ArenaError,
        CaptureError,
        CompileError,
        CorruptBundle,
        CudaError,
        FingerprintMismatch,
        OtherVersion,
        StoreError,
    )
    from graphs.keys import NotCaptured
    from runtime.driver import Runtime
    from runtime.pages import OutOfPages, OutOfRows
    from runtime.sampling import SamplingParams, StepOutput
    from runtime.turns import StepFailed

__all__ = [
    "ArenaError",
    "BarrierAborted",
    "BarrierTimeout",
    "CaptureError",
    "CompileError",
    "CorruptBundle",
    "CudaError",
    "FingerprintMismatch",
    "NotCaptured",
    "OtherVersion",
    "OutOfPages",
    "OutOfRows",
    "RankError",
    "RankMismatch",
    "RanksMissing",
    "Runtime",
    "SamplingParams",
    "StepFailed",
    "StepMismatch",
    "StepOutput",
    "StoreError",
]

_CACHE, _RANKS = "capture_cache.errors", "barriers.errors"
_HOME = {
    "Runtime": "runtime.driver",
    "StepFailed": "runtime.turns",
    "OutOfPages": "runtime.pages",
    "OutOfRows": "runtime.pages",
    "SamplingParams": "runtime.sampling",
    "StepOutput": "runtime.sampling",
    "NotCaptured": "graphs.keys",
    "ArenaError": _CACHE,
    "CaptureError": _CACHE,
    "CompileError": _CACHE,
    "CorruptBundle": _CACHE,
    "CudaError": _CACHE,
    "FingerprintMismatch": _CACHE,
    "OtherVersion": _CACHE,
    "StoreError": _CACHE,
    "BarrierAborted": _RANKS,
    "BarrierTimeout": _RANKS,
    "RankError": _RANKS,
    "RankMismatch": _RANKS,
    "RanksMissing": _RANKS,
    "StepMismatch": _RANKS,
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def _tell_interrupt(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Ctrl-C while a command still imports what it needs: a line, and not where it came."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted before it had begun", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # Python is looking for the module of `python -m runtime.…`
    sys.excepthook = _tell_interrupt
