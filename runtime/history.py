"""Every row's tokens, and what need not be asked again while the same rows decode.

Rows that merely decode come in the same order step after step, each with one token more. So the
first such steps are looked at entry by entry, and those after them only compared with these: a
token's place is the last one's, plus one. What such a step brings is only laid aside, and goes to
its place when somebody asks, or while the host waits for a step anyhow. Invariant: `end` is called
where a row changes hands or starts again, before the next step is read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.mailbox import Int32

Int64 = NDArray[np.int64]
Index = NDArray[np.intp]  # numpy's own type for places: others are converted at each use, dearly
MOST_ASIDE = 64  # steps whose tokens are laid aside at most


class History:
    """Tokens by row.

    Attributes:
        steady_rows: bytes of the rows (int32) whose requests `steady_requests` holds, int64 [n], or
            None: an entry of these rows alone, each with a plain new token, goes to `append_again`.
    """

    def __init__(self, max_rows: int, max_seq_len: int) -> None:
        self._tokens: Int32 = np.zeros((max_rows, max_seq_len), np.int32)
        self.steady_rows: bytes | None = None
        self.steady_requests: Int64 = np.zeros(0, np.int64)
        self._flat = self._tokens.reshape(-1)
        self._begins: Int64 = np.arange(max_rows) * max_seq_len  # of each row in it
        self._have: Int64 = np.zeros(max_rows, np.int64)
        self._last: bytes | None = None  # rows of the last plain step, nothing having ended since
        self._rows: Index = np.zeros(0, np.intp)
        self._next: Int64 = np.zeros(0, np.int64)  # where the next token of each of `_rows` goes
        self._aside: list[bytes] = []  # of each step since: a token (int32) for each of `_rows`

    @property
    def tokens(self) -> Int32:
        """int32 [max_rows, max_seq_len], prompt first."""
        self.write_up()
        return self._tokens

    @property
    def have(self) -> Int64:
        """int64 [max_rows], tokens that each row has."""
        self.write_up()
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
        self._aside.append(tokens.tobytes())
        if len(self._aside) >= MOST_ASIDE:
            self.write_up()

    def write_up(self) -> None:
        """Put in its places what has been laid aside, if anything has."""
        if not self._aside:
            return
        steps = len(self._aside)
        tokens = np.frombuffer(b"".join(self._aside), np.int32).reshape(steps, len(self._rows))
        self._flat[self._next + np.arange(steps)[:, None]] = tokens
        have = self._have.copy()
        have[self._rows] += steps
        # Together: an interrupt before this finds them laid aside still, and writes them again.
        self._next, self._have, self._aside = self._next + steps, have, []

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
