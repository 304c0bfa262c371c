"""Bundles as files: exported, imported elsewhere, and refused where they are not as exported."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capture_cache.__main__ import main
from capture_cache.archive import INDEX, export, import_file, read_bytes
from capture_cache.errors import CorruptBundle, StoreError
from capture_cache.files import Files
from capture_cache.manifest import seal, unseal
from capture_cache.store import Store
from tests.cpu.cache_stores import (
    entry_name,
    kernel_name,
    three_bundles,
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return three_bundles(tmp_path / "store")


@pytest.fixture
def exported(store: Path, tmp_path: Path) -> Path:
    path = tmp_path / "bundle.tar"
    found = next(
        e.manifest for e in Store(store).entries() if e.path.name == entry_name(store, "model-1")
    )
    assert found is not None
    export(Store(store), found, path)
    return path


def test_an_exported_bundle_arrives_elsewhere_as_it_was(
    store: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "elsewhere"
    assert main(["import", str(exported), "--store", str(other), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["added"]) == 3
    name = entry_name(store, "model-1")
    assert report["added"][-1] == name  # after the kernels that it uses
    for path in (other / name).rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (store / path.relative_to(other)).read_bytes()
    assert main(["verify", "--store", str(other)]) == 0
    capsys.readouterr()
    main(["import", str(exported), "--store", str(other), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["added"], len(report["present"])) == ([], 3)


def test_an_export_is_a_plain_tar_and_the_same_every_time(
    store: Path, exported: Path, tmp_path: Path
) -> None:
    with tarfile.open(exported) as tar:
        members = tar.getmembers()
    assert members[0].name == INDEX
    assert all(m.isreg() for m in members)
    name = entry_name(store, "model-1")
    assert f"{name}/graph/t1r1" in {m.name for m in members}
    assert main(["export", name[:9], str(tmp_path / "b"), "--store", str(store)]) == 0
    assert (tmp_path / "b").read_bytes() == exported.read_bytes()


def test_export_refuses_what_is_there_and_what_is_damaged(
    store: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, where = entry_name(store, "model-1"), ["--store", str(store)]
    assert main(["export", name, str(exported), *where]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["export", name, str(exported), "--force", *where]) == 0
    Store(store).remove(("kernels", *kernel_name(3)))
    before = exported.read_bytes()
    assert main(["export", name, str(exported), "--force", *where]) == 1
    assert "capture again" in capsys.readouterr().err
    assert exported.read_bytes() == before


def test_a_full_disk_leaves_no_half_export(store: Path, tmp_path: Path) -> None:
    class Full(Files):
        def write(self, path: Path, data: bytes) -> None:
            path.write_bytes(data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    manifest = next(e.manifest for e in Store(store).entries())
    assert manifest is not None
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(StoreError, match="free space"):
        export(Store(store), manifest, folder / "b.tar", files=Full())
    assert not list(folder.iterdir())


def _refused(data: bytes, tmp_path: Path) -> str:
    """Import `data` into a fresh store, which must stay without a bundle."""
    path, target = tmp_path / "bad.tar", tmp_path / "target"
    path.write_bytes(data)
    with pytest.raises(CorruptBundle) as raised:
        import_file(Store(target), path)
    assert Store(target).entries() == []
    return str(raised.value)


def test_any_flip_cut_or_addition_of_an_export_is_found(exported: Path, tmp_path: Path) -> None:
    good = exported.read_bytes()
    draw = random.Random(5)
    places = [*range(512), *(draw.randrange(len(good)) for _ in range(400))]
    for at in (*places, len(good) - 1):
        bad = bytearray(good)
        bad[at] ^= 1 << draw.randrange(8)
        with pytest.raises(CorruptBundle):
            read_bytes(bytes(bad), exported)
    for bad in (b"", good[:100], good[:-1], good[:-512], good + b"\0", good + bytes(512), good * 2):
        _refused(bytes(bad), tmp_path)


def _rewritten(
    exported: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]
) -> bytes:
    """The export taken apart and put together by Python's own tar writer."""
    with tarfile.open(exported) as tar:
        members = [(m, (tar.extractfile(m) or io.BytesIO()).read()) for m in tar.getmembers()]
    change(members)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    raw = out.getvalue()
    used = sum(512 + len(d) + -len(d) % 512 for _, d in members)
    return raw[:used] + bytes(1024)


def _escape(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members[1][0].name = "../../escaped"


def _absolute(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members[1][0].name = "/tmp/escaped"


def _as_link(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members[1][0].type, members[1][0].linkname = tarfile.SYMTYPE, "/etc/passwd"


def _as_device(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members[1][0].type = tarfile.CHRTYPE


def _swapped(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members[1], members[2] = members[2], members[1]


def _doubled(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members.append(members[-1])


def _setuid(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members[1][0].mode = 0o4777


@pytest.mark.parametrize(
    "change", [_escape, _absolute, _as_link, _as_device, _swapped, _doubled, _setuid]
)
def test_a_tar_that_means_harm_is_refused(
    exported: Path, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    assert _rewritten(exported, lambda _: None) == exported.read_bytes()
    _refused(_rewritten(exported, change), tmp_path)
    assert not Path("/tmp/escaped").exists()
    assert not (tmp_path / "escaped").exists()


def _resealed(exported: Path, edit: Callable[[dict[str, Any]], None]) -> bytes:
    """With another index, sealed as it should be."""

    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        record = unseal(members[0][1], Path(INDEX))
        edit(record)
        data = seal(record)
        members[0][0].size = len(data)
        members[0] = (members[0][0], data)

    return _rewritten(exported, change)


def _entry(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["entries"][0].__setitem__(0, name)


INDEXES: dict[str, Callable[[dict[str, Any]], None]] = {
    "another kind": lambda r: r.update(kind="x"),
    "another format": lambda r: r.update(format=2),
    "no entries": lambda r: r.update(entries=[]),
    "entries of another form": lambda r: r.update(entries={"a": {}}),
    "an entry that leaves the store": _entry("../" + "0" * 64),
    "an absolute entry": _entry("/etc"),
    "an entry of weights": _entry("weights/" + "0" * 64),
    "an entry twice": lambda r: r["entries"].append(r["entries"][0]),
    "a name that leaves its entry": lambda r: r["entries"][0][1].update(
        {"../x": {"bytes": 1, "sha256": "0" * 64}}
    ),
    "a negative size": lambda r: r["entries"][0][1]["cubin"].update(bytes=-1),
    "a huge size": lambda r: r["entries"][0][1]["cubin"].update(bytes=1 << 60),
    "another size": lambda r: r["entries"][0][1]["cubin"].update(bytes=999),
    "another hash": lambda r: r["entries"][0][1]["cubin"].update(sha256="0" * 64),
    "no record": lambda r: r["entries"][-1][1].pop("manifest.json"),
    "another fingerprint": lambda r: r["entries"][-1].__setitem__(0, "0" * 64),
}


@pytest.mark.parametrize("which", INDEXES)
def test_an_export_with_a_false_index_is_refused(
    exported: Path, tmp_path: Path, which: str
) -> None:
    _refused(_resealed(exported, INDEXES[which]), tmp_path)


def test_import_wants_a_file_of_ours(exported: Path, tmp_path: Path) -> None:
    target = Store(tmp_path / "target")
    with pytest.raises(StoreError, match="No such file"):
        import_file(target, tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(StoreError, match="regular file|yours|own"):
            import_file(target, other)
    exported.chmod(0o666)
    with pytest.raises(StoreError, match="0o666"):
        import_file(target, exported)
