"""The store: nothing half written is ever seen, nothing damaged is ever used, and it says why."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture_cache.errors import CorruptBundle, FingerprintMismatch, StoreError
from capture_cache.files import Files
from capture_cache.fingerprint import Fingerprint, check, diff
from capture_cache.layout import ArenaLayout, Entry
from capture_cache.manifest import SCHEMA, Manifest, seal, unseal
from capture_cache.store import Loaded, Store
from tests.cpu.failing_files import Killed, dying

HERE = Fingerprint.of({"driver": "595.20", "gpu": "H200", "sms": 132, "pdl": True})
DIGEST = "ab" * 32
KERNEL = {"cubin": b"device code" * 50}
META = {"registers": 42, "name": "gemm"}


def _manifest(fingerprint: Fingerprint = HERE) -> Manifest:
    layout = ArenaLayout.build([Entry("weights", "w", (3, 5), "bfloat16")])
    return Manifest(fingerprint, layout, {"keys": [1, 2]}, (("sm_90", DIGEST),))


def _publish_kernel(root: Path, files: Files | None = None, code: bytes = b"code" * 100) -> Loaded:
    return Store(root, files).publish_kernel("sm_90", DIGEST, META, {"cubin": code})


def _publish_bundle(root: Path, files: Files | None = None) -> object:
    contents = {"graph/1": b"nodes" * 20, "golden": b"state" * 20}
    return Store(root, files).publish(HERE, _manifest(), contents)


def _leftovers(root: Path) -> list[Path]:
    return list(root.glob(".tmp-*"))


# -- round trips ----------------------------------------------------------------------------------


def test_bundle_comes_back_as_it_was(tmp_path: Path) -> None:
    _publish_bundle(tmp_path)
    bundle = Store(tmp_path).load(HERE)
    assert bundle is not None
    assert bundle.files == {"graph/1": b"nodes" * 20, "golden": b"state" * 20}
    assert bundle.manifest.fingerprint == HERE
    assert bundle.manifest.arena == _manifest().arena
    assert bundle.manifest.ledger == {"keys": [1, 2]}
    assert bundle.manifest.kernels == (("sm_90", DIGEST),)
    assert not _leftovers(tmp_path)


def test_kernel_comes_back_as_it_was(tmp_path: Path) -> None:
    Store(tmp_path).publish_kernel("sm_90", DIGEST, META, KERNEL)
    loaded = Store(tmp_path).load_kernel("sm_90", DIGEST)
    assert loaded is not None
    assert (dict(loaded.record), dict(loaded.files)) == (META, KERNEL)
    assert Store(tmp_path).load_kernel("sm_100", DIGEST) is None


def test_nothing_is_created_by_reading(tmp_path: Path) -> None:
    store = Store(tmp_path / "absent")
    assert store.load(HERE) is None
    assert store.load_kernel("sm_90", DIGEST) is None
    assert store.entries() == []
    assert not (tmp_path / "absent").exists()


def test_first_writer_wins_unless_replacement_is_asked_for(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.publish_kernel("sm_90", DIGEST, META, {"cubin": b"first"})
    again = store.publish_kernel("sm_90", DIGEST, META, {"cubin": b"second"})
    assert again.files["cubin"] == b"first"
    store.publish(HERE, _manifest(), {"f": b"first"})
    assert store.publish(HERE, _manifest(), {"f": b"second"}).files["f"] == b"first"
    store.publish(HERE, _manifest(), {"f": b"third"}, replace_existing=True)
    bundle = store.load(HERE)
    assert bundle is not None
    assert bundle.files["f"] == b"third"
    assert not _leftovers(tmp_path)


# -- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("publish", [_publish_kernel, _publish_bundle])
def test_any_flip_cut_or_addition_is_found(
    tmp_path: Path, publish: Callable[[Path], object]
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    publish(tmp_path)
    store = Store(tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) >= 2
    for path in files:
        good = path.read_bytes()
        cuts = [good[: draw.randrange(len(good))] for _ in range(10)]
        flips = []
        for _ in range(60):
            at = draw.randrange(len(good))
            flips.append(good[:at] + bytes([good[at] ^ (1 << draw.randrange(8))]) + good[at + 1 :])
        for bad in (*cuts, *flips, b"", good + b"\n", good + b"\0" * 4096):
            path.write_bytes(bad)
            with pytest.raises(CorruptBundle, match="expected .*delete it") as raised:
                store.load(HERE) if publish is _publish_bundle else store.load_kernel(
                    "sm_90", DIGEST
                )
            assert str(path.parent) in str(raised.value)
        path.write_bytes(good)
    assert (store.load(HERE) or store.load_kernel("sm_90", DIGEST)) is not None


def _swap_for_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def _swap_for_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _swap_for_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


UNSAFE: dict[str, tuple[Callable[[Path], object], str]] = {
    "removed": (Path.unlink, "No such file"),
    "link": (_swap_for_link, "symbolic link"),
    "pipe": (_swap_for_pipe, "regular file"),
    "folder": (_swap_for_folder, "regular file"),
    "writable by all": (lambda path: path.chmod(0o666), "0o666"),
}


@pytest.mark.parametrize("how", UNSAFE)
@pytest.mark.parametrize("name", ["cubin", "meta.json"])
def test_a_file_that_is_not_ours_is_refused_then_replaced(
    tmp_path: Path, how: str, name: str
) -> None:
    _publish_kernel(tmp_path)
    folder = tmp_path / "kernels" / "sm_90" / DIGEST
    change, reason = UNSAFE[how]
    change(folder / name)
    with pytest.raises(CorruptBundle, match=reason):
        Store(tmp_path).load_kernel("sm_90", DIGEST)
    _publish_kernel(tmp_path)
    assert Store(tmp_path).load_kernel("sm_90", DIGEST) is not None
    assert not _leftovers(tmp_path)


@pytest.mark.parametrize("how", ["file", "link", "empty", "writable"])
def test_an_entry_that_is_no_folder_of_ours_is_refused_then_replaced(
    tmp_path: Path, how: str
) -> None:
    _publish_kernel(tmp_path)
    folder = tmp_path / "kernels" / "sm_90" / DIGEST
    if how == "writable":
        folder.chmod(0o777)
    else:
        folder.rename(tmp_path / "moved")
        {
            "file": lambda: folder.write_bytes(b"x"),
            "link": lambda: folder.symlink_to(tmp_path / "moved"),
            "empty": folder.mkdir,
        }[how]()
    with pytest.raises(CorruptBundle):
        Store(tmp_path).load_kernel("sm_90", DIGEST)
    _publish_kernel(tmp_path)
    assert Store(tmp_path).load_kernel("sm_90", DIGEST) is not None


def test_a_valid_entry_under_another_key_is_refused(tmp_path: Path) -> None:
    _publish_kernel(tmp_path)
    parent = tmp_path / "kernels" / "sm_90"
    (parent / DIGEST).rename(parent / ("cd" * 32))
    with pytest.raises(CorruptBundle, match=f"got 'kernels/sm_90/{DIGEST}'"):
        Store(tmp_path).load_kernel("sm_90", "cd" * 32)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    _publish_kernel(tmp_path)
    os.chown(tmp_path / "kernels" / "sm_90" / DIGEST / "cubin", 12345, -1)
    with pytest.raises(CorruptBundle, match="owner 0 or 0, got 12345"):
        Store(tmp_path).load_kernel("sm_90", DIGEST)


def test_a_store_that_everyone_may_write_is_refused(tmp_path: Path) -> None:
    _publish_kernel(tmp_path)
    for folder in (tmp_path, tmp_path / "kernels"):
        mode = folder.stat().st_mode
        folder.chmod(0o777)
        with pytest.raises(StoreError, match="chmod o-w"):
            Store(tmp_path).load_kernel("sm_90", DIGEST)
        with pytest.raises(StoreError, match="chmod o-w"):
            _publish_kernel(tmp_path)
        folder.chmod(mode)


def test_another_schema_is_told(tmp_path: Path) -> None:
    record = json.loads(seal({"a": 1}))
    record["schema"] = 99
    with pytest.raises(CorruptBundle, match=f"expected schema {SCHEMA}, got 99"):
        unseal(json.dumps(record).encode(), Path("manifest.json"))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=80).map(str.encode))
def test_no_bytes_make_unseal_do_anything_but_refuse(data: bytes) -> None:
    with pytest.raises(CorruptBundle):
        unseal(data, Path("manifest.json"))


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptBundle):
        unseal(b"[" * 200_000, Path("manifest.json"))


# -- writers that fail ----------------------------------------------------------------------------


@pytest.mark.parametrize("publish", [_publish_kernel, _publish_bundle])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_writer_killed_anywhere_leaves_all_or_nothing(
    tmp_path: Path, publish: Callable[..., object], damaged: bool
) -> None:
    for steps in range(100):
        root = tmp_path / str(steps)
        if damaged:
            publish(root)
            target = next(p for p in root.rglob("*") if p.is_file() and p.suffix != ".json")
            target.write_bytes(b"damaged")
        try:
            publish(root, dying(steps))
            break  # it lived to the end
        except Killed:
            pass
        store = Store(root)
        try:
            seen = store.load(HERE) or store.load_kernel("sm_90", DIGEST)
        except CorruptBundle:
            assert damaged
            seen = None
        if seen is not None:
            assert all(len(data) > 50 for data in seen.files.values())
        publish(root)
        assert (store.load(HERE) or store.load_kernel("sm_90", DIGEST)) is not None
    assert 5 < steps < 99


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free space"), (errno.EACCES, "writable"), (errno.EROFS, "read-only")],
)
def test_a_failing_disk_is_named_and_leaves_nothing(
    tmp_path: Path, number: int, remedy: str
) -> None:
    class Failing(Files):
        def write(self, path: Path, data: bytes) -> None:
            path.write_bytes(data[:1])
            raise OSError(number, os.strerror(number), str(path))

    with pytest.raises(StoreError, match=remedy):
        _publish_kernel(tmp_path, Failing())
    assert Store(tmp_path).load_kernel("sm_90", DIGEST) is None
    assert not _leftovers(tmp_path)


def test_a_root_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(StoreError, match="--store"):
        _publish_kernel(tmp_path / "f")


def test_dead_writers_are_swept_after_a_day(tmp_path: Path) -> None:
    for name, age in ((".tmp-old", 100_000), (".tmp-new", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_bytes(b"x")
        then = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (then, then))
    _publish_kernel(tmp_path)
    assert [p.name for p in _leftovers(tmp_path)] == [".tmp-new"]


def _race(root: str, worker: int, rounds: int, out: Any) -> None:
    seen = []
    for i in range(rounds):
        digest = f"{i:064x}"
        code = bytes([worker]) * 5000
        won = Store(Path(root)).publish_kernel("sm_90", digest, {"w": worker}, {"cubin": code})
        again = Store(Path(root)).load_kernel("sm_90", digest)
        assert again is not None
        assert again.files["cubin"] == won.files["cubin"] == bytes([again.record["w"]]) * 5000
        seen.append(again.record["w"])
    out.put(seen)


def test_writers_race_and_all_use_the_winners(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    workers = [context.Process(target=_race, args=(str(tmp_path), n, 20, out)) for n in (1, 2, 3)]
    for worker in workers:
        worker.start()
    results = [out.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert results[0] == results[1] == results[2]
    assert not _leftovers(tmp_path)


# -- fingerprints ---------------------------------------------------------------------------------


def test_a_miss_names_the_fields_of_the_nearest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(FingerprintMismatch, match="holds no bundle"):
        store.require(HERE)
    older = Fingerprint.of({**dict(HERE.fields), "driver": "580.159"})
    other = Fingerprint.of({"gpu": "B200"})
    for fingerprint in (older, other):
        store.publish(fingerprint, _manifest(fingerprint), {})
    with pytest.raises(FingerprintMismatch, match=r"driver 580\.159 → 595\.20\. Capture again"):
        store.require(HERE)
    assert store.load(older) is not None


def test_damaged_bundles_are_listed_with_their_problem(tmp_path: Path) -> None:
    _publish_bundle(tmp_path)
    other = Fingerprint.of({"gpu": "B200"})
    Store(tmp_path).publish(other, _manifest(other), {})
    (tmp_path / other.digest / "manifest.json").write_text("{}")
    listed = {e.path.name: e for e in Store(tmp_path).entries()}
    assert listed[HERE.digest].problem is None
    assert "sealed" in str(listed[other.digest].problem)


def test_a_manifest_of_another_fingerprint_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another fingerprint"):
        Store(tmp_path).publish(HERE, _manifest(Fingerprint.of({"gpu": "B200"})), {})


@pytest.mark.parametrize("name", ["../x", "/x", "a/b/c", "", ".hidden", "a//b", "a/../b"])
def test_file_names_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="file name"):
        Store(tmp_path).publish(HERE, _manifest(), {name: b"x"})


VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
FIELDS = st.dictionaries(st.text(min_size=1, max_size=6), VALUES, min_size=1, max_size=5)


@given(FIELDS, FIELDS, st.randoms())
def test_digest_and_diff_agree(a: Any, b: Any, shuffle: random.Random) -> None:
    one, two = Fingerprint.of(a), Fingerprint.of(b)
    assert (one.digest == two.digest) == (diff(one, two) == [])
    items = list(a.items())
    shuffle.shuffle(items)
    assert Fingerprint.of(dict(items)).digest == one.digest
    assert Fingerprint.from_json(json.loads(json.dumps(one.to_json()))) == one
    check(one, one)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1], b"x"])
def test_fingerprints_hold_plain_values_only(value: Any) -> None:
    with pytest.raises(ValueError, match="'x' must be"):
        Fingerprint.of({"x": value})


def test_a_measurement_comes_back_is_listed_and_replaced(tmp_path: Path) -> None:
    store, digest = Store(tmp_path / "s"), "ab" * 32
    assert store.records() == []
    assert store.load_record(digest) is None
    for record in ({"us": 1.5}, {"us": 2.5}):
        store.publish_record(digest, record)
        assert store.load_record(digest) == record
    assert store.records() == [digest]
    assert store.entries() == []  # no bundle
    (store.root / "records" / digest / "meta.json").write_bytes(b"{}")
    with pytest.raises(CorruptBundle):
        store.load_record(digest)
