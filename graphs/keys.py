"""Which graphs exist, and which one a step takes.

A graph is captured for a padded number of step tokens and of rows that sample. Selection is a pure
function of two integers and of a sorted ladder, so every rank chooses for itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Self

MIXED_PROMPT_TOKENS = (64, 512)  # prompt tokens beside the decoding rows in the default ladder


class NotCaptured(LookupError):
    """No captured graph covers the step; nothing was launched."""


class _Sizes(NamedTuple):
    tokens: int
    rows: int


class GraphKey(_Sizes):
    """What one graph was captured for; a tuple, since every step looks graphs up by it.

    Attributes:
        tokens: padded step tokens.
        rows: padded rows that sample, at most `tokens`.
    """

    __slots__ = ()

    def __new__(cls, tokens: int, rows: int) -> Self:
        if not 1 <= rows <= tokens:
            raise ValueError(
                f"a graph key needs 1 <= rows <= tokens, got rows {rows}, tokens {tokens}"
            )
        return super().__new__(cls, tokens, rows)

    def __str__(self) -> str:
        prompt = self.tokens - self.rows
        return f"{self.rows}" if prompt == 0 else f"{self.rows}+{prompt}"

    @classmethod
    def parse(cls, text: str) -> GraphKey:
        """Read `32` (pure decode) or `32+512` (32 sampling rows beside 512 prompt tokens).

        Raises:
            ValueError: not of that form.
        """
        rows, _, prompt = text.strip().partition("+")
        if not rows.isdigit() or (prompt and not prompt.isdigit()) or text.strip().endswith("+"):
            raise ValueError(
                f"ladder entry {text!r} is neither ROWS nor ROWS+PROMPT_TOKENS (like 32 or 32+512)"
            )
        return cls(int(rows) + int(prompt or 0), int(rows))


class Ladder:
    """The sorted keys of one runtime and the choice among them."""

    def __init__(self, keys: Iterable[GraphKey]) -> None:
        self.keys = tuple(sorted(set(keys)))
        if not self.keys:
            raise ValueError("the ladder is empty; give at least one bucket, such as --ladder 1")
        self.max_tokens = max(k.tokens for k in self.keys)
        self.max_rows = max(k.rows for k in self.keys)
        self._chosen: dict[tuple[int, int], GraphKey] = {}
        self._most_tokens = [
            max(k.tokens for k in self.keys if k.rows >= rows) for rows in range(self.max_rows + 1)
        ]

    @classmethod
    def default(cls, max_rows: int) -> Ladder:
        """Pure decode at so many rows that padding stays small, and mixed keys at a few counts.

        1, 2, 4, then steps of 8 up to 32 rows, 16 up to 64, 32 up to 256, and 64 from there.
        """
        steps = (1, 2, 4, *range(8, 32, 8), *range(32, 64, 16), *range(64, 256, 32))
        rows = sorted({r for r in (*steps, *range(256, max_rows, 64)) if r < max_rows} | {max_rows})
        mixed = sorted({min(8, max_rows), max(1, max_rows // 4), max_rows})
        return cls(
            [GraphKey(r, r) for r in rows]
            + [GraphKey(r + p, r) for p in MIXED_PROMPT_TOKENS for r in mixed]
        )

    @classmethod
    def parse(cls, text: str, max_rows: int) -> Ladder:
        """Read `--ladder 1,2,4,8+64`.

        Raises:
            ValueError: an entry is malformed, or no entry covers `max_rows` rows.
        """
        ladder = cls(GraphKey.parse(part) for part in text.split(",") if part.strip())
        if ladder.max_rows != max_rows:
            raise ValueError(
                f"--ladder {text} goes up to {ladder.max_rows} rows and this rank holds "
                f"{max_rows}: "
                f"the largest entry must be {max_rows} (--bs divided by --ep-size)"
            )
        return ladder

    def select(self, tokens: int, rows: int) -> GraphKey:
        """The smallest key that covers `tokens` step tokens of which `rows` sample.

        Raises:
            NotCaptured: no key does; names the ladder and the flag that adds the bucket.
        """
        chosen = self._chosen.get((tokens, rows))
        if chosen is not None:
            return chosen
        for key in self.keys:
            if key.tokens >= tokens and key.rows >= rows:
                self._chosen[tokens, rows] = key
                return key
        wanted = GraphKey(max(tokens, rows, 1), max(rows, 1))
        raise NotCaptured(
            f"bucket {wanted} ({tokens} step tokens, {rows} sampling rows) was not captured "
            f"(ladder {self}); add it with --ladder {self},{wanted}"
        )

    def most_tokens(self, rows: int) -> int:
        """Step tokens of the largest key that has `rows` sampling rows; 0 if none has."""
        return self._most_tokens[rows] if rows <= self.max_rows else 0

    def most_heads(self, tokens: int, rows: int) -> int:
        """Tokens that can still join `tokens` of which `rows` sample, if each of them samples."""
        return max(min(k.tokens - tokens, k.rows - rows) for k in self.keys)

    def __str__(self) -> str:
        return ",".join(str(k) for k in self.keys)
