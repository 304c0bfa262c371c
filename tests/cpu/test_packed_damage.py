"""Packed weights that are damaged, or change while they are read: refused by name, never used."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from capture_cache.errors import CorruptBundle, StoreError
from capture_cache.manifest import seal, unseal
from capture_cache.packed import PackedWeights, Run
from capture_cache.packed_index import INDEX, SHARED, Index
from capture_cache.restore_driver import Driver
from capture_cache.weights_io import DeviceLane, HostLane, copy_runs, load_packed
from graphs.model_config import ModelConfig
from runtime.packing import pack
from runtime.weights import COMPUTED
from tests.cpu.packs import poisoned_arena, same_weights, small_preset


@pytest.fixture(scope="module")
def _good(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Path]:
    model, source = small_preset("tiny", "fp8")
    path = tmp_path_factory.mktemp("good") / "packed"
    pack(model, source, path, ep_size=2)
    return model, path


@pytest.fixture
def damaged(_good: tuple[ModelConfig, Path], tmp_path: Path) -> tuple[ModelConfig, Path]:
    """A model and a copy of its packed weights, to be damaged."""
    return _good[0], Path(shutil.copytree(_good[1], tmp_path / "packed"))


def _load(model: ModelConfig, path: Path, *, rank: int = 0, verify: bool = False) -> None:
    arena, _ = poisoned_arena(model, 2)
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
    other = pack(*small_preset("tiny", "fp8"), tmp_path / "other", ep_size=2, seed=1)
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
    "format": [0, 1, 2, 4, "3", None],
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
    "origin": [None, 3],
    "content": [None, "zz", "0" * 63],
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
    arena, _ = poisoned_arena(damaged[0], 2)
    beyond = Run(SHARED, packed.shards[SHARED].nbytes - 100, 0, 256)
    with pytest.raises(CorruptBundle, match="cut short"):
        copy_runs(packed, [beyond], arena.base, [HostLane(), HostLane()])


@pytest.mark.parametrize("nbytes", [256, 999, 4096, 1 << 20])
def test_runs_arrive_whole_through_buffers_of_any_size(
    damaged: tuple[ModelConfig, Path], nbytes: int
) -> None:
    model, path = damaged
    packed = PackedWeights(path)
    expected, _ = poisoned_arena(model, 2)
    load_packed(packed, expected, rank=1, computed=COMPUTED)
    got, _ = poisoned_arena(model, 2)
    seen: list[tuple[int, int]] = []
    runs = packed.runs(got.layout, 1, computed=COMPUTED)
    lanes = [HostLane(nbytes) for _ in range(4)]
    total = copy_runs(packed, runs, got.base, lanes, lambda *at: seen.append(at))
    assert same_weights(got, expected)
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
    expected, _ = poisoned_arena(model, 2)
    load_packed(packed, expected, rank=1, computed=COMPUTED)
    got, _ = poisoned_arena(model, 2)
    made = [DeviceLane(cast(Driver, driver), 4096) for _ in range(lanes)]
    copy_runs(packed, packed.runs(got.layout, 1, computed=COMPUTED), got.base, made)
    assert same_weights(got, expected)
    for lane in made:
        lane.close()
        lane.close()
    assert not driver.held
    assert not driver.queues
