"""From options to graphs that replay: a stored bundle where one is valid, else a capture."""

from __future__ import annotations

from runtime.bundle_names import SKIP_WEIGHTS
from runtime.config import RuntimeConfig
from runtime.opening import NotRestored, Opening
from runtime.replayer import Replayer


def load_engine(options: RuntimeConfig, *, opening: Opening | None = None) -> Replayer:
    """Restore, or capture and record; the result says which, and why.

    Args:
        opening: the device as it is being opened, where somebody has begun.

    Raises:
        ValueError: options, config or weights; or weights are to be skipped and nothing can be
            restored.
        CaptureError, ArenaError, CompileError, StoreError, RankError: named, with the remedy.
    """
    reason, replace = "the CPU twin has no graphs to restore", False
    if not options.bundle:
        reason = "bundle=False: captured as asked"
    if opening is not None and not isinstance(opening, Opening):
        raise ValueError(
            f"opening: expected a runtime.opening.Opening or None, got {type(opening).__name__}"
        )
    if opening is not None and (not options.bundle or options.device == "cpu"):
        opening.close()  # nothing to restore
    elif options.bundle and options.device != "cpu":
        opening = opening or Opening(options.local_rank)  # before the longest import
        from runtime.restore import restore

        try:
            return restore(options, opening=opening)
        except NotRestored as e:
            reason, replace = str(e), e.replace
    if options.weights == SKIP_WEIGHTS:
        raise ValueError(
            f"weights={SKIP_WEIGHTS!r} measures a restore, and nothing was restored: {reason}"
        )
    from runtime.build import build

    engine = build(options, replace=replace)
    engine.load_reason = reason
    return engine
