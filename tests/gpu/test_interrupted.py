"""Ctrl-C, as a signal, at random moments of steps on the device: mostly it lands in a wait."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

import runtime as package
from runtime import Runtime, SamplingParams, StepFailed
from tests.gpu.conftest import Load

LONGEST = 200
OURS = str(Path(package.__file__).parent)


def _interrupt(_: int, frame: FrameType | None) -> None:
    """Outside our code it would only lose what this test has been given."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            raise KeyboardInterrupt
        frame = frame.f_back


def _serve(runtime: Runtime, rng: np.random.Generator | None) -> tuple[list[int], int, str]:
    """Tokens of one request, how many interrupts came meanwhile, and why it failed."""
    request = runtime.submit([1, 2, 3], SamplingParams(max_tokens=LONGEST, ignore_eos=True))
    tokens: list[int] = []
    came = 0
    while runtime.num_running:
        try:
            if rng is not None and rng.random() < 0.2:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 4e-4))
            out = runtime.step()
            tokens += out.tokens[out.requests == request].tolist()
        except KeyboardInterrupt:
            came += 1
        except StepFailed as error:
            return tokens, came, str(error)
    return tokens, came, ""


def test_a_signal_at_any_moment_leaves_the_same_tokens_or_a_failed_runtime(load: Load) -> None:
    with load("bf16") as runtime:
        expected, _, _ = _serve(runtime, None)
    assert len(expected) == LONGEST
    old = signal.signal(signal.SIGALRM, _interrupt)
    interrupts = 0
    try:
        for seed in range(6):
            with load("bf16") as runtime:
                tokens, came, failure = _serve(runtime, np.random.default_rng(seed))
                signal.setitimer(signal.ITIMER_REAL, 0)
            print(f"seed {seed}: {came} interrupts, {failure or 'went on'}")
            interrupts += came
            assert tokens == expected[: len(tokens)], f"seed {seed}, after {came} interrupts"
            if failure:
                assert "it was interrupted in a step" in failure
            else:
                assert len(tokens) == LONGEST
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    if not interrupts:
        pytest.fail("no interrupt came")
