"""Packers that fail, die or meet: they leave all or nothing."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from capture_cache.errors import StoreError
from capture_cache.files import Files
from capture_cache.packed import PackedWeights
from capture_cache.packed_index import INDEX, SHARED
from graphs.model_source import resolve_model
from runtime.packing import pack
from tests.cpu.failing_files import FailingFiles, Killed, dying
from tests.cpu.packs import odd_checkpoint, small_preset


def _attempts(make: Callable[[int], Files], root: Path) -> Iterator[tuple[Path, Files]]:
    for steps in range(100):
        yield root / f"{steps:02}" / "packed", make(steps)
    pytest.fail("it never lived to the end")


def test_a_packer_killed_anywhere_leaves_all_or_nothing(tmp_path: Path) -> None:
    model, source = small_preset("tiny", "fp8")
    steps = 0
    for out, files in _attempts(dying, tmp_path):
        try:
            pack(model, source, out, files=files)
            break
        except Killed:
            steps += 1
        if out.exists():  # renamed, but not known to be on the disk yet
            list(PackedWeights(out).verify())
        assert list(pack(model, source, out).verify())
    assert steps >= 9


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free space"), (errno.EACCES, "writable"), (errno.EROFS, "read-only")],
)
def test_a_failing_disk_is_named_and_leaves_nothing(
    tmp_path: Path, number: int, remedy: str
) -> None:
    model, source = small_preset("tiny", "fp8")

    def fail() -> None:
        raise OSError(number, os.strerror(number), "the disk")

    def make(steps: int) -> Files:
        return FailingFiles(steps, fail, removes=False)

    told = []
    for out, files in _attempts(make, tmp_path):
        try:
            pack(model, source, out, files=files)
            break
        except StoreError as e:
            told.append(str(e))
        assert not list(out.parent.glob(".tmp-*"))
    assert len(told) >= 9
    assert all(remedy in line and "--out" in line for line in told)


def test_a_full_disk_is_found_before_anything_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _at: int, _nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    told: list[str] = []
    with pytest.raises(StoreError, match="free space"):
        pack(
            *small_preset("tiny", "fp8"),
            tmp_path / "p",
            progress=lambda kind, *_: told.append(kind),
        )
    assert not told
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept_or_refused_or_replaced(tmp_path: Path) -> None:
    model, source = small_preset("tiny", "fp8")
    out = tmp_path / "p"
    out.mkdir()
    pack(model, source, out)  # an empty directory may have been made for it
    before = (out / INDEX).stat().st_ino
    pack(model, source, out)
    assert (out / INDEX).stat().st_ino == before
    with pytest.raises(StoreError, match="--force"):
        pack(model, source, out, seed=1)
    pack(model, source, out, seed=1, force=True)
    assert dict(PackedWeights(out).index.identity.fields)["seed"] == 1
    os.truncate(out / SHARED, (out / SHARED).stat().st_size - 4096)
    with pytest.raises(StoreError, match="--force"):
        pack(model, source, out)  # what is damaged was of others
    assert list(pack(model, source, out, seed=1).verify())  # made again: it was of these
    os.truncate(out / INDEX, 100)
    with pytest.raises(StoreError, match="--force"):
        pack(model, source, out, seed=1)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "diary.txt").write_text("dear")
    for force in (False, True):
        with pytest.raises(StoreError, match="got other files"):
            pack(model, source, other, force=force)
    assert (other / "diary.txt").read_text() == "dear"
    assert not list(tmp_path.glob(".tmp-*"))


def _race(out: str, worker: int, results: Any) -> None:
    torch.set_num_threads(1)
    model, source = small_preset("tiny", "fp8")
    packed = pack(model, source, Path(out))
    results.put((worker, len(list(packed.verify()))))


def test_two_packers_at_once_end_with_one_result(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    out = tmp_path / "p"
    workers = [context.Process(target=_race, args=(str(out), n, results)) for n in range(3)]
    for worker in workers:
        worker.start()
    assert len({results.get(timeout=60)[0] for _ in workers}) == 3
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_checkpoint_that_changes_while_it_is_packed_is_refused(tmp_path: Path) -> None:
    path = odd_checkpoint(tmp_path / "hf")

    def touch(*_: object) -> None:
        os.utime(path / "model.safetensors", (1, 1))

    with pytest.raises(StoreError, match="nobody writes them"):
        pack(*resolve_model(path), tmp_path / "p", progress=touch)
    assert not (tmp_path / "p").exists()
