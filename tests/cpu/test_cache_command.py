"""`python -m capture_cache`: what a person or a script can ask of a store, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from capture_cache.__main__ import main
from capture_cache.packed_index import INDEX as PACKED_INDEX
from capture_cache.packed_index import SHARED
from capture_cache.store import Store
from capture_cache.survey import tree_bytes
from graphs.model_source import resolve_model
from runtime.packing import pack
from runtime.weights import identity, store_folder
from tests.cpu.cache_stores import (
    LEDGER,
    Run,
    commands,
    entry_name,
    kernel_name,
    of_another_version,
    publish,
    three_bundles,
)
from tests.cpu.played import publish_bundle
from tests.cpu.twins import load_micro, micro_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return three_bundles(tmp_path / "store")


@pytest.fixture
def run(store: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return commands(store, capsys)


def test_list_shows_all_and_marks_what_is_damaged(store: Path, run: Run) -> None:
    code, report = run("list")
    assert code == 0
    assert [r["model"] for r in report["bundles"]] == ["model-0", "model-1", "model-2"]
    assert report["bundles"][0]["keys"] == 2
    assert report["bundles"][0]["graphs"] == 1
    assert report["kernels"]["sm_90"]["kernels"] == 5
    bad = entry_name(store, "model-1")
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
    code, report = run("show", entry_name(store, "model-0")[:10])
    assert code == 0
    assert report["fields"]["model"] == "model-0"
    assert report["ledger"] == LEDGER
    assert [k["name"] for k in report["kernels"]] == ["kernel_1", "kernel_2"]
    assert report["files"]["graph/t1r1"] == 500
    assert report["arena"]["weights"] == 2 << 20
    Store(store).remove(("kernels", *kernel_name(1)))
    code, report = run("show", entry_name(store, "model-0"))
    assert code == 1
    assert report["kernels"][0]["problem"] == "not in the store"


def test_tables_say_what_json_says(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = entry_name(store, "model-0")
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
    a, b = entry_name(store, "model-0"), entry_name(store, "model-1")
    code, report = run("diff", a, b)
    assert (code, report["differing"]) == (1, ["model"])
    row = next(f for f in report["fields"] if f["field"] == "model")
    assert (row["stored"], row["other"]) == ("model-0", "model-1")
    assert run("diff", a, a)[0] == 0


def test_diff_against_this_machine(store: Path, run: Run) -> None:
    assert run("diff", entry_name(store, "model-0"))[0] == 0
    foreign = publish(store, [], sources="0" * 64, torch="0.1", model="foreign")
    code, report = run("diff", foreign.digest)
    assert (code, report["differing"]) == (1, ["torch", "sources"])


def test_verify_names_the_damaged_file(store: Path, run: Run) -> None:
    assert run("verify")[1] == {"entries": 8, "bytes": tree_bytes(store), "damaged": []}
    name = entry_name(store, "model-2")
    for path in (
        store / name / "golden" / "t1r1",
        store / "kernels/sm_90" / kernel_name(3)[1] / "cubin",
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
    assert run("verify", entry_name(store, "model-0"))[0] == 0


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


def test_what_is_of_another_version_is_not_called_damaged(store: Path, run: Run) -> None:
    name = entry_name(store, "model-1")
    of_another_version(store / name / "manifest.json")
    code, report = run("list")
    assert code == 0
    row = next(r for r in report["bundles"] if r["fingerprint"] == name)
    assert row["other_version"]
    assert "of another version" in row["problem"]


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
