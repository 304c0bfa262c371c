"""What `pip install .` brings: not Python alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_an_installation_holds_the_cuda_sources(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    lib = tmp_path / "lib"
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(lib)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    folders = [ROOT / name / "cuda" for name in ("barriers", "kernels")]
    ours = {p.relative_to(ROOT) for folder in folders for p in folder.glob("*.cu*")}
    assert len(ours) > 4
    assert {p.relative_to(lib) for p in lib.rglob("*.cu*")} == ours
    assert not [p for p in lib.iterdir() if p.name == "tests"]
    # Found from beside the code, wherever that is.
    code = "from kernels.cuda.mla_decode import HOPPER_MLA; print(HOPPER_MLA.source_hash())"
    here, there = (
        subprocess.run(
            [sys.executable, "-c", code], cwd=at, capture_output=True, text=True, check=True
        ).stdout
        for at in (ROOT, lib)
    )
    assert here == there != ""
