"""Intake, advance and settle: kernels (in the interpreter) against their oracles, and by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from kernels.triton import intake, settle, state
from kernels.triton.launch import JitLauncher
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


def _i32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@dataclass
class Device:
    """Row state, step lists, mailbox and ring of one small runtime."""

    tokens: int
    samples: int
    layout: MailboxLayout = field(default_factory=lambda: MailboxLayout(ROWS, 16, STOPS))

    def __post_init__(self) -> None:
        self.mailbox = torch.full((2, self.layout.words), -7, dtype=torch.int32)
        self.forced_tokens = _i32(ROWS, LENGTH) - 5
        self.masks = _i32(2, ROWS, mask_words(VOCAB))
        self.step = torch.zeros(1, dtype=torch.int64)
        self.phase, self.seq_len, self.last_token, self.limit = (_i32(ROWS) for _ in range(4))
        self.stop_ids, self.page_table = _i32(ROWS, STOPS) - 1, _i32(ROWS, PAGES)
        self.row_params = _i32(PARAMS, param_pitch(ROWS))
        self.deadline_ns = torch.zeros(ROWS, dtype=torch.int64)
        self.seed, self.bias_ids = _i32(ROWS, 2), _i32(ROWS, MAX_BIASES) - 1
        self.bias_values = torch.zeros(ROWS, MAX_BIASES)
        self.stop_sequences = _i32(ROWS, MAX_STOP_SEQUENCES * MAX_STOP_LENGTH) - 1
        self.tail, self.mask_step = _i32(ROWS, MAX_STOP_LENGTH) - 1, _i32(ROWS) - 1
        self.token_mask = _i32(ROWS, mask_words(VOCAB))
        self.rows = RowState.of(vars(self))
        self.lists = {n: _i32(self.tokens) - 9 for n in ("tok_row", "tok_pos", "tok_id")}
        names = ("sample_tok", "sample_row", "sample_pos", "forced")
        self.lists |= {n: _i32(self.samples) - 9 for n in names}
        self.kv_slot, self.kv_len = torch.zeros(self.tokens, dtype=torch.int64), _i32(self.tokens)
        self.out_token, self.out_logprob = _i32(self.samples), torch.zeros(self.samples)
        self.top_ids = torch.arange(self.samples * MAX_TOP, dtype=torch.int32).view(-1, MAX_TOP)
        self.top_logprobs = -torch.arange(self.samples * MAX_TOP).float().view(-1, MAX_TOP)
        self.logits = torch.arange(self.samples * VOCAB).float().view(-1, VOCAB)
        self.fault, self.begin_ns = _i32(1), torch.zeros(1, dtype=torch.int64)
        self.ring = _i32(RING_SLOTS, RingLayout(ROWS).words)
        self.ring_step = torch.zeros(RING_SLOTS, dtype=torch.int64)
        self.ring_top = _i32(RING_SLOTS, ROWS, 2, MAX_TOP)
        self.ring_logits = torch.zeros(2, LINES, VOCAB)
        self.host = Mailbox(
            self.mailbox.numpy(), self.layout, self.forced_tokens.numpy(), self.masks.numpy()
        )

    def write(self, **changes: object) -> None:
        empty = {"cancels": (), "admits": (), "pages": np.zeros((0, 3), np.int32), "chunks": ()}
        self.host.write(int(self.step), **(empty | changes))  # type: ignore[arg-type]

    def intake(self, kernel: bool) -> None:
        args = (self.mailbox, self.forced_tokens, self.step, self.rows)
        outs = dict(**self.lists, fault=self.fault, begin_ns=self.begin_ns)
        more = dict(**outs, layout=self.layout, on_device=False)
        masks = (self.step, self.mask_step, self.masks)
        if kernel:
            intake.intake(JitLauncher(), *args, **more)
            intake.copy_masks(JitLauncher(), *masks, token_mask=self.token_mask)
        else:
            intake.intake_ref(*args, **more)
            intake.copy_masks_ref(*masks, token_mask=self.token_mask)

    def advance(self, kernel: bool) -> None:
        args = (self.lists["tok_row"], self.lists["tok_pos"], self.page_table)
        more = dict(page_size=PAGE, kv_slot=self.kv_slot, kv_len=self.kv_len, fault=self.fault)
        if kernel:
            intake.advance(JitLauncher(), *args, **more)
        else:
            intake.advance_ref(*args, **more)

    def settle(self, kernel: bool) -> None:
        entries = (self.lists["sample_row"], self.lists["sample_pos"])
        answers = (*entries, self.row_params, self.step, self.top_ids, self.top_logprobs)
        answers = (*answers, self.logits)
        to = dict(ring_top=self.ring_top, ring_logits=self.ring_logits)
        args = (*entries, self.out_token, self.out_logprob, self.step, self.rows)
        args = (*args, self.fault, self.begin_ns)
        more = dict(ring=self.ring, ring_step=self.ring_step, on_device=False)
        if kernel:
            settle.answer(JitLauncher(), *answers, **to)
            settle.settle(JitLauncher(), *args, **more)
        else:
            settle.answer_ref(*answers, **to)
            settle.settle_ref(*args, **more)

    def read(self, step: int) -> RingEntry:
        ring = Ring(
            self.ring.numpy(),
            self.ring_step.numpy(),
            header=HEADER,
            max_rows=ROWS,
            top=self.ring_top.numpy(),
            logits=self.ring_logits.numpy(),
        )
        assert ring.ready(step)
        assert not ring.ready(step + 1)
        return ring.read(step)

    def dump(self) -> dict[str, torch.Tensor]:
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return {k: v.clone() for k, v in (tensors | self.lists).items()}


def request(prompt: int = 2, stops: tuple[int, ...] = (), **params: Any) -> Admission:
    """A request of so many prompt tokens, as the mailbox takes it."""
    chosen = SamplingParams(**({"seed": 7} | params))
    return admission(chosen, np.arange(prompt, dtype=np.int32), stops, chosen.seed or 0)


@pytest.fixture(params=[True, False], ids=["kernel", "ref"])
def kernel(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def _two_rows(device: Device, kernel: bool) -> None:
    """Row 1 decodes at length 5, row 3 starts a prompt of 6 in chunks of 4 and 2."""
    device.phase[1], device.seq_len[1], device.last_token[1], device.limit[1] = 2, 5, 77, 7
    device.page_table[1, :2] = torch.tensor([4, 5])
    device.write(
        admits=[(3, request(6, (11, 12), max_tokens=3))],
        pages=np.array([[3, 0, 2]], np.int32),
        chunks=[Chunk(3, 0, np.array([20, 21, 22, 23], np.int32), False)],
    )
    device.intake(kernel)
    device.advance(kernel)


def test_tokens_are_decoding_rows_then_chunks_then_padding(kernel: bool) -> None:
    device = Device(8, 3)
    _two_rows(device, kernel)
    assert device.lists["tok_row"].tolist() == [1, 3, 3, 3, 3, -1, -1, -1]
    assert device.lists["tok_pos"].tolist() == [5, 0, 1, 2, 3, 0, 0, 0]
    assert device.lists["tok_id"].tolist() == [77, 20, 21, 22, 23, -1, -1, -1]
    assert device.lists["sample_row"].tolist() == [1, -1, -1]
    assert device.kv_slot.tolist() == [5 * PAGE + 1, 8, 9, 10, 11, 0, 0, 0]
    assert device.kv_len.tolist() == [6, 1, 2, 3, 4, 0, 0, 0]
    assert device.seq_len.tolist() == [0, 6, 0, 4, 0]
    assert device.stop_ids[3].tolist() == [11, 12, -1]
    assert int(device.fault) == 0


def test_a_chunk_that_ends_the_prompt_samples_and_starts_decoding(kernel: bool) -> None:
    device = Device(8, 3)
    _two_rows(device, kernel)
    device.out_token[0] = 99
    device.settle(kernel)
    device.write(
        pages=np.array([[3, 1, 3]], np.int32),
        chunks=[Chunk(3, 4, np.array([24, 25], np.int32), True)],
    )
    device.intake(kernel)
    device.advance(kernel)
    # Row 1 took its last token at total length 7 and is padding now.
    assert device.lists["tok_row"].tolist()[:3] == [3, 3, -1]
    assert device.lists["sample_tok"].tolist() == [1, -1, -1]
    assert device.lists["sample_row"].tolist() == [3, -1, -1]
    assert device.kv_slot.tolist()[:2] == [12, 13]
    device.out_token[0] = 50
    device.settle(kernel)
    assert device.phase.tolist() == [0, 0, 0, 2, 0]
    assert int(device.last_token[3]) == 50


@pytest.mark.parametrize(
    ("token", "limit", "reason"), [(50, 9, 0), (12, 9, 1), (12, 7, 1), (50, 7, 2), (-1, 9, 4)]
)
def test_endings(kernel: bool, token: int, limit: int, reason: int) -> None:
    device = Device(4, 2)
    device.phase[2], device.seq_len[2], device.limit[2] = 2, 5, limit
    device.stop_ids[2, :2] = torch.tensor([11, 12])
    device.page_table[2, :2] = 1
    device.intake(kernel)
    device.out_token[0], device.out_logprob[0] = token, -0.5
    device.settle(kernel)
    entry = device.read(0)
    assert (entry.rows.tolist(), entry.tokens.tolist()) == ([2], [token])
    assert (entry.reasons.tolist(), entry.logprobs.tolist()) == ([reason], [-0.5])
    assert int(device.phase[2]) == (2 if reason == 0 else 0)
    assert int(device.step) == 1


def test_stale_mailbox_is_not_applied_again(kernel: bool) -> None:
    device = Device(8, 3)
    _two_rows(device, kernel)
    device.step += 2  # the same slot, two steps later
    before = device.phase.clone(), device.seq_len.clone()
    device.intake(kernel)
    assert device.lists["tok_row"].tolist() == [1, -1, -1, -1, -1, -1, -1, -1]
    assert torch.equal(device.phase, before[0])
    assert device.seq_len.tolist() == [0, 7, 0, 4, 0]


def test_cancel_comes_before_admit_of_the_same_row(kernel: bool) -> None:
    device = Device(8, 3)
    device.phase[1], device.seq_len[1] = 2, 5
    device.write(cancels=[1], admits=[(1, request())])
    device.intake(kernel)
    assert device.phase.tolist() == [0, 1, 0, 0, 0]
    assert int(device.seq_len[1]) == 0
    assert device.lists["tok_row"].tolist() == [-1] * 8


def test_more_rows_than_the_key_is_a_fault(kernel: bool) -> None:
    device = Device(4, 2)
    device.phase[:3] = 2
    device.page_table[:] = 1
    device.intake(kernel)
    assert int(device.fault) == state.FAULT_TOO_MANY
    assert device.lists["sample_row"].tolist() == [0, 1]


def test_a_live_token_without_a_page_is_a_fault(kernel: bool) -> None:
    device = Device(4, 2)
    device.phase[0] = 2
    device.intake(kernel)
    device.advance(kernel)
    assert int(device.fault) == state.FAULT_NULL_PAGE
    assert device.kv_len.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(12))
def test_kernel_equals_ref_on_random_states(seed: int) -> None:
    print("seed", seed)
    devices = [Device(12, 5), Device(12, 5)]
    for device, kernel in zip(devices, (True, False), strict=True):
        rng = np.random.default_rng(seed)
        for _ in range(4):
            device.phase.copy_(torch.from_numpy(rng.integers(0, 3, ROWS, dtype=np.int32)))
            device.page_table.copy_(
                torch.from_numpy(rng.integers(1, 9, (ROWS, PAGES), dtype=np.int32))
            )
            device.seq_len.copy_(torch.from_numpy(rng.integers(1, 12, ROWS, dtype=np.int32)))
            device.limit.copy_(torch.from_numpy(rng.integers(4, 14, ROWS, dtype=np.int32)))
            size = int(rng.integers(1, 9))
            row = int(rng.integers(0, ROWS - 1))
            masks = rng.integers(-9, 9, mask_words(VOCAB), dtype=np.int32)
            device.write(
                cancels=rng.integers(0, ROWS, int(rng.integers(0, 3))).tolist(),
                admits=[(row, random_request(rng))],
                masks={row: masks, 4: None} if size % 3 else {},
                chunks=[
                    Chunk(
                        row,
                        int(rng.integers(0, 6)),
                        rng.integers(0, 5, size, dtype=np.int32),
                        bool(size % 2),
                        scored=bool(rng.integers(0, 2)),
                    )
                ],
            )
            device.intake(kernel)
            device.advance(kernel)
            device.out_token.copy_(torch.from_numpy(rng.integers(-1, 5, 5, dtype=np.int32)))
            device.settle(kernel)
    dumps = [device.dump() for device in devices]
    for dump in dumps:  # the kernel has no clock in the interpreter
        dump["begin_ns"].zero_()
        dump["ring"][:, 2:6] = 0
    for name, tensor in dumps[0].items():
        assert torch.equal(tensor, dumps[1][name]), name


def random_request(rng: np.random.Generator) -> Admission:
    """With stop sequences that random tokens below 5 complete often."""
    sequences = [rng.integers(0, 5, rng.integers(1, 3)).tolist() for _ in range(rng.integers(0, 4))]
    return request(
        prompt=int(rng.integers(1, 8)),
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
