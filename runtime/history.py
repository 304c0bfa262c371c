"""Every row's tokens, and what need not be asked again while the same rows decode.

Rows that merely decode come in the same order step after step, each with one token more. So the
first such steps are looked at entry by entry, and those after them only compared with these: a
token's place is the last one's, plus one. Invariant: `end` is called where a row changes hands or
starts again, before the next step is read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.mailbox import Int32

Int64 = NDArray[np.int64]
Index = NDArray[np.intp]  # numpy's own type for places: others are converted at each use, dearly


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
        self._begins: Int64 = np.arange(max_rows) * max_seq_len  # of each row in it
        self._have: Int64 = np.zeros(max_rows, np.int64)
        self._last: bytes | None = None  # rows of the last plain step, nothing having ended since
        self._rows: Index = np.zeros(0, np.intp)
        self._next: Int64 = np.zeros(0, np.int64)  # where the next token of each of `_rows` goes
        self._owed = 0  # tokens that each of `_rows` has and `_have` does not count

    @property
    def have(self) -> Int64:
        """int64 [max_rows], tokens that each row has."""
        if self._owed:
            self._have[self._rows] += self._owed
            self._owed = 0
        return self._have

    def append(self, rows: Index, tokens: Int32) -> None:
        """A token more for each of `rows`."""
        self.steady_rows = None  # for `_next` does not know of these
        have = self.have
        at = have[rows]
        self._flat[self._begins[rows] + at] = tokens
        have[rows] = at + 1

    def append_again(self, tokens: Int32) -> None:
        """The same for the steady rows, in their order."""
        self._flat[self._next] = tokens
        self._next += 1
        self._owed += 1

    def watch(self, key: bytes, rows: Index, requests: Int64) -> None:
        """A plain step has been appended: the second one of the same rows makes them steady.

        Args:
            key: the rows' bytes as int32.
            rows: intp [n]; requests: int64 [n], theirs, copied.
        """
        if key != self._last:
            self._last = key
            return
        self._rows, self.steady_requests = rows, requests.copy()
        self._next = self._begins[rows] + self.have[rows]
        self.steady_rows = key

    def end(self) -> None:
        """Whose the next entries are must be looked up."""
        self.steady_rows = self._last = None
