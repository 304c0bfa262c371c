"""Intake, advance and settle: kernels (in the interpreter) against their oracles, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.triton import state
from kernels.triton.launch import JitLauncher
from runtime.mailbox import Chunk
from tests.row_state import PAGE, Device, random_steps, request


def device_of(kernel: bool, tokens: int, samples: int) -> Device:
    return Device(tokens, samples, JitLauncher() if kernel else None)


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
    device.intake()
    device.advance()


def test_tokens_are_decoding_rows_then_chunks_then_padding(kernel: bool) -> None:
    device = device_of(kernel, 8, 3)
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
    device = device_of(kernel, 8, 3)
    _two_rows(device, kernel)
    device.out_token[0] = 99
    device.settle()
    device.write(
        pages=np.array([[3, 1, 3]], np.int32),
        chunks=[Chunk(3, 4, np.array([24, 25], np.int32), True)],
    )
    device.intake()
    device.advance()
    # Row 1 took its last token at total length 7 and is padding now.
    assert device.lists["tok_row"].tolist()[:3] == [3, 3, -1]
    assert device.lists["sample_tok"].tolist() == [1, -1, -1]
    assert device.lists["sample_row"].tolist() == [3, -1, -1]
    assert device.kv_slot.tolist()[:2] == [12, 13]
    device.out_token[0] = 50
    device.settle()
    assert device.phase.tolist() == [0, 0, 0, 2, 0]
    assert int(device.last_token[3]) == 50


@pytest.mark.parametrize(
    ("token", "limit", "reason"), [(50, 9, 0), (12, 9, 1), (12, 7, 1), (50, 7, 2), (-1, 9, 4)]
)
def test_endings(kernel: bool, token: int, limit: int, reason: int) -> None:
    device = device_of(kernel, 4, 2)
    device.phase[2], device.seq_len[2], device.limit[2] = 2, 5, limit
    device.stop_ids[2, :2] = torch.tensor([11, 12])
    device.page_table[2, :2] = 1
    device.intake()
    device.out_token[0], device.out_logprob[0] = token, -0.5
    device.settle()
    entry = device.read(0)
    assert (entry.rows.tolist(), entry.tokens.tolist()) == ([2], [token])
    assert (entry.reasons.tolist(), entry.logprobs.tolist()) == ([reason], [-0.5])
    assert int(device.phase[2]) == (2 if reason == 0 else 0)
    assert int(device.step) == 1


def _decoded(device: Device, launched: int) -> None:
    """A step of row 2, while so many steps are known to have been launched."""
    device.phase[2], device.seq_len[2], device.limit[2] = 2, 5, 20
    device.page_table[2, :2] = 1
    device.host.tell_launched(launched - 1)
    device.intake()
    device.out_token[0], device.out_logprob[0] = 50, -0.5
    device.settle()


@pytest.mark.parametrize("step", [0, 6, 2**31 - 2, 2**32 - 1])
def test_a_step_that_has_a_successor_is_published_by_it(kernel: bool, step: int) -> None:
    device, alone = device_of(kernel, 4, 2), device_of(kernel, 4, 2)
    device.step[0] = alone.step[0] = step
    _decoded(alone, step + 1)
    _decoded(device, step + 2)
    assert int(device.ring_step[step % state.RING_SLOTS]) == 0
    assert not device.ring.any()
    assert int(device.step) == step + 1
    device.intake()
    published, at_once = device.read(step), alone.read(step)
    for name in ("rows", "tokens", "logprobs", "reasons", "positions"):
        assert getattr(published, name).tolist() == getattr(at_once, name).tolist() != []
    # It is published once.
    device.ring[:] = 7
    device.intake()
    assert (device.ring == 7).all()


@pytest.mark.parametrize("launched", [0, 1])
def test_the_last_step_that_was_launched_publishes_itself(kernel: bool, launched: int) -> None:
    device = device_of(kernel, 4, 2)
    _decoded(device, launched)
    assert device.read(0).tokens.tolist() == [50]
    assert int(device.pending[state.IS_PENDING]) == 0
    before = device.ring.clone()
    device.intake()
    assert torch.equal(device.ring, before)


def test_what_was_there_of_earlier_steps_is_not_taken_for_a_successor(kernel: bool) -> None:
    device = device_of(kernel, 4, 2)
    device.step[0] = 9
    assert int(device.mailbox[-1, state.LAUNCHED]) == -1  # nothing was launched through a mailbox
    device.settle()
    assert int(device.ring_step[1]) == 10


def test_stale_mailbox_is_not_applied_again(kernel: bool) -> None:
    device = device_of(kernel, 8, 3)
    _two_rows(device, kernel)
    device.step += 2  # the same slot, two steps later
    before = device.phase.clone(), device.seq_len.clone()
    device.intake()
    assert device.lists["tok_row"].tolist() == [1, -1, -1, -1, -1, -1, -1, -1]
    assert torch.equal(device.phase, before[0])
    assert device.seq_len.tolist() == [0, 7, 0, 4, 0]


def test_cancel_comes_before_admit_of_the_same_row(kernel: bool) -> None:
    device = device_of(kernel, 8, 3)
    device.phase[1], device.seq_len[1] = 2, 5
    device.write(cancels=[1], admits=[(1, request())])
    device.intake()
    assert device.phase.tolist() == [0, 1, 0, 0, 0]
    assert int(device.seq_len[1]) == 0
    assert device.lists["tok_row"].tolist() == [-1] * 8


def test_more_rows_than_the_key_is_a_fault(kernel: bool) -> None:
    device = device_of(kernel, 4, 2)
    device.phase[:3] = 2
    device.page_table[:] = 1
    device.intake()
    assert int(device.fault) == state.FAULT_TOO_MANY
    assert device.lists["sample_row"].tolist() == [0, 1]


def test_a_live_token_without_a_page_is_a_fault(kernel: bool) -> None:
    device = device_of(kernel, 4, 2)
    device.phase[0] = 2
    device.intake()
    device.advance()
    assert int(device.fault) == state.FAULT_NULL_PAGE
    assert device.kv_len.tolist() == [0, 0, 0, 0]


def test_output_fed_again_after_a_preemption_is_the_rows_tail(kernel: bool) -> None:
    """Positions from the prompt's length on are output, whether drawn or fed: stops see them."""
    device = device_of(kernel, 8, 3)
    device.page_table[:] = 1
    resumed = request(3, stop_sequences=[[50, 51, 52], [9, 50]], max_tokens=9)
    device.write(
        admits=[(2, resumed)], chunks=[Chunk(2, 0, np.array([8, 9, 9, 50], np.int32), False)]
    )
    device.intake()
    device.settle()
    device.write(chunks=[Chunk(2, 4, np.array([51], np.int32), True)])
    device.intake()
    assert device.lists["sample_pos"].tolist()[:1] == [5]
    device.out_token[0] = 52
    device.settle()
    entry = device.read(1)
    assert (entry.rows.tolist(), entry.reasons.tolist()) == ([2], [1])


@pytest.mark.parametrize(
    ("now", "until", "reason"), [(1, 0, 0), (99, 100, 0), (100, 100, 5), (101, 100, 5)]
)
def test_a_row_ends_with_the_first_token_past_its_deadline(
    now: int, until: int, reason: int
) -> None:
    device = device_of(True, 4, 2)  # in the interpreter the clock is what the test says
    device.page_table[:] = 1
    device.phase[2], device.seq_len[2], device.limit[2], device.deadline_ns[2] = 2, 5, 9, until
    device.begin_ns[0] = now
    device.intake()
    device.settle()
    assert device.read(0).reasons.tolist() == [reason]


@pytest.mark.parametrize("seed", range(12))
def test_kernel_equals_ref_on_random_states(seed: int) -> None:
    print("seed", seed)
    dumps = []
    for kernel in (True, False):
        device = device_of(kernel, 12, 5)
        random_steps(device, seed)
        dumps.append(device.dump())
    for name, tensor in dumps[0].items():
        assert torch.equal(tensor, dumps[1][name]), name
