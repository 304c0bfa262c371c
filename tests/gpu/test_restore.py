"""Restored graphs give the bits of captured ones, in processes that share nothing but the store."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.models import LADDERS, MODELS, options_of

ROOT = Path(__file__).resolve().parents[2]


def run(options: dict[str, Any], steps: int) -> dict[str, Any]:
    """One process of `tests.restore_program`."""
    return result_of("tests.restore_program", json.dumps(options), str(steps))


def result_of(*words: str) -> dict[str, Any]:
    """What a program that ran in a process of its own told."""
    command = [sys.executable, "-m", *words]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("name", MODELS)
def test_restored_equals_captured(name: str, ladder: str, store: Path, tmp_path: Path) -> None:
    options = options_of(name) | {"ladder": ladder, "store": str(store), "device": "cuda"}
    options |= {"verify": False, "overrides": list(options_of(name).get("overrides", ()))}
    steps = 1000 if name == next(iter(MODELS)) else 50
    captured = run(options, steps)
    assert captured["from"] == "capture", captured["reason"]
    restored = run(options, steps)
    assert restored["from"] == "bundle", restored["reason"]
    assert not restored["torch"]
    assert not restored["triton"]
    assert restored["keys"] == restored["ladder"], "a key was not run"
    pairs = zip(restored["digests"], captured["digests"], strict=True)
    differing = [step for step, (one, other) in enumerate(pairs) if one != other]
    assert not differing, f"differs from step {differing[0]} on"


@pytest.mark.parametrize("own_gpu", [False, True], ids=["all visible", "own visible"])
def test_restored_ranks_equal_captured_ones(own_gpu: bool, tmp_path: Path) -> None:
    """1,000 steps on every key, every rank; the capturing ranks see all GPUs."""
    world = 4 if torch.cuda.device_count() >= 4 else 2
    if torch.cuda.device_count() < world:
        pytest.skip("needs two GPUs")
    options = options_of("fp8") | {"overrides": [*MODELS["fp8"], "n_routed_experts=8"]}
    options |= {"bs": 4 * world, "ladder": "1,2,4,4+64", "verify": False}
    options |= {"store": str(tmp_path / "store"), "device": "cuda"}
    for name, own in (("captured", False), ("restored", own_gpu)):
        (tmp_path / name).write_text(_ranks(options, 1000, world, own))
    compare = [sys.executable, "-m", "tests.compare_restored"]
    compare += [str(tmp_path / "captured"), str(tmp_path / "restored")]
    done = subprocess.run(compare, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def _ranks(options: dict[str, Any], steps: int, world: int, own_gpu: bool) -> str:
    """What `world` processes of `tests.restore_program` printed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": str(s.getsockname()[1]), "LOCAL_WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", "tests.restore_program", json.dumps(options), str(steps)]
    started = []
    for rank in range(world):
        env = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        if own_gpu:
            env |= {"CUDA_VISIBLE_DEVICES": str(rank)}
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)
        )
    said = ""
    try:
        for rank, process in enumerate(started):
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, f"rank {rank}: {err[-3000:]}"
            said += out
    finally:
        for process in started:
            process.kill()
    return said


def test_all_keys_have_their_golden_bits(store: Path) -> None:
    """Every key's golden step, restored; a load checks the first key's alone."""
    from runtime.config import RuntimeConfig
    from runtime.restore import check_golden, restore

    options = options_of("fp8") | {"ladder": LADDERS[0], "store": str(store), "device": "cuda"}
    options |= {"overrides": list(MODELS["fp8"]), "verify": False}
    run(options, 1)
    player = restore(RuntimeConfig.of(**options))
    try:
        for key in reversed(player.ladder.keys):
            check_golden(player, key)
    finally:
        player.close()


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_new_weights_in_restored_graphs(name: str, store: Path) -> None:
    """The same answers as captured graphs with the same new weights, keys built later included."""
    options = options_of(name) | {"store": str(store), "device": "cuda", "verify": False}
    options |= {"overrides": list(MODELS[name]), "ladder": LADDERS[3]}
    captured, restored = (result_of("tests.update_program", json.dumps(options)) for _ in range(2))
    assert restored["from"] == "bundle", restored["reason"]
    assert not restored["torch"], "before any new weights came"
    for told in (captured, restored):
        assert "expected finite values" in told["refusal"]
        assert told["again"] == told["before"], "a refusal changes nothing"
        assert told["after"] != told["before"]
    for what in ("before", "after", "steps"):
        assert restored[what] == captured[what], what
