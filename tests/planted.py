"""Kernels that do wrong on purpose: a check that does not see them sees nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from barriers.device_code import load_kernels
from capture_cache.nvrtc import CudaModule, compile_cuda
from capture_cache.store import Store
from tests.guarded import Memory

THREADS = 64  # two warps, so that the race is one between warps
WORDS = 1 << 10
SOURCE = r"""
extern "C" __global__ void planted_overrun(volatile int* data, int at) {
  data[at + threadIdx.x] = 1;
}
extern "C" __global__ void planted_race(volatile int* data, int at) {
  __shared__ volatile int words[64];
  words[threadIdx.x] = data[threadIdx.x];
  data[threadIdx.x] = words[63 - threadIdx.x] + at;
}
"""
KERNELS = ("planted_overrun", "planted_race")
# What each check must find.
EXPECTED = {"memcheck": KERNELS[0], "racecheck": KERNELS[1], "fence": KERNELS[0]}


def compile_planted(arch: str, store: Path) -> CudaModule:
    """Compile them, or take them from the store."""
    return compile_cuda(SOURCE, arch, store=Store(store))


def run_planted(
    memory: Memory, arch: str, store: Path, note: Callable[[str], None], *, before: bool
) -> None:
    """Launch them on a guarded tensor, the race first.

    Args:
        before: the overrun goes past the tensor's beginning instead of its end.
    """
    from capture_cache.driver import Device

    device = Device(torch.cuda.current_device())
    data = memory.empty("planted", (WORDS,), torch.int32)
    kinds = {name: ("ptr", "i32") for name in KERNELS}
    loaded = load_kernels(device, compile_planted(arch, store), kinds, num_warps=THREADS // 32)
    for name in reversed(KERNELS):
        note(name)
        stream = torch.cuda.current_stream().cuda_stream
        loaded[name].launch((1,), (data.data_ptr(), -THREADS if before else WORDS), stream)
        torch.cuda.synchronize()
