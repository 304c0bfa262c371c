"""`python -m capture_cache`: what a person or a script can ask of a store, and what it refuses."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capture_cache.__main__ import main
from capture_cache.archive import INDEX, export, import_file, read_bytes
from capture_cache.errors import CorruptBundle, StoreError
from capture_cache.files import Files
from capture_cache.fingerprint import Fingerprint
from capture_cache.layout import ArenaLayout, Entry
from capture_cache.machine import here
from capture_cache.manifest import Manifest, seal, unseal
from capture_cache.packed_index import INDEX as PACKED_INDEX
from capture_cache.packed_index import SHARED
from capture_cache.store import Store
from capture_cache.survey import tree_bytes
from graphs.model_source import resolve_model
from runtime.packing import pack
from runtime.weights import identity, store_folder
from tests.cpu.played import publish_bundle
from tests.cpu.twins import load_micro, micro_checkpoint

ROOT = Path(__file__).resolve().parents[2]
FACTS = {**here(on_device=False), "model": "tiny", "ep size": 1, "rows": 4, "ladder": "1,2,4"}
LEDGER = {"keys": [{"key": "1", "rows": 1}, {"key": "2", "rows": 2}]}


def _kernel(n: int) -> tuple[str, str]:
    return "sm_90", f"{n:064x}"


def _publish(root: Path, kernels: list[int], *, age_s: float = 0, **facts: Any) -> Fingerprint:
    """A bundle of the given kernels, captured so long ago."""
    fingerprint = Fingerprint.of(FACTS | facts)
    store = Store(root)
    then = time.time() - age_s
    for n in kernels:
        meta = {"name": f"kernel_{n}", "registers": n, "spill_bytes": 0, "shared_bytes": 0}
        loaded = store.publish_kernel(*_kernel(n), meta, {"cubin": bytes([n]) * 1000})
        os.utime(loaded.path, (then, then))
    layout = ArenaLayout.build([Entry("weights", "w", (3, 5), "bfloat16")])
    used = tuple(_kernel(n) for n in kernels)
    files = {"graph/t1r1": b"nodes" * 100, "golden/t1r1": b"state"}
    bundle = store.publish(fingerprint, Manifest(fingerprint, layout, LEDGER, used), files)
    os.utime(bundle.path / "manifest.json", (then, then))
    return fingerprint


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three bundles, the first the oldest; kernel 2 is used twice, kernel 9 by none."""
    root = tmp_path / "store"
    for i, kernels in enumerate(([1, 2], [2, 3], [4])):
        _publish(root, kernels, age_s=10_000 * (3 - i), model=f"model-{i}")
    Store(root).publish_kernel(*_kernel(9), {"name": "idle"}, {"cubin": b"x" * 1000})
    old = time.time() - 50_000
    os.utime(root / "kernels" / "sm_90" / _kernel(9)[1], (old, old))
    return root


Run = Callable[..., tuple[int, Any]]


@pytest.fixture
def run(store: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command with --json; (exit code, what it printed)."""

    def command(*argv: str) -> tuple[int, Any]:
        code = main([*argv, "--store", str(store), "--json"])
        out = capsys.readouterr()
        return code, json.loads(out.out) if out.out else out.err

    return command


def _name(store: Path, model: str) -> str:
    entries = Store(store).entries()
    return next(
        e.path.name
        for e in entries
        if e.manifest is not None and ("model", model) in e.manifest.fingerprint.fields
    )


def test_list_shows_all_and_marks_what_is_damaged(store: Path, run: Run) -> None:
    code, report = run("list")
    assert code == 0
    assert [r["model"] for r in report["bundles"]] == ["model-0", "model-1", "model-2"]
    assert report["bundles"][0]["keys"] == 2
    assert report["bundles"][0]["graphs"] == 1
    assert report["kernels"]["sm_90"]["kernels"] == 5
    bad = _name(store, "model-1")
    (store / bad / "manifest.json").write_text("{}")
    code, report = run("list")
    assert code == 1
    assert [bool(r["problem"]) for r in report["bundles"]].count(True) == 1


def test_an_empty_store_is_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["list", "--store", str(tmp_path)]) == 0
    assert "empty" in capsys.readouterr().out
    monkeypatch.delenv("LOCKSTEP_STORE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    for command in ("list", "verify"):  # the default place is made by the first capture
        assert main([command]) == 0
    assert not (tmp_path / "none").exists()


def _nothing(path: Path) -> None: ...


def _file(path: Path) -> None:
    path.write_text("x")


def _checkpoint(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")


@pytest.mark.parametrize("make", [_nothing, _file, _checkpoint])
@pytest.mark.parametrize("command", ["list", "verify", "prune", "show"])
def test_what_is_no_store_is_refused(
    command: str,
    make: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(tmp_path / "x")
    argv = [command, *(["abc"] if command == "show" else [])]
    assert main([*argv, "--store", str(tmp_path / "x")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: store {tmp_path / 'x'}: expected a ")
    assert err.count("\n") == 1
    monkeypatch.setenv("LOCKSTEP_STORE", str(tmp_path / "x"))
    assert main(argv) == 2


def test_show_tells_fields_ledger_kernels_and_files(store: Path, run: Run) -> None:
    code, report = run("show", _name(store, "model-0")[:10])
    assert code == 0
    assert report["fields"]["model"] == "model-0"
    assert report["ledger"] == LEDGER
    assert [k["name"] for k in report["kernels"]] == ["kernel_1", "kernel_2"]
    assert report["files"]["graph/t1r1"] == 500
    assert report["arena"]["weights"] == 2 << 20
    Store(store).remove(("kernels", *_kernel(1)))
    code, report = run("show", _name(store, "model-0"))
    assert code == 1
    assert report["kernels"][0]["problem"] == "not in the store"


def test_tables_say_what_json_says(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = _name(store, "model-0")
    for argv, words in (
        (["list"], ("model-0", "cpu twin", "sm_90", name[:12])),
        (["show", name], ("kernel_1", "graph/t1r1", "arena weights", "1,2,4")),
        (["diff", name], ("0 of",)),
        (["verify"], ("8 entries", "0 damaged")),
        (["prune", "--keep", "1", "--dry-run"], ("would remove 2 bundles and 4 kernels",)),
    ):
        assert main([*argv, "--store", str(store)]) == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words), out


def test_diff_of_two_bundles_names_each_field(store: Path, run: Run) -> None:
    a, b = _name(store, "model-0"), _name(store, "model-1")
    code, report = run("diff", a, b)
    assert (code, report["differing"]) == (1, ["model"])
    row = next(f for f in report["fields"] if f["field"] == "model")
    assert (row["stored"], row["other"]) == ("model-0", "model-1")
    assert run("diff", a, a)[0] == 0


def test_diff_against_this_machine(store: Path, run: Run) -> None:
    assert run("diff", _name(store, "model-0"))[0] == 0
    foreign = _publish(store, [], sources="0" * 64, torch="0.1", model="foreign")
    code, report = run("diff", foreign.digest)
    assert (code, report["differing"]) == (1, ["torch", "sources"])


def test_verify_names_the_damaged_file(store: Path, run: Run) -> None:
    assert run("verify")[1] == {"entries": 8, "bytes": tree_bytes(store), "damaged": []}
    name = _name(store, "model-2")
    for path in (
        store / name / "golden" / "t1r1",
        store / "kernels/sm_90" / _kernel(3)[1] / "cubin",
    ):
        good = path.read_bytes()
        path.write_bytes(good[:-1] + b"?")
        code, report = run("verify")
        assert code == 1
        assert len(report["damaged"]) == 1
        assert str(path) in report["damaged"][0]["problem"]
        path.write_bytes(good)
    (store / name / "graph" / "t1r1").write_bytes(b"")
    assert run("verify", name)[0] == 1
    assert run("verify", _name(store, "model-0"))[0] == 0


def test_verify_reads_the_structs_behind_right_hashes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = publish_bundle(tmp_path / "store")
    where = ["--store", str(tmp_path / "store")]
    assert main(["verify", *where]) == 0
    assert main(["show", path.name, *where]) == 0
    assert "restore graphs" in capsys.readouterr().out
    store = Store(tmp_path / "store")
    bundle = store.entries()[0].manifest
    assert bundle is not None
    files = dict(store.require(bundle.fingerprint).files)
    changed = bytearray(files["graph/t1r1"])
    changed[64 + 4] = 77  # the first node's function
    store.publish(
        bundle.fingerprint,
        bundle,
        files | {"graph/t1r1": bytes(changed)},
        replace_existing=True,
    )
    assert main(["verify", *where]) == 1
    assert "graph/t1r1: node 0: expected a function" in capsys.readouterr().out


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
    assert whole["kernels"] == [f"kernels/sm_90/{_kernel(9)[1]}".removeprefix("kernels/")]
    limit = whole["left_bytes"] - 1
    run("prune", "--max-bytes", str(limit))
    models, kernels = _left(store)
    assert (models, kernels) == ({"model-1", "model-2"}, {2, 3, 4})


def test_prune_spares_the_kernels_of_a_capture_under_way(store: Path, run: Run) -> None:
    Store(store).publish_kernel(*_kernel(7), {"name": "new"}, {"cubin": b"x"})
    run("prune", "--keep", "0")
    assert _left(store) == (set(), {7})


def test_prune_takes_damaged_bundles_first(store: Path, run: Run) -> None:
    (store / _name(store, "model-2") / "manifest.json").write_text("{}")
    run("prune", "--keep", "2")
    assert _left(store)[0] == {"model-0", "model-1"}


def _of_another_version(record: Path) -> None:
    text = record.read_text()
    record.write_text(text.replace('"schema": 2', '"schema": 1'))


def test_what_is_of_another_version_is_not_called_damaged(store: Path, run: Run) -> None:
    name = _name(store, "model-1")
    _of_another_version(store / name / "manifest.json")
    code, report = run("list")
    assert code == 0
    row = next(r for r in report["bundles"] if r["fingerprint"] == name)
    assert row["other_version"]
    assert "of another version" in row["problem"]


def test_prune_removes_what_cannot_be_used_and_says_so(
    store: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    Store(store).publish_record("cd" * 32, {"us": 1.5})
    bad, other = _name(store, "model-1"), _name(store, "model-2")
    (store / bad / "manifest.json").write_text("{}")
    _of_another_version(store / other / "manifest.json")
    _of_another_version(store / "kernels" / "sm_90" / _kernel(4)[1] / "meta.json")
    (store / "records" / ("cd" * 32) / "meta.json").write_bytes(b"{}")
    weights = store / "weights" / ("ab" * 32)
    weights.mkdir(parents=True)
    expected = {
        bad: "damaged",
        other: "of another version",
        f"kernels/sm_90/{_kernel(4)[1]}": "of another version",
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
    name = _name(store, "model-1")
    code, report = run("prune", "--only", name[:10], "--dry-run")
    assert (code, report["bundles"]) == (0, [name])
    assert len(_left(store)[0]) == 3
    run("prune", "--only", name[:10])
    assert _left(store) == ({"model-0", "model-2"}, {1, 2, 3, 4, 9})
    weights = store / "weights" / ("ab" * 32)
    weights.mkdir(parents=True)
    assert run("prune", "--only", "abab")[1]["weights"] == [weights.name]
    assert not weights.exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["prune", "--keep", "-1"],
        ["prune", "--only", "zz"],
        ["prune", "--only", ""],
        ["prune", "--only", "00", "--keep", "2"],
        ["show", "ffff"],
        ["show", ""],
        ["diff", "zz"],
        ["verify", "zz"],
        ["export", "zz", "file"],
    ],
)
def test_bad_arguments_exit_2_with_the_reason(run: Run, argv: list[str]) -> None:
    code, error = run(*argv)
    assert code == 2
    assert str(error).startswith("error: ")


@pytest.mark.parametrize("argv", [[], ["lost"], ["prune", "--max-bytes", "much"], ["list", "--js"]])
def test_the_parser_exits_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(argv)
    assert raised.value.code == 2


# -- export and import ----------------------------------------------------------------------------


@pytest.fixture
def exported(store: Path, tmp_path: Path) -> Path:
    path = tmp_path / "bundle.tar"
    found = next(
        e.manifest for e in Store(store).entries() if e.path.name == _name(store, "model-1")
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
    name = _name(store, "model-1")
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
    name = _name(store, "model-1")
    assert f"{name}/graph/t1r1" in {m.name for m in members}
    assert main(["export", name[:9], str(tmp_path / "b"), "--store", str(store)]) == 0
    assert (tmp_path / "b").read_bytes() == exported.read_bytes()


def test_export_refuses_what_is_there_and_what_is_damaged(
    store: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, where = _name(store, "model-1"), ["--store", str(store)]
    assert main(["export", name, str(exported), *where]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["export", name, str(exported), "--force", *where]) == 0
    Store(store).remove(("kernels", *_kernel(3)))
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


# -- a real store ---------------------------------------------------------------------------------


def test_the_twins_store_through_every_command(tmp_path: Path) -> None:
    """As a user has it: captured, packed, then looked after in processes without torch."""
    path = micro_checkpoint(tmp_path / "hf")
    root = tmp_path / "store"
    load_micro(path, store=str(root)).close()
    model, source = resolve_model(str(path))
    pack(model, source, store_folder(root, identity(model, source, ep_size=1, seed=0)))
    name = next(e.path.name for e in Store(root).entries())

    def command(*argv: str) -> str:
        program = (
            "import sys\nfrom capture_cache.__main__ import main\ncode = main(sys.argv[1:])\n"
            "assert not {'torch', 'triton', 'numpy.random'} & set(sys.modules)\nsys.exit(code)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, *argv],
            cwd=ROOT,
            env={**os.environ, "LOCKSTEP_STORE": str(root)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    listed = command("list")
    why = f"{name[:12]} is the record of a capture, no graphs: the CPU twin has no graphs"
    assert why in " ".join(listed.split())
    assert "model config" in command("show", name[:8])
    assert "0 of" in command("diff", name[:8])
    assert "2 entries" in command("verify")
    packed = Store(root).weights()[0]
    assert "shared.safetensors" in command("show", packed.name[:8])
    assert "1 entry," in command("verify", packed.name[:8])
    assert "1 entry," in command("verify", str(packed))
    command("export", name[:8], str(tmp_path / "one.tar"))
    assert str(path) in command("list")
    assert str(path) in command("show", packed.name[:8])
    assert str(path) in command("show", name[:8])
    command("prune", "--keep", "0")
    assert Store(root).entries() == []
    command("import", str(tmp_path / "one.tar"))
    assert [e.path.name for e in Store(root).entries()] == [name]
    assert packed.exists()


def test_measurements_are_counted_and_verified_and_stay(store: Path, run: Run) -> None:
    digest = "cd" * 32
    before = run("verify")[1]["entries"]
    Store(store).publish_record(digest, {"us": 1.5})
    assert run("list")[1]["measurements"] == 1
    assert run("verify")[1]["entries"] == before + 1
    assert run("prune", "--keep", "0")[0] == 0
    assert Store(store).records() == [digest]
    (store / "records" / digest / "meta.json").write_bytes(b"{}")
    code, report = run("verify")[:2]
    assert code == 1
    assert any(digest in bad["path"] for bad in report["damaged"])


@pytest.mark.parametrize("what", ["shard", "index", "no shard"])
def test_damaged_packed_weights_are_listed_verified_and_pruned(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, root = micro_checkpoint(tmp_path / "hf"), tmp_path / "store"
    model, source = resolve_model(str(path))
    packed = pack(model, source, store_folder(root, identity(model, source, ep_size=1, seed=0)))
    shard, index = packed.path / SHARED, packed.path / PACKED_INDEX
    if what == "shard":
        os.truncate(shard, shard.stat().st_size - 4096)
    elif what == "index":
        index.write_bytes(index.read_bytes()[:-9])
    else:
        shard.unlink()
    for argv in (["list"], ["verify"], ["verify", str(packed.path)]):
        assert main([*argv, "--store", str(root)]) == 1, argv
        out = capsys.readouterr().out
        assert "damaged" in out
        assert "python -m runtime.pack, with --force where --out" in out
    assert main(["prune", "--store", str(root)]) == 0
    assert not packed.path.exists()
