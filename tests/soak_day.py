"""The whole day: 10⁵ steps of a runtime, every token and every count checked, numbers as JSON.

    python -m tests.soak_day [--steps 100000] [--device twin|fake] [--out FILE]

`twin` is the CPU twin of a micro model, computing every step (about a quarter of an hour on one
core); `fake` a device that computes nothing (half a minute), whose host times are the driver's own.
CI runs the same in a short form (`tests/cpu/test_soak.py`). Exit 1 if anything was not as it must
be, or if something that a long day must meet never happened.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime import Runtime
from runtime.scheduler import SchedulerConfig
from tests.cpu.twins import load_micro, micro_checkpoint
from tests.fake_device import FakeConfig, FakeDevice, FakeModel, answer
from tests.serving import Request, serve
from tests.soak import Answers, Soak, happenings

PARTS = 10  # of the day, each with its own times and memory
FULL = 100_000  # steps in which everything must have happened
MAX_NEW = 30
AGEING_STEPS = 64
# 24 wait at most, each needs 40 steps at most; five levels of priority, one down, one for `add`.
LONGEST_WAIT = 7 * AGEING_STEPS + 24 * 40


class Day(Soak):
    """A soak that notes, at every tenth, what the host took and holds.

    Attributes:
        notes: one entry a part. Wall time has the checks in it and, on the twin, the runs of each
            prompt alone, most of them in the first part; the driver's own has the twin's computing
            in it, which its `launch` does.
    """

    def start(self, steps: int) -> None:
        """Run the day, a part after the other."""
        self.notes: list[dict[str, Any]] = []
        self.part_steps, self._mark = steps // PARTS, (0, 0, time.perf_counter())
        self.run(steps)

    def check(self) -> None:
        super().check()
        step, host_ns = self.runtime._next_step, self.scheduler.counters.host_ns
        before, host_before, began = self._mark
        if step - before < self.part_steps:
            return
        self._mark = (step, host_ns, time.perf_counter())
        self.notes.append(
            {
                "step": step,
                "wall_us_per_step": round((self._mark[2] - began) / (step - before) * 1e6, 1),
                "driver_us_per_step": round((host_ns - host_before) / (step - before) / 1e3, 1),
                "resident_mib": round(_rss_bytes() / 2**20, 1),
                "waiting": self.runtime.num_waiting,
            }
        )


def _rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _twin(folder: Path, held: ExitStack) -> tuple[Runtime, Answers]:
    """A runtime with too few pages, and the answers of another that serves one at a time."""
    checkpoint = micro_checkpoint(folder)
    # One key for all steps, so that the twin's bits must be those of each request alone.
    options: dict[str, Any] = {"ladder": "6+10", "num_pages": 12, "reservation": "lazy"}
    options["ageing_steps"] = AGEING_STEPS
    alone = held.enter_context(load_micro(checkpoint, ladder="6+10", prefix_cache=False))

    @cache
    def whole(prompt: tuple[int, ...]) -> tuple[list[int], list[np.float32]]:
        got = serve(alone, [Request(prompt, MAX_NEW)])[0]
        return got.tokens, got.logprobs

    def answers(prompt: tuple[int, ...], most: int) -> tuple[list[int], list[np.float32]]:
        tokens, logprobs = whole(prompt)
        return tokens[:most], logprobs[:most]

    return held.enter_context(load_micro(checkpoint, **options)), answers


def _fake() -> tuple[Runtime, Answers]:
    device = FakeDevice(FakeConfig(num_pages=16), "1,2,4,8,8+16")
    runtime = Runtime(device, SchedulerConfig("lazy", ageing_steps=AGEING_STEPS))  # type: ignore[arg-type]
    return runtime, cache(partial(answer, vocab=FakeModel.vocab_size))


def run_day(device: str, steps: int, seed: int) -> dict[str, Any]:
    """The record of one day; raises AssertionError where something is wrong."""
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        runtime, answers = _twin(folder, held) if device == "twin" else _fake()
        arrivals = 0.12
        day = Day(
            runtime,
            answers,
            seed,
            arrivals,
            added=0.5,
            max_prompt=40,
            max_new=MAX_NEW,
            num_prompts=400,
        )
        began = time.perf_counter()
        day.start(steps)
        stats = runtime.stats()
        return {
            "never_happened": [what for what in happenings(lazy=True) if not day.seen[what]],
            "seconds": round(time.perf_counter() - began, 1),
            "stats": stats.to_json(),
            "tokens_compared": day.given,
            "longest_wait_bound": LONGEST_WAIT,
            "longest_life_steps": day.longest_life,
            "happened": dict(sorted(day.seen.items())),
            "parts": day.notes,
        }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak_day", description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--device", choices=["twin", "fake"], default="twin")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to write the record, beside stdout")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    record = {
        "command": " ".join(["python -m tests.soak_day", *argv]),
        "commit": commit or "unknown",
        "hardware": f"{platform.machine()} CPU, one thread",
        "device": args.device,
        "steps": args.steps,
        "seed": args.seed,
    }
    try:
        record |= run_day(args.device, args.steps, args.seed)
    except AssertionError as e:
        print(f"FAILED: {e}", file=sys.stderr)
        return 1
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    short = args.steps >= FULL and record["never_happened"]
    starved = record["stats"]["longest_wait_steps"] > LONGEST_WAIT
    for failed, what in ((short, f"never happened: {short}"), (starved, "a wait past its bound")):
        if failed:
            print(f"FAILED: {what}", file=sys.stderr)
    return int(bool(short) or starved)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
