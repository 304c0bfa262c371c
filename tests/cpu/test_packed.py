"""Packed weights: what is loaded from them is what the checkpoint gives, to the bit, or nothing."""

from __future__ import annotations

import ctypes
import errno
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors import safe_open

from capture_cache.arena import HostArena
from capture_cache.checksum import segments_of, sum64, sum64_code
from capture_cache.cubin import kernel_facts
from capture_cache.errors import CorruptBundle, FingerprintMismatch, LayoutError, StoreError
from capture_cache.files import Files
from capture_cache.layout import ArenaLayout, Entry
from capture_cache.manifest import seal, unseal
from capture_cache.packed import PackedWeights, Run, parts_of
from capture_cache.packed_index import INDEX, SHARED, Index
from capture_cache.restore_driver import Driver
from capture_cache.store import Store
from capture_cache.weights_io import DeviceLane, HostLane, copy_runs, load_packed
from graphs.checkpoint import load_checkpoint, random_weights
from graphs.devices import bind_views
from graphs.model_config import ModelConfig, parse_overrides
from graphs.model_source import ModelSource, model_digest, resolve_model
from graphs.presets import PRESETS
from graphs.weights import weight_table
from runtime import Runtime
from runtime.config import RuntimeConfig
from runtime.packing import pack
from runtime.weights import COMPUTED, find, identity, store_folder
from tests.cpu.checkpoints import as_fp8, random_model, save_model, small_config
from tests.cpu.twins import load_micro, micro_checkpoint

# A preset's structure at a size for tests: what is not named stays the preset's.
SMALL = {
    "hidden_size": 128,
    "vocab_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 72,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}


def _preset(name: str, quantization: str) -> tuple[ModelConfig, ModelSource]:
    overrides = {**SMALL, "quantization": quantization}
    return resolve_model(name, overrides=overrides)


def _layout(model: ModelConfig, ep_size: int) -> ArenaLayout:
    """A weights section as the runtime's, with what it computes itself behind."""
    table = weight_table(model, ep_size=ep_size)
    entries = [Entry("weights", n, s.shape, s.dtype) for n, s in table.items()]
    return ArenaLayout.build([*entries, Entry("weights", "rope_table", (16, 8), "float32")])


def _arena(model: ModelConfig, ep_size: int) -> tuple[HostArena, dict[str, torch.Tensor]]:
    """Poisoned, so that a byte that nobody writes is seen."""
    arena = HostArena(_layout(model, ep_size))
    for place in arena.layout.places:
        arena.bytes_of(place.entry.name)[:] = 0xFF
    return arena, bind_views(arena, arena.layout, "cpu")


def _same(a: HostArena, b: HostArena) -> bool:
    return all(
        np.array_equal(a.bytes_of(p.entry.name), b.bytes_of(p.entry.name)) for p in a.layout.places
    )


def _micro(path: Path, fp8: bool = False) -> Path:
    """A checkpoint whose matrices are no multiple of a scale block."""
    save_model(path, random_model(small_config(), dtype=torch.bfloat16))
    if fp8:
        as_fp8(path)
    return path


# -- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_packed_preset_is_the_preset(
    tmp_path: Path, name: str, quantization: str, ep_size: int
) -> None:
    model, source = _preset(name, quantization)
    packed = pack(model, source, tmp_path / "packed", ep_size=ep_size, seed=5)
    for rank in range(ep_size):
        expected, views = _arena(model, ep_size)
        random_weights(model, views, seed=5, ep_rank=rank, ep_size=ep_size)
        got, _ = _arena(model, ep_size)
        load_packed(packed, got, rank=rank, computed=COMPUTED, verify=True)
        assert _same(got, expected)


@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("quantization", [None, "none", "fp8"])
def test_a_packed_checkpoint_is_the_checkpoint(
    tmp_path: Path, fp8: bool, quantization: str | None, ep_size: int
) -> None:
    if fp8 and quantization == "none":
        pytest.skip("an FP8 checkpoint is not turned back")
    path = _micro(tmp_path / "hf", fp8)
    overrides = {} if quantization is None else {"quantization": quantization}
    model, source = resolve_model(path, overrides=overrides)
    packed = pack(model, source, tmp_path / "packed", ep_size=ep_size)
    for rank in range(ep_size):
        expected, views = _arena(model, ep_size)
        load_checkpoint(path, model, views, ep_rank=rank, ep_size=ep_size)
        got, _ = _arena(model, ep_size)
        stats = load_packed(packed, got, rank=rank, computed=COMPUTED, lanes=3)
        assert _same(got, expected)
        assert stats.nbytes >= sum(s.nbytes for s in weight_table(model, ep_size=ep_size).values())


def test_fewer_layers_load_from_all(tmp_path: Path) -> None:
    path = _micro(tmp_path / "hf")
    model, source = resolve_model(path)
    packed = pack(model, source, tmp_path / "packed")
    fewer, _ = resolve_model(path, layers=2)
    expected, views = _arena(fewer, 1)
    load_checkpoint(path, fewer, views)
    got, _ = _arena(fewer, 1)
    load_packed(packed, got, computed=COMPUTED)
    assert _same(got, expected)


def test_shards_are_ordinary_safetensors(tmp_path: Path) -> None:
    path = _micro(tmp_path / "hf", fp8=True)
    model, source = resolve_model(path)
    packed = pack(model, source, tmp_path / "packed", ep_size=2)
    _, views = _arena(model, 2)
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
    model, source = _preset("tiny", "none")
    sizes = {}
    for ep_size in (1, 4):
        packed = pack(model, source, tmp_path / str(ep_size), ep_size=ep_size)
        sizes[ep_size] = sum(f.stat().st_size for f in packed.path.glob("*.safetensors"))
    assert sizes[4] < sizes[1] * 1.02 + (64 << 10)


def test_a_layer_is_a_few_copies(tmp_path: Path) -> None:
    model, source = _preset("tiny", "fp8")
    packed = pack(model, source, tmp_path / "p", ep_size=2)
    runs = packed.runs(_layout(model, 2), 1, computed=COMPUTED)
    moe = model.num_layers - model.first_k_dense_replace
    assert len(runs) == 2 * moe + 1  # experts of each, and what lies between


def test_conversions_are_the_ones_that_packed_weights_are_named_after(tmp_path: Path) -> None:
    """If this fails, the bytes of packed weights have changed: raise `runtime.weights.CONVERTER`.

    Then, and only then, write the new numbers here.
    """
    models = {q: _preset("tiny", q) for q in ("none", "fp8")}
    path = _micro(tmp_path / "hf")
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


# -- damage ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _good(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Path]:
    model, source = _preset("tiny", "fp8")
    path = tmp_path_factory.mktemp("good") / "packed"
    pack(model, source, path, ep_size=2)
    return model, path


@pytest.fixture
def damaged(_good: tuple[ModelConfig, Path], tmp_path: Path) -> tuple[ModelConfig, Path]:
    """A model and a copy of its packed weights, to be damaged."""
    return _good[0], Path(shutil.copytree(_good[1], tmp_path / "packed"))


def _load(model: ModelConfig, path: Path, *, rank: int = 0, verify: bool = False) -> None:
    arena, _ = _arena(model, 2)
    load_packed(PackedWeights(path), arena, rank=rank, computed=COMPUTED, verify=verify)


EXPERTS = "experts-000-of-002.safetensors"


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def _lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def _torn(path: Path) -> None:
    """The end was never written: the size is right, the bytes are zeros."""
    size = path.stat().st_size
    os.truncate(path, size // 2)
    os.truncate(path, size)


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (_cut, "expected [0-9]+ bytes, got"),
    "long": (_lengthen, "expected [0-9]+ bytes, got"),
    "empty": (lambda p: p.write_bytes(b""), "expected [0-9]+ bytes, got 0"),
    "torn": (_torn, "expected the sum"),
    "gone": (Path.unlink, "No such file"),
    "link": (_link, "symbolic links"),
    "pipe": (_pipe, "regular file"),
    "folder": (_folder, "regular file"),
    "writable by all": (lambda p: p.chmod(0o666), "0o666"),
    "another's": (lambda p: os.chown(p, 12345, -1), "got 12345"),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("shard", [SHARED, EXPERTS])
def test_a_damaged_shard_is_refused_by_name(
    damaged: tuple[ModelConfig, Path], how: str, shard: str
) -> None:
    if how == "another's" and os.geteuid() != 0:
        pytest.skip("needs root to give a file away")
    change, reason = DAMAGE[how]
    change(damaged[1] / shard)
    with pytest.raises(CorruptBundle, match=reason) as raised:
        _load(*damaged)
    assert shard in str(raised.value)
    assert "pack again" in str(raised.value)
    with pytest.raises(CorruptBundle):
        list(PackedWeights(damaged[1]).verify())


def test_any_flipped_bit_of_a_shard_is_found_at_load(damaged: tuple[ModelConfig, Path]) -> None:
    rng = np.random.default_rng(11)
    model, path = damaged
    for shard in (SHARED, EXPERTS):
        good = (path / shard).read_bytes()
        header = int.from_bytes(good[:8], "little") + 8
        places = [*range(16), *rng.integers(0, header, 20), *rng.integers(header, len(good), 60)]
        for at in (*places, len(good) - 1):
            bad = bytearray(good)
            bad[at] ^= 1 << int(rng.integers(8))
            (path / shard).write_bytes(bad)
            with pytest.raises(CorruptBundle, match=shard):
                _load(model, path)
        (path / shard).write_bytes(good)
    _load(model, path, verify=True)


def test_a_directory_that_everyone_may_write_is_refused(
    damaged: tuple[ModelConfig, Path],
) -> None:
    damaged[1].chmod(0o777)
    with pytest.raises(StoreError, match="chmod o-w"):
        _load(*damaged)
    with pytest.raises(CorruptBundle, match="got nothing"):
        PackedWeights(damaged[1] / "absent")


def test_shards_that_changed_places_are_refused(damaged: tuple[ModelConfig, Path]) -> None:
    model, path = damaged
    other = path / "experts-001-of-002.safetensors"
    (path / EXPERTS).rename(path / "x")
    other.rename(path / EXPERTS)
    (path / "x").rename(other)
    for rank in range(2):
        with pytest.raises(CorruptBundle, match="expected the header"):
            _load(model, path, rank=rank)


def test_a_shard_of_other_weights_is_refused(
    damaged: tuple[ModelConfig, Path], tmp_path: Path
) -> None:
    model, path = damaged
    other = pack(*_preset("tiny", "fp8"), tmp_path / "other", ep_size=2, seed=1)
    shutil.copy(other.path / EXPERTS, path / EXPERTS)
    with pytest.raises(CorruptBundle, match="expected the header"):
        _load(model, path)


def test_a_tensor_written_over_another_is_named(damaged: tuple[ModelConfig, Path]) -> None:
    model, path = damaged
    shard = PackedWeights(path).shards[SHARED]
    at, to = (shard.offsets[f"layers.{i}.o"] for i in (0, 1))
    data = bytearray((path / SHARED).read_bytes())
    data[to : to + 4096] = data[at : at + 4096]
    (path / SHARED).write_bytes(data)
    with pytest.raises(CorruptBundle, match=r"tensor layers\.1\.o, got another:"):
        _load(model, path)
    with pytest.raises(CorruptBundle, match="expected sha256"):
        _load(model, path, verify=True)


def test_padding_must_be_zero(damaged: tuple[ModelConfig, Path]) -> None:
    """It lies in the arena too, where nobody reads it; but a byte that differs is damage."""
    model, path = damaged
    packed = PackedWeights(path)
    tensor = next(t for t in packed.index.tensors if t.padded > t.nbytes and not t.expert)
    with (path / SHARED).open("r+b") as file:
        file.seek(packed.shards[SHARED].offsets[tensor.name] + tensor.nbytes)
        file.write(b"\1")
    with pytest.raises(CorruptBundle, match=tensor.name):
        _load(model, path)


def test_every_byte_of_the_index_counts(damaged: tuple[ModelConfig, Path]) -> None:
    _, path = damaged
    good = (path / INDEX).read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        with pytest.raises(CorruptBundle, match="weights.json"):
            Index.from_bytes(bytes(bad), path / INDEX)
    for bad in (b"", good[:-1], good + b" ", good[: len(good) // 2], b"{}", b"[" * 100_000):
        (path / INDEX).write_bytes(bad)
        with pytest.raises(CorruptBundle):
            PackedWeights(path)


# field → a value that makes no sense, in an index that is sealed as it should be
NONSENSE: dict[str, list[Any]] = {
    "kind": ["other", None, 3],
    "format": [0, 2, "1", None],
    "ep_size": [0, -1, 1 << 40, "2", True, None, 2.0, 1],
    "identity": [None, [], [["a"]], {"a": 1}, [["a", [1]]]],
    "tensors": [
        None,
        [],
        [["x"]],
        [["../x", "4", "float32", False, "0" * 16]],
        [["x", "4x", "float32", False, "0" * 16]],
        [["x", "0", "float32", False, "0" * 16]],
        [["x", "-4", "float32", False, "0" * 16]],
        [["x", "9" * 40, "float32", False, "0" * 16]],
        [["x", "4", "int3", False, "0" * 16]],
        [["x", "4", "float32", 1, "0" * 16]],
        [["x", "4", "float32", False, "0" * 15]],
        [["x", "4", "float32", True, "0" * 16]],
        [["x", "4", "float32", False, "0" * 16]] * 2,
    ],
    "pieces": [None, {}, {"shared.safetensors": ""}, {"../x": "0" * 64}],
    "small": [None, {"../x.json": {"bytes": 1, "sha256": "0" * 64}}, {"a.json": {}}],
    "made_from": [None, [["a", 1]], [["a", -1, 0]], [[1, 1, 1]]],
    "stored_dtype": [3],
}


@pytest.mark.parametrize("field", NONSENSE)
def test_a_sealed_index_that_makes_no_sense_is_refused(
    damaged: tuple[ModelConfig, Path], field: str
) -> None:
    good = unseal((damaged[1] / INDEX).read_bytes(), Path(INDEX))
    Index.from_bytes(seal(good), Path(INDEX))
    for value in NONSENSE[field]:
        with pytest.raises(CorruptBundle):
            Index.from_bytes(seal({**good, field: value}), Path(INDEX))
    with pytest.raises(CorruptBundle):
        Index.from_bytes(seal({k: v for k, v in good.items() if k != field}), Path(INDEX))


def test_an_index_of_another_schema_is_told(damaged: tuple[ModelConfig, Path]) -> None:
    record = json.loads((damaged[1] / INDEX).read_bytes()) | {"schema": 0}
    with pytest.raises(CorruptBundle, match="of another version"):
        Index.from_bytes(json.dumps(record).encode(), Path(INDEX))


def test_a_shard_that_shrinks_while_it_is_read_is_refused(
    damaged: tuple[ModelConfig, Path],
) -> None:
    packed = PackedWeights(damaged[1])
    arena, _ = _arena(damaged[0], 2)
    beyond = Run(SHARED, packed.shards[SHARED].nbytes - 100, 0, 256)
    with pytest.raises(CorruptBundle, match="cut short"):
        copy_runs(packed, [beyond], arena.base, [HostLane(), HostLane()])


@pytest.mark.parametrize("nbytes", [256, 999, 4096, 1 << 20])
def test_runs_arrive_whole_through_buffers_of_any_size(
    damaged: tuple[ModelConfig, Path], nbytes: int
) -> None:
    model, path = damaged
    packed = PackedWeights(path)
    expected, _ = _arena(model, 2)
    load_packed(packed, expected, rank=1, computed=COMPUTED)
    got, _ = _arena(model, 2)
    seen: list[tuple[int, int]] = []
    runs = packed.runs(got.layout, 1, computed=COMPUTED)
    lanes = [HostLane(nbytes) for _ in range(4)]
    total = copy_runs(packed, runs, got.base, lanes, lambda *at: seen.append(at))
    assert _same(got, expected)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


class _LateDriver:
    """Driver calls on host memory; a copy happens as late as the calls allow."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.queues: dict[int, list[tuple[int, int, int]]] = {}
        self.marks: dict[int, tuple[int, int]] = {}  # event → stream, copies before it
        self.done: dict[int, int] = {}
        self.current: set[int] = set()

    def host_alloc(self, nbytes: int) -> int:
        memory = np.zeros(nbytes, np.uint8)
        self.held[memory.ctypes.data] = memory
        return int(memory.ctypes.data)

    def host_free(self, address: int) -> None:
        del self.held[address]

    def create_stream(self) -> int:
        stream = len(self.queues) + 1
        self.queues[stream], self.done[stream] = [], 0
        return stream

    def destroy_stream(self, stream: int) -> None:
        del self.queues[stream]

    def create_event(self) -> int:
        event = 1000 + len(self.marks)
        self.marks[event] = (0, 0)
        return event

    def destroy_event(self, event: int) -> None:
        self.marks[event] = (-1, 0)

    def record_event(self, event: int, stream: int) -> None:
        self.marks[event] = (stream, len(self.queues[stream]))

    def wait_event(self, event: int, doing: str) -> None:
        stream, count = self.marks[event]
        if stream:
            self._run(stream, count)

    def wait(self, stream: int, doing: str) -> None:
        self._run(stream, len(self.queues[stream]))

    def copy_async(self, address: int, source: int, nbytes: int, stream: int) -> None:
        assert threading.get_ident() in self.current, "no context in this thread"
        self.queues[stream].append((address, source, nbytes))

    def make_current(self) -> None:
        self.current.add(threading.get_ident())

    def _run(self, stream: int, count: int) -> None:
        for address, source, nbytes in self.queues[stream][self.done[stream] : count]:
            ctypes.memmove(address, source, nbytes)
        self.done[stream] = max(self.done[stream], count)


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_staging_buffer_is_not_used_again_before_its_copy_is_done(
    damaged: tuple[ModelConfig, Path], lanes: int
) -> None:
    model, path = damaged
    packed, driver = PackedWeights(path), _LateDriver()
    expected, _ = _arena(model, 2)
    load_packed(packed, expected, rank=1, computed=COMPUTED)
    got, _ = _arena(model, 2)
    made = [DeviceLane(cast(Driver, driver), 4096) for _ in range(lanes)]
    copy_runs(packed, packed.runs(got.layout, 1, computed=COMPUTED), got.base, made)
    assert _same(got, expected)
    for lane in made:
        lane.close()
        lane.close()
    assert not driver.held
    assert not driver.queues


# -- what fits ------------------------------------------------------------------------------------


def test_wrong_ranks_models_and_seeds_are_told_with_both_values(tmp_path: Path) -> None:
    model, source = _preset("tiny", "fp8")
    packed = pack(model, source, tmp_path / "p", ep_size=2)
    plain, _ = _preset("tiny", "none")
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
        packed.runs(_layout(model, 4), 0, computed=COMPUTED)
    with pytest.raises(ValueError, match="rank: expected 0 … 1, got 2"):
        load_packed(packed, _arena(model, 2)[0], rank=2, computed=COMPUTED)


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
    packed = pack(*_preset("tiny", "none"), tmp_path / "p", seed=3)
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
    shard.write_bytes(data)  # same sizes, same headers: the digest cannot tell
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


# -- writers that fail ----------------------------------------------------------------------------


class _Failing(Files):
    """Fails, or dies, at the n-th thing it is asked to do, having done half of it."""

    def __init__(self, steps: int, error: BaseException) -> None:
        self.left, self.error = steps, error

    def _step(self, half: Callable[[], object] = lambda: None) -> None:
        if self.left == 0:
            half()
        self.left -= 1
        if self.left < 0:
            raise self.error

    def make_dir(self, path: Path) -> None:
        self._step()
        super().make_dir(path)

    def write(self, path: Path, data: bytes) -> None:
        self._step(lambda: path.write_bytes(data[: len(data) // 2]))
        super().write(path, data)

    def allocate(self, path: Path, nbytes: int) -> None:
        self._step(lambda: Files.allocate(self, path, nbytes // 2))
        super().allocate(path, nbytes)

    def sync_file(self, path: Path) -> None:
        self._step()
        super().sync_file(path)

    def sync_dir(self, path: Path) -> None:
        self._step()
        super().sync_dir(path)

    def rename(self, old: Path, new: Path) -> None:
        self._step()
        super().rename(old, new)


class _Killed(BaseException):
    """The process is gone."""


class _Dying(_Failing):
    def remove(self, path: Path) -> None:
        if self.left < 0:
            raise _Killed
        super().remove(path)


def _attempts(make: Callable[[int], Files], root: Path) -> Iterator[tuple[Path, Files]]:
    for steps in range(100):
        yield root / f"{steps:02}" / "packed", make(steps)
    pytest.fail("it never lived to the end")


def test_a_packer_killed_anywhere_leaves_all_or_nothing(tmp_path: Path) -> None:
    model, source = _preset("tiny", "fp8")
    steps = 0
    for out, files in _attempts(lambda n: _Dying(n, _Killed()), tmp_path):
        try:
            pack(model, source, out, files=files)
            break
        except _Killed:
            steps += 1
        if out.exists():  # renamed, but not known to be on the disk yet
            list(PackedWeights(out).verify())
        assert list(pack(model, source, out).verify())
    assert steps >= 9


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free space"), (errno.EACCES, "writable"), (errno.EROFS, "read-only")],
)
def test_a_failing_disk_is_named_and_leaves_nothing(
    tmp_path: Path, number: int, remedy: str
) -> None:
    model, source = _preset("tiny", "fp8")

    def make(steps: int) -> Files:
        return _Failing(steps, OSError(number, os.strerror(number), "the disk"))

    told = []
    for out, files in _attempts(make, tmp_path):
        try:
            pack(model, source, out, files=files)
            break
        except StoreError as e:
            told.append(str(e))
        assert not list(out.parent.glob(".tmp-*"))
    assert len(told) >= 9
    assert all(remedy in line and "--out" in line for line in told)


def test_a_full_disk_is_found_before_anything_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _at: int, _nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    told: list[str] = []
    with pytest.raises(StoreError, match="free space"):
        pack(*_preset("tiny", "fp8"), tmp_path / "p", progress=lambda kind, *_: told.append(kind))
    assert not told
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept_or_refused_or_replaced(tmp_path: Path) -> None:
    model, source = _preset("tiny", "fp8")
    out = tmp_path / "p"
    out.mkdir()
    pack(model, source, out)  # an empty directory may have been made for it
    before = (out / INDEX).stat().st_ino
    pack(model, source, out)
    assert (out / INDEX).stat().st_ino == before
    with pytest.raises(StoreError, match="--force"):
        pack(model, source, out, seed=1)
    pack(model, source, out, seed=1, force=True)
    assert dict(PackedWeights(out).index.identity.fields)["seed"] == 1
    _cut(out / SHARED)
    with pytest.raises(StoreError, match="--force"):
        pack(model, source, out, seed=1)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "diary.txt").write_text("dear")
    for force in (False, True):
        with pytest.raises(StoreError, match="got other files"):
            pack(model, source, other, force=force)
    assert (other / "diary.txt").read_text() == "dear"
    assert not list(tmp_path.glob(".tmp-*"))


def _race(out: str, worker: int, results: Any) -> None:
    torch.set_num_threads(1)
    model, source = _preset("tiny", "fp8")
    packed = pack(model, source, Path(out))
    results.put((worker, len(list(packed.verify()))))


def test_two_packers_at_once_end_with_one_result(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    out = tmp_path / "p"
    workers = [context.Process(target=_race, args=(str(out), n, results)) for n in range(3)]
    for worker in workers:
        worker.start()
    assert len({results.get(timeout=60)[0] for _ in workers}) == 3
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_checkpoint_that_changes_while_it_is_packed_is_refused(tmp_path: Path) -> None:
    path = _micro(tmp_path / "hf")

    def touch(*_: object) -> None:
        os.utime(path / "model.safetensors", (1, 1))

    with pytest.raises(StoreError, match="nobody writes them"):
        pack(*resolve_model(path), tmp_path / "p", progress=touch)
    assert not (tmp_path / "p").exists()
