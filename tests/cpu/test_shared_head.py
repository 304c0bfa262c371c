"""A head that ranks share by vocabulary: each rank's part is that of the whole head, however it
comes into memory; and what cannot be shared is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from capture_cache.weights_io import load_packed
from graphs.checkpoint import load_checkpoint
from graphs.model_config import ModelConfig
from graphs.model_source import resolve_model
from graphs.presets import PRESETS
from graphs.random_weights import random_weights
from graphs.weight_update import prepare_update
from graphs.weights import weight_table
from kernels.triton.weight_tiles import as_rows
from runtime.config import RuntimeConfig
from runtime.model import model_of
from runtime.pack import main as pack_command
from runtime.selection import choose
from runtime.weights import COMPUTED
from tests.cpu.checkpoints import empty_views
from tests.cpu.packs import odd_checkpoint, poisoned_arena
from tests.cpu.test_packed import pack

WORLDS = (2, 4)


def _shared(model: ModelConfig, world: int) -> ModelConfig:
    return dataclasses.replace(model, head_shards=world)


def _joined(model: ModelConfig, parts: list[torch.Tensor]) -> torch.Tensor:
    """The whole head, from each rank's part."""
    rows = [as_rows(p)[: len(model.head_range(rank))] for rank, p in enumerate(parts)]
    return torch.cat(rows)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("vocab", [96, 256, 1000, 129280])
def test_every_token_has_one_rank(vocab: int, world: int) -> None:
    hf = {**PRESETS["tiny"], "vocab_size": vocab, "eos_token_id": None, "bos_token_id": None}
    model = _shared(ModelConfig.from_hf(hf), world)
    ranges = [model.head_range(rank) for rank in range(world)]
    assert [token for r in ranges for token in r] == list(range(vocab))
    assert all(len(r) <= model.head_rows for r in ranges)
    spec = weight_table(model, ep_size=world if 16 % world == 0 else 1)["head"]
    assert spec.extents == (model.head_rows, model.hidden_size)
    assert world == 1 or model.head_rows % 128 == 0


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("fp8", [False, True])
def test_ranks_load_make_and_pack_their_parts_of_one_head(
    tmp_path: Path, world: int, fp8: bool
) -> None:
    path = odd_checkpoint(tmp_path / "hf", fp8)
    model, source = resolve_model(path)
    whole = empty_views(model)
    load_checkpoint(path, model, whole)
    want, shared = as_rows(whole["head"]), _shared(model, world)
    packed = pack(shared, source, tmp_path / "packed", ep_size=world)
    loaded, unpacked = [], []
    for rank in range(world):
        views = empty_views(shared, ep_size=world)
        load_checkpoint(path, shared, views, ep_rank=rank, ep_size=world)
        loaded.append(views["head"])
        past = as_rows(views["head"])[len(shared.head_range(rank)) :]
        assert not past.float().any(), "past the vocabulary there are zeros"
        arena, views = poisoned_arena(shared, world)
        load_packed(packed, arena, rank=rank, computed=COMPUTED)
        unpacked.append(views["head"].clone())
    assert _same(_joined(shared, loaded), want)
    assert all(_same(a, b) for a, b in zip(loaded, unpacked, strict=True))
    made = []
    random_weights(model, whole, seed=3)
    for rank in range(world):
        views = empty_views(shared, ep_size=world)
        random_weights(shared, views, seed=3, ep_rank=rank, ep_size=world)
        made.append(views["head"])
    assert _same(_joined(shared, made), as_rows(whole["head"]))


def test_a_new_head_is_cut_as_the_old_one(tmp_path: Path) -> None:
    path = odd_checkpoint(tmp_path / "hf")
    model, _ = resolve_model(path)
    shared, parts = _shared(model, 2), []
    head = torch.randn(model.vocab_size, model.hidden_size).to(torch.bfloat16)
    for rank in range(2):
        views = empty_views(shared, ep_size=2)
        load_checkpoint(path, shared, views, ep_rank=rank, ep_size=2)
        prepare_update([("lm_head.weight", head)], shared, views, ep_rank=rank, ep_size=2).apply()
        parts.append(views["head"])
    assert _same(_joined(shared, parts), head)


def test_packed_weights_say_how_the_head_lies(tmp_path: Path) -> None:
    path = odd_checkpoint(tmp_path / "hf")
    folders = []
    for head in ("whole", "sharded"):
        out = tmp_path / head
        words = ["--model", str(path), "--ep-size", "2", "--head", head, "--out", str(out)]
        assert pack_command([*words, "--store", str(tmp_path / "s")]) == 0
        folders.append({f.name: f.stat().st_size for f in out.glob("*.safetensors")})
    whole, sharded = folders
    assert whole.keys() == sharded.keys()
    assert sharded["shared.safetensors"] < whole["shared.safetensors"]


def _options(**more: object) -> RuntimeConfig:
    fixed = {"model": "tiny", "bs": 4, "device": "cpu", "ep_size": 2, "head": "sharded"}
    return RuntimeConfig(**{**fixed, **more})  # type: ignore[arg-type]


def test_what_cannot_be_shared_is_refused() -> None:
    assert model_of(_options())[0].head_shards == 2
    assert model_of(_options(ep_size=1))[0].head_shards == 1
    assert model_of(_options(head="whole"))[0].head_shards == 1
    with pytest.raises(ValueError, match="its embedding, which every rank needs whole"):
        model_of(_options(overrides=("tie_word_embeddings=true",)))
    with pytest.raises(ValueError, match="head must be one of whole, sharded, got 'half'"):
        _options(head="half")
    with pytest.raises(ValueError, match="--head sharded goes with .* a model with experts"):
        choose(_options(layers=1), compile_only=True)
