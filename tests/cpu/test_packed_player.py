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
from runtime.packing import pack
from runtime.player import Player
from runtime.restore import NotRestored, restore
from runtime.weights import identity, store_folder
from tests.cpu.fake_cuda import FakeKernel
from tests.cpu.played import OPTIONS, Gpu, publish_bundle


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
    for tensor in packed.index.tensors:
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
