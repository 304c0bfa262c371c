"""What a step does, and how it is filled: pages that decoding rows open, then chunks of prompts.

Prompts share a step's prompt tokens so: the first row in `Request.order` gets half, and what the
others leave; the others get the rest, the one with least left first. So short prompts pass long
ones, and yet whoever is first moves on by half a step's worth, whatever arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from capture_cache.dataclass import dataclass
from runtime.mailbox import Chunk
from runtime.pages import PagePool
from runtime.requests import WAITING, Request
from runtime.shared_pages import SharedPages

if TYPE_CHECKING:
    from graphs.keys import Ladder

NO_PAGES = np.zeros((0, 3), np.int32)


@dataclass(slots=True)
class Plan:
    """One step as the host wants it.

    Attributes:
        tokens, samples: step tokens; rows that sample.
        fed: rows with a chunk, and its tokens.
        sent: rows whose page table grows, and to how many pages.
        changes: whether the device must be told anything.
    """

    tokens: int
    samples: int
    changes: bool = False
    cancels: list[int] = field(default_factory=list)
    admits: list[Request] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    pages: NDArray[np.int32] = field(default_factory=lambda: NO_PAGES)
    fed: list[tuple[Request, int]] = field(default_factory=list)
    sent: dict[Request, int] = field(default_factory=dict)
    crossing: list[Request] = field(default_factory=list)


class Filling:
    """Fills one plan, as far as a key and the mailbox have room.

    Args:
        plan: of the rows that decode; changed.
        max_words: page-table entries that the mailbox takes.
    """

    def __init__(
        self,
        plan: Plan,
        ladder: Ladder,
        pages: PagePool,
        shared: SharedPages,
        *,
        max_words: int,
    ) -> None:
        self.plan, self.ladder, self.pages, self.shared = plan, ladder, pages, shared
        self._max_words = max_words
        self._words: list[tuple[int, int, int]] = []

    def open_pages(self) -> None:
        """Tell the device the page that each crossing row's token opens."""
        for request in self.plan.crossing:
            self._send(request, request.sent + 1)

    def feed(self, prefilling: Sequence[Request], budget: int | None) -> None:
        """Share the step's prompt tokens (see the module's description).

        Args:
            prefilling: rows with prompt left, in order.
            budget: prompt tokens at most; None: as many as a key covers.
        """
        if not prefilling:
            return
        room = self.ladder.most_tokens(self.plan.samples) - self.plan.tokens
        if budget is not None:
            room = min(room, budget)
        first, *others = prefilling
        theirs = min(room // 2, sum(request.left for request in others))
        room -= self._take(first, room - theirs)
        for request in sorted(others, key=_left) if len(others) > 1 else others:
            if room <= 0:
                break
            room -= self._take(request, room)

    def _take(self, request: Request, most: int) -> int:
        """Feed at most `most` tokens of a prompt, as far as some key covers them."""
        plan = self.plan
        if request.phase == WAITING:
            self.shared.find_again(request)
        left, most_tokens = request.left, self.ladder.most_tokens
        scored = request.is_scored
        if scored:
            n = min(left, most, self.ladder.most_heads(plan.tokens, plan.samples))
        # The chunk that ends a prompt samples, which takes a row of the key.
        elif left <= min(most, most_tokens(plan.samples + 1) - plan.tokens):
            n = left
        else:
            n = min(left - 1, most, most_tokens(plan.samples) - plan.tokens)
        if n <= 0:
            return 0
        if request.phase == WAITING:
            plan.admits.append(request)
        stop = request.done + n
        if not self._send(request, self.pages.pages_for(stop)):
            return 0  # many cached pages: the mailbox takes the rest of them in the next steps
        ids = request.tokens[request.done : stop]
        plan.chunks.append(Chunk(request.row, request.done, ids, n == left, scored))
        plan.fed.append((request, n))
        plan.tokens += n
        plan.samples += plan.chunks[-1].heads
        return n

    def _send(self, request: Request, count: int) -> bool:
        """Tell the device the row's first `count` pages; False if they do not all fit."""
        plan, words = self.plan, self._words
        start = plan.sent.get(request, request.sent)
        stop = min(count, start + self._max_words - len(words))
        held = self.pages.held(request.row)
        words.extend((request.row, index, held[index]) for index in range(start, stop))
        plan.sent[request] = max(start, stop)
        return stop >= count

    def finish(self) -> None:
        """Send what else the rows hold, as far as it fits, and say what is told at all."""
        plan = self.plan
        for request in [*plan.crossing, *(request for request, _ in plan.fed)]:
            count = len(self.pages.held(request.row))
            if plan.sent[request] < count:
                self._send(request, count)
        if self._words:
            plan.pages = np.array(self._words, np.int32)
        plan.changes = bool(self._words or plan.cancels or plan.admits or plan.chunks)


def _left(request: Request) -> tuple[int, tuple[int, int]]:
    return request.left, request.order
