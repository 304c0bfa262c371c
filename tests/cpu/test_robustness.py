"""A store under attack: killed writers, full disks, foreign and damaged entries, readers at work.

Whatever happens, a reader gets a whole entry, nothing, or a named refusal; and a runtime gives the
tokens that it gives without a store.
"""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from capture_cache import manifest as manifest_module
from capture_cache.archive import export, import_file
from capture_cache.errors import CorruptBundle, FingerprintMismatch, StoreError
from capture_cache.files import Files
from capture_cache.fingerprint import Fingerprint
from capture_cache.layout import ArenaLayout, Entry
from capture_cache.manifest import Manifest, seal
from capture_cache.packed import PackedWeights
from capture_cache.prune import prune
from capture_cache.store import Store
from runtime import Runtime, SamplingParams
from runtime.packing import pack
from tests.cpu.failing_files import FailingFiles
from tests.cpu.packs import small_preset
from tests.cpu.twins import load_micro, micro_checkpoint

HERE = Fingerprint.of({"device": "H200", "driver": "595.20", "model": "a", "sms": 132})
FILES = {"program": b"p" * 300, "graph/t1r1": b"nodes" * 200, "golden/t1r1": b"state" * 20}
KERNEL = "sm_90", "ab" * 32


def _manifest(fingerprint: Fingerprint = HERE) -> Manifest:
    layout = ArenaLayout.build([Entry("weights", "w", (3, 5), "bfloat16")])
    return Manifest(fingerprint, layout, {"keys": []}, (KERNEL,))


def _bundle(root: Path, files: Files | None = None) -> None:
    Store(root, files).publish(HERE, _manifest(), FILES, replace_existing=True)


def _kernel(root: Path, files: Files | None = None) -> None:
    Store(root, files).publish_kernel(*KERNEL, {"name": "k"}, {"cubin": b"code" * 100})


def _pack(root: Path, files: Files | None = None) -> None:
    torch.set_num_threads(1)
    model, source = small_preset("tiny", "fp8")
    pack(model, source, root / "weights" / "w", force=True, files=files)


def _imported(root: Path, files: Files | None = None) -> None:
    source = root.parent / "source"
    if not source.exists():
        _kernel(source)
        _bundle(source)
        export(Store(source), _manifest(), root.parent / "one.tar")
    import_file(Store(root, files), root.parent / "one.tar")


def _exported(root: Path, files: Files | None = None) -> None:
    source = root.parent / "source"
    if not source.exists():
        _kernel(source)
        _bundle(source)
    root.mkdir(parents=True, exist_ok=True)
    export(Store(source), _manifest(), root / "one.tar", force=True, files=files)


WRITERS = {
    "bundle": _bundle,
    "kernel": _kernel,
    "pack": _pack,
    "import": _imported,
    "export": _exported,
}


def _check_whole(root: Path) -> int:
    """Every visible entry is whole; how many there are."""
    store, found = Store(root), 0
    for entry in store.entries():
        assert entry.problem is None, entry.problem
        assert entry.manifest is not None
        assert dict((store.require(entry.manifest.fingerprint)).files) == FILES
        found += 1
    for kernel in store.kernels():
        assert store.load_kernel(*kernel) is not None
        found += 1
    if (root / "weights" / "w").exists():
        assert list(PackedWeights(root / "weights" / "w").verify())
        found += 1
    if (root / "one.tar").exists():
        assert (
            len(import_file(Store(root.parent / f"x{time.time_ns()}"), root / "one.tar").added) == 2
        )
        found += 1
    return found


def _die() -> None:
    os._exit(9)  # no handler, no cleaning up: as if the power were gone, but for the page cache


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_writer_killed_at_any_write_leaves_the_old_the_new_or_nothing(
    tmp_path: Path, kind: str, before: bool
) -> None:
    write, context = WRITERS[kind], multiprocessing.get_context("fork")
    for n in itertools.count():
        root = tmp_path / f"{n:02}" / "store"
        if before or kind in ("import", "export"):
            write(root if before else tmp_path / f"{n:02}" / "warm")
        child = context.Process(target=write, args=(root, FailingFiles(n, _die)))
        child.start()
        child.join(60)
        if child.exitcode == 0:
            break  # it lived to the end
        assert child.exitcode == 9
        found = _check_whole(root)
        assert found or not before or kind in ("bundle", "pack")  # moved aside, not yet replaced
        write(root)
        assert _check_whole(root)
        assert n < 60
    assert n >= 3


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_named_and_leaves_the_old_or_nothing(tmp_path: Path, kind: str) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the disk")

    write, refusals = WRITERS[kind], 0
    for n in range(60):
        root = tmp_path / f"{n:02}" / "store"
        if kind in ("import", "export"):
            write(tmp_path / f"{n:02}" / "warm")
        try:
            write(root, FailingFiles(n, full, once=True))
            break
        except StoreError as e:
            refusals += "free space" in str(e)
        _check_whole(root)
        write(root)
        assert _check_whole(root)
    assert refusals >= 2


def _replace_often(root: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        _bundle(Path(root))


def test_readers_see_whole_bundles_while_writers_replace_and_a_third_prunes(
    tmp_path: Path,
) -> None:
    context = multiprocessing.get_context("fork")
    _bundle(tmp_path)
    writers = [context.Process(target=_replace_often, args=(str(tmp_path), 3.0)) for _ in range(2)]
    for writer in writers:
        writer.start()
    seen = {"whole": 0, "none": 0, "refused": 0}
    while any(w.is_alive() for w in writers):
        try:
            found = Store(tmp_path).load(HERE)
        except CorruptBundle:  # it was removed while it was read
            seen["refused"] += 1
            continue
        seen["none" if found is None else "whole"] += 1
        assert found is None or dict(found.files) == FILES
        if seen["whole"] % 50 == 49:
            prune(Store(tmp_path), keep=0)
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    assert seen["whole"] > 20, seen
    _bundle(tmp_path)
    assert _check_whole(tmp_path) == 1
    assert not list(tmp_path.glob(".tmp-*"))


# -- foreign and old entries ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"), [("device", "B200"), ("driver", "999.1"), ("model", "b"), ("sms", 148)]
)
def test_a_bundle_of_elsewhere_is_told_field_by_field(
    tmp_path: Path, field: str, value: Any
) -> None:
    _bundle(tmp_path)
    here = Fingerprint.of({**dict(HERE.fields), field: value})
    store = Store(tmp_path)
    assert store.load(here) is None
    assert store.find(here, unset=frozenset({"torch"})) is None
    with pytest.raises(FingerprintMismatch, match=f"{field} {dict(HERE.fields)[field]} → {value}"):
        store.require(here)


def test_a_foreign_bundle_under_our_name_is_refused(tmp_path: Path) -> None:
    other = Fingerprint.of({**dict(HERE.fields), "device": "B200"})
    Store(tmp_path).publish(other, _manifest(other), FILES)
    (tmp_path / other.digest).rename(tmp_path / HERE.digest)
    with pytest.raises(CorruptBundle, match="expected the record of"):
        Store(tmp_path).load(HERE)
    _bundle(tmp_path)
    assert _check_whole(tmp_path) == 1


@pytest.mark.parametrize("schema", [0, 1, "2", None])
def test_a_bundle_of_another_schema_is_refused_then_replaced(
    tmp_path: Path, schema: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "SCHEMA", schema)
        _bundle(tmp_path)
    record = json.loads((tmp_path / HERE.digest / "manifest.json").read_bytes())
    assert record["schema"] == schema
    with pytest.raises(CorruptBundle, match="of another version"):
        Store(tmp_path).load(HERE)
    _bundle(tmp_path)
    assert _check_whole(tmp_path) == 1


# -- a runtime over a damaged store ---------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """What is done to a file of the store."""

    do: Callable[[Path], object]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _older(path: Path) -> None:
    record = json.loads(path.read_bytes())
    for key in ("schema", "sha256"):
        record.pop(key, None)
    data = json.loads(seal(record)) | {"schema": 0}
    path.write_text(json.dumps(data))


def _link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "bit flipped": _flip,
    "torn": lambda p: os.truncate(p, p.stat().st_size // 2),
    "empty": lambda p: p.write_bytes(b""),
    "older": _older,
    "link": _link,
    "pipe": _pipe,
    "gone": Path.unlink,
    "world-writable": lambda p: p.chmod(0o666),
    "another's": lambda p: os.chown(p, 12345, -1),
    "not text": lambda p: p.write_bytes(b"\xff" * 100),
}


def _tokens(runtime: Runtime) -> list[tuple[int, float]]:
    with runtime:
        runtime.add([1, 2, 3, 4], SamplingParams(max_tokens=6, ignore_eos=True))
        found = []
        while runtime.num_running:
            out = runtime.step()
            found += list(zip(out.tokens.tolist(), out.logprobs.tolist(), strict=True))
        return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_checkpoint(tmp_path_factory.mktemp("model") / "hf")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_store_costs_a_capture_and_never_a_token(
    checkpoint: Path, tmp_path: Path, how: str
) -> None:
    if how == "another's" and os.geteuid() != 0:
        pytest.skip("needs root to give a file away")
    store = str(tmp_path / "store")
    expected = _tokens(load_micro(checkpoint, store=store))
    (entry,) = Store(store).entries()
    DAMAGES[how](entry.path / "manifest.json")
    assert _tokens(load_micro(checkpoint, store=store)) == expected
    (again,) = Store(store).entries()
    assert again.problem is None, "the damaged record was not replaced"
