"""`python -m bench.sampling_cost` runs on the CPU twin, and notices a step not worth timing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import sampling_cost
from kernels.triton import sample
from runtime.sampling import StepOutput

ARGS = ["--model", "tiny", "--layers", "1", "--bs", "2", "--ladder", "2", "--max-seq-len", "64"]
ARGS += ["--ctx-len", "20", "--steps", "2", "--rounds", "1", "--device", "cpu", "--json"]


def test_every_mode_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sampling_cost.main([*ARGS, "--store", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert {"check bits", "time"} <= {line[11:] for line in captured.err.splitlines()}
    report = json.loads(captured.out.splitlines()[-1])
    assert {*report["modes"]} == {*sampling_cost.MODES}
    assert report["modes"]["bare step"]["added"] == 0.0
    assert not report["times_mean_something"]


def test_prompts_and_logits_are_in_the_steps_that_are_timed_for_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four rows: two decode, two tokens of each step are a prompt's; two may return logits."""
    modes = ["everything, stop sequences, logits", "the same, 20 alternatives"]
    argv = [*ARGS, "--bs", "4", "--ladder", "4", "--logits-rows", "2", "--store", str(tmp_path)]
    check = sampling_cost.SamplingBench._check_output
    seen: set[tuple[str, int, int, int]] = set()

    def noted(bench: sampling_cost.SamplingBench, mode: str, out: StepOutput) -> None:
        check(bench, mode, out)
        scored = 0 if out.prompt is None else len(out.prompt.tokens)
        seen.add((mode, len(out), len(out.logits), scored))

    monkeypatch.setattr(sampling_cost.SamplingBench, "_check_output", noted)
    assert sampling_cost.main([*argv, "--modes", *modes]) == 0
    assert seen == {("bare step", 4, 0, 0), (modes[0], 4, 2, 0), (modes[1], 2, 0, 2)}
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(report["modes"]) == ["bare step", *modes]
    assert report["prompt_part"] == 2

    add = sampling_cost.SamplingBench._add_prompt
    monkeypatch.setattr(
        sampling_cost.SamplingBench, "_add_prompt", lambda bench, _: add(bench, {"prompt": True})
    )
    with pytest.raises(RuntimeError, match="log-probs of 2 prompt tokens in a step, got 0 and 0"):
        sampling_cost.main([*argv, "--modes", modes[1]])


def test_a_bare_step_with_other_tokens_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any, **buffers: Any) -> None:
        sample.greedy_ref(*args, **buffers)
        buffers["out_token"] += 1

    monkeypatch.setattr(sampling_cost, "greedy_ref", wrong)
    with pytest.raises(RuntimeError, match="other tokens or log-probs than those of the bare step"):
        sampling_cost.main([*ARGS, "--store", str(tmp_path)])
