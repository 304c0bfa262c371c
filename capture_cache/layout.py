"""The arena's table: where every buffer lies, as a pure function of what has to be stored.

Two ranges are laid out, device memory and pinned host memory; an offset is relative to its range.
Sections come in one fixed order, each on a 2 MiB boundary (the granularity of device mappings), so
a section can be mapped, exported or measured alone. Empty sections take nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from capture_cache.dataclass import dataclass
from capture_cache.errors import LayoutError

SECTION_ALIGNMENT = 2 << 20  # bytes
ENTRY_ALIGNMENT = (
    256  # bytes: what allocators give, and more than any vector load or TMA base needs
)
ITEM_BYTES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
}


@dataclass(frozen=True)
class Section:
    """A named part of the arena; `host` puts it in pinned host memory."""

    name: str
    host: bool = False


SECTIONS: tuple[Section, ...] = (
    Section("weights"),
    Section("rows"),
    Section("kv"),
    Section("scratch"),
    Section("peers"),
    Section("ring", host=True),
)


@dataclass(frozen=True)
class Entry:
    """One buffer that is wanted.

    Attributes:
        section: one of the layout's sections.
        name: unique in the arena.
        dtype: a key of `ITEM_BYTES` (torch's names).
        alignment: bytes, a power of two up to 2 MiB.
    """

    section: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    alignment: int = ENTRY_ALIGNMENT

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def check(self) -> None:
        """Raises LayoutError naming the entry."""
        who = f"arena entry {self.name!r}"
        if not isinstance(self.name, str) or not self.name:
            raise LayoutError("an arena entry needs a name; name it after its buffer")
        if self.dtype not in ITEM_BYTES:
            raise LayoutError(
                f"{who}: unknown dtype {self.dtype!r}; use one of {_known(ITEM_BYTES)}"
            )
        # A bool is an int to isinstance, and no dimension.
        if not all(type(d) is int and d >= 0 for d in self.shape):
            raise LayoutError(f"{who}: dimensions must be integers >= 0, got {self.shape}")
        power_of_two = self.alignment > 0 and self.alignment & (self.alignment - 1) == 0
        if not power_of_two or not ITEM_BYTES[self.dtype] <= self.alignment <= SECTION_ALIGNMENT:
            raise LayoutError(
                f"{who}: alignment must be a power of two from the item size "
                f"({ITEM_BYTES[self.dtype]}) to {SECTION_ALIGNMENT}, got {self.alignment}"
            )


@dataclass(frozen=True)
class Place:
    """Where an entry lies: `offset` bytes into the device range, or into the host range."""

    entry: Entry
    offset: int
    host: bool

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes


@dataclass(frozen=True)
class Extent:
    """A section's part of its range; `nbytes` is a multiple of 2 MiB."""

    section: Section
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ArenaLayout:
    """The finished table.

    Attributes:
        places: every entry, by section and then in the order given.
        extents: every section, in order, empty ones included.
    """

    places: tuple[Place, ...]
    extents: tuple[Extent, ...]

    @classmethod
    def build(cls, entries: Sequence[Entry], sections: Sequence[Section] = SECTIONS) -> ArenaLayout:
        """Lay out `entries`.

        Raises:
            LayoutError: duplicate name, unknown section or dtype, bad shape or alignment.
        """
        by_section: dict[str, list[Entry]] = {s.name: [] for s in sections}
        if len(by_section) != len(sections):
            raise LayoutError(f"sections are not unique: {[s.name for s in sections]}")
        seen: set[str] = set()
        for entry in entries:
            entry.check()
            if entry.section not in by_section:
                raise LayoutError(
                    f"arena entry {entry.name!r}: unknown section {entry.section!r}; "
                    f"use one of {_known(by_section)}"
                )
            if entry.name in seen:
                raise LayoutError(f"arena entry {entry.name!r} is given twice; names are unique")
            seen.add(entry.name)
            by_section[entry.section].append(entry)
        places: list[Place] = []
        extents: list[Extent] = []
        end = {False: 0, True: 0}  # of the device and of the host range
        for section in sections:
            start = end[section.host]
            at = start
            for entry in by_section[section.name]:
                at = _round_up(at, entry.alignment)
                places.append(Place(entry, at, section.host))
                at += entry.nbytes
            end[section.host] = _round_up(at, SECTION_ALIGNMENT)
            extents.append(Extent(section, start, end[section.host] - start))
        return cls(tuple(places), tuple(extents))

    @property
    def device_bytes(self) -> int:
        return sum(e.nbytes for e in self.extents if not e.section.host)

    @property
    def host_bytes(self) -> int:
        return sum(e.nbytes for e in self.extents if e.section.host)

    @property
    def total(self) -> int:
        """Bytes of both ranges."""
        return self.device_bytes + self.host_bytes

    @property
    def section_bytes(self) -> dict[str, int]:
        """Bytes by section, rounded up to 2 MiB, empty sections included."""
        return {e.section.name: e.nbytes for e in self.extents}

    @cached_property
    def by_name(self) -> dict[str, Place]:
        return {p.entry.name: p for p in self.places}

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical JSON: equal tables have equal digests on every machine."""
        text = json.dumps(self._table, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return dict(self._table)

    @cached_property
    def _table(self) -> dict[str, Any]:
        return {
            "sections": [
                {"name": e.section.name, "host": e.section.host, "bytes": e.nbytes}
                for e in self.extents
            ],
            "entries": [_row(p) for p in self.places],
        }

    @classmethod
    def from_json(cls, table: Any) -> ArenaLayout:
        """Read a stored table back, laying it out anew and comparing every offset.

        Raises:
            LayoutError: malformed, or a stored number is not what this version computes.
        """
        try:
            sections = [Section(s["name"], s["host"]) for s in table["sections"]]
            entries = [
                Entry(e["section"], e["name"], tuple(e["shape"]), e["dtype"], e["alignment"])
                for e in table["entries"]
            ]
            layout = cls.build(entries, sections)
        except (TypeError, KeyError) as e:
            raise LayoutError(f"stored arena table is malformed ({e!r}); capture again") from e
        computed = layout._table
        for field in ("sections", "entries"):
            if table[field] == computed[field]:
                continue
            for stored, now in zip(table[field], computed[field], strict=True):
                if stored != now:
                    raise LayoutError(
                        f"stored arena table disagrees: expected {now}, got {stored}; capture again"
                    )
        return layout


def _row(place: Place) -> dict[str, Any]:
    """A place as the table has it, its keys sorted."""
    entry = place.entry
    return {
        "alignment": entry.alignment,
        "bytes": entry.nbytes,
        "dtype": entry.dtype,
        "name": entry.name,
        "offset": place.offset,
        "section": entry.section,
        "shape": list(entry.shape),
    }


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _known(names: Iterable[str]) -> str:
    return ", ".join(names)
