"""The host's side of the mailbox and the ring (layouts: `kernels.triton.state`).

Plain numpy over pinned memory. Invariants: a mailbox slot is rewritten only after the step that
read it two launches ago has been collected; the ring slot of a step is read only after its number
shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class RingEntry(NamedTuple):
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
        self.slots = len(steps)
        # Views are made once: a step reads the header, the times and one block, a call each.
        self._heads = [slot[:2] for slot in words]
        self._times = [slot[2:6].view(np.int64) for slot in words]
        self._bodies = [slot[header : header + 4 * max_rows].reshape(4, max_rows) for slot in words]
        # A memoryview's element is a plain int: a third of the time of a numpy scalar in a poll.
        self._steps = steps.data

    def ready(self, step: int) -> bool:
        """Whether `step` has been published; the device stores its number last."""
        return bool(self._steps[step % self.slots] == step + 1)

    def read(self, step: int) -> RingEntry:
        slot = step % self.slots
        n, fault = self._heads[slot].tolist()
        begin_ns, end_ns = self._times[slot].tolist()
        rows, tokens, bits, reasons = self._bodies[slot][:, :n].copy()
        return RingEntry(rows, tokens, bits.view(np.float32), reasons, fault, begin_ns, end_ns)
