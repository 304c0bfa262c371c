"""The sweep over plans without a GPU: what it would launch, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import plan_sweep

ROOT = Path(__file__).resolve().parents[2]


def test_every_plan_can_be_launched() -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.cpu.test_plan_sweep"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    listed = json.loads(run.stdout.splitlines()[-1])
    assert listed["names"] == [*plan_sweep.DENSE, "gate_up", "down"]
    assert listed["plans"] >= 100
    assert set(listed["kernels"]) == {
        *("_linear_fp8_kernel", "_gate_up_kernel", "_down_kernel"),
        *("_sum_splits_kernel", "_sum_many_splits_kernel", "_add_rmsnorm"),
    }


def test_only_known_products_on_a_device(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match="--only nothing: known are"):
            plan_sweep.main(["--store", str(tmp_path), "--only", "nothing"])
    else:
        with pytest.raises(ValueError, match="timed on a CUDA device"):
            plan_sweep.main(["--store", str(tmp_path)])


def _list() -> dict[str, object]:
    from graphs.compile import RecordingLauncher
    from kernels.triton.overlap import EARLY

    launcher, meta = RecordingLauncher(pdl=EARLY), torch.device("meta")
    cases = list(plan_sweep._cases([32], 32))
    for case in cases:
        buffers = case.make(meta)
        for plan in case.plans:
            case.launch(launcher, buffers, plan)
        plan_sweep._small(launcher, plan_sweep._small_buffers(meta, case.rows))
    return {
        "names": [c.name for c in cases],
        "plans": sum(len(c.plans) for c in cases),
        "kernels": sorted({r.function for r in launcher.requests}),
    }


if __name__ == "__main__":
    print(json.dumps(_list()))
