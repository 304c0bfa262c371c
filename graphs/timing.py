"""How long a launch takes, inside a CUDA graph, over rotated inputs: a median with its spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from capture_cache.errors import CaptureError

Run = Callable[[], object]
MARGIN = 0.03  # by which something else must be faster than the default, to replace it
SLACK = 0.01  # by which it may be slower at one of several points


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call; `low` and `high` are the 10th and 90th percentile of the samples.

    Attributes:
        samples: replays, each of several calls.
    """

    us: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        low, middle, high = np.percentile(samples, (10, 50, 90)).tolist()
        return cls(middle, low, high, len(samples))


def clearly_faster(other: Sequence[float], default: Sequence[float]) -> bool:
    """Whether one choice for all points should replace the default: faster on average by `MARGIN`,
    and nowhere slower by more than `SLACK`.

    Args:
        other, default: times at the same points.
    """
    ratios = [a / b for a, b in zip(other, default, strict=True)]
    return sum(ratios) / len(ratios) < 1 - MARGIN and max(ratios) <= 1 + SLACK


class Timer(Protocol):
    """Times calls that do the same over different data."""

    def __call__(self, calls: Sequence[Run]) -> Timing:
        """The time of one of `calls`; each may be run any number of times, in this order."""


class GraphTimer:
    """Times on the device: a graph of all calls, one after another, replayed.

    Args:
        stream: to capture and replay on.
        target_us: how long one replay should take at least.
        replays: timed.
    """

    MAX_CALLS = 256

    def __init__(self, stream: Any, *, target_us: float = 400.0, replays: int = 9) -> None:
        self._stream, self._target_us, self._replays = stream, target_us, replays

    def __call__(self, calls: Sequence[Run]) -> Timing:
        """Raises CaptureError where a call cannot be captured."""
        with torch.cuda.stream(self._stream):
            for call in calls:
                call()  # whatever is lazy happens here
            rough_us = self._replayed(calls, 1, 3).us
            repeats = int(min(self._target_us / max(rough_us * len(calls), 1.0), 64)) + 1
            repeats = max(1, min(repeats, self.MAX_CALLS // len(calls)))
            return self._replayed(calls, repeats, self._replays)

    def _replayed(self, calls: Sequence[Run], repeats: int, replays: int) -> Timing:
        graph, count = torch.cuda.CUDAGraph(), repeats * len(calls)
        # Not `with torch.cuda.graph(…)`, which collects garbage for a tenth of a second.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(repeats):
                for call in calls:
                    call()
        except RuntimeError as error:
            with suppress(RuntimeError):
                graph.capture_end()  # void already; the first error says why
            raise CaptureError(f"it cannot be captured: {str(error)[:200]}") from error
        graph.capture_end()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        graph.replay()
        samples = []
        for _ in range(replays):
            begin.record(self._stream)
            graph.replay()
            end.record(self._stream)
            end.synchronize()
            samples.append(begin.elapsed_time(end) * 1e3 / count)
        return Timing.of(samples)


class HostTimer:
    """Times on the CPU, for the twin: it shows that things run, and means nothing more."""

    def __call__(self, calls: Sequence[Run]) -> Timing:
        samples = []
        for call in (*calls, *calls):
            start = time.perf_counter()
            call()
            samples.append((time.perf_counter() - start) * 1e6)
        return Timing.of(samples[len(calls) :])
