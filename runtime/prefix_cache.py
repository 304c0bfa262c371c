"""Which full KV pages hold which tokens, so that a later prompt need not compute them again.

A page is named by a digest of all that its KV depends on: the salt, and every token from the
request's first up to the page's last. Only full pages have a name, so nobody ever writes to a
shared page and none is ever copied. A digest is 16 bytes of BLAKE2b: two different prefixes do not
meet. Invariants: a named page has one name and a name one page; `idle` pages are the named ones
that no row holds, least recently used first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import field

import numpy as np
from numpy.typing import NDArray

from capture_cache.dataclass import dataclass

DIGEST_BYTES = 16


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


@dataclass
class DigestChain:
    """The digests of one request's full pages, extended as its tokens become known.

    Attributes:
        salt: anything beside the tokens that changes KV, such as an adapter's id.
    """

    salt: bytes
    digests: list[bytes] = field(default_factory=list)

    def upto(self, count: int, tokens: NDArray[np.int32], page_size: int) -> list[bytes]:
        """Digests of the first `count` pages of `tokens` (int32 [n >= count * page_size])."""
        known = self.digests
        parent = known[-1] if known else _digest(b"\0" + self.salt)
        for index in range(len(known), count):
            page = tokens[index * page_size : (index + 1) * page_size]
            parent = _digest(parent + page.tobytes())
            known.append(parent)
        return known[:count]


class PrefixCache:
    """Names of pages, and the order in which idle ones are given up.

    Args:
        enabled: False keeps no names, so that nothing is ever found.

    Attributes:
        evictions: named pages that were given up for new ones.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.evictions = 0
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        """Named pages that no row holds."""
        return len(self._idle)

    @property
    def idle(self) -> list[int]:
        """Named pages that no row holds, the next to be given up first."""
        return list(self._idle)

    def __len__(self) -> int:
        return len(self._page_of)

    def __contains__(self, page: int) -> bool:
        return page in self._name_of

    def find(self, digests: list[bytes]) -> list[int]:
        """The pages of the longest run of `digests` from the first on that is all here."""
        pages: list[int] = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def name(self, page: int, digest: bytes) -> bool:
        """Call a page that a row holds `digest`; False if either is taken, or the cache is off."""
        if not self.enabled or digest in self._page_of or page in self._name_of:
            return False
        self._page_of[digest] = page
        self._name_of[page] = digest
        return True

    def forget(self, page: int) -> bool:
        """Take the page's name away; True if it was idle, and is the caller's to give out."""
        digest = self._name_of.pop(page, None)
        if digest is None:
            return False
        del self._page_of[digest]
        if page not in self._idle:
            return False
        del self._idle[page]
        return True

    def rest(self, page: int) -> None:
        """A named page that its last row has left."""
        self._idle[page] = None

    def wake(self, page: int) -> None:
        """A page that a row takes up, idle or not."""
        self._idle.pop(page, None)

    def evict(self) -> int:
        """Give up the idle page that was used longest ago."""
        page = next(iter(self._idle))
        self.forget(page)
        self.evictions += 1
        return page

    def clear(self) -> list[int]:
        """Forget every name; returns the pages that were idle."""
        idle = self.idle
        self._page_of.clear()
        self._name_of.clear()
        self._idle.clear()
        return idle
