"""Tensors whose surroundings are guarded, so that a kernel which leaves them is found.

A step's arena lies in one mapping, and torch's allocator carves tensors out of large blocks: there
an access past a tensor lands in another one, and nobody notices. Here every tensor has a block of
its own: `OwnBlocks` for a tool that watches allocations (compute-sanitizer), `Fenced` without any
tool, between addresses that nothing is mapped to. All of it starts as 0xFF (NaN, or -1).
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch

POISON = 0xFF
CANARY = 0xA5
ALIGNMENT = 16  # what kernels are compiled to rely on
UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"


class Memory(Protocol):
    """Where the tensors of a step come from."""

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A poisoned tensor."""

    def overwritten(self) -> list[str]:
        """Tensors beside which something was written, as far as this can be told from here."""

    def close(self) -> None:
        """Give everything back; the tensors are dead."""


class HostBlocks:
    """For the CPU twin: ordinary tensors, to try a program without a device."""

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As `Memory.empty`."""
        return _poisoned(torch.empty(shape, dtype=dtype))

    def overwritten(self) -> list[str]:
        """Nobody watches."""
        return []

    def close(self) -> None:
        """Tensors go with their last reference."""


class OwnBlocks(HostBlocks):
    """One allocation of the driver's a tensor: a sanitizer knows where each of them ends.

    Raises:
        RuntimeError: torch would carve the tensors out of blocks of its own.
    """

    def __init__(self) -> None:
        if os.environ.get(UNCACHED) != "1":
            raise RuntimeError(
                f"expected {UNCACHED}=1 in the environment, got "
                f"{os.environ.get(UNCACHED)!r}: tensors would share blocks; set it"
            )

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As `Memory.empty`."""
        return _poisoned(torch.empty(shape, dtype=dtype, device="cuda"))


class Fenced:
    """Every tensor in a mapping of its own between unmapped addresses.

    An access past the fenced side is a fault of the device at once, whatever kernel makes it; one
    on the other side within the mapping is seen by `overwritten` if it writes.

    Args:
        at_end: the tensor ends where its mapping ends (up to 15 bytes before it, so that it begins
            aligned); else it begins where that begins.
        device: driver calls (`capture_cache.driver.Device`).
    """

    def __init__(self, *, at_end: bool, device: Any) -> None:
        self._at_end, self._device = at_end, device
        self._unit = device.granularity()
        self._blocks: list[tuple[str, torch.Tensor, int, int]] = []  # whole mapping, from, to
        self._mapped: list[tuple[int, int, Any]] = []

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As `Memory.empty`."""
        nbytes = torch.empty(shape, dtype=dtype, device="meta").nbytes
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype, device="cuda")
        size = -(-nbytes // self._unit) * self._unit
        whole = self._map(size)
        begin = (size - nbytes) // ALIGNMENT * ALIGNMENT if self._at_end else 0
        whole.fill_(CANARY)
        self._blocks.append((name, whole, begin, begin + nbytes))
        part = whole[begin : begin + nbytes]
        return part.fill_(POISON).view(dtype).view(shape)

    def overwritten(self) -> list[str]:
        """As `Memory.overwritten`: within the mappings."""
        return [
            name
            for name, whole, begin, end in self._blocks
            if bool((whole[:begin] != CANARY).any()) or bool((whole[end:] != CANARY).any())
        ]

    def close(self) -> None:
        """As `Memory.close`; waits for the device."""
        torch.cuda.synchronize()
        self._blocks.clear()
        for address, size, handle in self._mapped:
            self._device.unmap(address, size)
            self._device.release(handle)
            self._device.unreserve(address - self._unit, size + 2 * self._unit)
        self._mapped.clear()

    def _map(self, size: int) -> torch.Tensor:
        """uint8 [size] with a reserved and unmapped unit on either side."""
        device, unit = self._device, self._unit
        address = device.reserve(size + 2 * unit, 0) + unit
        handle = device.create(size)
        device.map(address, size, handle)
        self._mapped.append((address, size, handle))
        return torch.as_tensor(_Bytes(address, size), device="cuda")


class _Bytes:
    """Device memory as torch takes it from others."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel():
        tensor.view(-1).view(torch.uint8).fill_(POISON)
    return tensor
