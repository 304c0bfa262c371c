"""Every row's tokens, and what need not be asked again while the same rows decode.

Rows that merely decode come in the same order step after step, each with one token more. So the
first such steps are looked at entry by entry, and those after them only compared with these: a
token's place is the last one's, plus one. Invariant: `end` is called before a row of such steps
changes hands or has its tokens taken back.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.mailbox import Int32

Int64 = NDArray[np.int64]


class History:
    """Tokens by row.

    Attributes:
        tokens: int32 [max_rows, max_seq_len], prompt first.
        steady_rows: bytes of the rows (int32) whose requests `steady_requests` holds, int64 [n], or
            None: an entry of these rows alone, each with a plain new token, goes to `append_again`.
    """

    def __init__(self, max_rows: int, max_seq_len: int) -> None:
        self.tokens: Int32 = np.zeros((max_rows, max_seq_len), np.int32)
        self.steady_rows: bytes | None = None
        self.steady_requests: Int64 = np.zeros(0, np.int64)
        self._flat = self.tokens.reshape(-1)
        self._have: Int64 = np.zeros(max_rows, np.int64)
        self._last: bytes | None = None  # rows of the last plain step, nothing having ended since
        self._rows: Int32 = np.zeros(0, np.int32)
        self._next: Int64 = np.zeros(0, np.int64)  # where the next token of each of `_rows` goes
        self._owed = 0  # tokens that each of `_rows` has and `_have` does not count

    @property
    def have(self) -> Int64:
        """int64 [max_rows], tokens that each row has."""
        if self._owed:
            self._have[self._rows] += self._owed
            self._owed = 0
        return self._have

    def append(self, rows: Int32, tokens: Int32) -> None:
        """A token more for each of `rows`."""
        have = self.have
        at = have[rows]
        self.tokens[rows, at] = tokens
        have[rows] = at + 1

    def append_again(self, tokens: Int32) -> None:
        """The same for the steady rows, in their order."""
        self._flat[self._next] = tokens
        self._next += 1
        self._owed += 1

    def watch(self, rows: Int32, requests: Int64) -> None:
        """A plain step has been appended: the second one of the same rows makes them steady.

        Args:
            rows: int32 [n]; requests: int64 [n], theirs. Neither is kept.
        """
        key = rows.tobytes()
        if key != self._last:
            self._last = key
            return
        have = self.have
        self._rows, self.steady_requests = rows.copy(), requests.copy()
        self._next = have[rows] + np.multiply(rows, self.tokens.shape[1], dtype=np.int64)
        self.steady_rows = key

    def end(self) -> None:
        """Whose the next entries are must be looked up."""
        self.steady_rows = self._last = None
