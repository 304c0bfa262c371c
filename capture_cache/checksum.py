"""A 64-bit sum that finds damage in weights at the speed of memory, on host and device.

For little-endian 64-bit words x it is the sum of x[i] * (2 i + 1) modulo 2**64. An odd factor has
an inverse there, so one damaged word always changes the sum; two words that change places do too,
unless the product of their difference and their distance is a multiple of 2**63. It guards against
accidents; the sha256 that `verify` compares guards against intent.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture_cache.driver import Device, wait_stream
from capture_cache.kernel import CompiledKernel, param_bytes
from capture_cache.launch import LoadedKernel
from capture_cache.nvrtc import compile_cuda
from capture_cache.store import Store

WORD_BYTES = 8
_MASK = (1 << 64) - 1
_BLOCK_WORDS = 1 << 16
_SEGMENT_WORDS = 1 << 19  # of one thread block: 4 MiB
_WARPS = 16
_PARAMS = ("ptr", "ptr")
_SOURCE = r"""
typedef unsigned long long u64;
// segments: u64 [grid, 3]: address (16-byte aligned), words (even), index of the first word.
// sums: u64 [grid].
extern "C" __global__ void __launch_bounds__(512) sum64(const u64* segments, u64* sums) {
    __shared__ u64 parts[16];
    const u64* segment = segments + 3ull * blockIdx.x;
    const ulonglong2* data = reinterpret_cast<const ulonglong2*>(segment[0]);
    const u64 pairs = segment[1] / 2, first = segment[2];
    u64 sum = 0;
    for (u64 i = threadIdx.x; i < pairs; i += blockDim.x) {
        const ulonglong2 x = data[i];
        const u64 factor = 2 * (first + 2 * i) + 1;
        sum += x.x * factor + x.y * (factor + 2);
    }
    for (int step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < 16; ++warp) sum += parts[warp];
        sums[blockIdx.x] = sum;
    }
}
"""


def sum64(data: NDArray[np.uint8], first: int = 0) -> int:
    """The sum of whole words, as a host computes it.

    Args:
        data: uint8 [8 n], at an address that is a multiple of 8.
        first: index of the first word, for a part of something longer.
    """
    words, total = data.view(np.uint64), 0
    factors = _factors()
    for at in range(0, len(words), _BLOCK_WORDS):
        part = words[at : at + _BLOCK_WORDS]
        plain = int(part.sum(dtype=np.uint64))
        total += int(np.dot(part, factors[: len(part)])) + 2 * (first + at) * plain
    return total & _MASK


@functools.cache
def _factors() -> NDArray[np.uint64]:
    return np.arange(_BLOCK_WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def compile_sum64(arch: str, store: Store | None) -> CompiledKernel:
    """The device's kernel; needs no GPU. Raises as `compile_cuda`."""
    module = compile_cuda(_SOURCE, arch, store=store)
    facts = module.kernels["sum64"]
    assert facts.param_bytes == param_bytes(_PARAMS), facts
    return CompiledKernel(
        name="sum64",
        arch=arch,
        cubin=module.cubin,
        num_warps=_WARPS,
        num_ctas=1,
        pdl=False,
        shared_bytes=0,
        params=_PARAMS,
        tensor_maps=(),
        registers=facts.registers,
        local_bytes=facts.local_bytes,
        spill_bytes=0,
    )


def segments_of(places: Sequence[tuple[int, int]]) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
    """Work of the thread blocks: uint64 [n, 3] (address, words, first word), and whose it is [n].

    Args:
        places: (address, bytes), both multiples of 16.
    """
    rows, owners = [], []
    for owner, (address, nbytes) in enumerate(places):
        words = nbytes // WORD_BYTES
        for first in range(0, words, _SEGMENT_WORDS):
            count = min(_SEGMENT_WORDS, words - first)
            rows.append((address + first * WORD_BYTES, count, first))
            owners.append(owner)
    return np.array(rows, np.uint64).reshape(-1, 3), np.array(owners, np.intp)


def device_sums(
    device: Device, kernel: CompiledKernel, places: Sequence[tuple[int, int]], stream: Any
) -> list[int]:
    """`sum64` of each (address, bytes) of device memory; waits.

    Args:
        places: as `segments_of` takes them.
        stream: a CUstream on which the data is complete.

    Raises:
        CudaError: the driver refuses, or the device failed.
    """
    segments, owners = segments_of(places)
    if not len(segments):
        return [0] * len(places)
    loaded = LoadedKernel(device, kernel)
    # Pinned memory has one address on both sides; the device reads and writes each word once.
    address = device.host_alloc(segments.nbytes + WORD_BYTES * len(segments))
    try:
        table = host_words(address, segments.size)
        sums = host_words(address + segments.nbytes, len(segments))
        table[:] = segments.ravel()
        loaded.launch((len(segments),), (address, address + segments.nbytes), int(stream))
        wait_stream(int(stream), 60.0, "summing the weights")
        totals = [0] * len(places)
        for owner, value in zip(owners.tolist(), sums.tolist(), strict=True):
            totals[owner] = (totals[owner] + value) & _MASK
        return totals
    finally:
        device.host_free(address)
        loaded.close()


def host_words(address: int, count: int) -> NDArray[np.uint64]:
    """Host memory as uint64 [count]; the caller keeps it alive."""
    return np.ctypeslib.as_array((ctypes.c_uint64 * count).from_address(address))
