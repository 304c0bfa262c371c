"""`python -m bench.sampling_cost` runs on the CPU twin, and notices a step not worth timing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import sampling_cost
from kernels.triton import sample

ARGS = ["--model", "tiny", "--layers", "1", "--bs", "2", "--ladder", "2", "--max-seq-len", "64"]
ARGS += ["--ctx-len", "20", "--steps", "2", "--rounds", "1", "--device", "cpu", "--json"]


def test_every_mode_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sampling_cost.main([*ARGS, "--store", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {*report["modes"]} == {*sampling_cost.MODES}
    assert report["modes"]["bare step"]["added"] == 0.0
    assert not report["times_mean_something"]


def test_a_bare_step_with_other_tokens_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any, **buffers: Any) -> None:
        sample.greedy_ref(*args, **buffers)
        buffers["out_token"] += 1

    monkeypatch.setattr(sampling_cost, "greedy_ref", wrong)
    with pytest.raises(RuntimeError, match="other tokens or log-probs than those of the bare step"):
        sampling_cost.main([*ARGS, "--store", str(tmp_path)])
