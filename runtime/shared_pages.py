"""Pages that requests share: what a request finds in the prefix cache, and what it leaves there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.pages import PagePool
from runtime.prefix_cache import PrefixCache
from runtime.requests import Request


class SharedPages:
    """The pool's pages by the names that the cache gives them, a request at a time."""

    def __init__(self, pages: PagePool, cache: PrefixCache) -> None:
        self.pages, self.cache = pages, cache

    def applies_to(self, request: Request) -> bool:
        """Whether the request takes part."""
        return self.cache.enabled and request.cacheable

    def find(self, request: Request) -> list[int]:
        """Named pages that begin like the request; its last token is always computed."""
        if not self.applies_to(request):
            return []
        count = request.findable_tokens // self.pages.page_size
        return self.cache.find(request.chain.upto(count, request.tokens, self.pages.page_size))

    def find_again(self, request: Request) -> None:
        """Others may have computed more of the request's pages since it was given its row."""
        shared = self.find(request)
        for index in range(request.matched, len(shared)):
            self.pages.swap(request.row, index, shared[index])
        if len(shared) > request.matched:
            request.matched = request.named = len(shared)
            request.done = len(shared) * self.pages.page_size

    def name(self, request: Request, tokens: int, history: NDArray[np.int32]) -> None:
        """Let others find the pages that the first `tokens` tokens fill.

        Args:
            history: int32 [max_rows, max_seq_len], every row's tokens.
        """
        if not self.applies_to(request):
            return
        size, count = self.pages.page_size, tokens // self.pages.page_size
        if count <= request.named:
            return
        digests = request.chain.upto(count, history[request.row], size)
        for index in range(request.named, count):
            self.pages.name(request.row, index, digests[index])
        request.named = count
