"""`python -m bench.host_time`: what the driver's Python costs per step, with a device that is free.

The engine here does nothing: a launch publishes its step at once. What remains is `Runtime.launch`
and `Runtime.collect`, over rows that all decode. Needs no GPU. On one, add what launching a graph
takes (`runtime.replay_bench` shows both, "python us" and "launch us").
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.table import Table

from graphs.keys import GraphKey, Ladder
from graphs.model_config import ModelConfig
from graphs.presets import PRESETS
from graphs.step_config import StepConfig, mailbox_layout
from kernels.triton.state import HEADER, MAX_TOP, RING_SLOTS, RingLayout, mask_words
from runtime.cli import command, console, print_json, run
from runtime.driver import Runtime
from runtime.replayer import Replayer
from runtime.report import provenance
from runtime.row_params import Admission

MARK_US = 30.0
PAGE = 64
CTX_LEN = 2000
WARM_UP = 100


class NoDevice:
    """Stands where an engine would; every launched step is finished, each row with token 1.

    Args:
        rows: all of which the bench occupies.
        max_seq_len: tokens a row may reach.
    """

    ring_header = HEADER
    deadline_s = 10.0

    def __init__(self, rows: int, max_seq_len: int) -> None:
        pages = -(-max_seq_len // PAGE)
        self.config = StepConfig(
            max_rows=rows, max_seq_len=max_seq_len, page_size=PAGE, num_pages=rows * pages + 1
        )
        self.model_config = ModelConfig.from_hf(PRESETS["tiny"])
        self.ladder = Ladder([GraphKey(rows, rows), GraphKey(rows + PAGE, rows)])
        self.mailbox_layout = mailbox_layout(self.config, self.ladder)
        self.mailbox = np.full((2, self.mailbox_layout.words), -1, np.int32)
        self.ring = np.zeros((RING_SLOTS, RingLayout(rows).words), np.int32)
        self.ring_step = np.zeros(RING_SLOTS, np.int64)
        vocab = self.model_config.vocab_size
        self.ring_top = np.zeros((RING_SLOTS, rows, 2, MAX_TOP), np.int32)
        self.ring_logits = np.zeros((2, 1, vocab), np.float32)
        self.forced_tokens = np.zeros((rows, max_seq_len), np.int32)
        self.masks = np.zeros((2, rows, mask_words(vocab)), np.int32)
        self.steps = 0
        self.ring[:, 0] = rows
        self.ring[:, HEADER : HEADER + rows] = np.arange(rows)
        self.ring[:, HEADER + rows : HEADER + 2 * rows] = 1

    def replay(self, key: GraphKey) -> None:
        """Publish the step that was launched."""
        self.steps += 1
        self.ring_step[(self.steps - 1) % RING_SLOTS] = self.steps

    def adopt(self, length: int, rows: Mapping[int, tuple[Admission, list[int]]]) -> None:
        """Nobody keeps row state here."""

    def check_ranks(self) -> None:
        """No peer can be late."""

    def check_alive(self) -> None:
        """Nothing can die."""

    def close(self) -> None:
        """Nothing to release."""


@dataclass(frozen=True)
class HostTime:
    """Microseconds of the driver's calls for one number of rows; medians over steps.

    Attributes:
        crossing_us: launch and collect of a step in which a row begins a page.
        changed_us: launch and collect of a step after a row has changed hands: every entry is
            looked up.
        functions: (function, calls a step, us a step in itself), the dearest first, under a
            profiler, which makes each call dearer than it is.
    """

    rows: int
    launch_us: float
    collect_us: float
    p99_us: float
    crossing_us: float
    changed_us: float
    functions: list[tuple[str, float, float]]

    @property
    def step_us(self) -> float:
        return self.launch_us + self.collect_us


def measure(rows: int, steps: int) -> HostTime:
    """Time `steps` steps of `rows` decoding rows, two in flight."""
    launch, collect, crossing = _timed(rows, steps)
    both = launch + collect
    return HostTime(
        rows=rows,
        launch_us=float(np.median(launch)),
        collect_us=float(np.median(collect)),
        p99_us=float(np.percentile(both, 99)),
        crossing_us=float(np.median(both[crossing])) if crossing.any() else float(np.median(both)),
        changed_us=float(np.median(sum(_timed(rows, steps, changing=True)[:2]))),
        functions=profiled(rows, steps, most=12),
    )


def _runtime(rows: int, steps: int) -> Runtime:
    tokens = WARM_UP + steps + 4
    runtime = Runtime(cast(Replayer, NoDevice(rows, CTX_LEN + PAGE + tokens + 1)))
    # Rows of equal length would all begin a page in the same step.
    for row in range(rows):
        runtime.occupy(1, CTX_LEN + row % PAGE, tokens)
    runtime.launch()
    for _ in range(WARM_UP):
        runtime.launch()
        runtime.collect()
    return runtime


def _timed(rows: int, steps: int, *, changing: bool = False) -> tuple[Any, Any, Any]:
    """Microseconds of each launch and collect, and in which steps a row begins a page.

    Args:
        changing: every step as after a row has changed hands.
    """
    runtime = _runtime(rows, steps)
    clock = time.perf_counter_ns
    times = np.zeros((2, steps))
    crossing = np.zeros(steps, bool)
    for i in range(steps):
        if changing:
            runtime._scheduler.past.end()
        begin = clock()
        runtime.launch()
        middle = clock()
        runtime.collect()
        end = clock()
        times[:, i] = middle - begin, end - middle
        # A row begins a page where its length before the step is a whole number of pages.
        crossing[i] = any((CTX_LEN + r % PAGE + WARM_UP + 1 + i) % PAGE == 0 for r in range(rows))
    return times[0] / 1e3, times[1] / 1e3, crossing


def profiled(rows: int, steps: int, most: int | None) -> list[tuple[str, float, float]]:
    """The `most` dearest functions, as in `HostTime.functions`; None: all of them."""
    runtime = _runtime(rows, steps)
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(steps):
        runtime.launch()
        runtime.collect()
    profile.disable()
    stats = cast(Any, pstats.Stats(profile)).stats
    found = [
        (f"{Path(file).stem}.{name}" if line else name, calls / steps, own * 1e6 / steps)
        for (file, line, name), (calls, _, own, _, _) in stats.items()
    ]
    return sorted(found, key=lambda f: -f[2])[:most]


def parser() -> argparse.ArgumentParser:
    p = command("bench.host_time", __doc__)
    p.add_argument("--rows", default="32,256", help="decoding rows, such as 32,256")
    p.add_argument("--steps", type=int, default=2000, help="timed steps")
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    counts = args.rows.split(",")
    if not all(c.strip().isdigit() and int(c) > 0 for c in counts):
        raise ValueError(f"--rows must be positive numbers such as 32,256, got {args.rows!r}")
    if args.steps < PAGE:
        raise ValueError(f"--steps {args.steps}: expected at least {PAGE}, a page of tokens")
    found = [measure(int(c), args.steps) for c in counts]
    for times in found:
        _show(times)
    if args.json:
        print_json(
            provenance("none: host only")
            | {
                "steps": args.steps,
                "mark_us": MARK_US,
                "rows": [vars(t) | {"step_us": t.step_us} for t in found],
            }
        )
    return 0


def _show(times: HostTime) -> None:
    console.print(
        f"{times.rows} rows: launch {times.launch_us:.1f} + collect {times.collect_us:.1f} = "
        f"{times.step_us:.1f} us a step, p99 {times.p99_us:.1f}, mark {MARK_US:.0f}; "
        f"{times.crossing_us:.1f} where a page begins, {times.changed_us:.1f} where a row has "
        "changed hands"
    )
    table = Table()
    for column in ("function", "calls a step", "us a step, profiled"):
        table.add_column(column, justify="left" if column == "function" else "right")
    for name, calls, us in times.functions:
        table.add_row(name, f"{calls:.1f}", f"{us:.2f}")
    console.print(table)


if __name__ == "__main__":
    run(main)
