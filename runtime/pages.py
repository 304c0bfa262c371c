"""Who owns which KV page.

Page 0 is the null page: padding writes go there, and nobody is ever given it. Invariant: every
other page is either free or held by exactly one row.
"""

from __future__ import annotations


class OutOfPages(RuntimeError):
    """The KV cache cannot take the request now; nothing was changed or launched."""


class OutOfRows(OutOfPages):
    """Every row is taken; nothing was changed or launched."""


class PagePool:
    """A free list of pages 1 … num_pages-1, last freed first given (its lines may still be
    cached)."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, 0, -1))
        self._held: dict[int, list[int]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Pages that can be given out at all."""
        return self.num_pages - 1

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def held(self, row: int) -> list[int]:
        """The row's pages in position order."""
        return self._held.get(row, [])

    def grow(self, row: int, tokens: int) -> None:
        """Make sure that `row` holds pages for `tokens` tokens.

        Raises:
            OutOfPages: not enough free pages; the row keeps what it had.
        """
        pages = self._held.setdefault(row, [])
        need = self.pages_for(tokens) - len(pages)
        if need > len(self._free):
            raise OutOfPages(
                f"row {row} needs {need} more pages of {self.page_size} tokens and "
                f"{len(self._free)} of {self.capacity} are free; wait for a row to finish, cancel "
                f"one, "
                "or raise --num-pages"
            )
        for _ in range(need):
            pages.append(self._free.pop())

    def release(self, row: int) -> None:
        self._free.extend(reversed(self._held.pop(row, [])))
