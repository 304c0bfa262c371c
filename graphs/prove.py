"""The proof that a key gets at capture: its replay does what the eager step does, bit for bit.

For each key a synthetic state (random lengths, pages, tokens and wishes of sampling, and a prompt
chunk where the key has room) is run eagerly once. Then the graph is replayed from the same state
with every scratch byte, the null page and all padded rows poisoned, and again many times: tokens,
log-probs, alternatives, logits, row state and the KV written must have the same bits each time. A
second state shows that the graph reads its inputs where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from capture_cache.errors import CaptureError
from graphs.capture import GraphSet
from graphs.keys import GraphKey
from kernels.triton.rows import RowState
from kernels.triton.state import (
    DECODE,
    F_MASKED,
    F_PROCESSED,
    INT_PARAMS,
    MAX_TOP,
    P_FORCED_LEN,
    P_LOGITS,
    P_SEQUENCES,
    P_TOP,
    PARAMS,
    PREFILL,
    REAL_PARAMS,
)

ROWS = (*RowState.names(), "step")
OUTPUTS = ("tok_row", "tok_pos", "sample_row", "sample_pos", "forced", "final", "logits")
CHOICES = ("out_token", "out_logprob", "top_ids", "top_logprobs")
ANSWERS = ("fault", *ROWS, *OUTPUTS, *CHOICES)
POISON = 0xFF  # NaN in every float type, -1 in every integer type


class ProofFailed(CaptureError):
    """A graph that does not do what the eager step does; it must not be used."""


@dataclass(frozen=True)
class Proof:
    """What was shown for one key.

    Attributes:
        live_rows, chunk_tokens: of the synthetic state; the rest of the key was padding.
        replays: compared with the eager step bit for bit.
    """

    key: GraphKey
    live_rows: int
    chunk_tokens: int
    replays: int


@dataclass(frozen=True)
class _State:
    """A synthetic state: row state to restore, and what it holds."""

    rows: dict[str, torch.Tensor]
    live_rows: int
    chunk_tokens: int
    slots: torch.Tensor  # int64, the KV slots that the step writes


class Prover:
    """Proves keys of one captured set.

    Args:
        replays: per key.
        seed: of the synthetic states.
    """

    def __init__(self, graphs: GraphSet, *, replays: int = 100, seed: int = 0) -> None:
        if replays < 1:
            raise ValueError(f"a proof needs at least one replay, got {replays}")
        self.graphs, self.replays, self.seed = graphs, replays, seed
        self.step, self.config = graphs.step, graphs.step.config
        self.buffers = graphs.step.buffers
        self.device = self.buffers["x"].device
        self._kv = [self.buffers[f"kv.{i}"] for i in range(self.step.cfg.num_layers)]
        # A row and a chunk of full length and a few pages for every other one, as far as there are
        # pages.
        wanted = 2 * self.config.max_pages + 3 * self.config.max_rows
        self._pages = min(self.config.num_pages, 1 + wanted)
        with graphs.backend.on_stream():
            self._fill_kv()

    def _fill_kv(self) -> None:
        """Real values in the pages that states use: an empty cache would hide wrong reads."""
        gen = torch.Generator(self.device).manual_seed(self.seed)
        for kv in self._kv:
            part = kv[: self._pages * self.config.page_size]
            part.copy_(torch.randn(part.shape, generator=gen, device=self.device))

    def prove(self, key: GraphKey) -> Proof:
        """Prove one key.

        Raises:
            ProofFailed: names the buffer and how many of its words differ.
        """
        with self.graphs.backend.on_stream():
            first, answers = self._eager(key, self.seed)
            self._poison(key)
            self._compare(key, first, answers, 1, "the poisoned replay")
            self._compare(key, first, answers, self.replays - 1, "a later replay")
            moved, others = self._eager(key, self.seed + 1)
            self._compare(key, moved, others, 1, "the replay on other inputs")
            self.buffers["poison"].zero_()
            if torch.equal(answers["logits"], others["logits"]):
                raise ProofFailed(f"key {key}: two different states gave the same logits")
        return Proof(key, first.live_rows, first.chunk_tokens, self.replays + 1)

    def _eager(self, key: GraphKey, seed: int) -> tuple[_State, dict[str, torch.Tensor]]:
        state = self._make_state(key, np.random.default_rng(seed))
        self.buffers["poison"].zero_()
        self.graphs.backend.eager(lambda: self.step.run(key))
        answers = {name: t.clone() for name, t in self._answers(key, state).items()}
        if int(answers["fault"]):
            raise ProofFailed(f"key {key}: the eager step reported fault {int(answers['fault'])}")
        if not bool(torch.isfinite(answers["logits"]).all()):
            raise ProofFailed(f"key {key}: the eager step gave logits that are not finite")
        return state, answers

    def _answers(self, key: GraphKey, state: _State) -> dict[str, torch.Tensor]:
        b = self.buffers.for_key(key)
        kv = {f"kv.{i}": kv[state.slots] for i, kv in enumerate(self._kv)}
        return {name: b[name] for name in ANSWERS} | kv

    def _poison(self, key: GraphKey) -> None:
        for name in self.buffers.scratch_names(key):
            self.buffers[name].view(torch.uint8).fill_(POISON)
        for kv in self._kv:
            kv[: self.config.page_size].view(torch.uint8).fill_(POISON)
        self.buffers["poison"].fill_(1)

    def _compare(
        self, key: GraphKey, state: _State, want: dict[str, torch.Tensor], replays: int, what: str
    ) -> None:
        differ = torch.zeros(len(want), dtype=torch.int64, device=self.device)
        for i in range(replays):
            for name, saved in state.rows.items():
                self.buffers[name].copy_(saved)
            check_kv = i == 0
            if check_kv:
                for kv in self._kv:
                    kv[state.slots] = float("nan")
            self.graphs.replay(key)
            got = self._answers(key, state) if check_kv else self.buffers.for_key(key)
            for j, (name, expected) in enumerate(want.items()):
                if check_kv or not name.startswith("kv."):
                    differ[j] += (_bits(got[name]) != _bits(expected)).sum()
        for name, count in zip(want, differ.tolist(), strict=True):
            if count:
                raise ProofFailed(
                    f"key {key}: {what} differs from the eager step in {count} bytes of {name!r}; "
                    "do not use this capture, and report it with the ledger"
                )

    # ------------------------------------------------------------------ synthetic states

    def _make_state(self, key: GraphKey, rng: np.random.Generator) -> _State:
        # Some padding wherever the key has room for it, and a prompt chunk beside decoding rows.
        live_tokens = key.tokens - (max(1, key.tokens // 8) if key.tokens > 1 else 0)
        decode = max(1, key.rows - 1 - key.rows // 4)
        if key.rows == 1 and key.tokens > 1:
            decode = 0
        pages = list(rng.permutation(np.arange(1, self._pages)))
        order = rng.permutation(self.config.max_rows)
        decode = min(decode, len(pages))
        chunk_pages = len(pages) // 2 if decode else len(pages)
        chunk = min(live_tokens - decode, self.config.max_seq_len - 1)
        chunk = max(0, min(chunk, chunk_pages * self.config.page_size))
        table = np.zeros((self.config.max_rows, self.config.max_pages), np.int32)
        lengths = np.zeros(self.config.max_rows, np.int32)
        phase = np.zeros(self.config.max_rows, np.int32)
        slots: list[int] = []

        def place(row: int, length: int, new: int) -> None:
            count = -(-(length + new) // self.config.page_size)
            table[row, :count] = [pages.pop() for _ in range(count)]
            for pos in range(length, length + new):
                page, offset = divmod(pos, self.config.page_size)
                slots.append(int(table[row, page]) * self.config.page_size + offset)

        if chunk:
            place(int(order[-1]), 0, chunk)
            phase[order[-1]] = PREFILL
        live = 0
        for i, row in enumerate(order[: min(decode, self.config.max_rows - bool(chunk))]):
            length = self._length(i, len(pages) - (decode - i), rng)
            if length < 1:
                break
            place(int(row), length, 1)
            phase[row], lengths[row] = DECODE, length
            live += 1
        self._ask(lengths, rng)
        rows = self._write(phase, lengths, table, rng)
        self._write_mailbox(int(order[-1]), chunk, rng)
        return _State(rows, live, chunk, torch.tensor(slots, dtype=torch.int64, device=self.device))

    def _length(self, index: int, spare_pages: int, rng: np.random.Generator) -> int:
        """A cached length that leaves a page for each row still to come; boundaries come first."""
        size, cut, most = self.config.page_size, self.config.cut, self.config.max_seq_len - 1
        wanted = (most, 1, size - 1, size, size + 1, cut - 1, cut, cut + 1)
        length = wanted[index] if index < len(wanted) else int(rng.integers(1, 3 * size))
        return min(length, most, (spare_pages + 1) * size - 1)

    def _ask(
        self, lengths: np.ndarray[tuple[int], np.dtype[np.int32]], rng: np.random.Generator
    ) -> None:
        """Give rows in turn each wish that sampling knows; counts start anew at every replay."""
        vocab, rows = self.step.cfg.vocab_size, self.config.max_rows
        words = np.zeros((PARAMS, self.buffers["row_params"].shape[1]), np.int32)
        ints = {name: words[line] for name, line in INT_PARAMS.items()}
        reals = {name: words[line].view(np.float32) for name, line in REAL_PARAMS.items()}
        for name in ("top_p", "repetition"):
            reals[name][:] = 1.0
        ints["fresh"][:] = 1
        wish = np.arange(len(words[0])) % 7
        reals["temperature"][np.isin(wish, (1, 2, 4))] = 0.8
        reals["top_p"][wish == 1], ints["top_k"][wish == 1] = 0.9, 50
        reals["repetition"][wish == 2], reals["presence"][wish == 2] = 1.2, 0.5
        reals["frequency"][wish == 2], reals["min_p"][wish == 4] = 0.1, 0.05
        ints["flags"][wish == 3], ints["flags"][wish == 4] = F_MASKED, F_PROCESSED
        ints["bias_count"][wish == 3] = 5
        ints["min_len"][wish == 5] = 2**30
        ints["top_n"][wish == 4] = words[P_TOP][wish == 4] = MAX_TOP
        ends = np.minimum(lengths + 2, self.config.max_seq_len)
        words[P_FORCED_LEN, :rows] = np.where(wish[:rows] == 4, ends, 0)
        words[P_SEQUENCES][wish == 6] = 2
        words[P_LOGITS][:7][wish[:7] == 6] = 1
        token = rng.integers(0, vocab, self.buffers["forced_tokens"].shape, dtype=np.int32)
        mask = rng.integers(-(2**31), 2**31, self.buffers["token_mask"].shape, dtype=np.int64)
        values: dict[str, np.ndarray[Any, Any]] = {
            "row_params": words,
            "forced_tokens": token,
            "token_mask": mask.astype(np.int32),
            "seed": rng.integers(0, 2**31, (rows, 2), dtype=np.int32),
            "bias_ids": np.arange(self.buffers["bias_ids"].numel(), dtype=np.int32) % vocab,
            "bias_values": rng.random(self.buffers["bias_values"].numel(), dtype=np.float32),
            "stop_sequences": rng.integers(
                -1, vocab, self.buffers["stop_sequences"].shape, dtype=np.int32
            ),
        }
        for name, value in values.items():
            self.buffers[name].copy_(torch.from_numpy(value).view(self.buffers[name].shape))
        for name, rest in (("tail", -1), ("mask_step", -1), ("deadline_ns", 0)):
            self.buffers[name].fill_(rest)

    def _write(
        self,
        phase: np.ndarray[tuple[int], np.dtype[np.int32]],
        lengths: np.ndarray[tuple[int], np.dtype[np.int32]],
        table: np.ndarray[tuple[int, int], np.dtype[np.int32]],
        rng: np.random.Generator,
    ) -> dict[str, torch.Tensor]:
        vocab = self.step.cfg.vocab_size
        tokens = rng.integers(0, vocab, self.config.max_rows, dtype=np.int32)
        for name, value in (("phase", phase), ("seq_len", lengths), ("last_token", tokens)):
            self.buffers[name].copy_(torch.from_numpy(value))
        self.buffers["page_table"].copy_(torch.from_numpy(table))
        self.buffers["limit"].fill_(self.config.max_seq_len)
        self.buffers["stop_ids"].fill_(-1)
        return {name: self.buffers[name].clone() for name in ROWS}

    def _write_mailbox(self, row: int, chunk: int, rng: np.random.Generator) -> None:
        at = self.buffers.mailbox_layout
        step = int(self.buffers["step"])
        box = self.buffers["mailbox"][step % 2]
        box[0] = -1
        if chunk:
            ids = rng.integers(0, self.step.cfg.vocab_size, chunk, dtype=np.int32)
            box[1:7] = torch.tensor([0, 0, 0, 1, chunk, 0], dtype=torch.int32)
            box[at.chunks : at.chunks + 4] = torch.tensor([row, 0, chunk, 1], dtype=torch.int32)
            box[at.ids : at.ids + chunk] = torch.from_numpy(ids)
            box[0] = step


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
