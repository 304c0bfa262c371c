"""Whole runtimes on two CPU ranks: the tokens of one rank, and refusals that name both sides."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from barriers.config import GroupConfig
from barriers.spawn import run_ranks
from capture_cache import machine
from runtime import Runtime
from runtime.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
TIMEOUT_S = 150


def _prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 2048, n).tolist() for n in (3, 40, 17, 1, 30)]


def _options(store: Path, **more: Any) -> dict[str, Any]:
    fixed = {"bs": 4, "max_seq_len": 128, "device": "cpu", "store": str(store)}
    return fixed | {"overrides": ["dtype=float32"], "proof_replays": 1, "page_size": 16} | more


def _free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def _start(rank: int, world: int, port: str, options: dict[str, Any]) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1"}
    if world > 1:
        env |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(world)}
    words = ["tests.ep.run_rank", "tiny", json.dumps(options), json.dumps(_prompts()), str(STEPS)]
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _run(options: list[dict[str, Any]]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each rank."""
    port, world = _free_port(), len(options)
    ranks = [_start(rank, world, port, o) for rank, o in enumerate(options)]
    try:
        outs = [rank.communicate(timeout=TIMEOUT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(r.returncode, *o) for r, o in zip(ranks, outs, strict=True)]


def _results(runs: list[tuple[int, str, str]]) -> tuple[dict[str, Any], dict[str, Any]]:
    tokens: dict[str, Any] = {}
    logprobs: dict[str, Any] = {}
    for code, out, err in runs:
        assert code == 0, err
        report = json.loads(out.splitlines()[-1])
        tokens |= report["tokens"]
        logprobs |= report["logprobs"]
    return tokens, logprobs


@pytest.mark.slow
@pytest.mark.parametrize("head", ["whole", "sharded"])
def test_two_ranks_give_the_tokens_of_one(tmp_path: Path, head: str) -> None:
    """Ranks admit, prefill, decode and idle on their own; only the number of steps is shared."""
    one = _results(_run([_options(tmp_path, ladder="1,2,4,4+16")]))
    two = _results(_run([_options(tmp_path, ladder="1,2,2+16", head=head)] * 2))
    assert len(one[0]) == len(_prompts())
    assert one[0] == two[0]
    for request, values in one[1].items():
        np.testing.assert_allclose(two[1][request], values, atol=1e-4)


def test_ranks_with_different_weights_are_refused(tmp_path: Path) -> None:
    options = _options(tmp_path, ladder="2,2+16")
    runs = _run([options, options | {"seed": 7}])
    for code, _, err in runs:
        assert code == 1
        assert "RankMismatch" in err
        assert "seed 0" in err
        assert "seed 7" in err


# What the second rank is started with instead, and how the refusal puts it.
DIFFERENT: list[tuple[dict[str, Any], str]] = [
    ({"ladder": "1,2+8"}, "ladder: rank 0 has 1,2,2+16, rank 1 has 1,2+8"),
    ({"deadline_s": 3.0}, "deadline: rank 0 has 10.0 s, rank 1 has 3.0 s"),
    ({"logits_rows": 4}, "logits rows: rank 0 has 8, rank 1 has 4"),
    ({"overrides": []}, "model: rank 0 has "),
    ({"transport": "allgather", "kernels": "default"}, "kernels: rank 0 has auto"),
    ({"triton": "0.1"}, "triton: rank 0 has "),
]


def _start_each(config: GroupConfig, store: str) -> list[str]:
    """What this rank is told of each of `DIFFERENT`."""
    names = {"RANK": config.rank, "LOCAL_RANK": config.rank, "WORLD_SIZE": config.world}
    names |= {"LOCAL_WORLD_SIZE": config.world, "MASTER_PORT": config.name}
    os.environ.update({name: str(value) for name, value in names.items()})
    told = []
    for change, _ in DIFFERENT:
        mine = dict(change) if config.rank else {}
        other = {name: mine.pop(name) for name in ("triton",) if name in mine}
        with pytest.MonkeyPatch.context() as patch:
            installed = machine.installation() | other
            patch.setattr("runtime.fingerprint.installation", lambda i=installed: i)
            try:
                options = _options(Path(store), **({"ladder": "1,2,2+16"} | mine))
                Runtime.load("tiny", **options).close()
                told.append("nothing")
            except Exception as e:  # any other is told below
                told.append(f"{type(e).__name__}: {e}")
    return told


def test_ranks_that_were_started_differently_are_told_both_values(tmp_path: Path) -> None:
    outcomes = run_ranks(2, _start_each, str(tmp_path), timeout_s=TIMEOUT_S)
    for outcome in outcomes:
        assert outcome.error is None, outcome
        assert outcome.value is not None, outcome
        for told, (_, expected) in zip(outcome.value, DIFFERENT, strict=True):
            assert told.startswith("RankMismatch")
            assert expected in told


# Which rank is given what, and why that cannot be: as an option, or with the model or a device.
REFUSED: list[tuple[int, dict[str, Any], str]] = [
    (1, {"bs": 0}, "ValueError: bs must be at least 1, got 0"),
    (0, {"ladder": "2,9"}, "ValueError: --ladder 2,9 goes up to 9 rows"),
    (1, {"transport": "rdep"}, "ValueError: --transport rdep needs GPUs"),
]


@pytest.mark.parametrize(("failing", "change", "reason"), REFUSED)
def test_a_rank_that_is_refused_tells_the_others_why(
    tmp_path: Path, failing: int, change: dict[str, Any], reason: str
) -> None:
    options = [_options(tmp_path, ladder="2,2+16")] * 2
    options[failing] = options[failing] | change
    began = time.monotonic()
    runs = _run(options)
    assert time.monotonic() - began < 50, "a rank waited for one that cannot come"
    assert [code for code, _, _ in runs] == [1, 1]
    assert reason in runs[failing][2]
    told = f"RankError: rank {failing} could not start: {reason}"
    assert told in runs[1 - failing][2], runs[1 - failing][2]


def test_an_ep_size_that_torchrun_did_not_start_is_refused(tmp_path: Path) -> None:
    ((code, _, err),) = _run([_options(tmp_path, ladder="2", ep_size=2)])
    assert code == 1
    assert "--nproc-per-node 2" in err


def test_giving_up_on_nccl_does_not_wait_for_graphs_that_are_closed_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its abort returns only when no captured graph is left that uses the communicator."""
    graphs_are_gone, aborted = threading.Event(), threading.Event()

    def abort() -> None:
        graphs_are_gone.wait(10.0)
        aborted.set()

    def destroy() -> None:
        raise AssertionError("an aborted group is destroyed as well")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", abort)
    monkeypatch.setattr(dist, "destroy_process_group", destroy)
    ranks = Ranks(GroupConfig(rank=0, world=1, name="alone"), {}, deadline_s=10.0)
    ranks.abandon()
    ranks.abandon()
    assert not aborted.is_set()
    graphs_are_gone.set()
    ranks._disconnect()
    assert aborted.is_set()
    ranks.close()
