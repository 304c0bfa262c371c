"""Every sampling kernel compiles for both chips at a real vocabulary, without spills."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

KERNELS = {
    *("_count_tokens", "_greedy_chunk", "_process", "_filter", "_draw", "_choose"),
    *("_top_chunk", "_top_merge"),
}


def test_kernels_compile_without_spills() -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=250
    )
    assert run.returncode == 0, run.stderr[-4000:]
    built = json.loads(run.stdout.splitlines()[-1])
    assert {(b["name"], b["arch"]) for b in built} == {(k, a) for k in KERNELS for a in (90, 100)}
    assert not [b for b in built if b["spills"] or b["registers"] > 128]


def _step_on_meta(launch: Any, *, rows: int = 32, vocab: int = 129280, tokens: int = 64) -> None:
    from kernels.triton.draw_pipeline import row_tensors, sample_step, scratch_tensors
    from kernels.triton.logits_counts import count_tokens
    from kernels.triton.sample import num_chunks

    ids, parts = ((rows,), "int32"), (rows, num_chunks(vocab))
    table = {
        **row_tensors(rows, vocab),
        **scratch_tensors(rows, vocab),
        **dict.fromkeys(("tok_row", "tok_pos", "tok_id"), ((tokens,), "int32")),
        **dict.fromkeys(("sample_tok", "sample_row", "out_token"), ids),
        **dict.fromkeys(("part_max", "part_sum"), (parts, "float32")),
        "part_arg": (parts, "int32"),
        "out_logprob": ((rows,), "float32"),
        "logits": ((rows, vocab), "float32"),
        "stop_ids": ((rows, 16), "int32"),
        "token_mask": ((rows, vocab // 32), "int32"),
    }
    b = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (shape, dtype) in table.items()
    }
    names = [n for n in inspect.signature(count_tokens).parameters if n != "launch"]
    count_tokens(launch, **{name: b[name] for name in names})
    sample_step(launch, b)


def _compile_all(arch: int) -> list[dict[str, Any]]:
    from graphs.compile import RecordingLauncher
    from graphs.triton_compile import compile_kernel

    recorder = RecordingLauncher(f"sm_{arch}")
    _step_on_meta(recorder)
    built = []
    for request in recorder.requests:
        made = compile_kernel(request.spec, request.resolve(), dict(request.constexprs), arch)
        facts = {"registers": made.registers, "spills": made.spill_bytes + made.local_bytes}
        built.append({"name": request.function, "arch": arch, **facts})
    return built


if __name__ == "__main__":
    print(json.dumps(_compile_all(90) + _compile_all(100)))
