"""Device code inside a host library: the fat binaries of its `.nv_fatbin` section, as they stand.

A library made by nvcc holds one container after another, each with code for several chips, perhaps
compressed; the driver loads a container as it is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

SECTION = ".nv_fatbin"
_MAGIC = 0xBA55ED50
_HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of the header, bytes that follow it
_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")


def fat_binaries(library: bytes) -> list[bytes]:
    """Every container of a 64-bit ELF library; empty where it has none.

    Raises:
        ValueError: not an ELF library, or a damaged section.
    """
    try:
        return [c for offset, size in _sections(library) for c in _split(library, offset, size)]
    except (struct.error, IndexError, UnicodeDecodeError) as e:
        raise ValueError(f"expected a 64-bit ELF library, got one cut short ({e})") from e


def _sections(library: bytes) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of each section of that name."""
    if library[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"expected a 64-bit ELF library, got one that begins {library[:6]!r}")
    table = struct.unpack_from("<Q", library, 0x28)[0]
    stride, count, names_index = struct.unpack_from("<HHH", library, 0x3A)
    headers = [_SECTION_HEADER.unpack_from(library, table + stride * i) for i in range(count)]
    names_at = headers[names_index][4]
    for name, _, _, _, offset, size, *_ in headers:
        start = names_at + name
        if library[start : library.index(b"\0", start)].decode() == SECTION:
            yield offset, size


def _split(library: bytes, offset: int, size: int) -> Iterator[bytes]:
    end = offset + size
    if end > len(library):
        raise ValueError(f"{SECTION} ends at byte {end} of {len(library)}")
    while offset + _HEADER.size <= end:
        magic, _, header, rest = _HEADER.unpack_from(library, offset)
        if magic == 0:  # padding between containers
            offset += 8
            continue
        if magic != _MAGIC or header + rest > end - offset:
            raise ValueError(f"{SECTION}: expected a container at byte {offset}, got {magic:#x}")
        yield library[offset : offset + header + rest]
        offset += header + rest
