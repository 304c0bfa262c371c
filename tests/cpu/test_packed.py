"""Packed weights: what is loaded from them is what the checkpoint gives, to the bit, or nothing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from capture_cache.checksum import segments_of, sum64, sum64_code
from capture_cache.cubin import kernel_facts
from capture_cache.errors import CorruptBundle, FingerprintMismatch, LayoutError
from capture_cache.layout import ArenaLayout, Entry
from capture_cache.packed import parts_of
from capture_cache.packed_index import SHARED
from capture_cache.store import Store
from capture_cache.weights_io import load_packed
from graphs.checkpoint import load_checkpoint, random_weights
from graphs.model_config import parse_overrides
from graphs.model_source import ModelSource, model_digest, resolve_model
from graphs.presets import PRESETS
from graphs.weights import weight_table
from runtime import Runtime
from runtime.config import RuntimeConfig
from runtime.packing import pack
from runtime.weights import COMPUTED, find, identity, store_folder
from tests.cpu.packs import (
    odd_checkpoint,
    poisoned_arena,
    same_weights,
    small_preset,
    weights_layout,
)
from tests.cpu.twins import load_micro, micro_checkpoint

# -- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_packed_preset_is_the_preset(
    tmp_path: Path, name: str, quantization: str, ep_size: int
) -> None:
    model, source = small_preset(name, quantization)
    packed = pack(model, source, tmp_path / "packed", ep_size=ep_size, seed=5)
    for rank in range(ep_size):
        expected, views = poisoned_arena(model, ep_size)
        random_weights(model, views, seed=5, ep_rank=rank, ep_size=ep_size)
        got, _ = poisoned_arena(model, ep_size)
        load_packed(packed, got, rank=rank, computed=COMPUTED, verify=True)
        assert same_weights(got, expected)


@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("quantization", [None, "none", "fp8"])
def test_a_packed_checkpoint_is_the_checkpoint(
    tmp_path: Path, fp8: bool, quantization: str | None, ep_size: int
) -> None:
    if fp8 and quantization == "none":
        pytest.skip("an FP8 checkpoint is not turned back")
    path = odd_checkpoint(tmp_path / "hf", fp8)
    overrides = {} if quantization is None else {"quantization": quantization}
    model, source = resolve_model(path, overrides=overrides)
    packed = pack(model, source, tmp_path / "packed", ep_size=ep_size)
    for rank in range(ep_size):
        expected, views = poisoned_arena(model, ep_size)
        load_checkpoint(path, model, views, ep_rank=rank, ep_size=ep_size)
        got, _ = poisoned_arena(model, ep_size)
        stats = load_packed(packed, got, rank=rank, computed=COMPUTED, lanes=3)
        assert same_weights(got, expected)
        assert stats.nbytes >= sum(s.nbytes for s in weight_table(model, ep_size=ep_size).values())


def test_fewer_layers_load_from_all(tmp_path: Path) -> None:
    path = odd_checkpoint(tmp_path / "hf")
    model, source = resolve_model(path)
    packed = pack(model, source, tmp_path / "packed")
    fewer, _ = resolve_model(path, layers=2)
    expected, views = poisoned_arena(fewer, 1)
    load_checkpoint(path, fewer, views)
    got, _ = poisoned_arena(fewer, 1)
    load_packed(packed, got, computed=COMPUTED)
    assert same_weights(got, expected)


def test_shards_are_ordinary_safetensors(tmp_path: Path) -> None:
    path = odd_checkpoint(tmp_path / "hf", fp8=True)
    model, source = resolve_model(path)
    packed = pack(model, source, tmp_path / "packed", ep_size=2)
    _, views = poisoned_arena(model, 2)
    load_checkpoint(path, model, views, ep_rank=1, ep_size=2)
    seen = set()
    for name in (SHARED, "experts-001-of-002.safetensors"):
        with safe_open(str(packed.path / name), framework="pt") as shard:
            for tensor in shard.keys():  # noqa: SIM118
                if not tensor.startswith("pad."):
                    seen.add(tensor)
                    assert (
                        shard.get_tensor(tensor)
                        .view(torch.uint8)
                        .equal(views[tensor].view(torch.uint8))
                    )
    assert seen == set(weight_table(model, ep_size=2))


def test_what_all_ranks_share_is_stored_once(tmp_path: Path) -> None:
    model, source = small_preset("tiny", "none")
    sizes = {}
    for ep_size in (1, 4):
        packed = pack(model, source, tmp_path / str(ep_size), ep_size=ep_size)
        sizes[ep_size] = sum(f.stat().st_size for f in packed.path.glob("*.safetensors"))
    assert sizes[4] < sizes[1] * 1.02 + (64 << 10)


def test_a_layer_is_a_few_copies(tmp_path: Path) -> None:
    model, source = small_preset("tiny", "fp8")
    packed = pack(model, source, tmp_path / "p", ep_size=2)
    runs = packed.runs(weights_layout(model, 2), 1, computed=COMPUTED)
    moe = model.num_layers - model.first_k_dense_replace
    assert len(runs) == 2 * moe + 1  # experts of each, and what lies between


def test_conversions_are_the_ones_that_packed_weights_are_named_after(tmp_path: Path) -> None:
    """If this fails, the bytes of packed weights have changed: raise `runtime.weights.CONVERTER`.

    Then, and only then, write the new numbers here.
    """
    models = {q: small_preset("tiny", q) for q in ("none", "fp8")}
    path = odd_checkpoint(tmp_path / "hf")
    models |= {f"hf {q}": resolve_model(path, overrides={"quantization": q}) for q in models}
    found: dict[str, Any] = {}
    for name, (model, source) in models.items():
        packed = pack(model, source, tmp_path / name, ep_size=2)
        total = sum(sum(t.sums) for t in packed.index.tensors) % (1 << 64)
        found[name] = f"{total:016x}"
        found["converter"] = dict(packed.index.identity.fields)["converter"]
    assert found == CONVERTED


CONVERTED = {
    "converter": 1,
    "none": "0ed240d298fccc46",
    "fp8": "6683e4db87489178",
    "hf none": "37c98095fcadb1be",
    "hf fp8": "817f273c0727000d",
}


# -- the sum --------------------------------------------------------------------------------------


def test_the_sum_is_its_formula_and_sums_of_parts_add_up() -> None:
    rng = np.random.default_rng(3)
    words = rng.integers(0, 1 << 64, 200_001, dtype=np.uint64)
    expected = sum(int(x) * (2 * i + 1) for i, x in enumerate(words.tolist())) % (1 << 64)
    data = words.view(np.uint8)
    assert sum64(data) == expected
    parts = [sum64(data[at : at + 80_000], at // 8) for at in range(0, len(data), 80_000)]
    assert sum(parts) % (1 << 64) == expected
    assert sum64(np.zeros(64, np.uint8)) == 0


def test_the_sum_sees_any_flipped_bit_and_any_two_words_swapped() -> None:
    rng = np.random.default_rng(4)
    data = rng.integers(0, 256, 4096, dtype=np.uint8)
    whole = sum64(data)
    for at in range(len(data) * 8):
        flipped = data.copy()
        flipped[at // 8] ^= 1 << at % 8
        assert sum64(flipped) != whole
    words = data.view(np.uint64)
    for _ in range(500):
        i, j = rng.integers(0, len(words), 2)
        swapped = words.copy()
        swapped[[i, j]] = swapped[[j, i]]
        assert i == j or sum64(swapped.view(np.uint8)) != whole


def test_the_devices_segments_cover_every_word_once() -> None:
    places = [(1 << 20, 256), (1 << 21, (9 << 20) + 256), (1 << 25, 4 << 20)]
    rows, owners = segments_of(places)
    for owner, (address, nbytes) in enumerate(places):
        own = rows[owners == owner].tolist()
        assert own[0][0] == address
        assert sum(count for _, count, _ in own) * 8 == nbytes
        assert all(at == address + first * 8 for at, _, first in own)
        assert all(a[2] + a[1] == b[2] for a, b in zip(own, own[1:], strict=False))
        assert all(count % 2 == 0 for _, count, _ in own)


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_the_devices_sum_compiles_without_spills_and_is_found_again(
    tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = sum64_code(arch, Store(tmp_path))
    facts = kernel_facts(code)["sum64"]
    assert facts.local_bytes == 0
    assert facts.registers <= 64
    assert facts.param_bytes == (8, 8)
    monkeypatch.setitem(sys.modules, "capture_cache.nvrtc", None)  # a player without a compiler
    assert sum64_code(arch, Store(tmp_path)) == code


# -- what fits ------------------------------------------------------------------------------------


def test_wrong_ranks_models_and_seeds_are_told_with_both_values(tmp_path: Path) -> None:
    model, source = small_preset("tiny", "fp8")
    packed = pack(model, source, tmp_path / "p", ep_size=2)
    plain, _ = small_preset("tiny", "none")
    cases = {
        "ep size 2 → 4": identity(model, source, ep_size=4, seed=0),
        "seed 0 → 9": identity(model, source, ep_size=2, seed=9),
        "format fp8 → plain": identity(plain, source, ep_size=2, seed=0),
        "source tiny → moonlight": identity(
            model, ModelSource("moonlight", None), ep_size=2, seed=0
        ),
    }
    for words, wanted in cases.items():
        with pytest.raises(FingerprintMismatch, match=words):
            packed.check_identity(wanted)
    with pytest.raises(FingerprintMismatch, match=r"experts_gate_up \[4, .*→ \[2, "):
        packed.runs(weights_layout(model, 4), 0, computed=COMPUTED)
    with pytest.raises(ValueError, match="rank: expected 0 … 1, got 2"):
        load_packed(packed, poisoned_arena(model, 2)[0], rank=2, computed=COMPUTED)


def test_a_runtime_uses_what_the_store_holds_and_what_it_is_given(tmp_path: Path) -> None:
    path = micro_checkpoint(tmp_path / "hf")
    options = {"store": str(tmp_path / "store")}
    with load_micro(path, **options) as runtime:
        assert runtime.engine.weights_note == "the checkpoint"
        expected = {n: v.clone() for n, v in runtime.engine.graphs.step.weights.items()}
    model, source = resolve_model(str(path))
    folder = store_folder(tmp_path / "store", identity(model, source, ep_size=1, seed=0))
    pack(model, source, folder)

    def same(runtime: Runtime, note: str) -> None:
        with runtime:
            assert note in runtime.engine.weights_note
            weights = runtime.engine.graphs.step.weights
            assert weights.keys() == expected.keys()
            for name, view in weights.items():
                assert view.view(torch.uint8).equal(expected[name].view(torch.uint8)), name

    same(load_micro(path, **options), f"packed, {folder}")
    moved = tmp_path / "moved"
    folder.rename(moved)
    same(load_micro(path, **options, weights=str(moved)), f"packed, {moved}")
    same(load_micro(path, **options, weights=str(moved), verify_weights=True), "packed")
    # The checkpoint is needed no more: the directory is a model itself.
    digest = model_digest(path)
    shutil.rmtree(path)
    assert model_digest(moved) == digest
    same(load_micro(moved, **options), f"packed, {moved}")


@pytest.mark.parametrize("overrides", [(), ("hidden_size=128", "moe_intermediate_size=128")])
def test_scales_of_small_experts_need_not_fill_16_bytes(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """All experts' scales lie in one entry, those of the shared one behind the others'."""
    overrides = ("quantization=fp8", *overrides)
    pack(*resolve_model("tiny", layers=2, overrides=parse_overrides(overrides)), tmp_path / "p")
    weights = []
    for given in (None, str(tmp_path / "p")):
        with Runtime.load(
            "tiny", layers=2, overrides=overrides, bs=1, max_seq_len=64, ladder="1",
            device="cpu", store=str(tmp_path / "s"), weights=given, verify=False,
        ) as runtime:  # fmt: skip
            step = runtime.engine.graphs.step
            weights.append({n: v.clone().view(torch.uint8) for n, v in step.weights.items()})
    assert weights[0]["layers.1.all_down_scale"].nbytes % 16 in (4, 8)
    assert all(weights[1][name].equal(data) for name, data in weights[0].items())


def test_a_joined_entry_begins_its_second_tensor_on_a_word() -> None:
    entry = Entry("weights", "layers.1.all_down_scale", (4, 1, 1), "float32")
    place = ArenaLayout.build([entry]).places[0]
    with pytest.raises(LayoutError, match="expected experts of whole 8 bytes in all, got 3 of 4"):
        parts_of(place)


def test_a_packed_preset_as_a_model_is_refused_with_the_options_that_it_goes_with(
    tmp_path: Path,
) -> None:
    packed = pack(*small_preset("tiny", "none"), tmp_path / "p", seed=3)
    with pytest.raises(ValueError, match=f"--model tiny --seed 3 --weights {packed.path}, with"):
        resolve_model(str(packed.path))


def test_changed_checkpoint_files_are_not_shadowed_by_packed_ones(tmp_path: Path) -> None:
    path = micro_checkpoint(tmp_path / "hf")
    options = RuntimeConfig(str(path), bs=1, store=str(tmp_path / "store"))
    model, source = resolve_model(str(path))
    folder = store_folder(options.store_path, identity(model, source, ep_size=1, seed=0))
    pack(model, source, folder)
    assert find(options, model, source).packed is not None
    shard = path / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)  # same sizes, same headers: the model's digest cannot tell
    found = find(options, model, source)
    assert found.packed is None
    assert "have changed since" in found.note


def test_a_changed_config_of_packed_weights_is_refused(tmp_path: Path) -> None:
    path = micro_checkpoint(tmp_path / "hf")
    packed = pack(*resolve_model(str(path)), tmp_path / "p")
    config = json.loads((packed.path / "config.json").read_text())
    (packed.path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(CorruptBundle, match=r"config\.json"):
        model_digest(packed.path)
