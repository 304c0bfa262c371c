"""Benchmarks of ranks: what one of them refuses, the others hear at once; as real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = "bench.rdep_barrier_ab"
TIMEOUT_S = 30.0  # to be told takes a second; a rank that is told nothing waits 40


def _run(module: str, *options: list[str]) -> list[tuple[int, str]]:
    """Exit code and stderr of each rank, started as torchrun does with options of its own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    world = str(len(options))
    fixed = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, *own],
            cwd=ROOT,
            env={**os.environ, **fixed, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(options)
    ]
    try:
        told = [rank.communicate(timeout=TIMEOUT_S)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, text) for rank, text in zip(ranks, told, strict=True)]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (["--replays", "0"], "--replays, --deadline-ms and --limit-s must be positive"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_what_one_rank_refuses_is_told_to_the_others(
    option: list[str], reason: str, failing: int
) -> None:
    ends = _run(BENCH, *(option if rank == failing else [] for rank in range(2)))
    assert ends[failing] == (2, f"error: {reason}; see python -m {BENCH} --help\n")
    assert ends[1 - failing] == (
        1,
        f"error: RankError: rank {failing} could not start: {reason}; correct that and start all "
        "ranks again\n",
    )


@pytest.mark.parametrize("option", [["--replays", "7"], ["--no-torch"]])
def test_options_that_differ_are_refused_with_both(option: list[str]) -> None:
    for code, told in _run(BENCH, [], option):
        assert code == 1
        assert told.startswith(f"error: RankMismatch: ranks disagree on {option[0]}: rank 0 has ")


def test_ranks_without_a_gpu_are_named_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for code, told in _run(BENCH, [], []):
        assert code == 1
        assert told.startswith("error: RankError: opening the GPU failed on ranks 0, 1: rank 0: ")
