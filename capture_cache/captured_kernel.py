"""A kernel of a captured graph: its parameters, and what its nodes were given for them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from capture_cache.errors import NotRestorable
from capture_cache.kernel import PARAM_KINDS, CompiledKernel

_EXTRA_BUFFER, _EXTRA_SIZE = 1, 2  # CU_LAUNCH_PARAM_BUFFER_POINTER, …_SIZE


@dataclass(frozen=True)
class Param:
    """One parameter on the device; `kind` is None where nobody says what it is."""

    offset: int
    nbytes: int
    kind: str | None


@dataclass
class CapturedKernel:
    """A kernel as the driver has it."""

    index: int
    handle: int
    name: str
    params: list[Param]
    static_shared: int
    dynamic_shared: int  # what a launch may ask for
    module: int
    known: bool
    compiled_cluster: bool = False  # its code has a cluster size, or wants one
    defaults: dict[int, bytes] | None = None
    wanted_shared: int = 0

    @property
    def param_bytes(self) -> int:
        return max((p.offset + p.nbytes for p in self.params), default=0)


def with_kinds(
    name: str, sizes: Sequence[tuple[int, int]], known: CompiledKernel | None
) -> list[Param]:
    if known is None:
        return [Param(offset, nbytes, None) for offset, nbytes in sizes]
    want = [PARAM_KINDS[kind][1] for kind in known.params]
    if [nbytes for _, nbytes in sizes] != want:
        raise NotRestorable(
            f"kernel {name}: its signature has parameters of {want} bytes, the driver says "
            f"{[n for _, n in sizes]}; compile it again"
        )
    return [Param(o, n, kind) for (o, n), kind in zip(sizes, known.params, strict=True)]


def read_params(kernel: CapturedKernel, storage: int, extra: int) -> bytes:
    """A node's parameters as the device lays them out."""
    data = bytearray(kernel.param_bytes)
    if storage:
        pointers = (ctypes.c_uint64 * len(kernel.params)).from_address(storage)
        for param, pointer in zip(kernel.params, pointers, strict=True):
            data[param.offset : param.offset + param.nbytes] = ctypes.string_at(
                pointer, param.nbytes
            )
    elif extra:
        words = (ctypes.c_uint64 * 5).from_address(extra)
        given = {words[0]: words[1], words[2]: words[3]}
        size = ctypes.c_uint64.from_address(given[_EXTRA_SIZE]).value
        raw = ctypes.string_at(given[_EXTRA_BUFFER], min(size, len(data)))
        data[: len(raw)] = raw
    elif kernel.params:
        raise NotRestorable(f"kernel {kernel.name}: the driver shows no parameters of its node")
    return bytes(data)
