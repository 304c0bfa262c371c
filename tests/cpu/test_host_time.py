"""The host's side of a step alone: the ring as it is read, and the benchmark of the driver."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench import host_time
from kernels.triton.state import HEADER, MAX_TOP, RING_FIELDS, RING_SLOTS, RingLayout
from runtime.cli import run
from runtime.mailbox import Ring

ROWS = 5


def _ring() -> tuple[np.ndarray, np.ndarray, Ring]:
    words = np.zeros((RING_SLOTS, RingLayout(ROWS).words), np.int32)
    steps = np.zeros(RING_SLOTS, np.int64)
    top = np.zeros((RING_SLOTS, ROWS, 2, MAX_TOP), np.int32)
    logits = np.zeros((2, 1, 8), np.float32)
    return (
        words,
        steps,
        Ring(words, steps, header=HEADER, max_rows=ROWS, top=top, logits=logits),
    )


def test_the_ring_shows_a_step_as_soon_as_its_number_is_stored() -> None:
    _, steps, ring = _ring()
    step = 2**33 + 1
    assert not ring.ready(step)
    steps[step % RING_SLOTS] = step + 1
    assert ring.ready(step)
    assert not ring.ready(step + RING_SLOTS)


def test_an_entry_is_what_was_written_and_stays_so_when_its_slot_is_reused() -> None:
    words, _, ring = _ring()
    slot = words[6 % RING_SLOTS]
    slot[:2] = 3, 7
    slot[2:6] = np.array([2**40 + 5, 2**41], np.int64).view(np.int32)
    body = slot[HEADER : HEADER + RING_FIELDS * ROWS].reshape(RING_FIELDS, ROWS)
    body[0], body[1], body[3] = np.arange(ROWS), np.arange(ROWS) + 100, np.arange(ROWS) % 2
    body[2] = np.linspace(-1, 0, ROWS, dtype=np.float32).view(np.int32)
    body[4] = np.arange(ROWS) + 40
    entry = ring.read(6)
    words[:] = -1
    assert (entry.fault, entry.begin_ns, entry.end_ns) == (7, 2**40 + 5, 2**41)
    assert entry.rows.tolist() == [0, 1, 2]
    assert entry.tokens.tolist() == [100, 101, 102]
    assert entry.logprobs.dtype == np.float32
    assert entry.logprobs.tolist() == [-1.0, -0.75, -0.5]
    assert entry.reasons.tolist() == [0, 1, 0]
    assert entry.positions.tolist() == [40, 41, 42]


def test_the_benchmark_reports_each_number_of_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(host_time.main, ["--rows", "2,5", "--steps", "80", "--json"])
    assert end.value.code == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [r["rows"] for r in report["rows"]] == [2, 5]
    for r in report["rows"]:
        assert 0 < r["launch_us"] < r["step_us"]
        assert any(name == "stepping.launch" and calls == 1 for name, calls, _ in r["functions"])


@pytest.mark.parametrize("bad", [["--rows", "0"], ["--rows", "two"], ["--steps", "3"]])
def test_the_benchmark_refuses_what_it_cannot_time(bad: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(host_time.main, bad)
    assert end.value.code == 2
