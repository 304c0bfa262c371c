"""A compiled kernel: device code, how to launch it, and what it costs, independent of its compiler.

Parameters are packed from plain numbers into one aligned block, since a launch inside a capture
must neither allocate device memory nor look anything up.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capture_cache.errors import CorruptBundle

CUBIN = "cubin"
RECORD = 1  # raised whenever `CompiledKernel` changes; part of every key
TENSOR_MAP_BYTES = 128
_BLOCK_ALIGNMENT = 64  # of a tensor map inside the block
# kind → (struct code, bytes); a kind is what a parameter is, as Triton names its types.
PARAM_KINDS: dict[str, tuple[str, int]] = {
    "ptr": ("Q", 8),
    "i1": ("?", 1),
    "i8": ("b", 1),
    "u8": ("B", 1),
    "i16": ("h", 2),
    "u16": ("H", 2),
    "i32": ("i", 4),
    "u32": ("I", 4),
    "i64": ("q", 8),
    "u64": ("Q", 8),
    "fp32": ("f", 4),
    "fp64": ("d", 8),
    "tensormap": (f"{TENSOR_MAP_BYTES}s", TENSOR_MAP_BYTES),
}


@dataclass(frozen=True)
class TensorMapSpec:
    """How one tensor-map parameter is encoded; the tensor's address and shape come at launch.

    Attributes:
        elem_type: a CUtensorMapDataType value.
        elem_bytes: of one element.
        swizzle: a CUtensorMapSwizzle value.
        block: elements of one copy, (rows, cols).
    """

    elem_type: int
    elem_bytes: int
    swizzle: int
    block: tuple[int, int]


@dataclass(frozen=True)
class CompiledKernel:
    """Device code with everything a launch needs.

    Attributes:
        name: the symbol.
        arch: such as "sm_90".
        num_warps: of a block, as compiled (warp specialisation may add some).
        num_ctas: blocks of a cluster.
        pdl: launched with programmatic stream serialisation.
        shared_bytes: dynamic shared memory of a block.
        params: kinds (`PARAM_KINDS`) of all parameters, in order, hidden ones included.
        tensor_maps: one for each "tensormap" parameter, in order.
        registers, local_bytes, spill_bytes: per thread; spills count stores and loads.
    """

    name: str
    arch: str
    cubin: bytes
    num_warps: int
    num_ctas: int
    pdl: bool
    shared_bytes: int
    params: tuple[str, ...]
    tensor_maps: tuple[TensorMapSpec, ...]
    registers: int
    local_bytes: int
    spill_bytes: int

    def meta(self) -> dict[str, Any]:
        """Everything but the code, as JSON."""
        fields = asdict(self)
        del fields[CUBIN]
        return fields

    @classmethod
    def from_meta(
        cls, meta: Mapping[str, Any], files: Mapping[str, bytes], shown: Path
    ) -> CompiledKernel:
        """Raises CorruptBundle: the record of a kernel lacks a field or holds a wrong one."""
        try:
            fields = dict(meta)
            fields["params"] = tuple(fields["params"])
            fields["tensor_maps"] = tuple(
                TensorMapSpec(**{**m, "block": (int(m["block"][0]), int(m["block"][1]))})
                for m in fields["tensor_maps"]
            )
            kernel = cls(**fields, cubin=files[CUBIN])
            kernel._check_types()
            unknown = sorted(set(kernel.params) - set(PARAM_KINDS))
            maps = kernel.params.count("tensormap")
        except (KeyError, TypeError, ValueError, IndexError) as e:
            raise CorruptBundle(
                f"{shown}: expected the record of a compiled kernel, got {e!r:.200}; "
                "delete it; it will be compiled again"
            ) from e
        if unknown or maps != len(kernel.tensor_maps):
            raise CorruptBundle(
                f"{shown}: expected known parameters with {len(kernel.tensor_maps)} tensor maps, "
                f"got {maps} and the unknown {unknown[:4]!r:.200}; "
                "delete it; it will be compiled again"
            )
        return kernel

    def _check_types(self) -> None:
        """Raises ValueError: a field that no launch could use."""
        numbers = {
            "num_warps": self.num_warps,
            "num_ctas": self.num_ctas,
            "shared_bytes": self.shared_bytes,
            "registers": self.registers,
            "local_bytes": self.local_bytes,
            "spill_bytes": self.spill_bytes,
        }
        for m in self.tensor_maps:
            numbers |= {"elem_type": m.elem_type, "swizzle": m.swizzle, "rows": m.block[0]}
            if not 1 <= m.elem_bytes <= 16 or m.block[1] < 1:
                raise ValueError(f"tensor map {m!r:.100}")
        for name, value in numbers.items():
            if type(value) is not int or not 0 <= value < 1 << 31:
                raise ValueError(f"{name} {value!r:.40}")
        texts = (self.name, self.arch, *self.params)
        if not all(isinstance(t, str) for t in texts) or type(self.pdl) is not bool:
            raise ValueError("expected names as text and pdl as a bool")


def param_bytes(kinds: Sequence[str]) -> tuple[int, ...]:
    """Size of each parameter."""
    return tuple(PARAM_KINDS[kind][1] for kind in kinds)


class ParamBlock:
    """One kernel's parameters in host memory, naturally aligned, and the pointers to them.

    The driver copies them during the launch call, so one block serves every launch of its kernel.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        offsets, form, at = [], "<", 0
        for kind in kinds:
            code, size = PARAM_KINDS[kind]
            start = -(-at // min(size, _BLOCK_ALIGNMENT)) * min(size, _BLOCK_ALIGNMENT)
            form += f"{start - at}x{code}" if start > at else code
            offsets.append(start)
            at = start + size
        self.kinds = tuple(kinds)
        self.offsets = tuple(offsets)
        self._struct = struct.Struct(form)
        self._memory = ctypes.create_string_buffer(at + _BLOCK_ALIGNMENT)
        raw = ctypes.addressof(self._memory)
        self._base = -(-raw // _BLOCK_ALIGNMENT) * _BLOCK_ALIGNMENT
        self._skip = self._base - raw
        self._pointers = (ctypes.c_void_p * max(1, len(offsets)))(
            *(self._base + offset for offset in offsets)
        )

    @property
    def address(self) -> int:
        """Of the array of pointers, as `kernelParams` wants it."""
        return ctypes.addressof(self._pointers)

    def pack(self, values: Sequence[int | float | bytes]) -> None:
        """Write one value per parameter.

        Raises:
            ValueError: another number of values, or one that does not fit its kind.
        """
        try:
            self._struct.pack_into(self._memory, self._skip, *values)
        except (struct.error, OverflowError) as e:
            raise ValueError(
                f"expected {len(self.kinds)} parameters {self.kinds}, got "
                f"{tuple(values)!r:.400}: {e}"
            ) from e

    def read(self, index: int) -> bytes:
        """The packed bytes of one parameter."""
        return ctypes.string_at(self._base + self.offsets[index], PARAM_KINDS[self.kinds[index]][1])
