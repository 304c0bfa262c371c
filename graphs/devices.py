"""The arena as tensors: views on its memory, never copies.

The names, shapes and dtypes are the layout's. Views do not keep a closed arena alive on the device:
whoever closes it drops them first.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from capture_cache.arena import Arena, DeviceArena, HostArena
from capture_cache.layout import ArenaLayout, Entry


def bind_views(
    arena: Arena | None, layout: ArenaLayout, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """Every entry of `layout` as a tensor.

    Entries of host sections are CPU tensors on pinned memory, whose address the device sees too.

    Args:
        arena: None gives meta tensors, for listing what has to be compiled.
        device: "cpu" for a `HostArena`, "cuda[:N]" for a `DeviceArena`, "meta" for none.

    Raises:
        ValueError: the arena has another layout, or is not on `device`.
    """
    device = torch.device(device)
    kind = "meta" if arena is None else "cpu" if isinstance(arena, HostArena) else "cuda"
    if kind != device.type:
        raise ValueError(
            f"an arena of type {type(arena).__name__} has views on {kind}, got device {device}"
        )
    if arena is None:
        return {p.entry.name: _empty(p.entry, device) for p in layout.places}
    if arena.layout.digest != layout.digest:
        raise ValueError(
            f"the arena was made for layout {arena.layout.digest[:12]}, got {layout.digest[:12]}; "
            "make a new arena"
        )
    if isinstance(arena, HostArena):
        return {p.entry.name: _host_view(arena, p.entry) for p in layout.places}
    assert isinstance(arena, DeviceArena)
    return _device_views(arena, layout, device)


def _host_view(arena: HostArena, entry: Entry) -> torch.Tensor:
    if entry.nbytes == 0:
        return _empty(entry, torch.device("cpu"))
    return _typed(torch.from_numpy(arena.bytes_of(entry.name)), entry)


def _device_views(
    arena: DeviceArena, layout: ArenaLayout, device: torch.device
) -> dict[str, torch.Tensor]:
    whole = {False: torch.empty(0, dtype=torch.uint8, device=device), True: torch.empty(0)}
    if layout.device_bytes:
        whole[False] = torch.as_tensor(_DeviceBytes(arena), device=device)
        if whole[False].data_ptr() != arena.base:  # torch copied it
            raise ValueError(f"the arena is not on {device}; name the device that it was made on")
    if layout.host_bytes:
        memory = (ctypes.c_uint8 * layout.host_bytes).from_address(arena.host_base)
        whole[True] = torch.frombuffer(memory, dtype=torch.uint8)
    views = {}
    for place in layout.places:
        part = whole[place.host]
        views[place.entry.name] = (
            _typed(part.narrow(0, place.offset, place.nbytes), place.entry)
            if place.nbytes
            else _empty(place.entry, part.device)
        )
    return views


class _DeviceBytes:
    """The device range for torch; as bytes, for the interface knows neither bf16 nor fp8."""

    def __init__(self, arena: DeviceArena) -> None:
        self._arena = arena
        self.__cuda_array_interface__: dict[str, Any] = {
            "data": (arena.base, False),
            "shape": (arena.layout.device_bytes,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


def _typed(data: torch.Tensor, entry: Entry) -> torch.Tensor:
    return data.view(torch_dtype(entry.dtype)).view(entry.shape)


def _empty(entry: Entry, device: torch.device) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device=device)


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of a layout's dtype name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype
