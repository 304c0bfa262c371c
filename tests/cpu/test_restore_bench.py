"""The restore benchmark: processes of one and two ranks on the fake GPU, and what it prints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from barriers.config import GroupConfig
from runtime import bare_driver, restore_bench
from runtime.cli import Bar
from runtime.config import RuntimeConfig, child_environment
from runtime.restore_runs import RunFailed, Runs
from tests.cpu.fake_cuda import FakeCuda
from tests.cpu.played import LADDER, OPTIONS, publish_bundle

PEERS = {"base": 0x680000000000, "payload_bytes": 1 << 20, "words_at": [4096]}
ROOT = Path(__file__).resolve().parents[2]


def start(options: dict[str, Any], rank: int = 0, world: int = 1) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if world > 1:
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT, "TORCHELASTIC_RUN_ID": "bench"}
    command = [sys.executable, "-m", "tests.cpu.restored_rank", json.dumps(options)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


PORT = free_port()


def results(processes: list[subprocess.Popen[str]]) -> list[tuple[int, Any, str]]:
    """(exit code, what it printed, stderr) of each."""
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=120)
            lines = [x for x in out.splitlines() if x.startswith("RUNS ")]
            told = json.loads(lines[0].removeprefix("RUNS ")) if lines else None
            found.append((process.returncode, told, err))
    finally:
        for process in processes:
            process.kill()
    return found


def test_a_run_is_timed_from_the_start_of_its_process(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    options = OPTIONS | {"store": str(tmp_path)}
    ((code, told, err),) = results([start(options)])
    assert code == 0, err[-3000:]
    (first, _), _, alone = told
    assert first["from"] == "bundle", first["reason"]
    assert not first["torch"]
    assert first["first_step_ms"] == pytest.approx(sum(first["spans_ms"].values()))
    assert first["all_keys_ms"] >= first["first_step_ms"]
    assert sorted(first["key_ms"]) == sorted(LADDER.split(","))
    assert "ranks" not in first
    assert first["connections"] == "2", "asked for by whoever opens the driver first"
    assert alone["ready_ms"] == pytest.approx(sum(alone["spans_ms"].values()))
    assert list(alone["spans_ms"]) == ["interpreter", "library", "cuInit", "context"]
    assert "ranks" not in alone


def test_a_process_that_does_not_end_is_a_failure_like_any_other(tmp_path: Path) -> None:
    code = "import sys, time; print('stuck here', file=sys.stderr, flush=True); time.sleep(60)"
    options = RuntimeConfig.of(**OPTIONS | {"store": str(tmp_path)})
    with (
        Runs(options.ranks, (sys.executable, "-c", code), limit_s=2.0) as runs,
        pytest.raises(RunFailed, match="took more than 2 s: stuck here"),
    ):
        runs.process(options)


def test_two_ranks_run_together_and_the_slowest_counts(tmp_path: Path) -> None:
    publish_bundle(tmp_path, ep_size=2, bs=4, peers=PEERS)
    options = OPTIONS | {"store": str(tmp_path), "ep_size": 2, "bs": 4}
    found = results([start(options, rank, 2) for rank in range(2)])
    for code, told, err in found:
        assert code == 0, err[-3000:]
        for run in told[0]:
            assert run["from"] == "bundle", run["reason"]
            assert len(run["ranks"]) == 2
            assert run["first_step_ms"] == max(r["first_step_ms"] for r in run["ranks"])
            assert min(r["started_after_ms"] for r in run["ranks"]) == 0
            assert "ranks" in run["stages_ms"], "how long they took to meet"
            assert "peers" in run["stages_ms"], "and to map each other's memory"
            assert not any(r["torch"] or r["cuda_python"] for r in run["ranks"])
        alone = told[2]
        assert len(alone["ranks"]) == 2
        assert alone["ready_ms"] == max(r["ready_ms"] for r in alone["ranks"])
        assert min(r["started_after_ms"] for r in alone["ranks"]) == 0
    assert found[0][1] == found[1][1], "all ranks know the same"


def test_the_bare_program_says_what_fails(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = FakeCuda()
    gpu.fail["cuDevicePrimaryCtxRetain"] = 101
    assert bare_driver.main(["0", "0"], lib=gpu) == 1
    assert capsys.readouterr().err == "cuDevicePrimaryCtxRetain failed with CUDA error 101\n"


def test_the_bare_program_imports_nothing_of_ours() -> None:
    told = "print([m for m in sys.modules if m.split('.')[0] in ('runtime', 'numpy', 'json')])"
    code = f"import runpy, sys; runpy.run_path({bare_driver.__file__!r}); {told}"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_it_gets_the_gpus_and_connections_of_a_restoring_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    seen = "[os.environ[n] for n in ('CUDA_DEVICE_MAX_CONNECTIONS', 'CUDA_VISIBLE_DEVICES')]"
    tell = f"print('RESULT', json.dumps({{'ready_ms': 1.0, 'seen': {seen}}}))"
    program = (sys.executable, "-c", f"import json, os; {tell}")
    options = RuntimeConfig.of(**OPTIONS | {"store": str(tmp_path)})
    with Runs(options.ranks, bare=program, own_gpu=True) as runs:
        assert runs.bare_driver(options)["seen"] == ["2", "4"]
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "7")
        assert runs.bare_driver(options)["seen"] == ["7", "4"]


def test_a_rank_that_fails_is_named_by_the_others(tmp_path: Path) -> None:
    publish_bundle(tmp_path, ep_size=2, bs=4)
    options = OPTIONS | {"store": str(tmp_path), "ep_size": 2, "bs": 4, "weights": "skip"}
    wrong = options | {"store": str(tmp_path / "nowhere")}
    (good, _, told), (bad, _, own) = results([start(options, 0, 2), start(wrong, 1, 2)])
    assert good == 1
    assert bad == 1
    assert "rank 1" in told
    assert "holds no bundle" in told
    assert "holds no bundle" in own


def run_of(**changes: Any) -> dict[str, Any]:
    return {
        "from": "bundle",
        "spans_ms": {"imports": 100.0},
        "stages_ms": {"bundle": 30.0},
        "first_step_ms": 300.0,
        "all_keys_ms": 500.0,
        "key_ms": {"1": 9.0, "2": 8.0},
        "key_parts_ms": {"nodes": 3.0},
        "ahead_ms": {"decode": 1.0},
        "torch": False,
        "connections": "2",
        "bytecode": {"runtime": True, "numpy": True},
        "driver_alone": {"ready_ms": 220.0, "spans_ms": {"cuInit": 150.0, "context": 70.0}},
    } | changes


def test_the_table_has_stages_keys_size_and_published_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    captured = run_of(key_ms={}, key_parts_ms={}, ahead_ms={}, torch=True, first_step_ms=9000.0)
    report = {
        "ranks": 4,
        "bundle_bytes": 20 << 20,
        "nodes": [900, 1391],
        "runs": {"restored, no weights": [run_of()] * 2, "captured, cold": [captured]},
        "published": [{"what": "vLLM", "time": "14 s", "source": "github.com/x"}],
    }
    restore_bench._show(report)
    out = capsys.readouterr().out
    for text in ("4 rank(s)", "imports 100", "bundle 30", "9,000", "1 9.0, 2 8.0", "nodes 3"):
        assert text in out
    for text in ("220 ms by itself (cuInit 150, context 70; connections: 2)", "80 ms to the first"):
        assert text in out
    for text in ("decode 1", "900 to 1391", "20.0 MiB; page cache warm", "14 s", "github.com/x"):
        assert text in out


@pytest.mark.parametrize(("there", "told"), [(True, False), (False, True)])
def test_a_numpy_that_every_process_compiles_is_told(
    there: bool, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_of(bytecode={"runtime": True, "numpy": there})
    runs = {"restored": [run_of(), found]}
    restore_bench._show({"ranks": 1, "runs": runs, "published": []})
    assert ("numpy without bytecode" in capsys.readouterr().out) == told


@pytest.mark.parametrize(("unwritten", "there"), [("1", "False"), ("", "True")])
def test_a_process_knows_whether_numpy_has_bytecode(
    unwritten: str, there: str, tmp_path: Path
) -> None:
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text("")
    code = "import numpy, runtime.restore_child as c; print(c._has_bytecode('numpy'))"
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": unwritten, "PYTHONPATH": str(tmp_path)}
    env.pop("PYTHONPYCACHEPREFIX", None)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(1, {str(ROOT)!r}); {code}"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == there, done.stderr


def test_the_twin_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="CPU twin has no graphs to restore"):
        restore_bench.main(["--device", "cpu"])


def test_kinds_are_chosen_by_name() -> None:
    args = restore_bench.parser().parse_args(["--kinds", "no-weights", "cold"])
    assert args.kinds == ["no-weights", "cold"]
    assert restore_bench.parser().parse_args([]).kinds == list(restore_bench.KINDS)


@pytest.mark.parametrize(
    ("visible", "rank", "own"), [(None, "2", "2"), ("4,5,6", "1", "5"), ("GPU-7", "3", "GPU-7")]
)
def test_a_process_may_see_its_own_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, rank: str, own: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("LOCAL_RANK", rank)
    env = child_environment("x", own_gpu=True)
    assert env["CUDA_VISIBLE_DEVICES"] == own
    assert child_environment("x").get("CUDA_VISIBLE_DEVICES") == visible
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", own)
    assert RuntimeConfig(model="tiny").local_rank == 0, "the only GPU that it sees"


def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="names 2 GPUs, and this is local rank 2"):
        child_environment("x", own_gpu=True)


def test_the_gpu_is_that_of_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert RuntimeConfig(model="tiny").local_rank == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert RuntimeConfig(model="tiny").local_rank == 3


class Recorded(Runs):
    """Starts nothing; keeps what it was asked to load."""

    def __init__(self) -> None:
        super().__init__(GroupConfig(0, 1, "alone"))
        self.asked: list[RuntimeConfig] = []

    def process(self, options: RuntimeConfig) -> dict[str, Any]:
        self.asked.append(options)
        return run_of()

    def bare_driver(self, options: RuntimeConfig) -> dict[str, Any]:
        return {"ready_ms": 1.0}


def test_each_kind_loads_what_it_says(tmp_path: Path) -> None:
    options = RuntimeConfig.of(**(OPTIONS | {"store": str(tmp_path), "check_keys": "all"}))
    kinds = list(restore_bench.KINDS.values())
    with Recorded() as runs, Bar() as bar:
        found = restore_bench._measure(runs, options, kinds, 2, bar)
        bare, _, whole, _, cold, warm = runs.asked
        assert Path(str(cold.store)).is_dir()
    restored = [r for kind in kinds[:2] for r in found[kind]]
    assert all(r["driver_alone"] == {"ready_ms": 1.0} for r in restored)
    assert {kind: len(r) for kind, r in found.items()} == dict(
        zip(kinds, (2, 2, 1, 1), strict=True)
    )
    assert (bare.weights, bare.check_keys, bare.bundle) == ("skip", "first", True)
    assert whole == options
    assert warm == cold, "what the first compiled makes the second warm"
    assert not cold.bundle
    assert cold.store != str(tmp_path)
    assert not Path(str(cold.store)).exists(), "removed at the end"
