"""Packed weights are used for the checkpoint that they were made from, and for no other.

A fine-tune has the config, headers and sizes of its base: only bytes of its tensors differ.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import graphs.checkpoint_content as content
from capture_cache.errors import CorruptBundle, FingerprintMismatch, OtherVersion
from capture_cache.manifest import seal, unseal
from capture_cache.packed import PackedWeights
from capture_cache.packed_index import INDEX, SHARED
from capture_cache.store import Store
from capture_cache.survey import SHORT
from graphs.model_source import model_digest, resolve_model
from graphs.safetensors_dir import CheckpointError
from runtime import SamplingParams
from runtime.config import RuntimeConfig
from runtime.pack import main as pack_command
from runtime.packing import make_packed, pack
from runtime.weights import Found, find
from tests.cpu.terminal import ROOT
from tests.cpu.twins import load_micro, micro_checkpoint

SHARD = "model.safetensors"


def _copy(path: Path, to: Path, *, tuned: bool = False) -> Path:
    """A copy as `cp -r` makes it, later; with other values in every tensor if `tuned`."""
    shutil.copytree(path, to)
    data = bytearray((to / SHARD).read_bytes())
    if tuned:
        begin = 8 + int.from_bytes(data[:8], "little")
        for at in range(begin, len(data), 4):
            data[at] ^= 1
    (to / SHARD).write_bytes(data)
    os.utime(to / SHARD, ns=(1, 1))
    return to


def _find(path: Path, store: Path, weights: Path | None = None) -> Found:
    options = RuntimeConfig(
        str(path), bs=1, store=str(store), weights=None if weights is None else str(weights)
    )
    return find(options, *resolve_model(str(path)))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return micro_checkpoint(tmp_path / "base")


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    path = _copy(base, tmp_path / "tuned", tuned=True)
    assert model_digest(path) == model_digest(base), "else this tests nothing"
    return path


def test_given_weights_of_another_checkpoint_are_refused(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    packed = pack(*resolve_model(str(base)), tmp_path / "p")
    with pytest.raises(FingerprintMismatch) as raised:
        _find(tuned, tmp_path / "s", packed.path)
    for part in (packed.index.content[:16], content.content_digest(tuned)[:16], str(base)):
        assert part in str(raised.value)
    assert f"runtime.pack --model {tuned}" in str(raised.value)
    with pytest.raises(FingerprintMismatch, match="another checkpoint"):
        load_micro(tuned, weights=str(packed.path), store=str(tmp_path / "s"))
    other = pack(*resolve_model(str(tuned)), tmp_path / "q")
    with pytest.raises(FingerprintMismatch, match="another checkpoint"):
        _find(other.path, tmp_path / "s", packed.path)


def test_a_copy_of_the_checkpoint_is_the_checkpoint(base: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    assert pack_command(["--model", str(base), "--store", str(store)]) == 0
    copy = _copy(base, tmp_path / "copy")
    assert _find(copy, store).note.startswith("packed, ")
    out = pack(*resolve_model(str(base)), tmp_path / "p").path
    assert _find(copy, tmp_path / "none", out).packed is not None
    os.utime(base / SHARD)  # written again, the same bytes
    assert _find(base, store).packed is not None


def test_another_checkpoint_with_the_path_and_times_of_the_first_is_told(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    """As images of containers put them: at one path, all files of one time."""
    store = tmp_path / "s"
    os.utime(base / SHARD, ns=(1, 1))
    assert pack_command(["--model", str(base), "--store", str(store)]) == 0
    assert _find(base, store).packed is not None
    shutil.rmtree(base)
    tuned.rename(base)
    os.utime(base / SHARD, ns=(1, 1))
    found = _find(base, store)
    assert found.packed is None
    assert "was packed from other weights" in found.note


def test_the_store_holds_both_and_each_finds_its_own(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    store, found = tmp_path / "s", []
    for path in (base, tuned):
        assert pack_command(["--model", str(path), "--store", str(store)]) == 0
        for origin in (base, tuned)[: 1 + len(found)]:
            packed = _find(origin, store).packed
            assert packed is not None
            assert packed.index.origin == str(origin)
        found.append(_tokens(path, store))
    begins = [p.name[:SHORT] for p in Store(store).weights()]
    assert len(set(begins)) == 2, "what people name them by must differ"
    assert found == [_tokens(base, tmp_path / "t"), _tokens(tuned, tmp_path / "t")]
    assert found[0] != found[1]


def _tokens(path: Path, store: Path) -> list[float]:
    with load_micro(path, store=str(store)) as runtime:
        runtime.add([1, 2, 3], SamplingParams(max_tokens=4))
        return [float(x) for _ in range(4) for x in runtime.step().logprobs]


def test_files_that_are_as_they_were_are_not_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(*resolve_model(str(base)), tmp_path / "p")

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(content, "content_digest", refuse)
    with pytest.raises(AssertionError):  # the files are of this moment, as clocks go
        _find(base, tmp_path / "s", packed.path)
    monkeypatch.setattr("runtime.weights.CLOCK_SLACK_NS", 0)
    assert _find(base, tmp_path / "s", packed.path).packed is not None
    link = tmp_path / "link"
    link.symlink_to(base)
    assert _find(link, tmp_path / "s", packed.path).packed is not None
    with pytest.raises(AssertionError):
        _find(_copy(base, tmp_path / "copy"), tmp_path / "s", packed.path)


def test_a_config_without_weights_takes_given_ones_of_its_model(base: Path, tmp_path: Path) -> None:
    packed = pack(*resolve_model(str(base)), tmp_path / "p")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(base / "config.json", bare)
    found = _find(bare, tmp_path / "s", packed.path)
    assert found.packed is not None
    assert f"{bare} has no weights to compare them with" in found.note
    load_micro(bare, weights=str(packed.path), store=str(tmp_path / "s")).close()
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(FingerprintMismatch, match=r"rms_eps 1e-06 → 0\.5"):
        _find(bare, tmp_path / "s", packed.path)
    with pytest.raises(CheckpointError, match="got no weights"):
        _find(bare, tmp_path / "s")


@pytest.mark.parametrize(
    ("before", "lacks", "why"),
    [(1, ("origin", "content"), "which checkpoint"), (2, (), "which has no tiles")],
)
def test_packed_weights_of_a_format_before_are_refused_where_given_and_not_used_in_a_store(
    before: int, lacks: tuple[str, ...], why: str, base: Path, tmp_path: Path
) -> None:
    store = tmp_path / "s"
    pack_command(["--model", str(base), "--store", str(store)])
    packed = _find(base, store).packed
    assert packed is not None
    record = unseal((packed.path / INDEX).read_bytes(), Path(INDEX))
    for name in lacks:
        del record[name]
    (packed.path / INDEX).write_bytes(seal(record | {"format": before}))
    told = rf"format 3, got format {before} of another version, .*{why}.*--force"
    with pytest.raises(OtherVersion, match=told):
        _find(base, store, packed.path)
    with pytest.warns(RuntimeWarning, match="not used"):
        found = _find(base, store)
    assert found.packed is None
    assert found.note.startswith("the checkpoint: packed ones are not used: ")
    assert pack_command(["--model", str(base), "--store", str(store)]) == 0
    assert _find(base, store).packed is not None


# -- the digest -----------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, 16384, 16385, 1 << 20, 14 << 20, (1 << 30) + 7])
def test_windows_lie_in_the_tensor_and_hold_both_ends(nbytes: int) -> None:
    found = list(content.windows(nbytes))
    assert found[0][0] == 0
    assert sum(found[-1]) == nbytes
    assert all(a + n <= b for (a, n), (b, _) in zip(found, found[1:], strict=False))
    assert sum(n for _, n in found) <= max(content.WHOLE_BYTES, nbytes // 900)


def test_the_digest_is_of_headers_and_of_every_tensor(base: Path, tmp_path: Path) -> None:
    good = content.content_digest(base)
    assert content.content_digest(_copy(base, tmp_path / "copy")) == good
    data = (base / SHARD).read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:begin])
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        bad = bytearray(data)
        bad[begin + entry["data_offsets"][1] - 1] ^= 1
        (base / SHARD).write_bytes(bad)
        assert content.content_digest(base) != good, name
    (base / SHARD).unlink()
    with pytest.raises(CheckpointError):
        content.content_digest(base)


# -- damage in the store --------------------------------------------------------------------------


def _damage(packed: PackedWeights) -> None:
    with (packed.path / SHARED).open("r+b") as file:
        file.seek(packed.shards[SHARED].offsets["head"])
        file.write(b"\xa5" * 64)


DAMAGE: dict[str, Any] = {
    "a tensor": _damage,
    "the index": lambda p: (p.path / INDEX).write_bytes(b"{}"),
    "no shard": lambda p: (p.path / SHARED).unlink(),
    "a directory for the index": lambda p: ((p.path / INDEX).unlink(), (p.path / INDEX).mkdir()),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_weights_in_the_store_do_not_keep_the_checkpoint_from_loading(
    base: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "s"
    argv = ["--model", str(base), "--store", str(store)]
    expected = _tokens(base, tmp_path / "t")
    pack_command(argv)
    packed = _find(base, store).packed
    assert packed is not None
    DAMAGE[what](packed)
    with pytest.warns(RuntimeWarning, match="packed ones are not used"):
        runtime = load_micro(base, store=str(store))
    assert runtime.engine.weights_note.startswith("the checkpoint: packed ones are not used")
    runtime.close()
    with pytest.warns(RuntimeWarning, match="packed ones are not used"):
        assert _tokens(base, store) == expected
    with pytest.raises(CorruptBundle, match="--force"):
        load_micro(base, store=str(tmp_path / "t"), weights=str(packed.path))
    capsys.readouterr()
    assert pack_command(argv) == 0
    assert "replaced" in capsys.readouterr().out
    assert list(PackedWeights(packed.path).verify())
    assert _find(base, store).packed is not None


def test_packing_again_says_that_it_wrote_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(base), "--out", str(tmp_path / "p")]
    pack_command(argv)
    assert "there already" not in capsys.readouterr().out
    pack_command(argv)
    assert "there already, every sha256 compared, nothing written" in capsys.readouterr().out
    _damage(PackedWeights(tmp_path / "p"))
    done = make_packed(*resolve_model(str(base)), tmp_path / "p")
    assert done.made
    assert "shared.safetensors" in str(done.replaced)


def test_a_player_that_must_read_the_samples_needs_no_torch(base: Path, tmp_path: Path) -> None:
    packed = pack(*resolve_model(str(base)), tmp_path / "p")
    copy = _copy(base, tmp_path / "copy")
    program = f"""
import sys
from graphs.model_source import resolve_model
from runtime.config import RuntimeConfig
from runtime.weights import find
options = RuntimeConfig({str(copy)!r}, bs=1, weights={str(packed.path)!r})
assert find(options, *resolve_model({str(copy)!r})).packed is not None
assert "graphs.checkpoint_content" in sys.modules
assert not {{"torch", "triton"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=True)
