"""A 64-bit sum that finds damage in weights at the speed of memory, on host and device.

For little-endian 64-bit words x it is the sum of x[i] * (2 i + 1) modulo 2**64. An odd factor has
an inverse there, so one damaged word always changes the sum; two words that change places do too,
unless the product of their difference and their distance is a multiple of 2**63. It guards against
accidents; the sha256 that `verify` compares guards against intent.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from capture_cache.errors import CorruptBundle
from capture_cache.kernel import CUBIN
from capture_cache.restore_driver import Driver
from capture_cache.store import Store

WORD_BYTES = 8
_MASK = (1 << 64) - 1
_BLOCK_WORDS = 1 << 16
_SEGMENT_WORDS = 1 << 19  # of one thread block: 4 MiB
_THREADS = 512
_SOURCE = r"""
typedef unsigned long long u64;
// segments: u64 [grid, 3]: address (8-byte aligned), words, index of the first word.
// sums: u64 [grid].
extern "C" __global__ void __launch_bounds__(512) sum64(const u64* segments, u64* sums) {
    __shared__ u64 parts[16];
    const u64* segment = segments + 3ull * blockIdx.x;
    const u64* words = reinterpret_cast<const u64*>(segment[0]);
    const u64 count = segment[1], first = segment[2];
    // 16 bytes a load where they lie so; scales of small experts may not.
    const u64 pairs = segment[0] % 16 ? 0 : count / 2;
    const ulonglong2* data = reinterpret_cast<const ulonglong2*>(words);
    u64 sum = 0;
    for (u64 i = threadIdx.x; i < pairs; i += blockDim.x) {
        const ulonglong2 x = data[i];
        const u64 factor = 2 * (first + 2 * i) + 1;
        sum += x.x * factor + x.y * (factor + 2);
    }
    for (u64 i = 2 * pairs + threadIdx.x; i < count; i += blockDim.x)
        sum += words[i] * (2 * (first + i) + 1);
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


def sum64_code(arch: str, store: Store | None) -> bytes:
    """Device code of the kernel, from the store or compiled into it; needs no GPU.

    It is found by its source alone, so a player needs no compiler once it is there.

    Raises:
        CompileError, CudaError: as `compile_cuda`.
        StoreError: the store cannot be written.
    """
    digest = hashlib.sha256(f"sum64\0{arch}\0{_SOURCE}".encode()).hexdigest()
    try:
        loaded = None if store is None else store.load_kernel(arch, digest)
    except CorruptBundle:
        loaded = None  # replaced by a good one below
    if loaded is not None and CUBIN in loaded.files:
        return loaded.files[CUBIN]
    from capture_cache.nvrtc import compile_cuda  # where nothing is compiled it may be absent

    module = compile_cuda(_SOURCE, arch)
    if store is not None:
        meta = {"name": "sum64", "registers": module.kernels["sum64"].registers}
        store.publish_kernel(arch, digest, meta, {CUBIN: module.cubin})
    return module.cubin


def segments_of(places: Sequence[tuple[int, int]]) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
    """Work of the thread blocks: uint64 [n, 3] (address, words, first word), and whose it is [n].

    Args:
        places: (address, bytes), both multiples of 8.
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
    driver: Driver, code: bytes, places: Sequence[tuple[int, int]], stream: int
) -> list[int]:
    """`sum64` of each (address, bytes) of device memory; waits.

    Args:
        code: of `sum64_code`, for this device.
        places: as `segments_of` takes them.
        stream: a CUstream.

    Raises:
        CudaError: the driver refuses, or the device failed.
    """
    segments, owners = segments_of(places)
    if not len(segments):
        return [0] * len(places)
    with ExitStack() as held:
        library = driver.load_library(code, "loading kernel sum64")
        held.callback(driver.unload_library, library)
        kernel = driver.kernel(library, "sum64")
        # Pinned memory has one address on both sides; the device reads and writes each word once.
        address = driver.host_alloc(segments.nbytes + WORD_BYTES * len(segments))
        held.callback(driver.host_free, address)
        sums_at = address + segments.nbytes
        host_words(address, segments.size)[:] = segments.ravel()
        driver.launch_kernel(kernel, len(segments), _THREADS, (address, sums_at), stream)
        driver.wait(stream, "summing the weights")
        totals = [0] * len(places)
        sums = host_words(sums_at, len(segments)).tolist()
        for owner, value in zip(owners.tolist(), sums, strict=True):
            totals[owner] = (totals[owner] + value) & _MASK
        return totals


def host_words(address: int, count: int) -> NDArray[np.uint64]:
    """Host memory as uint64 [count]; the caller keeps it alive."""
    return np.ctypeslib.as_array((ctypes.c_uint64 * count).from_address(address))
