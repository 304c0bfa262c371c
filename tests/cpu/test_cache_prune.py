"""`python -m capture_cache prune`: what is kept, what is removed, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from capture_cache.__main__ import main
from capture_cache.store import Store
from tests.cpu.cache_stores import (
    Run,
    commands,
    entry_name,
    kernel_name,
    of_another_version,
    three_bundles,
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return three_bundles(tmp_path / "store")


@pytest.fixture
def run(store: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return commands(store, capsys)


def _left(store: Path) -> tuple[set[str], set[int]]:
    listed = Store(store)
    models = {
        str(dict(e.manifest.fingerprint.fields)["model"]) for e in listed.entries() if e.manifest
    }
    return models, {int(digest, 16) for _, digest in listed.kernels()}


def test_prune_keeps_the_newest_and_their_kernels(store: Path, run: Run) -> None:
    code, report = run("prune", "--keep", "2", "--dry-run")
    assert (code, report["dry_run"], len(report["bundles"])) == (0, True, 1)
    assert len(_left(store)[0]) == 3
    assert run("prune", "--keep", "2")[0] == 0
    assert _left(store) == ({"model-1", "model-2"}, {2, 3, 4})
    assert run("verify")[0] == 0
    assert run("prune", "--keep", "0")[0] == 0
    assert _left(store) == (set(), set())
    assert not list(store.glob(".tmp-*"))


def test_prune_to_bytes_counts_kernels_that_stay_in_use(store: Path, run: Run) -> None:
    whole = run("prune", "--max-bytes", "1G")[1]
    assert whole["bundles"] == []
    assert whole["kernels"] == [f"kernels/sm_90/{kernel_name(9)[1]}".removeprefix("kernels/")]
    limit = whole["left_bytes"] - 1
    run("prune", "--max-bytes", str(limit))
    models, kernels = _left(store)
    assert (models, kernels) == ({"model-1", "model-2"}, {2, 3, 4})


def test_prune_spares_the_kernels_of_a_capture_under_way(store: Path, run: Run) -> None:
    Store(store).publish_kernel(*kernel_name(7), {"name": "new"}, {"cubin": b"x"})
    run("prune", "--keep", "0")
    assert _left(store) == (set(), {7})


def test_prune_takes_damaged_bundles_first(store: Path, run: Run) -> None:
    (store / entry_name(store, "model-2") / "manifest.json").write_text("{}")
    run("prune", "--keep", "2")
    assert _left(store)[0] == {"model-0", "model-1"}


def test_prune_removes_what_cannot_be_used_and_says_so(
    store: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    Store(store).publish_record("cd" * 32, {"us": 1.5})
    bad, other = entry_name(store, "model-1"), entry_name(store, "model-2")
    (store / bad / "manifest.json").write_text("{}")
    of_another_version(store / other / "manifest.json")
    of_another_version(store / "kernels" / "sm_90" / kernel_name(4)[1] / "meta.json")
    (store / "records" / ("cd" * 32) / "meta.json").write_bytes(b"{}")
    weights = store / "weights" / ("ab" * 32)
    weights.mkdir(parents=True)
    expected = {
        bad: "damaged",
        other: "of another version",
        f"kernels/sm_90/{kernel_name(4)[1]}": "of another version",
        f"records/{'cd' * 32}": "damaged",
        f"weights/{'ab' * 32}": "damaged",
    }
    assert run("prune", "--dry-run")[1]["broken"] == expected
    assert weights.exists()
    assert main(["prune", "--store", str(store)]) == 0
    told = capsys.readouterr().out
    assert all(f"removed {entry}, {why}" in told for entry, why in expected.items())
    assert _left(store) == ({"model-0"}, {1, 2, 3, 9})
    assert not any((store / entry).exists() for entry in expected)
    assert run("prune")[1]["broken"] == {}
    assert run("verify")[0] == 0


def test_prune_removes_the_one_that_is_named(store: Path, run: Run) -> None:
    name = entry_name(store, "model-1")
    code, report = run("prune", "--only", name[:10], "--dry-run")
    assert (code, report["bundles"]) == (0, [name])
    assert len(_left(store)[0]) == 3
    run("prune", "--only", name[:10])
    assert _left(store) == ({"model-0", "model-2"}, {1, 2, 3, 4, 9})
    weights = store / "weights" / ("ab" * 32)
    weights.mkdir(parents=True)
    assert run("prune", "--only", "abab")[1]["weights"] == [weights.name]
    assert not weights.exists()
