"""The memory checks' own logic: what they cover, and how a sanitizer's output is read."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sanitized import CONFIGS
from tests.sanitizer import findings, verdict

ROOT = Path(__file__).resolve().parents[2]
# Kernels that no step launches: `kernels.triton.sample.greedy` as a whole serves benchmarks, and
# `kernels.triton.stream` measures a device.
NOT_IN_A_STEP = {"_greedy_merge", "_read_kernel"}
MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at _linear_kernel+0x1a0 in linear.py:88
=========     by thread (3,0,0) in block (1,0,0)
=========     Access to 0x7f0010000400 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f0010000000 of size 1024 bytes
=========
========= Invalid __global__ write of size 4 bytes
=========     at void flashinfer::mla::run<int, 4>(Params)+0x90
=========     by thread (0,0,0) in block (0,0,0)
=========
========= Invalid __global__ read of size 16 bytes
=========     at _linear_kernel+0x1a0 in linear.py:88
=========     by thread (4,0,0) in block (1,0,0)
=========
========= ERROR SUMMARY: 3 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at planted_race+0x120
=========     and Read access at planted_race+0x1b0 [252 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def entry_kernels() -> set[str]:
    """Kernels of `kernels/triton` that a launcher names: `launch(_kernel, …`."""
    found = set()
    for path in (ROOT / "kernels" / "triton").glob("*.py"):
        tree = ast.parse(path.read_text())
        defined = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef)
            and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name not in defined:
                names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                found |= names & defined
    return found


def program(*options: str) -> list[dict[str, Any]]:
    """The JSON lines of a run of its own: here Triton's interpreter is on."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sanitized", *options],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(("listing kernels of", "running ")), "silent while it works"
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_of_a_step_is_run(tmp_path: Path) -> None:
    (by_config,) = program("--list", f"--store={tmp_path}")
    assert by_config.keys() == CONFIGS.keys()
    listed = {name for names in by_config.values() for name in names}
    missing = entry_kernels() - listed - NOT_IN_A_STEP
    assert not missing, f"no config of tests/sanitized.py launches {sorted(missing)}"
    assert entry_kernels() >= NOT_IN_A_STEP


def test_the_program_runs_on_the_twin(tmp_path: Path) -> None:
    lines = program("--memory=host", "--configs=bf16,rdep", f"--store={tmp_path}")
    assert [f"{line['config']} {line['key']}" for line in lines[:-1]] == [
        f"{name} {key}" for name in ("bf16", "rdep") for key in CONFIGS[name].keys
    ]
    assert all(line["live_rows"] for line in lines[:-1])
    assert any(line["chunk"] for line in lines[:-1]), "no case has prompt tokens"


def test_findings_name_their_kernels() -> None:
    assert [kernel for kernel, _ in findings(MEMCHECK)] == [
        "_linear_kernel",
        "void flashinfer::mla::run<int, 4>",
        "_linear_kernel",
    ]
    assert findings(RACECHECK)[0][0] == "planted_race"


def ran(**more: Any) -> dict[str, Any]:
    lines = [
        {"config": "bf16", "key": "1", "seconds": 1, "launches": {"_linear_kernel": 4}},
        {"done": True},
    ]
    found = {"rc": 0, "lines": lines, "errors": "", "overwritten": {}, "seconds": 2.0}
    return found | more


@pytest.mark.parametrize(
    ("changed", "text", "code"),
    [
        ({}, "========= ERROR SUMMARY: 0 errors\n", 0),
        ({}, MEMCHECK, 1),
        ({}, RACECHECK, 0),  # in a kernel that is not ours
        ({}, "========= Internal Sanitizer Error: the tool gave up\n", 1),
        ({"overwritten": {"bf16 1": ["kv.0"]}}, "", 1),
        ({"lines": ran()["lines"][:1]}, "", 1),  # ended early
        ({"lines": []}, "========= Error: Device not supported.\n", 2),
    ],
)
def test_verdicts(changed: dict[str, Any], text: str, code: int) -> None:
    report = verdict(ran(**changed), text)
    assert report["exit"] == code, report
    if code == 0:
        assert not report["ours"]


def test_ours_and_others_are_told_apart() -> None:
    report = verdict(ran(), MEMCHECK)
    assert report["ours"] == {"_linear_kernel: Invalid __global__ read of size 16 bytes": 2}
    assert len(report["others"]) == 1
    assert report["summary"] == ["ERROR SUMMARY: 3 errors"]
