"""A device that computes nothing: it takes the mailbox and fills the ring as the kernels do.

Numpy only, for long runs of the driver. KV is modelled as one number per slot, a mix of token and
position; a token's "logits" are the sum of that number over the positions that it attends to, found
through the page table. So a page that is missing, stale, shared wrongly or written too early gives
a wrong token, which `answer` (the same arithmetic without pages) shows.
Invariants: `kernels.triton.intake` and `.settle` are the law; this follows their `_ref` forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphs.keys import GraphKey, Ladder
from kernels.triton.state import (
    ADMIT_HEADER,
    ADMIT_LIMIT,
    ADMIT_ROW,
    ADMIT_STOPS,
    ADMIT_WORDS,
    DECODE,
    FREE,
    HEADER,
    LENGTH,
    MAX_TOP,
    PARAMS,
    PREFILL,
    RING_SLOTS,
    RUNNING,
    STOP,
    MailboxLayout,
    RingLayout,
    mask_words,
)
from runtime.row_params import Admission

UINT = NDArray[np.uint64]
M1, M2, M3 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(29)


def mix(x: UINT) -> UINT:
    """A fixed scramble of 64 bits."""
    with np.errstate(over="ignore"):
        x = (x + M1) * M2
        x = (x ^ (x >> M3)) * M1
        return np.asarray(x ^ (x >> np.uint64(32)), np.uint64)


def kv_of(tokens: NDArray[np.integer], positions: NDArray[np.integer]) -> UINT:  # type: ignore[type-arg]
    return mix(tokens.astype(np.uint64) * np.uint64(1 << 32) + positions.astype(np.uint64))


def sampled(sums: UINT, vocab: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Token and "log-prob" of each sum."""
    x = mix(sums)
    tokens = (x % np.uint64(vocab)).astype(np.int32)
    return tokens, -((x >> np.uint64(40)).astype(np.float32) + 1) / np.float32(1 << 20)


def answer(prompt: Sequence[int], count: int, vocab: int) -> tuple[list[int], list[np.float32]]:
    """The first `count` tokens that a prompt gives, alone, and their log-probs."""
    ids = np.asarray(prompt)
    with np.errstate(over="ignore"):
        total = kv_of(ids, np.arange(len(ids))).sum(dtype=np.uint64)
        tokens, logprobs = [], []
        for position in range(len(ids), len(ids) + count):
            token, logprob = sampled(np.array([total]), vocab)
            tokens.append(int(token[0]))
            logprobs.append(logprob[0])
            total += kv_of(token, np.array([position]))[0]
    return tokens, logprobs


@dataclass
class FakeConfig:
    max_rows: int = 8
    num_pages: int = 33
    page_size: int = 16
    max_seq_len: int = 96
    ep_size: int = 1
    logits_rows: int = 2


@dataclass
class FakeModel:
    vocab_size: int = 97
    eos_token_ids: tuple[int, ...] = ()


class FakeDevice:
    """Stands where `runtime.engine.Engine` stands.

    Args:
        lag: steps that stay unpublished until asked for; 0 publishes at once.

    Attributes:
        idle: True makes `replay` publish an empty step and look at nothing (for host times).
    """

    ring_header = HEADER
    deadline_s = 10.0

    def __init__(self, config: FakeConfig, ladder: str, *, max_stops: int = 4) -> None:
        self.config, self.model_config = config, FakeModel()
        rows = config.max_rows
        self.ladder = Ladder.parse(ladder, rows)
        at = self.mailbox_layout = MailboxLayout(rows, self.ladder.max_tokens, max_stops)
        self.mailbox = np.zeros((2, at.words), np.int32)
        self.ring = np.zeros((RING_SLOTS, RingLayout(rows).words), np.int32)
        self.ring_step = np.zeros(RING_SLOTS, np.int64)
        vocab = self.model_config.vocab_size
        self.ring_top = np.zeros((RING_SLOTS, rows, 2, MAX_TOP), np.int32)
        self.ring_logits = np.zeros((2, config.logits_rows, vocab), np.float32)
        self.forced_tokens = np.zeros((rows, config.max_seq_len), np.int32)
        self.masks = np.zeros((2, rows, mask_words(vocab)), np.int32)
        pages = -(-config.max_seq_len // config.page_size)
        self.phase = np.zeros(rows, np.int32)
        self.seq_len = np.zeros(rows, np.int32)
        self.last_token = np.zeros(rows, np.int32)
        self.limit = np.zeros(rows, np.int32)
        self.stop_ids = np.full((rows, max_stops), -1, np.int32)
        self.page_table = np.zeros((rows, pages), np.int32)
        self.kv = np.zeros(config.num_pages * config.page_size, np.uint64)
        self.step = 0
        self.closed = False

    def check_alive(self) -> None:
        """It never dies."""

    def check_ranks(self) -> None:
        """It has no peers."""

    def close(self) -> None:
        self.closed = True

    def adopt(self, length: int, rows: dict[int, tuple[Admission, list[int]]]) -> None:
        for row, (admitted, held) in rows.items():
            self.phase[row], self.seq_len[row] = DECODE, length
            self.limit[row], self.stop_ids[row] = admitted.limit, -1
            self.page_table[row, : len(held)] = held

    def replay(self, key: GraphKey) -> None:
        row, position, token, sample = self._intake(key)
        sums = self._attend(row, position, token)
        self._settle(row[sample], *sampled(sums[sample], self.model_config.vocab_size))

    def _intake(self, key: GraphKey) -> tuple[NDArray[np.int32], ...]:
        at, box = self.mailbox_layout, self.mailbox[self.step % 2]
        fresh = box[0] == self.step
        admits, cancels, pages, chunks = box[1:5].tolist() if fresh else (0, 0, 0, 0)
        self.phase[box[at.cancels : at.cancels + cancels]] = FREE
        o = at.admits
        for _ in range(admits):
            row, stops = int(box[o + ADMIT_ROW]), int(box[o + ADMIT_STOPS])
            self.phase[row], self.seq_len[row] = PREFILL, 0
            self.limit[row], self.stop_ids[row] = box[o + ADMIT_LIMIT], -1
            lists = o + ADMIT_HEADER + PARAMS
            self.stop_ids[row, :stops] = box[lists : lists + stops]
            o += int(box[o + ADMIT_WORDS])
        update = box[at.pages : at.pages + 3 * pages].reshape(-1, 3)
        self.page_table[update[:, 0], update[:, 1]] = update[:, 2]

        rows = np.flatnonzero(self.phase == DECODE).astype(np.int32)
        row, position, token = [rows], [self.seq_len[rows]], [self.last_token[rows]]
        self.seq_len[rows] += 1
        tokens, taken = len(rows), 0
        sample = list(range(tokens))
        for i in range(chunks):
            r, start, n, ends = box[at.chunks + 4 * i :][:4].tolist()
            assert self.phase[r] == PREFILL, f"a chunk for row {r} in phase {self.phase[r]}"
            row.append(np.full(n, r, np.int32))
            position.append(np.arange(start, start + n, dtype=np.int32))
            token.append(box[at.ids + taken : at.ids + taken + n])
            taken, tokens = taken + n, tokens + n
            if ends:
                sample.append(tokens - 1)
            self.seq_len[r] = start + n
        assert tokens <= key.tokens, "more tokens than the key holds"
        assert len(sample) <= key.rows, "more sampling rows than the key holds"
        flat = (np.concatenate(x) for x in (row, position, token))
        return (*flat, np.array(sample, np.int32))

    def _attend(self, row: UINT, position: UINT, token: UINT) -> UINT:  # type: ignore[type-arg]
        """Write each token's KV, then sum what each sees. Pages must be there."""
        size = self.config.page_size
        if not len(row):
            return np.zeros(0, np.uint64)
        page = self.page_table[row, position // size]
        assert (page > 0).all(), "a live token without a page"
        self.kv[page * size + position % size] = kv_of(token, position)
        seen = np.arange(int(position.max()) + 1)
        slots = self.page_table[row][:, seen // size] * size + seen % size
        values = np.where(seen <= position[:, None], self.kv[slots], np.uint64(0))
        return np.asarray(values.sum(1, dtype=np.uint64))

    def _settle(
        self, row: NDArray[np.int32], token: NDArray[np.int32], logprob: NDArray[np.float32]
    ) -> None:
        reason = np.where(self.seq_len[row] + 1 >= self.limit[row], LENGTH, RUNNING)
        reason[(self.stop_ids[row] == token[:, None]).any(1)] = STOP
        self.last_token[row] = token
        self.phase[row] = np.where(reason == RUNNING, DECODE, FREE)
        out, rows, n = self.ring[self.step % RING_SLOTS], self.config.max_rows, len(row)
        for i, field in enumerate((row, token, logprob.view(np.int32), reason)):
            out[HEADER + i * rows : HEADER + i * rows + n] = field
        out[:6] = (n, 0, 0, 0, 0, 0)
        self.ring_step[self.step % RING_SLOTS] = self.step + 1
        self.step += 1
