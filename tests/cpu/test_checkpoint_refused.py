"""Checkpoints that are torn, incomplete or another model's: each problem named, nothing guessed."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graphs.checkpoint import CheckpointError, load_checkpoint, model_digest, resolve_model
from graphs.model_config import UnsupportedModel
from tests.cpu.checkpoints import (
    INDEX,
    Tensors,
    as_fp8,
    edit_config,
    empty_views,
    read_tensors,
    write_tensors,
)
from tests.cpu.loaded import GATE, O_PROJ, change_tensors, make, refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop(O_PROJ),
            f"model.safetensors: {O_PROJ}: expected [64, 64] bfloat16|float16|float32, got no such",
        ),
        (
            lambda t: t.update(extra=torch.ones(3, 2)),
            "model.safetensors: extra: expected no such tensor in this model, got [3, 2] float32",
        ),
        (
            lambda t: t.update({O_PROJ: t[O_PROJ][:5]}),
            f"model.safetensors: {O_PROJ}: expected shape [64, 64], got [5, 64] float32",
        ),
        (
            lambda t: t.update({O_PROJ: t[O_PROJ].to(torch.int32)}),
            f"{O_PROJ}: expected bfloat16|float16|float32|float8_e4m3fn, got [64, 64] I32",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}),
            "model.norm.weight: expected bfloat16|float16|float32, got [64] float8_e4m3fn",
        ),
        (
            lambda t: t.update({O_PROJ: t[O_PROJ].to(torch.float8_e4m3fn)}),
            "expected bfloat16|float16|float32 as config.json has no quantization_config",
        ),
    ],
    ids=["missing", "extra", "shape", "type", "fp8 norm", "fp8 in a plain model"],
)
def test_tensor_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[Tensors], object], words: str
) -> None:
    make(tmp_path)
    change_tensors(tmp_path, change)
    assert words in str(refused(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop(f"{GATE}_scale_inv"),
            f"{GATE}_scale_inv: expected [1, 1] bfloat16|float16|float32 beside FP8 {GATE}, got no",
        ),
        (
            lambda t: t.update({f"{GATE}_scale_inv": torch.ones(2, 1)}),
            f"{GATE}_scale_inv: expected [1, 1] bfloat16|float16|float32, got [2, 1] float32",
        ),
        (
            lambda t: t.update({GATE: t[GATE].float()}),
            f"{GATE}_scale_inv: expected no such tensor in this model",
        ),
    ],
    ids=["missing", "shape", "without an FP8 weight"],
)
def test_scale_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[Tensors], object], words: str
) -> None:
    make(tmp_path)
    as_fp8(tmp_path)
    change_tensors(tmp_path, change)
    assert words in str(refused(tmp_path))


def test_all_problems_are_counted_and_the_first_shown(tmp_path: Path) -> None:
    make(tmp_path)
    change_tensors(tmp_path, lambda t: t.update({f"x{i}": torch.ones(1) for i in range(30)}))
    error = refused(tmp_path)
    assert len(error.problems) == 30
    assert "30 problems" in str(error)
    assert "… and 10 more" in str(error)
    assert len(str(error).splitlines()) == 23


def test_another_width_than_the_config_s_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    error = refused(tmp_path, overrides={"n_routed_experts": 4, "n_group": 1, "topk_group": 1})
    assert any("experts.7" in p and "no such tensor" in p for p in error.problems)
    assert any("mlp.gate.weight: expected shape [4, 64], got [8, 64]" in p for p in error.problems)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [O_PROJ, "model.norm.weight", "lm_head.weight"])
def test_value_that_is_not_finite_is_named(tmp_path: Path, name: str, bad: float) -> None:
    make(tmp_path)
    at = 3 if name == "model.norm.weight" else (3, 5)
    change_tensors(tmp_path, lambda t: t[name].__setitem__(at, bad))
    words = f"model.safetensors: {name}: expected finite values, got NaN or infinity, 1 here"
    error = str(refused(tmp_path))
    assert words in error
    assert ("at [3]" if name == "model.norm.weight" else "at [3, 5]") in error


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_fp8_nan_is_named(tmp_path: Path, byte: int) -> None:
    make(tmp_path)
    as_fp8(tmp_path)
    change_tensors(tmp_path, lambda t: t[GATE].view(torch.uint8).__setitem__((1, 2), byte))
    assert f"{GATE}: expected finite values, got NaN or infinity, 1 here" in str(refused(tmp_path))


@pytest.mark.parametrize("name", [GATE, "model.layers.0.self_attn.kv_b_proj.weight"])
def test_fp8_scale_that_is_not_finite_is_named(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    as_fp8(tmp_path)
    change_tensors(tmp_path, lambda t: t[f"{name}_scale_inv"].fill_(torch.nan))
    assert f"{name}_scale_inv: expected finite values" in str(refused(tmp_path))


def test_value_too_large_for_float16_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    change_tensors(tmp_path, lambda t: t[O_PROJ].__setitem__((0, 0), 1e6))
    assert "expected values that fit float16" in str(
        refused(tmp_path, overrides={"dtype": "float16"})
    )


def _header_length(file: Path) -> int:
    return int(struct.unpack("<Q", file.read_bytes()[:8])[0])


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (lambda size, header: 0, "expected a safetensors file, got 0 bytes"),
        (lambda size, header: 7, "expected a safetensors file, got 7 bytes"),
        (lambda size, header: 8, "cut short: expected a header of"),
        (lambda size, header: 8 + header // 2, "cut short: expected a header of"),
        (lambda size, header: 8 + header, "cut short: expected"),
        (lambda size, header: size - 1, "cut short: expected"),
    ],
    ids=["empty", "in the length", "no header", "in the header", "no data", "last byte"],
)
def test_truncated_file_is_named(
    tmp_path: Path, keep: Callable[[int, int], int], words: str
) -> None:
    make(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: keep(len(data), _header_length(file))])
    error = str(refused(tmp_path))
    assert f"model.safetensors: {words}" in error
    assert "download" in error


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff" * 64, "got a header of 18446744073709551615 bytes"),
        (struct.pack("<Q", 8) + b"not json", "expected a safetensors header, got"),
        (struct.pack("<Q", 2) + b"[]", "expected a safetensors header, got"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "expected a safetensors header, got"),
    ],
)
def test_file_of_another_kind_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    make(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    assert words in str(refused(tmp_path))


def test_header_with_wrong_offsets_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    file = tmp_path / "model.safetensors"
    data, length = file.read_bytes(), _header_length(file)
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [63]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert "model.norm.weight: expected [63] float32 at byte" in str(refused(tmp_path))


def test_bytes_after_the_last_tensor_are_named(tmp_path: Path) -> None:
    make(tmp_path)
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"tail")
    assert "too long: expected" in str(refused(tmp_path))


def edit_index(path: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((path / INDEX).read_text())
    edit(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def test_missing_and_renamed_shards_are_named(tmp_path: Path) -> None:
    make(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[0].unlink()
    shards[1].rename(tmp_path / "renamed.safetensors")
    error = refused(tmp_path)
    expected = [f"{shard.name}: expected a file, got nothing" for shard in shards[:2]]
    assert list(error.problems) == expected


def test_index_that_names_the_wrong_file_is_refused(tmp_path: Path) -> None:
    make(tmp_path, max_shard_size="100KB")
    right, wrong = (s.name for s in sorted(tmp_path.glob("*.safetensors"))[:2])
    edit_index(tmp_path, lambda index: index.update({"lm_head.weight": wrong}))
    error = str(refused(tmp_path))
    assert f"{wrong}: lm_head.weight: expected here by {INDEX}, got no such tensor" in error
    assert f"{right}: lm_head.weight: expected what {INDEX} lists, got a tensor listed in" in error


def test_tensor_that_the_index_lacks_is_named(tmp_path: Path) -> None:
    make(tmp_path, max_shard_size="100KB")
    edit_index(tmp_path, lambda index: index.pop("lm_head.weight"))
    words = f"lm_head.weight: expected what {INDEX} lists, got a tensor not listed"
    assert words in str(refused(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", f"{INDEX}: expected JSON, got"),
        ("[]", f"{INDEX}: expected a JSON object, got list"),
        ("{}", f"{INDEX}: expected weight_map"),
        ('{"weight_map": {"a": "../b.safetensors"}}', f"{INDEX}: expected weight_map"),
    ],
)
def test_invalid_index_is_named(tmp_path: Path, text: str, words: str) -> None:
    make(tmp_path, max_shard_size="40KB")
    (tmp_path / INDEX).write_text(text)
    assert words in str(refused(tmp_path))


def test_index_beside_a_single_file_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    assert "got both" in str(refused(tmp_path))


def test_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "got pytorch_model.bin" in str(refused(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "config.json: expected a file, got nothing"),
        ("{", "config.json: expected JSON, got"),
        ("[]", "config.json: expected a JSON object, got list"),
    ],
)
def test_config_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert words in str(refused(tmp_path))


def test_config_of_another_architecture_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    edit_config(tmp_path, lambda config: config.update(architectures=["LlamaForCausalLM"]))
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM"):
        resolve_model(str(tmp_path))


def test_file_in_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("x")
    with pytest.raises(CheckpointError, match="expected a directory, got a file"):
        resolve_model(str(file))


def test_views_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    make(tmp_path)
    cfg, _ = resolve_model(str(tmp_path))
    views = empty_views(cfg)
    views["embed"] = views["embed"].bfloat16()
    with pytest.raises(ValueError, match=r"embed: expected \[96, 64\] float32, got .*bfloat16"):
        load_checkpoint(tmp_path, cfg, views)
    with pytest.raises(ValueError, match="ep_rank: expected 0 … 1, got 2"):
        load_checkpoint(tmp_path, cfg, views, ep_rank=2, ep_size=2)


def test_unknown_model_lists_the_presets() -> None:
    with pytest.raises(ValueError, match="tiny, moonlight, deepseek-v3, kimi-k2, got 'tniy'"):
        resolve_model("tniy")


def test_preset_name_that_is_also_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="a preset and a directory; write ./tiny"):
        resolve_model("tiny")
    assert resolve_model("./tiny")[0].vocab_size == 96


def test_stop_ids_are_those_of_generation(tmp_path: Path) -> None:
    make(tmp_path)
    assert resolve_model(str(tmp_path))[0].eos_token_ids == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert resolve_model(str(tmp_path))[0].eos_token_ids == (7, 8)
    cfg, _ = resolve_model(str(tmp_path), overrides={"eos_token_id": 9})
    assert cfg.eos_token_ids == (9,)


def test_model_digest_is_of_config_index_and_layout(tmp_path: Path) -> None:
    make(tmp_path, max_shard_size="40KB")
    digest = model_digest(tmp_path)
    assert model_digest(tmp_path) == digest
    edit_config(tmp_path, lambda config: config.update(vocab_size=97))
    other_config = model_digest(tmp_path)
    write_tensors(tmp_path, read_tensors(tmp_path), shards=2)
    assert len({digest, other_config, model_digest(tmp_path)}) == 3
