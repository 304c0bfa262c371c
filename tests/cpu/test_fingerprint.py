"""The fingerprint: what matters invalidates a capture, what does not matter does not."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import capture_cache.machine as module
import runtime.fingerprint as asked
from capture_cache.fingerprint import Fingerprint, differing
from capture_cache.layout import ArenaLayout, Entry
from capture_cache.machine import PACKAGES, ROOT, SOURCES
from capture_cache.manifest import Manifest
from capture_cache.store import Store
from runtime.config import RuntimeConfig
from runtime.fingerprint import FIELDS, IGNORED, OPTIONS, absent_packages, fingerprint
from tests.cpu.checkpoints import edit_config, read_tensors, write_tensors
from tests.cpu.twins import micro_checkpoint

BASE: dict[str, Any] = {"model": "tiny", "bs": 4, "max_seq_len": 128, "device": "cpu"}
CHIP = {
    "device": "NVIDIA H200",
    "compute capability": "9.0",
    "multiprocessors": 132,
    "driver": "580.95.05 (CUDA 13.0)",
}


def _of(**changes: Any) -> Fingerprint:
    return fingerprint(RuntimeConfig.of(**(BASE | changes)))


def test_every_field_has_its_reason_and_no_other_field_exists() -> None:
    assert [name for name, _ in _of().fields] == list(FIELDS)
    assert all(len(reason) > 10 for reason in (*FIELDS.values(), *IGNORED.values()))


def test_every_option_is_judged_once() -> None:
    options = {f.name for f in dataclasses.fields(RuntimeConfig)}
    unjudged = options - OPTIONS.keys() - IGNORED.keys()
    assert not unjudged, f"say in runtime/fingerprint.py whether {unjudged} changes a capture"
    assert not OPTIONS.keys() & IGNORED.keys()
    assert set(OPTIONS.values()) <= set(FIELDS)


CHANGES: dict[str, dict[str, Any]] = {
    "model": {"model": "moonlight"},
    "seed": {"seed": 1},
    "rows": {"bs": 8},
    "max seq len": {"max_seq_len": 64},
    "page size": {"page_size": 32},
    "num pages": {"num_pages": 50},
    "ladder": {"ladder": "1,4"},
    "attention": {"attention": "triton"},
    "transport": {"transport": "local"},
    "ep size": {"ep_size": 2, "bs": 8},
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_option_changes_its_field(field: str) -> None:
    found = differing(_of(), _of(**CHANGES[field]))
    assert field in found
    also = {"model": {"model config"}, "rows": {"ladder"}}
    assert set(found) <= {field} | also.get(field, set())


@pytest.mark.parametrize("change", [{"layers": 2}, {"overrides": ("norm_topk_prob=false",)}])
def test_layers_and_overrides_change_the_model_config(change: dict[str, Any]) -> None:
    assert differing(_of(), _of(**change)) == ["model config"]


@pytest.mark.parametrize("package", PACKAGES)
def test_another_package_version_invalidates(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _of()
    real = module.package_version
    monkeypatch.setattr(module, "package_version", lambda p: "0.0" if p == package else real(p))
    assert differing(before, _of()) == [package]


@pytest.mark.parametrize("fact", CHIP)
def test_another_machine_invalidates(fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = RuntimeConfig.of(**(BASE | {"device": "auto"}))
    monkeypatch.setattr(asked, "device_facts", lambda *_: dict(CHIP))
    before = fingerprint(options, on_device=True)
    assert [name for name, _ in before.fields] == list(FIELDS)
    monkeypatch.setattr(asked, "device_facts", lambda *_: CHIP | {fact: "another"})
    assert differing(before, fingerprint(options, on_device=True)) == [fact]


def _copied_sources(root: Path) -> Path:
    for part in SOURCES:
        target = root / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, target)
    return root


def test_sources_count_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _of()
    copy = _copied_sources(tmp_path / "elsewhere")
    monkeypatch.setattr(module, "ROOT", copy)
    assert _of() == before
    changed = ("barriers/cuda/rdep.cu", "kernels/triton/norm.py", "graphs/step.py")
    for i, name in enumerate((*changed, "capture_cache/layout.py")):
        root = shutil.copytree(copy, tmp_path / str(i))
        (root / name).write_text((root / name).read_text() + "\n")
        monkeypatch.setattr(module, "ROOT", root)
        assert differing(before, _of()) == ["sources"], name
    root = shutil.copytree(copy, tmp_path / "renamed")
    (root / "kernels/triton/norm.py").rename(root / "kernels/triton/norm2.py")
    monkeypatch.setattr(module, "ROOT", root)
    assert differing(before, _of()) == ["sources"]
    root = shutil.copytree(copy, tmp_path / "notes")
    (root / "kernels" / "notes.txt").write_text("not code")
    os.utime(root / "kernels/triton/norm.py", (1, 1))
    monkeypatch.setattr(module, "ROOT", root)
    assert _of() == before


def test_a_checkpoint_counts_by_what_it_holds_not_where(tmp_path: Path) -> None:
    path = micro_checkpoint(tmp_path / "a")
    options = {"model": str(path), "max_seq_len": 64, "page_size": 16}
    before = _of(**options)
    moved = shutil.copytree(path, tmp_path / "b")
    for file in moved.iterdir():
        os.utime(file, (1, 1))
    assert _of(**(options | {"model": str(moved)})) == before
    assert _of(**options, seed=7) == before  # a checkpoint has no seed
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    write_tensors(moved, read_tensors(moved), shards=2)
    assert shards <= {f.name for f in moved.iterdir()}
    assert differing(before, _of(**(options | {"model": str(moved)}))) == ["model"]
    edit_config(path, lambda config: config.update(rms_norm_eps=1e-3))
    assert set(differing(before, _of(**options))) == {"model", "model config"}


IGNORED_CHANGES: dict[str, Any] = {
    "store": "/elsewhere",
    "verify": False,
    "proof_replays": 5,
    "deadline_s": 3.0,
    "check_keys": "all",
}


@pytest.mark.parametrize("option", IGNORED_CHANGES)
def test_what_changes_nothing_captured_changes_nothing(option: str) -> None:
    assert _of(**{option: IGNORED_CHANGES[option]}) == _of()


def _in_fresh_process(cwd: Path, **environment: str) -> str:
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from runtime.config import RuntimeConfig
from runtime.fingerprint import fingerprint
print(fingerprint(RuntimeConfig.of(**{BASE!r})).digest)
assert not {{"torch", "triton"}} & set(sys.modules), "torch or triton was imported"
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_another_process_directory_user_and_environment_agree_without_torch(
    tmp_path: Path,
) -> None:
    """The capturing process has torch imported, as this one has."""
    other = {"HOME": str(tmp_path), "HOSTNAME": "other", "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7"}
    assert _in_fresh_process(tmp_path) == _of().digest
    assert _in_fresh_process(Path("/"), **other, TRITON_CACHE_DIR="/x") == _of().digest


def test_ranks_share_one_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for rank in range(2):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": 29500 + rank}
        for name, value in ranks.items():
            monkeypatch.setenv(name, str(value))
        seen.add(_of(bs=8).digest)
    assert len(seen) == 1


def test_a_player_without_compilers_finds_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = _of()
    layout = ArenaLayout.build([Entry("weights", "w", (3, 5), "bfloat16")])
    store = Store(tmp_path)
    store.publish(captured, Manifest(captured, layout), {})
    assert store.find(captured) == captured
    real = module.package_version
    gone = {"torch", "triton"}
    monkeypatch.setattr(module, "package_version", lambda p: None if p in gone else real(p))
    here = _of()
    assert here != captured
    assert store.find(here) is None
    assert absent_packages() >= gone
    assert store.find(here, unset=absent_packages()) == captured
    monkeypatch.setattr(module, "package_version", lambda p: "9" if p in gone else real(p))
    assert store.find(_of(), unset=absent_packages()) is None
