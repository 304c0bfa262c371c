"""Facts about device code, read from the ELF image itself: no driver and no GPU needed.

`.nv.info` sections hold (format, attribute, size, value) items; the few attributes used here have
kept their meaning since sm_70 and are what `cuobjdump --dump-resource-usage` prints.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from capture_cache.errors import CompileError

_MACHINE_CUDA = 190
_SHT_NOBITS = 8
_FORMAT_SIZED = 4  # the item's size field counts bytes that follow; otherwise it is the value
_REGCOUNT, _FRAME_SIZE, _MIN_STACK = 0x2F, 0x11, 0x12  # in .nv.info: (symbol index, value)
_KPARAM_INFO, _REQNTID = 0x17, 0x10  # in .nv.info.NAME


@dataclass(frozen=True)
class KernelFacts:
    """What ptxas decided for one kernel.

    Attributes:
        registers: per thread.
        local_bytes: stack per thread, spills and callees included.
        static_shared_bytes: beside what the launch asks for, the system's own share included.
        threads: required threads per block, 0 if any number will do.
        param_bytes: size of every parameter, in order.
    """

    registers: int
    local_bytes: int
    static_shared_bytes: int
    threads: int
    param_bytes: tuple[int, ...]


@dataclass(frozen=True)
class _SectionHeader:
    name: str
    kind: int
    offset: int
    size: int
    link: int


def kernel_facts(cubin: bytes) -> dict[str, KernelFacts]:
    """Facts of every kernel in `cubin`, by symbol name.

    Raises:
        CompileError: not a 64-bit CUDA ELF image, or cut short.
    """
    try:
        sections = _sections(cubin)
        by_name = {s.name: s for s in sections}
        totals = _totals(cubin, sections, by_name)
        return {
            name.removeprefix(".text."): _facts(cubin, name.removeprefix(".text."), by_name, totals)
            for name in by_name
            if name.startswith(".text.") and f".nv.info.{name.removeprefix('.text.')}" in by_name
        }
    except (struct.error, IndexError, KeyError, ValueError, OverflowError) as e:
        raise CompileError(
            f"expected a CUDA ELF image, got {len(cubin)} bytes that are not ({e!r:.200}); "
            "compile again"
        ) from e


def _sections(cubin: bytes) -> list[_SectionHeader]:
    machine = struct.unpack_from("<H", cubin, 18)[0] if cubin[:5] == b"\x7fELF\x02" else None
    if machine != _MACHINE_CUDA:
        raise ValueError(f"ELF machine {machine}, not {_MACHINE_CUDA}")
    table = struct.unpack_from("<Q", cubin, 0x28)[0]
    stride, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    raw = [struct.unpack_from("<IIQQQQII", cubin, table + stride * i) for i in range(count)]
    names_at = raw[names_index][4]
    headers = []
    for name, kind, _, _, offset, size, link, _ in raw:
        if kind != _SHT_NOBITS and offset + size > len(cubin):
            raise ValueError(f"a section ends at byte {offset + size}")
        headers.append(_SectionHeader(_text(cubin, names_at + name), kind, offset, size, link))
    return headers


def _totals(
    cubin: bytes, sections: list[_SectionHeader], by_name: dict[str, _SectionHeader]
) -> dict[tuple[int, str], int]:
    """(attribute, symbol name) → value, from the image-wide `.nv.info`."""
    symbols, values = by_name[".symtab"], {}
    strings = sections[symbols.link]
    for attribute, item in _items(cubin, by_name[".nv.info"]):
        if attribute in (_REGCOUNT, _FRAME_SIZE, _MIN_STACK):
            index, value = struct.unpack("<II", item)
            name = struct.unpack_from("<I", cubin, symbols.offset + 24 * index)[0]
            values[attribute, _text(cubin, strings.offset + name)] = value
    return values


def _facts(
    cubin: bytes,
    name: str,
    by_name: dict[str, _SectionHeader],
    totals: dict[tuple[int, str], int],
) -> KernelFacts:
    params: dict[int, int] = {}
    threads = 0
    for attribute, item in _items(cubin, by_name[f".nv.info.{name}"]):
        if attribute == _KPARAM_INFO:
            # index u32, ordinal u16, offset u16, then a word whose upper 14 bits are the size
            _, ordinal, _, packed = struct.unpack("<IHHI", item)
            params[ordinal] = packed >> 18
        elif attribute == _REQNTID:
            x, y, z = struct.unpack("<III", item)
            threads = x * y * z
    shared = by_name.get(f".nv.shared.{name}")
    return KernelFacts(
        registers=totals[_REGCOUNT, name],
        # The second counts what the kernel calls, too.
        local_bytes=max(totals.get((a, name), 0) for a in (_FRAME_SIZE, _MIN_STACK)),
        static_shared_bytes=shared.size if shared else 0,
        threads=threads,
        param_bytes=tuple(params[i] for i in range(len(params))),
    )


def _items(cubin: bytes, section: _SectionHeader) -> Iterator[tuple[int, bytes]]:
    at, end = section.offset, section.offset + section.size
    while at < end:
        form, attribute, size = struct.unpack_from("<BBH", cubin, at)
        at += 4
        if form == _FORMAT_SIZED:
            yield attribute, cubin[at : at + size]
            at += -(-size // 4) * 4


def _text(cubin: bytes, at: int) -> str:
    return cubin[at : cubin.index(b"\0", at)].decode()
