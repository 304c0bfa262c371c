"""Packed weights on the player's path, on a fake GPU: the same bytes, every sum, no compiler."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capture_cache.checksum import sum64, sum64_code
from capture_cache.errors import FingerprintMismatch
from capture_cache.packed import PackedWeights
from capture_cache.packed_index import SHARED
from capture_cache.store import Store
from graphs.model_source import resolve_model
from runtime.config import RuntimeConfig
from runtime.pack import main as pack_command
from runtime.packing import pack
from runtime.player import Player
from runtime.restore import NotRestored, restore
from runtime.weights import identity, store_folder
from tests.cpu.fake_cuda import FakeKernel
from tests.cpu.played import OPTIONS, Gpu, publish_bundle
from tests.cpu.twins import micro_checkpoint


class PackGpu(Gpu):
    """A GPU with asynchronous copies, which it does at once, and the kernel of the sums."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        code = sum64_code("sm_90", Store(root))
        self.code = {**self.code, code: (FakeKernel("sum64", ((0, 8), (8, 8))),)}

    def cuEventCreate(self, out: int, flags: int) -> None:
        ctypes.c_uint64.from_address(out).value = self.new()

    def cuEventDestroy_v2(self, event: int) -> None: ...
    def cuEventRecord(self, event: int, stream: int) -> None: ...
    def cuEventSynchronize(self, event: int) -> None: ...

    def cuMemcpyHtoDAsync_v2(self, address: int, source: int, nbytes: int, stream: int) -> None:
        self.cuMemcpyHtoD_v2(address, source, nbytes)

    def cuLaunchKernel(self, kernel: int, *rest: int) -> None:
        assert self.kernels[kernel].name == "sum64"
        grid, pointers = rest[0], rest[-2]
        table, out = (
            ctypes.c_uint64.from_address(p).value
            for p in (ctypes.c_uint64 * 2).from_address(pointers)
        )
        rows = self.at(table, 24 * grid).view(np.uint64).reshape(-1, 3).tolist()
        sums = self.at(out, 8 * grid).view(np.uint64)
        for i, (address, words, first) in enumerate(rows):
            sums[i] = sum64(self.at(address, 8 * words), first)


def _options(root: Path, **changes: Any) -> RuntimeConfig:
    return RuntimeConfig.of(**(OPTIONS | {"store": str(root)} | changes))


@pytest.fixture
def packed(tmp_path: Path) -> PackedWeights:
    """A store with the bundle of `OPTIONS` and its packed weights."""
    publish_bundle(tmp_path)
    model, source = resolve_model("tiny", layers=1)
    folder = store_folder(tmp_path, identity(model, source, ep_size=1, seed=0))
    return pack(model, source, folder)


def _holds(player: Player, packed: PackedWeights) -> bool:
    """The shared ones that lie in the arena by themselves."""
    for tensor in packed.index.tensors:
        if ".experts_" in tensor.name or ".shared_" in tensor.name:
            continue
        with (packed.path / packed.shards[SHARED].name).open("rb") as file:
            file.seek(packed.shards[SHARED].offsets[tensor.name])
            if player.read(tensor.name).tobytes() != file.read(tensor.nbytes):
                return False
    return True


def test_the_player_takes_the_stores_packed_weights(tmp_path: Path, packed: PackedWeights) -> None:
    gpu = PackGpu(tmp_path)
    player = restore(_options(tmp_path), lib=gpu)
    assert gpu.launched == ["publish"], "the golden step alone: nothing fills weights at random"
    assert "cuLaunchKernel" in gpu.calls
    assert _holds(player, packed)
    assert set(player.read("rope_table").tolist()) == {7}
    player.close()
    assert not gpu.pinned
    assert not gpu.mapped


def test_given_weights_of_another_seed_are_refused(tmp_path: Path, packed: PackedWeights) -> None:
    publish_bundle(tmp_path, seed=1)
    with pytest.raises(FingerprintMismatch, match="seed 0 → 1"):
        restore(_options(tmp_path, weights=str(packed.path), seed=1), lib=PackGpu(tmp_path))


def test_damaged_weights_never_reach_a_step(tmp_path: Path, packed: PackedWeights) -> None:
    at = packed.shards[SHARED].offsets["head"] + 4096
    with (packed.path / SHARED).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
    gpu = PackGpu(tmp_path)
    with pytest.raises(NotRestored, match="tensor head, got another"):
        restore(_options(tmp_path), lib=gpu)
    assert not gpu.launched
    assert not gpu.mapped


def test_a_failing_copy_is_named(tmp_path: Path, packed: PackedWeights) -> None:
    gpu = PackGpu(tmp_path)
    gpu.fail["cuMemcpyHtoDAsync_v2"] = 2
    with pytest.raises(Exception, match="CUDA_ERROR_OUT_OF_MEMORY"):
        restore(_options(tmp_path), lib=gpu)
    assert not gpu.pinned


# -- weights of a checkpoint, which must be this one's ---------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint whose bundle and packed weights are in the store."""
    path = micro_checkpoint(tmp_path / "hf")
    publish_bundle(tmp_path, model=str(path), layers=None, max_seq_len=96)
    pack_command(["--model", str(path), "--store", str(tmp_path)])
    return path


def _restored(root: Path, path: Path, **more: Any) -> Player:
    options = _options(root, model=str(path), layers=None, max_seq_len=96, **more)
    return restore(options, lib=PackGpu(root))


def test_a_restored_run_takes_its_own_checkpoints_weights_and_reads_none_of_it(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = PackedWeights(Store(tmp_path).weights()[0])

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("graphs.checkpoint_content.content_digest", refuse)
    monkeypatch.setattr("runtime.weights.CLOCK_SLACK_NS", 0)  # the files are of this moment
    for weights in (None, str(packed.path)):
        player = _restored(tmp_path, checkpoint, weights=weights)
        assert _holds(player, packed)
        player.close()


def test_a_restored_run_refuses_given_weights_of_another_checkpoint(
    tmp_path: Path, checkpoint: Path
) -> None:
    given = Store(tmp_path).weights()[0]
    shard = checkpoint / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(FingerprintMismatch, match="another checkpoint"):
        _restored(tmp_path, checkpoint, weights=str(given))
    with pytest.raises(NotRestored, match="packed from other weights, or they have changed since"):
        _restored(tmp_path, checkpoint)


def test_damaged_weights_in_the_store_are_no_fault_of_the_bundle(
    tmp_path: Path, checkpoint: Path
) -> None:
    packed = PackedWeights(Store(tmp_path).weights()[0])
    with (packed.path / SHARED).open("r+b") as file:
        file.seek(packed.shards[SHARED].offsets["head"])
        file.write(b"\xa5" * 64)
    with pytest.raises(NotRestored, match="damaged and not used") as raised:
        _restored(tmp_path, checkpoint)
    assert not raised.value.replace
    (packed.path / SHARED).unlink()
    with pytest.raises(NotRestored) as raised:
        _restored(tmp_path, checkpoint)
    assert not raised.value.replace
