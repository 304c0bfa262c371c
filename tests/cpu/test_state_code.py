"""How intake and settle share a CTA's threads, by their code at many rows."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ROWS = 256


@pytest.fixture(scope="module")
def code() -> dict[str, str]:
    """Triton's last form before PTX, from a process without the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.cpu.test_state_code"]
    run = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_one_thread_of_settle_reads_how_many_steps_were_launched(code: dict[str, str]) -> None:
    """The host may write it between two warps' loads, and a slot must not be left in halves."""
    (load,) = _uses(code["_settle"], "%mailbox", "load")
    shape = re.search(r"tensor<(\d+)x!tt.ptr<i32>, (#\w+)>", load)
    assert shape is not None, f"every thread reads it: {load}"
    layout = re.search(rf"{shape[2]} = #ttg.blocked<(.*)>", code["_settle"])
    assert layout is not None
    per = [int(n) for n in re.findall(r"= \[(\d+)\]", layout[1])[:3]]
    assert math.prod(per) <= int(shape[1]), f"several threads read its first element: {layout[0]}"


def test_no_thread_of_intake_clears_the_flag_before_all_have_seen_it(code: dict[str, str]) -> None:
    lines = code["_intake"].splitlines()
    (seen,) = [u for u in _uses(code["_intake"], "%pending", "load") if "tensor" not in u]
    (cleared,) = _uses(code["_intake"], "%pending", "store")
    between = lines[lines.index(seen) : lines.index(cleared)]
    assert any("barrier" in line for line in between)


def _uses(text: str, pointer: str, kind: str) -> list[str]:
    """The lines that load or store through a kernel's argument, or what is added to it."""
    names, found = {pointer}, []
    for line in text.splitlines():
        op = re.search(r"(?:(%[\w#]+) = )?tt\.(\w+) (%[\w#]+)", line)
        if op is not None and op[3] in names:
            if op[2] in ("addptr", "splat"):
                names.add(op[1])
            elif op[2] == kind:
                found.append(line)
    return found


def _report() -> dict[str, str]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from runtime.assemble import list_kernels
    from runtime.config import RuntimeConfig
    from runtime.selection import choose

    chosen = RuntimeConfig.of(model="tiny", bs=ROWS, ladder=str(ROWS), pdl="late")
    found: dict[str, str] = {}
    for request in list_kernels(choose(chosen, compile_only=True), "sm_90", ["triton"]).requests:
        spec = request.spec
        if spec.name not in ("_settle", "_intake"):
            continue
        aligned: dict[Any, Any] = {(i,): [["tt.divisibility", 16]] for i in spec.aligned}
        constexprs = dict(request.constexprs)
        source = ASTSource(request.resolve(), dict(spec.signature), constexprs, aligned)
        options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
        assert spec.num_warps > 1
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        found[spec.name] = made.asm["ttgir"]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_report()))
