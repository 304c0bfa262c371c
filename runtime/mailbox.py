"""The host's side of the mailbox and the ring (layouts: `kernels.triton.state`).

Plain numpy over pinned memory. Invariants: a mailbox slot is rewritten only after the step that
read it two launches ago has been collected; the ring slot of a step is read only after its number
shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Chunk:
    """A run of prompt tokens one row prefills in one step."""

    row: int
    start: int
    ids: Int32
    ends: bool


class Mailbox:
    """Writes one step's changes into the slot that the step will read.

    Args:
        words: int32 [2, layout.words].
        layout: a `MailboxLayout`.
    """

    def __init__(self, words: Int32, layout: Any) -> None:
        self._words, self._layout = words, layout
        words[:, 0] = -1

    def write(
        self,
        step: int,
        *,
        cancels: Sequence[int],
        admits: Sequence[tuple[int, int, Sequence[int]]],
        pages: Int32,
        chunks: Sequence[Chunk],
    ) -> None:
        """Fill the slot of `step`.

        Args:
            cancels: rows.
            admits: (row, total token limit, stop ids).
            pages: int32 [n, 3]: row, page index, page id.
            chunks: in the order in which their tokens follow the decoding rows.
        """
        at, box = self._layout, self._words[step % 2]
        box[at.cancels : at.cancels + len(cancels)] = cancels
        for i, (row, limit, stops) in enumerate(admits):
            o = at.admits + i * at.admit_words
            box[o : o + 3 + len(stops)] = (row, limit, len(stops), *stops)
        box[at.pages : at.pages + pages.size] = pages.ravel()
        taken = 0
        for i, c in enumerate(chunks):
            o = at.chunks + 4 * i
            box[o : o + 4] = (c.row, c.start, len(c.ids), c.ends)
            box[at.ids + taken : at.ids + taken + len(c.ids)] = c.ids
            taken += len(c.ids)
        box[1:6] = (len(admits), len(cancels), len(pages), len(chunks), taken)
        box[0] = np.int64(step).astype(np.int32)  # last: a slot with an old number is ignored


@dataclass(frozen=True)
class RingEntry:
    """One finished step as the device published it (copies)."""

    rows: Int32
    tokens: Int32
    logprobs: NDArray[np.float32]
    reasons: Int32
    fault: int
    begin_ns: int
    end_ns: int


class Ring:
    """Reads finished steps.

    Args:
        words: int32 [slots, words]; steps: int64 [slots].
        header: words before the arrays; max_rows: length of each array.
    """

    def __init__(
        self, words: Int32, steps: NDArray[np.int64], *, header: int, max_rows: int
    ) -> None:
        self._words, self._steps = words, steps
        self._header, self._rows = header, max_rows
        self.slots = len(steps)

    def ready(self, step: int) -> bool:
        """Whether `step` has been published; the device stores its number last."""
        return bool(self._steps[step % self.slots] == step + 1)

    def read(self, step: int) -> RingEntry:
        out = self._words[step % self.slots]
        n, fault = int(out[0]), int(out[1])
        times = out[2:6].copy().view(np.int64)
        rows, tokens, bits, reasons = (
            out[self._header + i * self._rows :][:n].copy() for i in range(4)
        )
        return RingEntry(
            rows, tokens, bits.view(np.float32), reasons, fault, int(times[0]), int(times[1])
        )
