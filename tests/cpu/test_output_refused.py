"""What a command cannot read, and what it cannot write its words to: one line, and no trace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from capture_cache.archive import export
from capture_cache.errors import StoreError
from capture_cache.files import write_failure
from capture_cache.store import Store
from runtime import Runtime, capture, generate, pack, replay_bench
from tests.cpu.played import publish_bundle
from tests.cpu.terminal import ROOT, Terminal, small
from tests.cpu.twins import micro_checkpoint

# -- a model directory without weights ------------------------------------------------------------


def _other_format(path: Path) -> None:
    (path / "pytorch_model.bin").write_bytes(b"x")


def _dangling(path: Path) -> None:
    (path / "model.safetensors").symlink_to("/nowhere/blob")


def _index_is_a_folder(path: Path) -> None:
    (path / "model.safetensors.index.json").mkdir()


def _shard_is_a_folder(path: Path) -> None:
    (path / "model.safetensors").mkdir()


WEIGHTLESS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a config alone": (lambda path: path, "got no weights; download"),
    "another format": (_other_format, "got pytorch_model.bin; download"),
    "a link to nothing": (_dangling, "got a link to /nowhere/blob"),
    "an index that is a folder": (_index_is_a_folder, "index.json: expected a file, got a direct"),
    "a shard that is a folder": (_shard_is_a_folder, "model.safetensors: expected a file, got a d"),
}


@pytest.mark.parametrize("what", WEIGHTLESS)
def test_a_directory_without_weights_is_one_line(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, bare = micro_checkpoint(tmp_path / "hf"), tmp_path / "bare"
    bare.mkdir()
    shutil.copy(path / "config.json", bare)
    WEIGHTLESS[what][0](bare)
    terminal = Terminal(tmp_path / "s", capsys)
    for main, more in ((capture.main, []), (replay_bench.main, ["--steps", "2"])):
        assert terminal.run(main, *small(bare), *more) == 2
        _one_line(terminal.err, str(bare), WEIGHTLESS[what][1])
    assert terminal.run(pack.main, "--model", str(bare)) == 2
    _one_line(terminal.err, str(bare), WEIGHTLESS[what][1])
    with pytest.raises(ValueError, match="checkpoint"):
        Runtime.load(str(bare), bs=1, max_seq_len=64, device="cpu", store=str(tmp_path / "s"))


def _one_line(err: str, *parts: str) -> None:
    assert "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


# -- a tokenizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path.write_text('{"model": 3}'), "expected a tokenizer that"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "expected a tokenizer that"),
        (lambda path: path.mkdir(), "expected a file, got a directory"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(
    make: Callable[[Path], object],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = micro_checkpoint(tmp_path / "hf")
    make(path / "tokenizer.json")
    terminal = Terminal(tmp_path / "s", capsys)
    assert terminal.run(generate.main, *small(path), "--prompt", "hi", "--max-tokens", "2") == 2
    _one_line(terminal.err, str(path / "tokenizer.json"), told)


# -- output that nobody takes ----------------------------------------------------------------------


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["verify", "list"])
def test_a_full_disk_below_the_output_is_one_line(
    command: str, unbuffered: str, tmp_path: Path
) -> None:
    with open("/dev/full", "w") as full:
        done = _run(command, tmp_path, unbuffered, full.fileno())
    assert done.returncode == 1
    assert done.stderr == "error: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_went_away_ends_a_command_without_a_word(
    unbuffered: str, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = _run("list", tmp_path, unbuffered, writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def _run(
    command: str, tmp_path: Path, unbuffered: str, out: int
) -> subprocess.CompletedProcess[str]:
    publish_bundle(tmp_path / "store")
    return subprocess.run(
        [sys.executable, "-m", "capture_cache", command, "--store", str(tmp_path / "store")],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_export_replaces_no_device_and_no_folder(tmp_path: Path) -> None:
    publish_bundle(tmp_path / "store")
    store = Store(tmp_path / "store")
    manifest = store.entries()[0].manifest
    assert manifest is not None
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for out in (tmp_path / "pipe", tmp_path, tmp_path / "link"):
        with pytest.raises(StoreError, match="regular file"):
            export(store, manifest, out, force=True)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()


def test_a_failed_write_without_a_name_shows_none() -> None:
    shown = str(write_failure(OSError(28, "No space left on device"), Path("/x"), "--store"))
    assert "None" not in shown
    assert "cannot write /x: No space left on device; free space" in shown


def test_a_store_that_is_a_file_is_not_to_be_made_ones_own(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(StoreError) as raised:
        Store(tmp_path / "f").load_record("0" * 64)
    assert "not a directory" in str(raised.value)
    assert "chown" not in str(raised.value)
