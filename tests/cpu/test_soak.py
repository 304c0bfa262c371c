"""A day of a runtime in 10⁵ steps: nothing leaks, nobody starves, every count adds up.

Most of it on a device that computes nothing (`tests.fake_device`), a part on the CPU twin.
"""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

from runtime import Runtime
from runtime.scheduler import SchedulerConfig
from tests import soak_day
from tests.cpu.twins import load_micro, micro_checkpoint
from tests.fake_device import FakeConfig, FakeDevice, FakeModel, answer
from tests.serving import Request, serve
from tests.soak import Soak, happenings

AGEING_STEPS = 64
# 24 wait at most, one needs 57 steps at most, and a level of priority is worth 64: five of them.
LONGEST_WAIT = 5 * AGEING_STEPS + 24 * 57
# Nobody passes it any more then, nor preempts it; those in the eight rows may be before it.
LONGEST_LIFE = LONGEST_WAIT + 9 * 57


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reservation", "pages", "prefix_cache", "budget", "steps"),
    [
        ("lazy", 16, True, None, 50_000),
        ("full", 25, True, 7, 30_000),
        ("lazy", 20, False, 5, 20_000),
    ],
)
def test_a_hundred_thousand_steps(
    reservation: str, pages: int, prefix_cache: bool, budget: int | None, steps: int
) -> None:
    device = FakeDevice(FakeConfig(num_pages=pages), "1,2,4,8,8+16")
    config = SchedulerConfig(reservation, prefix_cache, budget, AGEING_STEPS)
    runtime = Runtime(device, config)  # type: ignore[arg-type]
    answers = partial(answer, vocab=FakeModel.vocab_size)
    soak = Soak(runtime, answers, 5, arrivals=0.1, added=0.5, max_prompt=40, max_new=56)
    soak.run(steps)
    stats = runtime.stats()
    print(stats, dict(sorted(soak.seen.items())), soak.longest_life)
    lazy = reservation == "lazy"
    for what in happenings(lazy=lazy):
        assert soak.seen[what], f"never happened: {what}"
    assert stats.longest_wait_steps <= LONGEST_WAIT
    assert soak.longest_life <= LONGEST_LIFE, "preempted again and again"
    assert bool(stats.preemptions) == lazy
    assert (stats.prefix_hits > 0) == (stats.prefix_evictions > 0) == prefix_cache
    assert not device.phase.any(), "a row lives on the device alone"


@pytest.mark.slow
def test_a_stream_of_add_starves_nobody_in_the_queue() -> None:
    """More than rows can take, nearly all of it by `add`; the queue is served all the same."""
    ageing = 16
    device = FakeDevice(FakeConfig(num_pages=25), "1,2,4,8,8+16")
    runtime = Runtime(device, SchedulerConfig(ageing_steps=ageing))  # type: ignore[arg-type]
    answers = cache(partial(answer, vocab=FakeModel.vocab_size))
    soak = Soak(
        runtime,
        answers,
        seed=6,
        arrivals=0.9,
        added=0.99,
        max_prompt=40,
        max_new=30,
        most_waiting=1000,
        num_prompts=30,
    )
    soak.run(2000)
    assert soak.seen["add refused for the queue's sake"]
    # The lowest priority that comes is one level down, `add` one up, the highest five; then a few
    # requests of 32 steps at most are before it.
    assert runtime.stats().longest_wait_steps <= 7 * ageing + 3 * 32


def test_the_command_of_the_whole_day(tmp_path: Path) -> None:
    out = tmp_path / "day.json"
    assert soak_day.main(["--device", "fake", "--steps", "200", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["stats"]["submitted"] == sum(record["stats"]["finished"].values())
    assert len(record["parts"]) >= 4
    assert record["steps"] == 200


@pytest.mark.slow
def test_a_few_hundred_steps_of_the_twin(tmp_path: Path) -> None:
    """One key for all steps, so that the twin's bits must be those of each request alone."""
    checkpoint = micro_checkpoint(tmp_path)
    options = {"ladder": "6+10", "num_pages": 12, "reservation": "lazy", "ageing_steps": 16}
    with (
        load_micro(checkpoint, ladder="6+10", prefix_cache=False) as alone,
        load_micro(checkpoint, **options) as runtime,
    ):

        @cache
        def answers(prompt: tuple[int, ...], most: int) -> tuple[list[int], list[np.float32]]:
            got = serve(alone, [Request(prompt, most)])[0]
            return got.tokens, got.logprobs

        soak = Soak(runtime, answers, seed=3, arrivals=0.12, max_prompt=40, max_new=30)
        soak.run(300)
        stats = runtime.stats()
        print(stats, dict(sorted(soak.seen.items())))
        assert stats.preemptions
        assert stats.prefix_hits
        assert not runtime.engine.graphs.step.buffers["phase"].any()
