"""What the readers of a bundle's binary files check; a failure says where: `CorruptBundle`."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from capture_cache.bundle import SCHEMA, Table
from capture_cache.errors import CorruptBundle
from capture_cache.files import REMEDY

HEADER_BYTES = 64


def header_fields(form: struct.Struct, data: bytes, magic: bytes, shown: str) -> tuple[Any, ...]:
    """The fields after the magic, the schema first."""
    if len(data) < HEADER_BYTES:
        raise corrupt(shown, f"expected a header of {HEADER_BYTES} bytes, got {len(data)}")
    found, *fields = form.unpack_from(data)
    if found != magic:
        raise corrupt(shown, f"expected it to begin with {magic!r}, got {found!r}")
    if fields[0] != SCHEMA:
        raise corrupt(shown, f"expected schema {SCHEMA}, got {fields[0]} (of another version)")
    if form.pack(found, *fields) != data[:HEADER_BYTES]:
        raise corrupt(shown, "expected zeros at the end of the header, got others")
    return tuple(fields)


def expect_equal(shown: str, what: str, expected: int, got: int) -> None:
    if got != expected:
        raise corrupt(shown, f"{what}: expected {expected}, got {got}")


def expect_all(shown: str, what: str, good: Table, expected: str) -> None:
    if not good.all():
        raise corrupt(shown, f"{what} {int(np.argmin(good))}: expected {expected}, got another")


def expect_ascending(shown: str, what: str, keys: Table) -> None:
    if (keys[1:] <= keys[:-1]).any():
        raise corrupt(shown, f"expected {what} sorted and unique, got others")


def corrupt(shown: str, problem: str) -> CorruptBundle:
    return CorruptBundle(f"{shown}: {problem}; {REMEDY}")
