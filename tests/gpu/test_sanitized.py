"""No kernel of a step reads or writes past its tensors, and none races in shared memory.

The fence needs nothing but the device; compute-sanitizer does not run on every machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def check(tool: str, store: Path, configs: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.sanitized", f"--tool={tool}", f"--store={store}"]
    done = subprocess.run(
        [*command, f"--configs={configs}", "--timeout=120"],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({k: v for k, v in report.items() if k != "launches"}))
    return report


def test_nothing_is_touched_beside_the_tensors_of_a_step(store: Path) -> None:
    report = check("fence", store, "bf16,fp8,v3_heads,rdep,hopper,flashinfer,fp32,no_q_lora")
    assert report["exit"] == 0, report


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing_in_our_kernels(tool: str, store: Path) -> None:
    report = check(tool, store, "fp8")
    if report["exit"] == 2:
        pytest.skip(f"{tool} does not work here: {report.get('reason', report.get('refused'))}")
    assert report["exit"] == 0, report
