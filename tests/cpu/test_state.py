"""Intake, advance and settle: kernels (in the interpreter) against their oracles, and by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from kernels.triton import intake, settle, state
from kernels.triton.launch import JitLauncher
from kernels.triton.state import HEADER, RING_SLOTS, MailboxLayout, RingLayout
from runtime.mailbox import Chunk, Mailbox, Ring

ROWS, PAGES, STOPS, PAGE = 5, 6, 3, 4


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
        self.step = torch.zeros(1, dtype=torch.int64)
        self.phase, self.seq_len, self.last_token, self.limit = (_i32(ROWS) for _ in range(4))
        self.stop_ids, self.page_table = _i32(ROWS, STOPS) - 1, _i32(ROWS, PAGES)
        self.lists = {n: _i32(self.tokens) - 9 for n in ("tok_row", "tok_pos", "tok_id")}
        self.lists |= {n: _i32(self.samples) - 9 for n in ("sample_tok", "sample_row")}
        self.kv_slot, self.kv_len = torch.zeros(self.tokens, dtype=torch.int64), _i32(self.tokens)
        self.out_token, self.out_logprob = _i32(self.samples), torch.zeros(self.samples)
        self.fault, self.begin_ns = _i32(1), torch.zeros(1, dtype=torch.int64)
        self.ring = _i32(RING_SLOTS, RingLayout(ROWS).words)
        self.ring_step = torch.zeros(RING_SLOTS, dtype=torch.int64)
        self.host = Mailbox(self.mailbox.numpy(), self.layout)

    def rows(self) -> tuple[torch.Tensor, ...]:
        return self.phase, self.seq_len, self.last_token, self.limit, self.stop_ids

    def write(self, **changes: object) -> None:
        empty = {"cancels": (), "admits": (), "pages": np.zeros((0, 3), np.int32), "chunks": ()}
        self.host.write(int(self.step), **(empty | changes))  # type: ignore[arg-type]

    def intake(self, kernel: bool) -> None:
        args = (self.mailbox, self.step, *self.rows(), self.page_table)
        outs = dict(**self.lists, fault=self.fault, begin_ns=self.begin_ns)
        more = dict(**outs, layout=self.layout, on_device=False)
        if kernel:
            intake.intake(JitLauncher(), *args, **more)
        else:
            intake.intake_ref(*args, **more)

    def advance(self, kernel: bool) -> None:
        args = (self.lists["tok_row"], self.lists["tok_pos"], self.page_table)
        more = dict(page_size=PAGE, kv_slot=self.kv_slot, kv_len=self.kv_len, fault=self.fault)
        if kernel:
            intake.advance(JitLauncher(), *args, **more)
        else:
            intake.advance_ref(*args, **more)

    def settle(self, kernel: bool) -> None:
        args = (self.lists["sample_row"], self.out_token, self.out_logprob, self.step)
        args = (*args, *self.rows(), self.fault, self.begin_ns)
        more = dict(ring=self.ring, ring_step=self.ring_step, on_device=False)
        if kernel:
            settle.settle(JitLauncher(), *args, **more)
        else:
            settle.settle_ref(*args, **more)

    def dump(self) -> dict[str, torch.Tensor]:
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return {k: v.clone() for k, v in (tensors | self.lists).items()}


@pytest.fixture(params=[True, False], ids=["kernel", "ref"])
def kernel(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def _two_rows(device: Device, kernel: bool) -> None:
    """Row 1 decodes at length 5, row 3 starts a prompt of 6 in chunks of 4 and 2."""
    device.phase[1], device.seq_len[1], device.last_token[1], device.limit[1] = 2, 5, 77, 7
    device.page_table[1, :2] = torch.tensor([4, 5])
    device.write(
        admits=[(3, 9, (11, 12))],
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
    ring = Ring(device.ring.numpy(), device.ring_step.numpy(), header=HEADER, max_rows=ROWS)
    assert ring.ready(0)
    assert not ring.ready(1)
    entry = ring.read(0)
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
    device.write(cancels=[1], admits=[(1, 9, ())])
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
    devices = [Device(12, 4), Device(12, 4)]
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
            row = int(rng.integers(0, ROWS))
            device.write(
                cancels=rng.integers(0, ROWS, int(rng.integers(0, 3))).tolist(),
                admits=[(row, 14, tuple(range(int(rng.integers(0, STOPS + 1)))))],
                chunks=[Chunk(row, 0, rng.integers(0, 99, size, dtype=np.int32), bool(size % 2))],
            )
            device.intake(kernel)
            device.advance(kernel)
            device.out_token.copy_(torch.from_numpy(rng.integers(-1, 5, 4, dtype=np.int32)))
            device.settle(kernel)
    dumps = [device.dump() for device in devices]
    for dump in dumps:  # the kernel has no clock in the interpreter
        dump["begin_ns"].zero_()
        dump["ring"][:, 2:6] = 0
    for name, tensor in dumps[0].items():
        assert torch.equal(tensor, dumps[1][name]), name
