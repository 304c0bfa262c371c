"""The host's side of the mailbox and the ring (layouts: `kernels.triton.state`).

Plain numpy over pinned memory. Invariants: a mailbox slot is rewritten only after the step that
read it two launches ago has been collected; the ring slot of a step is read only after its number
shows.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from capture_cache.dataclass import dataclass
from kernels.triton.state import ADMIT_LIFE_MS, ADMIT_ROW, LAUNCHED, PROMPT_ENTRY, RING_FIELDS

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

RING_HEAD = struct.Struct("=iiqq")  # entries, fault, begin ns, end ns


@dataclass(frozen=True)
class Chunk:
    """A run of prompt tokens one row prefills in one step.

    Attributes:
        ends: it ends the prompt, so its last token's logits give a new token.
        scored: every token of it runs the head, because the prompt's log-probs are wanted.
    """

    row: int
    start: int
    ids: Int32
    ends: bool
    scored: bool = False

    @property
    def heads(self) -> int:
        """Sampling rows of a key that the chunk takes."""
        return len(self.ids) if self.scored else int(self.ends)


class Admitted(Protocol):
    """What the mailbox needs of a request: see `runtime.row_params.Admission`."""

    @property
    def record(self) -> Int32: ...

    @property
    def known(self) -> Int32 | None: ...

    @property
    def life_ms(self) -> int: ...


class Mailbox:
    """Writes one step's changes into the slot that the step will read.

    Args:
        words: int32 [2, layout.words].
        layout: a `MailboxLayout`.
        forced_tokens: int32 [max_rows, max_seq_len], pinned.
        masks: int32 [2, max_rows, mask words], pinned.
    """

    def __init__(self, words: Int32, layout: Any, forced_tokens: Int32, masks: Int32) -> None:
        self._words, self._layout = words, layout
        self._forced_tokens, self._masks = forced_tokens, masks
        words[:, 0] = words[-1, LAUNCHED] = -1
        self._launched = words[-1, LAUNCHED:].view(np.uint32).data

    def write(
        self,
        step: int,
        *,
        cancels: Sequence[int],
        admits: Sequence[tuple[int, Admitted]],
        pages: Int32,
        chunks: Sequence[Chunk],
        masks: Mapping[int, Int32 | None] | None = None,
    ) -> None:
        """Fill the slot of `step`.

        Args:
            cancels: rows.
            admits: (row, what `runtime.row_params.admission` made of its request).
            pages: int32 [n, 3]: row, page index, page id.
            chunks: in the order in which their tokens follow the decoding rows.
            masks: new token mask by row; None ends masking.
        """
        at, box = self._layout, self._words[step % 2]
        box[at.cancels : at.cancels + len(cancels)] = cancels
        o = at.admits
        for row, admitted in admits:
            words = len(admitted.record)
            box[o : o + words] = admitted.record
            box[o + ADMIT_ROW], box[o + ADMIT_LIFE_MS] = row, admitted.life_ms
            o += words
            if admitted.known is not None:
                # Whoever had the row before has ended, or its tokens are dropped.
                self._forced_tokens[row, : len(admitted.known)] = admitted.known
        box[at.pages : at.pages + pages.size] = pages.ravel()
        taken = 0
        for i, c in enumerate(chunks):
            o = at.chunks + 4 * i
            box[o : o + 4] = (c.row, c.start, len(c.ids), c.heads)
            box[at.ids + taken : at.ids + taken + len(c.ids)] = c.ids
            taken += len(c.ids)
        for i, (row, mask) in enumerate((masks or {}).items()):
            box[at.masks + 2 * i : at.masks + 2 * i + 2] = (row, mask is not None)
            if mask is not None:
                self._masks[step % 2, row] = mask
        box[1:7] = (len(admits), len(cancels), len(pages), len(chunks), taken, len(masks or {}))
        box[0] = np.int64(step).astype(np.int32)  # last: a slot with an old number is ignored

    def tell_launched(self, step: int) -> None:
        """Let the step before `step` know that it has a successor; only once that is launched."""
        self._launched[0] = step + 1 & 0xFFFFFFFF


class RingEntry:
    """One finished step as the device published it (copies).

    Args:
        fields: int32 [RING_FIELDS, n], the arrays of the slot.
        plain: whether every entry is a new token, of a row that goes on and asked for nothing more.
        top: int32 [n, 2, MAX_TOP], valid up to the counts; [n, 2, 0] if nobody asked.

    Attributes:
        logits: float32 [lines, vocab].
    """

    # What most steps are not asked for is worked out when it is: one of these is made each step.
    __slots__ = ("_fields", "_top", "begin_ns", "end_ns", "fault", "is_plain", "logits")

    def __init__(
        self,
        fields: Int32,
        plain: bool,
        fault: int,
        begin_ns: int,
        end_ns: int,
        top: Int32,
        logits: Float32,
    ) -> None:
        self._fields, self.is_plain, self.fault = fields, plain, fault
        self.begin_ns, self.end_ns = begin_ns, end_ns
        self._top, self.logits = top, logits

    @property
    def rows(self) -> Int32:
        """int32 [n]."""
        rows: Int32 = self._fields[0]
        return rows

    @property
    def tokens(self) -> Int32:
        """int32 [n]."""
        tokens: Int32 = self._fields[1]
        return tokens

    @property
    def logprobs(self) -> Float32:
        """float32 [n]."""
        logprobs: Float32 = self._fields[2].view(np.float32)
        return logprobs

    @property
    def reasons(self) -> Int32:
        """int32 [n]; `PROMPT_ENTRY` is the reason of a scored prompt token."""
        reasons: Int32 = self._fields[3]
        return reasons

    @property
    def positions(self) -> Int32:
        """int32 [n], of the token in its sequence."""
        positions: Int32 = self._fields[4]
        return positions

    @property
    def top_counts(self) -> Int32:
        """int32 [n], alternatives of each entry."""
        counts: Int32 = self._fields[5] & 255
        return counts

    @property
    def logit_lines(self) -> Int32:
        """int32 [n], 0 or 1 + the entry's line of `logits`."""
        lines: Int32 = self._fields[5] >> 8
        return lines

    @property
    def top_ids(self) -> Int32:
        """int32 [n, MAX_TOP], valid up to the count; [n, 0] if nobody asked."""
        top_ids: Int32 = self._top[:, 0]
        return top_ids

    @property
    def top_logprobs(self) -> Float32:
        """float32, shaped as `top_ids`."""
        top_logprobs: Float32 = self._top[:, 1].view(np.float32)
        return top_logprobs

    @property
    def is_prompt(self) -> NDArray[np.bool_]:
        """bool [n], entries of scored prompt tokens."""
        is_prompt: NDArray[np.bool_] = self.reasons == PROMPT_ENTRY
        return is_prompt

    @property
    def asks_nothing(self) -> bool:
        """Whether there are only new tokens, and nobody asked for more than their log-prob."""
        return self.is_plain or not (np.count_nonzero(self._fields[5]) or self.num_prompt)

    @property
    def num_prompt(self) -> int:
        """How many of those there are."""
        return 0 if self.is_plain else int(np.count_nonzero(self.is_prompt))


class Ring:
    """Reads finished steps.

    Args:
        words: int32 [slots, words]; steps: int64 [slots].
        header: words before the arrays; max_rows: length of each array.
        top: int32 [slots, max_rows, 2, MAX_TOP].
        logits: float32 [2, lines, vocab].
    """

    def __init__(
        self,
        words: Int32,
        steps: NDArray[np.int64],
        *,
        header: int,
        max_rows: int,
        top: Int32,
        logits: Float32,
    ) -> None:
        self._top, self._logits = top, logits
        self._no_logits = logits[0, :0]
        self.slots = len(steps)
        # Views are made once, and again when the number of entries changes: making one takes as
        # long as copying what it shows. A memoryview's element is a plain int: a third of the time
        # of a numpy scalar in a poll.
        self._heads = [slot.data for slot in words]
        self._bodies = [
            slot[header : header + RING_FIELDS * max_rows].reshape(RING_FIELDS, max_rows)
            for slot in words
        ]
        self._cut(max_rows)
        self._steps = steps.data

    def _cut(self, n: int) -> None:
        self._n = -1  # should an interrupt come before the end
        self._zeros = bytes(4 * n)
        self._used = [body[:, :n] for body in self._bodies]
        self._no_top = self._top[0, :n, :, :0]
        self._n = n

    def ready(self, step: int) -> bool:
        """Whether `step` has been published; the device stores its number last."""
        return bool(self._steps[step % self.slots] == step + 1)

    def read(self, step: int) -> RingEntry:
        slot = step % self.slots
        n, fault, begin_ns, end_ns = RING_HEAD.unpack_from(self._heads[slot])
        if n != self._n:
            self._cut(n)
        fields = self._used[slot].copy()
        zeros = self._zeros
        if fields[5].tobytes() == zeros:
            plain = fields[3].tobytes() == zeros
            top, logits = self._no_top, self._no_logits
            return RingEntry(fields, plain, fault, begin_ns, end_ns, top, logits)
        # Copied only if somebody asked, so that a plain step costs the same for any number of rows.
        answers = fields[5]
        width = self._top.shape[-1] if (answers & 255).any() else 0
        top = self._top[slot, :n, :, :width].copy()
        logits = self._logits[step % 2, : int(answers.max()) >> 8].copy()
        return RingEntry(fields, False, fault, begin_ns, end_ns, top, logits)
