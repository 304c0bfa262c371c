"""`python -m runtime.pack` as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import runtime.packing
from capture_cache.errors import StoreError
from capture_cache.packed import PackedWeights
from runtime.capture import main as capture
from runtime.pack import main
from tests.cpu.twins import micro_checkpoint

Capture = pytest.CaptureFixture[str]


def _last_line(capsys: Capture) -> dict[str, object]:
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_a_checkpoint_is_packed_into_the_store_and_used(tmp_path: Path, capsys: Capture) -> None:
    path, store = micro_checkpoint(tmp_path / "hf"), str(tmp_path / "store")
    assert main(["--model-path", str(path), "--store", store, "--json"]) == 0
    report = _last_line(capsys)
    assert str(report["path"]).startswith(f"{store}/weights/")
    assert report["shards"] == {
        n: s.nbytes for n, s in PackedWeights(str(report["path"])).shards.items()
    }
    options = ["--model", str(path), "--bs", "2", "--max-seq-len", "64", "--page-size", "16"]
    options += ["--ladder", "1,2", "--device", "cpu", "--no-verify", "--store", store, "--json"]
    assert capture(options) == 0
    assert _last_line(capsys)["weights"] == f"packed, {report['path']}"
    other = ["--weights", str(report["path"]), "--verify-weights"]
    assert capture([*options, *other]) == 0


def test_a_second_run_keeps_what_is_there(tmp_path: Path, capsys: Capture) -> None:
    path, out = micro_checkpoint(tmp_path / "hf"), tmp_path / "out"
    for argv in ([], [], ["--force"]):
        assert main(["--model", str(path), "--out", str(out), *argv]) == 0
    with pytest.raises(StoreError, match="--force"):
        main(["--model", str(path), "--out", str(out), "--override", "dtype=bfloat16"])


def test_ranks_that_do_not_divide_the_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="divisor of 4 routed experts, got 3"):
        main(["--model", str(micro_checkpoint(tmp_path)), "--ep-size", "3", "--out", str(tmp_path)])


def test_packed_weights_are_not_packed_again(tmp_path: Path) -> None:
    path, out = micro_checkpoint(tmp_path / "hf"), tmp_path / "out"
    main(["--model", str(path), "--out", str(out)])
    with pytest.raises(ValueError, match="is packed already"):
        main(["--model", str(out), "--out", str(tmp_path / "again")])


def test_one_process_packs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="without torchrun"):
        main(["--model", "tiny", "--ep-size", "2", "--out", str(tmp_path / "out")])


def test_sums_over_pieces_are_those_over_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pieces of a hash cut tensors anywhere."""
    path = micro_checkpoint(tmp_path / "hf")
    main(["--model", str(path), "--out", str(tmp_path / "whole")])
    monkeypatch.setattr(runtime.packing, "PIECE_BYTES", 4096 + 8)
    monkeypatch.setattr("capture_cache.packed.PIECE_BYTES", 4096 + 8)
    monkeypatch.setattr("capture_cache.packed_index.PIECE_BYTES", 4096 + 8)
    main(["--model", str(path), "--out", str(tmp_path / "cut")])
    cut = PackedWeights(tmp_path / "cut")
    assert cut.shards["shared.safetensors"].num_pieces > 4
    assert list(cut.verify())
    monkeypatch.undo()
    assert cut.index.tensors == PackedWeights(tmp_path / "whole").index.tensors
