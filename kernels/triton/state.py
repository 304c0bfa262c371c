"""The words in which host and device speak: mailbox, ring, phases, reasons, faults, parameters.

The host writes a mailbox slot and launches; these kernels apply it, list the step's tokens, and
publish what came of them to a ring. Invariants: row state is written by one CTA only, so its order
is program order; the ring's step number is stored last, with system-scope release.

A step that has a successor leaves its ring slot in `pending`, on the device, and the successor's
intake publishes it beside its own work: writing to host memory and waiting until it is there would
take longer than all else between two steps. The last step that was launched publishes itself. So
nothing that has been launched waits to be published for a launch that may never come.

Mailbox slot (int32; slot = step % 2), offsets in `MailboxLayout`:
  header   HEADER words: step, admits, cancels, pages, chunks, chunk tokens, masks, -
  cancels  [max_rows]            row
  admits   records one after the other, each as long as its first word says (`ADMIT_*`)
  pages    [max_tokens, 3]       row, page index, page id
  chunks   [max_rows, 4]         row, start position, tokens, how many of the last run the head
  masks    [max_rows, 2]         row, 1 if a token mask lies in its pinned buffer, 0 to end masking
  ids      [max_tokens]          prompt token ids of all chunks, in chunk order
The last word of the last slot, LAUNCHED, says how many steps have been launched (the low 32 bits).
It has a memory line of its own: a step reads it when the host may be writing the next one's slot.

Admit record: ADMIT_HEADER words (its length, row, limit in total tokens, lifetime in ms or 0, stop
ids, biased tokens, stop sequences, low and high word of the seed), then PARAMS parameters (`P_*`;
reals as their bits), then the stop ids, the biased ids, their biases (as bits) and the stop
sequences, each MAX_STOP_LENGTH words, right-aligned behind -1. A plain request sends the header,
the parameters and its stop ids.

Beside the mailbox in pinned memory:
  forced_tokens  int32 [max_rows, max_seq_len], the token at each position below P_FORCED_LEN
  masks          int32 [2, max_rows, words], token masks of the slot's step, bit 1 = allowed

Ring slot (int32; slot = step % RING_SLOTS), offsets in `RingLayout`:
  header   HEADER words: entries, fault, begin ns (2 words), end ns (2 words), 1 in `pending` until
           it is published (of a slot of the ring it says nothing), -
  RING_FIELDS arrays of [max_rows] words: row, token, log-prob bits, finish reason (PROMPT_ENTRY for
  a scored prompt token), position of the token, answers (alternatives, and 256 * (1 + line of its
  logits))
Beside the ring: ring_top int32 [RING_SLOTS, max_rows, 2, MAX_TOP] (ids, log-prob bits), written
for entries with alternatives; ring_logits fp32 [2, lines, vocab].
Step numbers of the ring are int64 [RING_SLOTS], apart from the slots; a finished step s shows s +
1.
"""

from __future__ import annotations

from dataclasses import dataclass

HEADER = 8
LAUNCHED = -1  # word of the mailbox's last slot
LINE = 64  # words; more than a memory line
IS_PENDING = 6  # word of a ring slot
RING_SLOTS = 4
RING_FIELDS = 6
# Row phases.
FREE, PREFILL, DECODE = 0, 1, 2
# Finish reasons, in the order of `runtime`'s names.
RUNNING, STOP, LENGTH, CANCELLED, ERROR, DEADLINE = 0, 1, 2, 3, 4, 5
PROMPT_ENTRY = 256
# Faults: what the host must never have asked for.
FAULT_NONE, FAULT_TOO_MANY, FAULT_NULL_PAGE = 0, 1, 2
# Words of an admit record.
ADMIT_WORDS, ADMIT_ROW, ADMIT_LIMIT, ADMIT_LIFE_MS = 0, 1, 2, 3
ADMIT_STOPS, ADMIT_BIASES, ADMIT_SEQUENCES, ADMIT_SEED, ADMIT_HEADER = 4, 5, 6, 7, 9
# Parameters of a row: lines of `row_params`, by the names that kernels know them by.
P_FLAGS, P_TEMPERATURE, P_TOP_K, P_TOP_P, P_MIN_P = 0, 1, 2, 3, 4
P_REPETITION, P_PRESENCE, P_FREQUENCY = 5, 6, 7
P_TOP_N = 8  # alternatives to find
P_BIAS_COUNT = 9
P_MIN_LEN = 10  # no stop ends the row with a token at a position below
P_PROMPT_LEN = 11  # positions from here on are output
P_FRESH = 12  # the row's token counts are still those of its last owner
P_FORCED_LEN = 13  # positions below have their token in `forced_tokens`, if any
P_SEQUENCES = 14  # stop sequences
P_TOP, P_PROMPT_TOP = 15, 16  # alternatives to return for a new token, for a prompt token
P_LOGITS = 17  # 1 if the logits of new tokens are to be returned
PARAMS = 18
INT_PARAMS = {
    "flags": P_FLAGS,
    "top_k": P_TOP_K,
    "top_n": P_TOP_N,
    "bias_count": P_BIAS_COUNT,
    "min_len": P_MIN_LEN,
    "prompt_len": P_PROMPT_LEN,
    "fresh": P_FRESH,
}
REAL_PARAMS = {
    "temperature": P_TEMPERATURE,
    "top_p": P_TOP_P,
    "min_p": P_MIN_P,
    "repetition": P_REPETITION,
    "presence": P_PRESENCE,
    "frequency": P_FREQUENCY,
}
# Bits of P_FLAGS.
F_MASKED, F_PROCESSED = 1, 2
# Capacities of a row.
MAX_TOP = 20
MAX_STOP_SEQUENCES, MAX_STOP_LENGTH = 8, 16
MAX_BIASES = 320


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
        """Words of the longest admit record."""
        lists = self.max_stops + 2 * MAX_BIASES + MAX_STOP_SEQUENCES * MAX_STOP_LENGTH
        return ADMIT_HEADER + PARAMS + lists

    @property
    def pages(self) -> int:
        return self.admits + self.max_rows * self.admit_words

    @property
    def chunks(self) -> int:
        return self.pages + 3 * self.max_tokens

    @property
    def masks(self) -> int:
        return self.chunks + 4 * self.max_rows

    @property
    def ids(self) -> int:
        return self.masks + 2 * self.max_rows

    @property
    def words(self) -> int:
        return -(-(self.ids + self.max_tokens) // LINE) * LINE + LINE


@dataclass(frozen=True)
class RingLayout:
    """Word offsets of one ring slot."""

    max_rows: int

    @property
    def words(self) -> int:
        return -(-(HEADER + RING_FIELDS * self.max_rows) // LINE) * LINE


def mask_words(vocab: int) -> int:
    """int32 words of a token mask, 32 tokens a word, token t at bit t % 32 of word t // 32."""
    return -(-vocab // 32)


def param_pitch(rows: int) -> int:
    """Words of a line of `row_params`: each line starts on 16 bytes."""
    return -(-rows // 4) * 4
