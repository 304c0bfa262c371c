"""Who owns which KV page.

Page 0 is the null page: padding writes go there, and nobody is ever given it. Invariant: every
other page is exactly one of free, idle (named in the prefix cache, held by nobody) or held; a page
that several rows hold was named when they came by it: it is full, and nobody writes to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.prefix_cache import PrefixCache


class OutOfPages(RuntimeError):
    """The KV cache cannot take the request now; nothing was changed or launched."""


class OutOfRows(OutOfPages):
    """Every row is taken; nothing was changed or launched."""


class PagePool:
    """Pages 1 … num_pages-1, last freed first given (its lines may still be cached).

    Args:
        page_size: tokens.
        cache: names of full pages; by default one that is switched off.
    """

    def __init__(self, num_pages: int, page_size: int, cache: PrefixCache | None = None) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.cache = cache if cache is not None else PrefixCache(enabled=False)
        self._free = list(range(num_pages - 1, 0, -1))
        self._held: dict[int, list[int]] = {}
        self._refs = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that no row holds; idle ones of the prefix cache are given up when asked for."""
        return len(self._free) + self.cache.num_idle

    @property
    def num_cached(self) -> int:
        """Pages that no row holds and whose KV a later prompt may use."""
        return self.cache.num_idle

    @property
    def capacity(self) -> int:
        """Pages that can be given out at all."""
        return self.num_pages - 1

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def held(self, row: int) -> list[int]:
        """The row's pages in position order."""
        return self._held.get(row, [])

    def refs(self, page: int) -> int:
        """Rows that hold the page."""
        return self._refs[page]

    def has_room(self, pages: int, shared: Sequence[int] = ()) -> bool:
        """Whether a new row can have so many pages, the `shared` ones among them."""
        woken = sum(not self._refs[page] for page in shared)
        return pages - len(shared) + woken <= self.num_free

    def share(self, row: int, pages: Sequence[int]) -> None:
        """Give a row that holds nothing these named pages, as its first."""
        assert not self._held.get(row), f"row {row} holds pages already"
        for page in pages:
            self._hold(page)
        self._held[row] = list(pages)

    def grow(self, row: int, tokens: int) -> None:
        """Make sure that `row` holds pages for `tokens` tokens.

        Raises:
            OutOfPages: not enough free pages; the row keeps what it had.
        """
        pages = self._held.setdefault(row, [])
        need = self.pages_for(tokens) - len(pages)
        if need > self.num_free:
            raise OutOfPages(
                f"row {row} needs {need} more pages of {self.page_size} tokens and "
                f"{self.num_free} of {self.capacity} are free; wait for a row to finish, cancel "
                f"one, or raise --num-pages"
            )
        for _ in range(need):
            page = self._free.pop() if self._free else self.cache.evict()
            self._refs[page] = 1
            pages.append(page)

    def shrink(self, row: int, count: int) -> None:
        """Take back what `grow` gave beyond the row's first `count` pages; nobody has used it."""
        pages = self._held[row]
        while len(pages) > count:
            self._drop(pages.pop())

    def swap(self, row: int, index: int, page: int) -> None:
        """Put a named page in the place of the row's own."""
        pages = self._held[row]
        self._hold(page)
        self._drop(pages[index])
        pages[index] = page

    def name(self, row: int, index: int, digest: bytes) -> None:
        """Let later prompts find the row's page `index`, which is full."""
        self.cache.name(self._held[row][index], digest)

    def release(self, row: int) -> None:
        """Take the row's pages back; named ones stay findable until their room is needed."""
        # The end of a prefix is of no use without its beginning: it is given up first.
        for page in reversed(self._held.pop(row, [])):
            self._drop(page)

    def forget(self, row: int) -> None:
        """Nobody shall find the row's pages any more."""
        for page in self.held(row):
            self.cache.forget(page)

    def forget_all(self) -> None:
        """Empty the prefix cache; rows keep what they hold."""
        self._free.extend(self.cache.clear())

    def _hold(self, page: int) -> None:
        self._refs[page] += 1
        self.cache.wake(page)

    def _drop(self, page: int) -> None:
        self._refs[page] -= 1
        if self._refs[page]:
            return
        if page in self.cache:
            self.cache.rest(page)
        else:
            self._free.append(page)
