"""The row state of one small runtime, driven by kernels or by their oracles. Any device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kernels.triton import advance, intake, settle, token_masks
from kernels.triton.launch import Launcher
from kernels.triton.rows import RowState
from kernels.triton.state import (
    HEADER,
    MAX_BIASES,
    MAX_STOP_LENGTH,
    MAX_STOP_SEQUENCES,
    MAX_TOP,
    PARAMS,
    RING_SLOTS,
    MailboxLayout,
    RingLayout,
    mask_words,
    param_pitch,
)
from runtime.mailbox import Chunk, Mailbox, Ring, RingEntry
from runtime.row_params import Admission, admission
from runtime.sampling import SamplingParams

ROWS, PAGES, STOPS, PAGE, VOCAB, LENGTH, LINES = 5, 6, 3, 4, 100, 24, 5
PINNED = ("mailbox", "forced_tokens", "masks", "ring", "ring_step", "ring_top", "ring_logits")


def _i32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@dataclass
class Device:
    """Row state, step lists, mailbox and ring.

    Attributes:
        launch: None runs the oracles.
        where: torch device.
        max_rows: of the runtime.
    """

    tokens: int
    samples: int
    launch: Launcher | None = None
    where: str = "cpu"
    max_rows: int = ROWS

    def __post_init__(self) -> None:
        rows = self.max_rows
        self.layout = MailboxLayout(rows, 16, STOPS)
        self.mailbox = torch.full((2, self.layout.words), -7, dtype=torch.int32)
        self.forced_tokens = _i32(rows, LENGTH) - 5
        self.masks = _i32(2, rows, mask_words(VOCAB))
        self.step = torch.zeros(1, dtype=torch.int64)
        self.phase, self.seq_len, self.last_token, self.limit = (_i32(rows) for _ in range(4))
        self.stop_ids, self.page_table = _i32(rows, STOPS) - 1, _i32(rows, PAGES)
        self.row_params = _i32(PARAMS, param_pitch(rows))
        self.deadline_ns = torch.zeros(rows, dtype=torch.int64)
        self.seed, self.bias_ids = _i32(rows, 2), _i32(rows, MAX_BIASES) - 1
        self.bias_values = torch.zeros(rows, MAX_BIASES)
        self.stop_sequences = _i32(rows, MAX_STOP_SEQUENCES * MAX_STOP_LENGTH) - 1
        self.tail, self.mask_step = _i32(rows, MAX_STOP_LENGTH) - 1, _i32(rows) - 1
        self.token_mask = _i32(rows, mask_words(VOCAB))
        self.lists = {n: _i32(self.tokens) - 9 for n in ("tok_row", "tok_pos", "tok_id")}
        names = ("sample_tok", "sample_row", "sample_pos", "forced")
        self.lists |= {n: _i32(self.samples) - 9 for n in names}
        self.kv_slot, self.kv_len = torch.zeros(self.tokens, dtype=torch.int64), _i32(self.tokens)
        self.out_token, self.out_logprob = _i32(self.samples), torch.zeros(self.samples)
        self.top_ids = torch.arange(self.samples * MAX_TOP, dtype=torch.int32).view(-1, MAX_TOP)
        self.top_logprobs = -torch.arange(self.samples * MAX_TOP).float().view(-1, MAX_TOP)
        self.logits = torch.arange(self.samples * VOCAB).float().view(-1, VOCAB)
        self.fault, self.begin_ns = _i32(1), torch.zeros(1, dtype=torch.int64)
        self.ring = _i32(RING_SLOTS, RingLayout(rows).words)
        self.pending = _i32(RingLayout(rows).words)
        self.ring_step = torch.zeros(RING_SLOTS, dtype=torch.int64)
        self.ring_top = _i32(RING_SLOTS, rows, 2, MAX_TOP)
        self.ring_logits = torch.zeros(2, LINES, VOCAB)
        self._move()
        self.rows = RowState.of(vars(self))
        self.host = Mailbox(
            self.mailbox.numpy(), self.layout, self.forced_tokens.numpy(), self.masks.numpy()
        )

    def _move(self) -> None:
        if self.where == "cpu":
            return
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.pin_memory() if name in PINNED else value.to(self.where))
        self.lists = {name: value.to(self.where) for name, value in self.lists.items()}

    def write(self, **changes: object) -> None:
        empty = {"cancels": (), "admits": (), "pages": np.zeros((0, 3), np.int32), "chunks": ()}
        self.host.write(int(self.step), **(empty | changes))  # type: ignore[arg-type]

    def _call(self, home: Any, name: str, *args: Any, **more: Any) -> None:
        if self.launch is None:
            getattr(home, f"{name}_ref")(*args, **more)
        else:
            getattr(home, name)(self.launch, *args, **more)

    def intake(self) -> None:
        outs = dict(**self.lists, fault=self.fault, begin_ns=self.begin_ns)
        args = (self.mailbox, self.forced_tokens, self.step, self.rows)
        to = dict(pending=self.pending, ring=self.ring, ring_step=self.ring_step)
        more = dict(layout=self.layout, on_device=self.where != "cpu") | to
        self._call(intake, "intake", *args, **outs, **more)
        masks = (self.step, self.mask_step, self.masks)
        self._call(token_masks, "copy_masks", *masks, token_mask=self.token_mask)

    def advance(self) -> None:
        args = (self.lists["tok_row"], self.lists["tok_pos"], self.page_table)
        more = dict(page_size=PAGE, kv_slot=self.kv_slot, kv_len=self.kv_len, fault=self.fault)
        self._call(advance, "advance", *args, **more)

    def settle(self) -> None:
        entries = (self.lists["sample_row"], self.lists["sample_pos"])
        answers = (*entries, self.row_params, self.step, self.top_ids, self.top_logprobs)
        to = dict(ring_top=self.ring_top, ring_logits=self.ring_logits)
        self._call(settle, "answer", *answers, self.logits, **to)
        args = (*entries, self.out_token, self.out_logprob, self.step, self.rows)
        more = dict(mailbox=self.mailbox, on_device=self.where != "cpu")
        more |= dict(pending=self.pending, ring=self.ring, ring_step=self.ring_step)
        self._call(settle, "settle", *args, self.fault, self.begin_ns, **more)

    def read(self, step: int) -> RingEntry:
        ring = Ring(
            self.ring.numpy(),
            self.ring_step.numpy(),
            header=HEADER,
            max_rows=self.max_rows,
            top=self.ring_top.numpy(),
            logits=self.ring_logits.numpy(),
        )
        assert ring.ready(step)
        assert not ring.ready(step + 1)
        return ring.read(step)

    def dump(self) -> dict[str, torch.Tensor]:
        """Everything but the time, on the CPU."""
        if self.where != "cpu":
            torch.cuda.synchronize()
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        found = {k: v.cpu().clone() for k, v in (tensors | self.lists).items()}
        found["begin_ns"].zero_()
        found["ring"][:, 2:6] = found["pending"][2:6] = 0
        return found


def request(prompt: int = 2, stops: tuple[int, ...] = (), **params: Any) -> Admission:
    """A request of so many prompt tokens, as the mailbox takes it."""
    chosen = SamplingParams(**({"seed": 7} | params))
    return admission(chosen, np.arange(prompt, dtype=np.int32), stops, chosen.seed or 0)


def random_steps(device: Device, seed: int, steps: int = 4) -> None:
    """Random states, mailboxes and tokens: the same for any two devices."""
    rng = np.random.default_rng(seed)
    states = {"phase": (0, 3), "page_table": (1, 9), "seq_len": (1, 12), "limit": (4, 14)}
    for _ in range(steps):
        for name, (low, high) in states.items():
            state = getattr(device, name)
            state.copy_(torch.from_numpy(rng.integers(low, high, state.shape, dtype=np.int32)))
        size = int(rng.integers(1, 9))
        row = int(rng.integers(0, ROWS - 1))
        mask = rng.integers(-9, 9, mask_words(VOCAB), dtype=np.int32)
        start, scored = int(rng.integers(0, 6)), bool(rng.integers(0, 2))
        ids = rng.integers(0, 5, size, dtype=np.int32)
        device.write(
            cancels=rng.integers(0, ROWS, int(rng.integers(0, 3))).tolist(),
            # Of a chunk that is scored, at most one position is past the prompt: one token a row.
            admits=[(row, random_request(rng, start + size if scored else 0))],
            masks={row: mask, 4: None} if size % 3 else {},
            chunks=[Chunk(row, start, ids, bool(size % 2), scored=scored)],
        )
        device.host.tell_launched(int(device.step) + int(rng.integers(0, 2)))
        device.intake()
        device.advance()
        tokens = rng.integers(-1, 5, device.samples, dtype=np.int32)
        device.out_token.copy_(torch.from_numpy(tokens))
        device.settle()


def random_request(rng: np.random.Generator, least_prompt: int = 0) -> Admission:
    """With stop sequences that random tokens below 5 complete often."""
    sequences = [rng.integers(0, 5, rng.integers(1, 3)).tolist() for _ in range(rng.integers(0, 4))]
    return request(
        prompt=max(least_prompt, int(rng.integers(1, 8))),
        stops=tuple(range(int(rng.integers(0, STOPS + 1)))),
        max_tokens=int(rng.integers(1, 9)),
        temperature=float(rng.choice([0.0, 0.7])),
        logit_bias={int(t): float(t) for t in rng.integers(0, 99, rng.integers(0, 3))},
        stop_sequences=sequences,
        logprobs=int(rng.integers(0, MAX_TOP + 1)),
        prompt_logprobs=[None, 0, 3][rng.integers(0, 3)],
        return_logits=bool(rng.integers(0, 2)),
        forced_tokens=[None, (3,)][rng.integers(0, 2)],
        seed=int(rng.integers(0, 2**63)),
    )
