"""`python -m bench.host_time`: what the driver's Python costs per step, with a device that is free.

The engine here does nothing: a launch publishes its step at once. What remains is `Runtime.launch`
and `Runtime.collect`, over rows that all decode. Needs no GPU. On one, add what launching a graph
takes (`runtime.replay_bench` shows both, "python us" and "launch us").

In a tight loop code and data stay in the processor's caches; beside a device that takes
milliseconds they do not. So the same is timed with steps that another process publishes `--wait-ms`
after their launch, which needs a core of its own.
"""

from __future__ import annotations

import argparse
import cProfile
import mmap
import multiprocessing
import os
import pstats
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
WAITED_STEPS, WAITED_WARM_UP = 100, 10


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


class SlowDevice(NoDevice):
    """A device whose steps end a while after their launch: another process publishes them."""

    def __init__(self, rows: int, max_seq_len: int) -> None:
        super().__init__(rows, max_seq_len)
        self.ring, self.ring_step = _shared(self.ring), _shared(self.ring_step)
        self.launched = _shared(np.zeros(1, np.int64))

    def replay(self, key: GraphKey) -> None:
        """Tell the other process."""
        self.steps += 1
        self.launched[0] = self.steps

    @contextmanager
    def running(self, step_s: float) -> Iterator[None]:
        """Within it steps end, each `step_s` after the last or after its launch."""
        args = (self.launched, self.ring, self.ring_step, step_s)
        # Forked, for the arrays lie in memory that only a fork shares.
        process = multiprocessing.get_context("fork").Process(target=_publish, args=args)
        process.start()
        try:
            yield
        finally:
            self.launched[0] = -1
            process.join()


def _shared(array: Any) -> Any:
    """A copy in memory that forked processes share."""
    memory = mmap.mmap(-1, array.nbytes)
    copy = np.frombuffer(memory, array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def _publish(launched: Any, ring: Any, ring_step: Any, step_s: float) -> None:
    """What a slow device does, until `launched` says -1 or the process that made it is gone."""
    clock, done, entry = time.perf_counter, 0, ring[0].copy()
    parent = os.getppid()  # which may be killed, and say nothing then
    while launched[0] >= 0 and os.getppid() == parent:
        if launched[0] > done:
            end = clock() + step_s
            while clock() < end:
                pass
            ring[done % RING_SLOTS] = entry  # as the device's own writes: in no cache of the host
            done += 1
            ring_step[(done - 1) % RING_SLOTS] = done


@dataclass(frozen=True)
class HostTime:
    """Microseconds of the driver's calls for one number of rows; medians over steps.

    Attributes:
        crossing_us: launch and collect of a step in which a row begins a page.
        changed_us: launch and collect of a step after a row has changed hands: every entry is
            looked up.
        waited_us: launch and collect after a wait for the device; None where that was not asked.
        functions: (function, calls a step, us a step in itself), the dearest first, under a
            profiler, which makes each call dearer than it is.
    """

    rows: int
    launch_us: float
    collect_us: float
    p99_us: float
    crossing_us: float
    changed_us: float
    waited_us: float | None
    functions: list[tuple[str, float, float]]

    @property
    def step_us(self) -> float:
        return self.launch_us + self.collect_us


def measure(rows: int, steps: int, wait_ms: float) -> HostTime:
    """Time `steps` steps of `rows` decoding rows, two in flight; some with steps of `wait_ms`."""
    launch, collect, crossing = _timed(rows, steps)
    both = launch + collect
    return HostTime(
        rows=rows,
        launch_us=float(np.median(launch)),
        collect_us=float(np.median(collect)),
        p99_us=float(np.percentile(both, 99)),
        crossing_us=float(np.median(both[crossing])) if crossing.any() else float(np.median(both)),
        changed_us=float(np.median(sum(_timed(rows, steps, changing=True)[:2]))),
        waited_us=float(np.median(_waited(rows, wait_ms / 1e3))) if wait_ms else None,
        functions=profiled(rows, steps, most=12),
    )


def _occupied(device: type[NoDevice], rows: int, tokens: int) -> Runtime:
    runtime = Runtime(cast(Replayer, device(rows, CTX_LEN + PAGE + tokens + 1)))
    # Rows of equal length would all begin a page in the same step.
    for row in range(rows):
        runtime.occupy(1, CTX_LEN + row % PAGE, tokens)
    return runtime


def _runtime(rows: int, steps: int) -> Runtime:
    runtime = _occupied(NoDevice, rows, WARM_UP + steps + 4)
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


def _waited(rows: int, step_s: float) -> Any:
    """Microseconds of collect and launch of each step, of steps that take `step_s`."""
    runtime = _occupied(SlowDevice, rows, WAITED_WARM_UP + WAITED_STEPS + 4)
    clock = time.perf_counter_ns
    times = []
    with runtime.engine.running(step_s):
        runtime.launch()
        runtime.launch()
        for _ in range(WAITED_WARM_UP + WAITED_STEPS):
            runtime.wait()
            begin = clock()
            runtime.collect()
            runtime.launch()
            times.append(clock() - begin)
    return np.array(times[WAITED_WARM_UP:]) / 1e3


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
    p.add_argument(
        "--wait-ms", type=float, default=10.0, help="length of the slow steps; 0: none of them"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    counts = args.rows.split(",")
    if not all(c.strip().isdigit() and int(c) > 0 for c in counts):
        raise ValueError(f"--rows must be positive numbers such as 32,256, got {args.rows!r}")
    if args.steps < PAGE:
        raise ValueError(f"--steps {args.steps}: expected at least {PAGE}, a page of tokens")
    if not 0 <= args.wait_ms <= 1000:
        raise ValueError(f"--wait-ms {args.wait_ms}: expected milliseconds, 0 … 1000")
    found = [measure(int(c), args.steps, args.wait_ms) for c in counts]
    for times in found:
        _show(times, args.wait_ms)
    if args.json:
        print_json(
            provenance("none: host only")
            | {
                "steps": args.steps,
                "mark_us": MARK_US,
                "wait_ms": args.wait_ms,
                "rows": [vars(t) | {"step_us": t.step_us} for t in found],
            }
        )
    return 0


def _show(times: HostTime, wait_ms: float) -> None:
    console.print(
        f"{times.rows} rows: launch {times.launch_us:.1f} + collect {times.collect_us:.1f} = "
        f"{times.step_us:.1f} us a step, p99 {times.p99_us:.1f}, mark {MARK_US:.0f}; "
        f"{times.crossing_us:.1f} where a page begins, {times.changed_us:.1f} where a row has "
        "changed hands"
        + (
            ""
            if times.waited_us is None
            else f", {times.waited_us:.1f} after steps of {wait_ms} ms"
        )
    )
    table = Table()
    for column in ("function", "calls a step", "us a step, profiled"):
        table.add_column(column, justify="left" if column == "function" else "right")
    for name, calls, us in times.functions:
        table.add_row(name, f"{calls:.1f}", f"{us:.2f}")
    console.print(table)


if __name__ == "__main__":
    run(main)
