"""The words in which host and device speak: mailbox, ring, phases, reasons and faults.

The host writes a mailbox slot and launches; these kernels apply it, list the step's tokens, and
publish what came of them to a ring. Invariants: row state is written by one CTA only, so its order
is program order; the ring's step number is stored last, with system-scope release.

Mailbox slot (int32; slot = step % 2), offsets in `MailboxLayout`:
  header   HEADER words: step, admits, cancels, pages, chunks, chunk tokens
  cancels  [max_rows]            row
  admits   [max_rows, 3+stops]   row, limit (total tokens), number of stop ids, stop ids
  pages    [max_tokens, 3]       row, page index, page id
  chunks   [max_rows, 4]         row, start position, tokens, 1 if the chunk ends the prompt
  ids      [max_tokens]          prompt token ids of all chunks, in chunk order

Ring slot (int32; slot = step % RING_SLOTS), offsets in `RingLayout`:
  header   HEADER words: entries, fault, begin ns (2 words), end ns (2 words), -, -
  row, token, log-prob bits, finish reason: [max_rows] each
Step numbers of the ring are int64 [RING_SLOTS], apart from the slots; a finished step s shows s +
1.
"""

from __future__ import annotations

from dataclasses import dataclass

HEADER = 8
RING_SLOTS = 4
# Row phases.
FREE, PREFILL, DECODE = 0, 1, 2
# Finish reasons, in the order of `runtime`'s names.
RUNNING, STOP, LENGTH, CANCELLED, ERROR = 0, 1, 2, 3, 4
# Faults: what the host must never have asked for.
FAULT_NONE, FAULT_TOO_MANY, FAULT_NULL_PAGE = 0, 1, 2


@dataclass(frozen=True)
class MailboxLayout:
    """Word offsets of one mailbox slot.

    Attributes:
        max_rows, max_tokens: capacity of the largest key.
        max_stops: stop token ids a row may carry.
    """

    max_rows: int
    max_tokens: int
    max_stops: int

    @property
    def cancels(self) -> int:
        return HEADER

    @property
    def admits(self) -> int:
        return self.cancels + self.max_rows

    @property
    def admit_words(self) -> int:
        return 3 + self.max_stops

    @property
    def pages(self) -> int:
        return self.admits + self.max_rows * self.admit_words

    @property
    def chunks(self) -> int:
        return self.pages + 3 * self.max_tokens

    @property
    def ids(self) -> int:
        return self.chunks + 4 * self.max_rows

    @property
    def words(self) -> int:
        return -(-(self.ids + self.max_tokens) // 64) * 64


@dataclass(frozen=True)
class RingLayout:
    """Word offsets of one ring slot."""

    max_rows: int

    @property
    def words(self) -> int:
        return -(-(HEADER + 4 * self.max_rows) // 64) * 64
