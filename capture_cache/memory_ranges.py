"""Memory that outlives a process by name, and the name of an address in it."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from capture_cache.bundle import Symbol


@dataclass(frozen=True)
class Range:
    """Memory that outlives a process by name."""

    name: str
    base: int
    nbytes: int
    host: bool = False


class Ranges:
    """Finds the symbol of an address: an entry if it lies in one, else the whole that holds it."""

    def __init__(self, entries: Sequence[Range], wholes: Sequence[Range]) -> None:
        self._all = [r for r in entries if r.nbytes] + [r for r in wholes if r.nbytes]
        self.symbols = tuple(Symbol(r.name, r.nbytes, r.host) for r in self._all)
        apart = sum(1 for r in entries if r.nbytes)
        self._order = sorted(range(apart), key=lambda i: self._all[i].base)
        self._starts = [self._all[i].base for i in self._order]
        self._wholes = list(range(apart, len(self._all)))

    def find(self, address: int) -> tuple[int, int] | None:
        """(symbol, offset into it) of an address; None if it is not ours."""
        at = bisect.bisect_right(self._starts, address) - 1
        candidates = ([self._order[at]] if at >= 0 else []) + self._wholes
        for i in candidates:
            r = self._all[i]
            if r.base <= address < r.base + r.nbytes:
                return i, address - r.base
        return None

    def is_host(self, address: int) -> bool:
        place = self.find(address)
        return place is not None and self._all[place[0]].host
