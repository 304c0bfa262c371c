"""`python -m runtime.replay_bench` on the CPU twin: every key, its files, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from runtime import replay_bench
from runtime.capture import TWIN_NOTE
from runtime.engine import Engine
from tests.cpu.terminal import Terminal, small


def test_replay_bench_times_every_key_and_writes_its_files(
    checkpoint: Path, tmp_path: Path, terminal: Terminal
) -> None:
    out = tmp_path / "out"
    argv = small(checkpoint, "--ctx-len", "20", "--steps", "4", "--out", str(out), "--json")
    assert terminal.run(replay_bench.main, *argv) == 0
    assert TWIN_NOTE in terminal.out
    report = terminal.report
    assert report["times_mean_something"] is False
    expected = {"command", "commit", "device", "versions", "ctx_len", "steps", "keys", "parts_us"}
    assert expected <= report.keys()
    assert [k["key"] for k in report["keys"]] == ["1", "2", "2+14"]
    for key in report["keys"]:
        assert 0 < key["p50_us"] <= key["p99_us"]
        assert key["host_us"] > 0
        assert 0 < key["graph_launch_us"] < key["host_us"]
        assert 0 < key["python_us"] < key["host_us"]
        assert key["floor"]["total"] > 0
        assert key["new_tokens_per_s"] > 0
        assert len(key["steps_us"]) == 4
        assert max(key["steps_us"]) + 0.1 >= key["p99_us"] >= key["p50_us"]
    assert report["marks"] == {"python_us": 30.0, "idle_us": 3.0}
    assert "mark 30; launch us" in " ".join(terminal.out.split())
    assert report["parts_key"] == "2"
    assert list(report["parts_us"]) == [
        *("embed", "layer 0 attention", "layer 0 mlp", "layer 1 attention", "layer 1 mlp"),
        *("head", "settle"),
    ]
    record, plot, trace = (out / f"replay_bench.{kind}" for kind in ("json", "png", "trace.json"))
    assert json.loads(record.read_text()) == report
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    events = json.loads(trace.read_text())["traceEvents"]
    assert [event["name"] for event in events] == list(report["parts_us"])
    assert all(event["ph"] == "X" and event["dur"] >= 0 for event in events)


def test_replay_bench_takes_the_keys_it_is_told(checkpoint: Path, terminal: Terminal) -> None:
    argv = small(checkpoint, "--ctx-len", "9", "--steps", "2", "--keys", "2,2+14", "--json")
    assert terminal.run(replay_bench.main, *argv, "--no-verify") == 0
    assert [k["key"] for k in terminal.report["keys"]] == ["2", "2+14"]


@pytest.mark.parametrize("context", [1, 56, 57])
def test_replay_bench_takes_every_context_that_it_says_it_takes(
    context: int, checkpoint: Path, terminal: Terminal
) -> None:
    argv = small(checkpoint, "--ctx-len", str(context), "--steps", "4", "--no-verify")
    code = terminal.run(replay_bench.main, *argv)
    if code:
        assert code == 2
        assert f"--ctx-len {context} with 4 steps: expected 1 … " in terminal.err
        assert int(re.findall(r"1 … (\d+)", terminal.err)[0]) < context


def test_replay_bench_of_a_prompt_chunk_longer_than_a_request_may_be(
    checkpoint: Path, terminal: Terminal
) -> None:
    """The default ladder has keys of 512 prompt tokens, whatever --max-seq-len is."""
    argv = [
        *("--model", str(checkpoint), "--device", "cpu", "--bs", "2", "--no-verify", "--json"),
        *("--max-seq-len", "32", "--page-size", "16", "--ctx-len", "8", "--steps", "2"),
    ]
    ladder = ("--ladder", "1,2,2+40,2+80")
    assert terminal.run(replay_bench.main, *argv, *ladder) == 0
    assert [k["key"] for k in terminal.report["keys"]] == ["1", "2"]
    assert terminal.report["skipped_keys"] == ["2+40", "2+80"]
    assert "skipped    2+40, 2+80: a prompt that fills the key is longer" in terminal.out
    assert terminal.run(replay_bench.main, *argv, *ladder, "--keys", "2+40") == 2
    assert "raise it, or name other --keys" in terminal.err


BENCH_REFUSED: dict[str, tuple[list[str], str]] = {
    "context": (["--ctx-len", "2000"], "--ctx-len 2000 with 4 steps: expected 1 … "),
    "no context": (["--ctx-len", "0"], "--ctx-len 0"),
    "no steps": (["--steps", "0"], "--steps"),
    "keys": (["--keys", "3"], "--keys 3: not in the ladder 1,2,2+14"),
    "malformed keys": (["--keys", "two"], "'two' is neither ROWS nor"),
    "no keys": (["--keys", ""], "neither ROWS nor"),
    "bandwidth": (["--bandwidth", "-1"], "--bandwidth"),
    "unknown": (["--proof-replays", "3"], "unrecognized arguments: --proof-replays 3"),
}


@pytest.mark.parametrize("name", BENCH_REFUSED)
def test_replay_bench_refuses_with_the_reason(
    name: str, checkpoint: Path, terminal: Terminal
) -> None:
    more, reason = BENCH_REFUSED[name]
    argv = small(checkpoint, "--ctx-len", "20", "--steps", "4", "--no-verify", *more)
    assert terminal.run(replay_bench.main, *argv) == 2
    assert reason in terminal.err


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--keys", "4"), "--keys 4: not in the ladder 1,2,2+14; add them with --ladder"),
        (("--num-pages", "5", "--ctx-len", "40"), "give --num-pages 7, fewer rows"),
        (("--steps", "100000", "--ctx-len", "10"), "room for 59 steps at most beside a token"),
        (("--steps", "100000"), "lower --steps, or raise --max-seq-len (the model has 512)"),
        (("--steps", "100000", "--max-seq-len", "512"), "lower --steps\n"),
        (("--keys", "2+14", "--max-seq-len", "14", "--steps", "2"), "a prompt chunk of 15 tokens"),
        (("--seed", "-1"), "seed must be in [0, 2**63), got -1"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_the_work(
    more: tuple[str, ...], reason: str, checkpoint: Path, terminal: Terminal
) -> None:
    argv = small(checkpoint, "--steps", "4", *more)
    assert terminal.run(replay_bench.main, *argv) == 2
    assert reason in terminal.err
    assert terminal.err.count("\n") == 1, "refused only after work had begun"


def test_as_few_pages_as_it_asks_for_are_enough(checkpoint: Path, terminal: Terminal) -> None:
    argv = small(checkpoint, "--ctx-len", "40", "--steps", "4", "--num-pages", "7", "--no-verify")
    assert terminal.run(replay_bench.main, *argv) == 0


def test_a_file_that_cannot_be_written_is_named_and_the_numbers_are_not_lost(
    checkpoint: Path, tmp_path: Path, terminal: Terminal
) -> None:
    (tmp_path / "replay_bench.trace.json").symlink_to("/dev/full")
    argv = small(checkpoint, "--steps", "2", "--no-verify", "--keys", "1", "--json")
    assert terminal.run(replay_bench.main, *argv, "--out", str(tmp_path)) == 2
    assert terminal.error.startswith(f"error: --out: {tmp_path}/replay_bench.trace.json cannot be")
    assert "No space left on device" in terminal.error
    assert [key["key"] for key in terminal.report["keys"]] == ["1"]


def test_of_several_ranks_the_table_says_whose_tokens_it_counts(
    checkpoint: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = replay_bench._show

    def of_eight(engine: Engine, *rest: Any) -> None:
        engine.ranks.world = 8
        show(engine, *rest)

    argv = small(checkpoint, "--steps", "2", "--no-verify", "--keys", "1")
    assert terminal.run(replay_bench.main, *argv) == 0
    assert "of rank" not in terminal.out
    monkeypatch.setattr(replay_bench, "_show", of_eight)
    assert terminal.run(replay_bench.main, *argv) == 0
    assert "tok/s: of rank 0 alone, of 8; python us" in " ".join(terminal.out.split())
