"""The host's side of a step alone: the ring as it is read, and the benchmark of the driver."""

from __future__ import annotations

import cProfile
import json
import select
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from subprocess import PIPE

import numpy as np
import pytest

from bench import host_time
from graphs.keys import GraphKey
from kernels.triton.state import (
    HEADER,
    LAUNCHED,
    MAX_TOP,
    RING_FIELDS,
    RING_SLOTS,
    RingLayout,
)
from runtime import Runtime, SamplingParams, StepOutput
from runtime.cli import run
from runtime.history import MOST_ASIDE, History
from runtime.mailbox import Ring
from runtime.row_params import step_output
from runtime.scheduler import SchedulerConfig
from runtime.stepping import REHEARSE_SPINS
from tests.cpu.terminal import ROOT
from tests.fake_device import FakeConfig, FakeDevice

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


def test_the_number_of_entries_may_change_from_step_to_step() -> None:
    words, _, ring = _ring()
    for step, n in enumerate((2, 5, 0, 3)):
        body = words[step][HEADER : HEADER + RING_FIELDS * ROWS].reshape(RING_FIELDS, ROWS)
        words[step][0], body[1] = n, np.arange(ROWS) + 10 * step
        body[3, n:] = 2  # of an earlier step
        entry = ring.read(step)
        assert entry.tokens.tolist() == [10 * step + i for i in range(n)]
        assert entry.is_plain
        assert entry.top_ids.shape == (n, 0)


@pytest.mark.parametrize("field", [3, 5])  # somebody ended; somebody asked for something
def test_a_step_is_plain_only_if_every_entry_is(field: int) -> None:
    words, _, ring = _ring()
    words[0][0] = ROWS
    assert ring.read(0).is_plain
    words[0][HEADER + field * ROWS + ROWS - 1] = 1
    assert not ring.read(0).is_plain


# ------------------------------------------------------------------ steps of the same rows


def _steady_history() -> tuple[History, bytes, np.ndarray]:
    """Rows 3 and 1 have had two tokens, after none and four."""
    past, rows = History(4, 16), np.array([3, 1])
    past.have[1] = 4
    key = rows.astype(np.int32).tobytes()
    for step in range(2):
        assert past.steady_rows is None
        past.append(rows, np.array([30 + step, 10 + step], np.int32))
        past.watch(key, rows, np.array([7, 8]))
    assert past.steady_rows == key
    return past, key, rows


def test_tokens_of_steady_rows_follow_those_before() -> None:
    past, _, rows = _steady_history()
    assert past.steady_requests.tolist() == [7, 8]
    past.append_again(np.array([32, 12], np.int32))
    past.append_again(np.array([33, 13], np.int32))
    assert past.have.tolist() == [0, 8, 0, 4]
    past.append(rows, np.array([34, 14], np.int32))
    assert past.have.tolist() == [0, 9, 0, 5]
    assert past.tokens[3, :5].tolist() == [30, 31, 32, 33, 34]
    assert past.tokens[1, 4:9].tolist() == [10, 11, 12, 13, 14]
    assert np.count_nonzero(past.tokens) == 10


def test_rows_that_change_hands_are_looked_up_until_two_steps_agree_again() -> None:
    past, key, rows = _steady_history()
    past.append_again(np.array([32, 12], np.int32))
    past.end()
    assert past.steady_rows is None
    past.have[3] = 0  # given to somebody else
    for step in range(2):
        past.append(rows, np.array([40 + step, 13 + step], np.int32))
        past.watch(key, rows, np.array([9, 8]))
    past.append_again(np.array([42, 15], np.int32))
    assert past.steady_requests.tolist() == [9, 8]
    assert past.tokens[3, :3].tolist() == [40, 41, 42]
    assert past.tokens[1, 4:10].tolist() == [10, 11, 12, 13, 14, 15]
    assert past.have.tolist() == [0, 10, 0, 3]


def _decoding(rows: int) -> Runtime:
    """Rows that have decoded for a while, two steps in flight."""
    device = FakeDevice(FakeConfig(max_rows=rows), f"1,2,{rows},{rows}+16")
    runtime = Runtime(device)  # type: ignore[arg-type]
    for row in range(rows):
        runtime.add([row + 1], SamplingParams(max_tokens=60, ignore_eos=True))
    for _ in range(5):
        runtime.step()
    runtime.launch()
    runtime.launch()
    return runtime


def _others_after(change: Callable[[Runtime], object]) -> list[StepOutput]:
    runtime = _decoding(4)
    assert runtime._scheduler.past.steady_rows is not None, "nothing is tested"
    change(runtime)
    return [runtime.collect(), runtime.collect(), runtime.step(), runtime.step(), runtime.step()]


def test_a_row_that_changes_hands_among_steady_ones_gives_nobodys_token_away() -> None:
    def change(runtime: Runtime) -> None:
        runtime.cancel(2)
        assert runtime.add([50], SamplingParams(max_tokens=60, ignore_eos=True)) == 2

    kept = _others_after(lambda _: None)
    outs = _others_after(change)
    for old, out in zip(kept, outs, strict=True):
        others = out.requests < 4
        assert out.requests[others].tolist() == [0, 1, 3]
        assert out.tokens[others].tolist() == old.tokens[[0, 1, 3]].tolist()
        assert set(out.requests.tolist()) <= {0, 1, 3, 4}
    assert [4 in out.requests for out in outs] == [False, False, True, True, True]


def test_a_row_that_starts_again_among_steady_ones_gives_its_tokens_once() -> None:
    def change(runtime: Runtime) -> None:
        scheduler = runtime._scheduler
        scheduler.reserve_restart()
        request = scheduler.rows[2]
        assert request is not None
        scheduler.restart(request)

    kept = _others_after(lambda _: None)
    outs = _others_after(change)
    assert [out.requests.tolist() for out in outs[:3]] == [[0, 1, 3], [0, 1, 3], [0, 1, 3, 2]]
    # Its tokens in flight were dropped, so it is two behind from then on.
    assert outs[2].tokens[3] == kept[0].tokens[2]
    assert [out.tokens[out.requests == 2].item() for out in outs[3:]] == [
        out.tokens[2] for out in kept[1:3]
    ]


def test_other_rows_in_between_end_steadiness() -> None:
    past, key, rows = _steady_history()
    past.append(rows[:1], np.array([32], np.int32))
    assert past.steady_rows is None
    for step in range(2):
        past.append(rows, np.array([33 + step, 12 + step], np.int32))
        past.watch(key, rows, np.array([7, 8]))
    past.append_again(np.array([35, 14], np.int32))
    assert past.tokens[3, :6].tolist() == list(range(30, 36))
    assert past.tokens[1, 4:9].tolist() == list(range(10, 15))


def test_outputs_of_steady_steps_are_the_users_to_keep_and_to_change() -> None:
    runtime = _decoding(4)
    first = runtime.collect()
    kept = [getattr(first, name).copy() for name in ("rows", "requests", "tokens", "logprobs")]
    second = runtime.collect()
    for name in ("rows", "requests", "tokens", "logprobs"):
        getattr(second, name)[:] = 77
    second.finished[:], second.finish_reasons[:] = True, "stop"
    third = runtime.step()
    for name, old in zip(("rows", "requests", "tokens", "logprobs"), kept, strict=True):
        assert getattr(first, name).tolist() == old.tolist()
    assert third.rows.tolist() == third.requests.tolist() == [0, 1, 2, 3]
    assert not third.finished.any()
    assert set(third.finish_reasons.tolist()) == {""}
    # What the user did is not what the rows were given.
    have = runtime._scheduler.have
    given = runtime._scheduler.history[0, have[0] - 3 : have[0]]
    assert (given[0], given[2]) == (first.tokens[0], third.tokens[0])
    assert given[1] != 77


def test_what_steady_steps_bring_is_put_in_its_place_however_many_there_are() -> None:
    past, _, _ = _steady_history()
    roomy = History(4, 2 * MOST_ASIDE + 8)
    key = np.array([3, 1], np.int32).tobytes()
    for step in range(2):
        roomy.append(np.array([3, 1]), np.array([step, 100 + step], np.int32))
        roomy.watch(key, np.array([3, 1]), np.array([7, 8]))
    for step in range(2, 2 + MOST_ASIDE + 3):
        roomy.append_again(np.array([step, 100 + step], np.int32))
    assert roomy.have.tolist() == [0, MOST_ASIDE + 5, 0, MOST_ASIDE + 5]
    assert roomy.tokens[3, : MOST_ASIDE + 5].tolist() == list(range(MOST_ASIDE + 5))
    assert roomy.tokens[1, : MOST_ASIDE + 5].tolist() == list(range(100, MOST_ASIDE + 105))
    mine = np.array([32, 12], np.int32)
    past.append_again(mine)
    mine[:] = 77  # the user's copy is the user's
    assert past.tokens[3, 2] == 32


def test_steady_steps_may_have_no_entry() -> None:
    past, none = History(4, 16), np.zeros(0, np.int32)
    for _ in range(2):
        past.append(none.astype(np.intp), none)
        past.watch(b"", none.astype(np.intp), none.astype(np.int64))
    past.append_again(none)
    past.append_again(none)
    assert past.have.tolist() == [0, 0, 0, 0]


# ------------------------------------------------------------------ what a wait is used for


def _slow(runtime: Runtime, polls: int) -> None:
    """A step is seen after so many polls only, though the device has ended it at once."""
    ready, asked = runtime._ring.ready, 0

    def late(step: int) -> bool:
        nonlocal asked
        asked += 1
        if asked <= polls:
            return False
        asked = 0
        return ready(step)

    runtime._ring.ready = late  # type: ignore[method-assign]


def _served(polls: int) -> tuple[list[tuple[object, ...]], list[object]]:
    """Rows that come, decode, open pages, end and are cancelled, two steps in flight."""
    device = FakeDevice(FakeConfig(num_pages=24), "1,2,4,8,8+16")
    runtime = Runtime(device, SchedulerConfig("lazy"))  # type: ignore[arg-type]
    _slow(runtime, polls)
    for i in range(14):
        params = SamplingParams(max_tokens=4 + 5 * (i % 7), ignore_eos=True)
        runtime.submit([i + 1] * (3 + 11 * (i % 3)), params, i % 2)
    outs = []
    runtime.launch()
    while runtime.num_running:
        runtime.launch()
        out = runtime.collect()
        outs.append((out.requests.tolist(), out.tokens.tolist(), out.finish_reasons.tolist()))
        if out.step == 20:
            runtime.cancel_request(12)
    runtime.collect()
    stats = vars(runtime.stats()) | {"host_us_per_step": 0}
    history = runtime._scheduler.history.tolist()
    return outs, [stats, history, runtime._scheduler.have.tolist()]


def test_a_wait_changes_nothing_whatever_is_done_in_it() -> None:
    at_once, late = _served(0), _served(2 * REHEARSE_SPINS + 3)
    assert late == at_once
    assert len(at_once[0]) > 30


def test_what_was_laid_aside_is_written_up_while_the_host_waits() -> None:
    runtime = _decoding(4)
    past = runtime._scheduler.past
    runtime.collect()
    assert past._aside
    _slow(runtime, REHEARSE_SPINS + 1)
    runtime.wait()
    assert not past._aside


def test_a_wait_does_with_the_last_step_what_the_awaited_one_will_need() -> None:
    runtime = _decoding(4)
    looked: list[int] = []
    look = runtime._look
    runtime._look = lambda step: looked.append(step) or look(step)  # type: ignore
    runtime.collect()
    runtime.launch()
    _slow(runtime, REHEARSE_SPINS + 1)
    runtime.wait()
    awaited = runtime._in_flight[0]
    assert looked == [awaited - 1, awaited - 1]  # the collect above, and its rehearsal
    runtime.cancel(1)  # from now on nobody knows whose the entries are
    runtime.wait()
    assert looked == [awaited - 1, awaited - 1]


def test_a_wait_lets_nobody_in_who_could_still_be_passed() -> None:
    runtime = _decoding(4)
    runtime.cancel(2)  # one row for two
    _slow(runtime, REHEARSE_SPINS + 1)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    later = runtime.submit([5], params)
    runtime.wait()
    first = runtime.submit([6], params, priority=1)
    runtime.collect()
    runtime.launch()
    served = [request.id for request in runtime._scheduler.running()]
    assert first in served
    assert later not in served


def test_a_step_hears_of_its_successor_only_once_that_is_launched() -> None:
    device = FakeDevice(FakeConfig(max_rows=2), "1,2,2+16")
    runtime = Runtime(device)  # type: ignore[arg-type]
    assert device.mailbox[-1, LAUNCHED] == -1
    runtime.add([1, 2], SamplingParams(max_tokens=9, ignore_eos=True))
    replay, known = device.replay, []

    def watched(key: GraphKey) -> None:
        known.append(int(device.mailbox[-1, LAUNCHED]))
        replay(key)

    device.replay = watched  # type: ignore[method-assign]
    runtime.launch()
    for _ in range(2):
        runtime.launch()
        runtime.collect()
    assert known == [-1, 1, 2]
    assert device.mailbox[-1, LAUNCHED] == 3

    def broken(_: GraphKey) -> None:
        raise RuntimeError("no launch")

    device.replay = broken  # type: ignore[method-assign]
    runtime.collect()
    with pytest.raises(RuntimeError, match="no launch"):
        runtime.launch()
    assert device.mailbox[-1, LAUNCHED] == 3


# ------------------------------------------------------------------ what a step takes


def test_a_step_takes_as_few_calls_for_many_decoding_rows_as_for_few() -> None:
    """Counted, of Python and of numpy, for times differ from machine to machine."""
    calls = [sum(n for _, n, _ in host_time.profiled(rows, 64, most=None)) for rows in (2, 32, 256)]
    # Python's own collector calls now and then; a cost by the row would be hundreds of calls.
    assert max(calls) - min(calls) < 1, f"{calls} calls a step at 2, 32 and 256 rows"
    assert calls[0] < 56, f"{calls[0]} calls a step"


def _calls(run: Callable[[], object]) -> int:
    """Calls of Python and numpy functions while it runs."""
    profile = cProfile.Profile()
    profile.enable()
    run()
    profile.disable()
    return sum(entry.callcount for entry in profile.getstats())


@pytest.mark.parametrize("reservation", ["full", "lazy"])
def test_a_step_takes_as_few_calls_after_thousands_of_requests_as_after_some(
    reservation: str,
) -> None:
    """Queue, prompts, decoding, pages taken from the prefix cache: the same batch, ever later."""
    device = FakeDevice(FakeConfig(num_pages=40), "1,2,4,8,8+16")
    runtime = Runtime(device, SchedulerConfig(reservation))  # type: ignore[arg-type]
    rng = np.random.default_rng(1)

    def batch() -> None:
        for i in range(40):  # other tokens each time, so that no page is found
            ids = rng.integers(0, 97, 5 + 7 * (i % 9)).tolist()
            params = SamplingParams(max_tokens=1 + 5 * (i % 6), ignore_eos=True)
            runtime.submit(ids, params, i % 3)
        while runtime.num_running:
            runtime.step()

    def calls_a_step() -> float:
        before = runtime.stats().steps
        return _calls(batch) / (runtime.stats().steps - before)

    batch()  # fills the prefix cache
    early = calls_a_step()
    for _ in range(60):
        batch()
    late = calls_a_step()
    assert runtime.stats().prefix_evictions > 1000
    assert late < 1.02 * early, f"{early:.1f} calls a step at first, {late:.1f} after 2400 requests"


def test_alternatives_of_many_rows_take_as_few_calls_as_of_few() -> None:
    """A step in which every row asked for log-probs, from the ring to the user."""
    counts = []
    for rows in (2, 32, 256):
        words = np.zeros((RING_SLOTS, RingLayout(rows).words), np.int32)
        top = np.zeros((RING_SLOTS, rows, 2, MAX_TOP), np.int32)
        logits = np.zeros((2, 1, 8), np.float32)
        steps = np.zeros(RING_SLOTS, np.int64)
        ring = Ring(words, steps, header=HEADER, max_rows=rows, top=top, logits=logits)
        words[0][0] = rows
        words[0][HEADER : HEADER + RING_FIELDS * rows].reshape(RING_FIELDS, rows)[5] = MAX_TOP
        ours, requests = np.ones(rows, bool), np.arange(rows)
        ring.read(0)
        counts.append(_calls(partial(_show_step, ring, ours, requests)))
    assert counts[0] == counts[1] == counts[2], f"{counts} calls a step at 2, 32 and 256 rows"


def _show_step(ring: Ring, ours: np.ndarray, requests: np.ndarray) -> None:
    out = step_output(0, ring.read(0), ours, requests)
    assert out.top is not None
    assert out.top.ids.shape == (len(ours), MAX_TOP)


def test_the_benchmark_reports_each_number_of_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(host_time.main, ["--rows", "2,5", "--steps", "80", "--wait-ms", "0.5", "--json"])
    assert end.value.code == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [r["rows"] for r in report["rows"]] == [2, 5]
    for r in report["rows"]:
        assert 0 < r["launch_us"] < r["step_us"]
        assert r["changed_us"] > 0
        assert r["waited_us"] > 0
        assert any(name == "stepping._launch" and calls == 1 for name, calls, _ in r["functions"])


def test_the_slow_device_ends_with_the_benchmark_even_if_that_is_killed() -> None:
    program = "import time; from bench.host_time import SlowDevice\n"
    program += "with SlowDevice(1, 64).running(1e-3): print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=PIPE) as bench:
        assert bench.stdout is not None
        assert bench.stdout.readline() == b"up\n"
        bench.kill()
        # The other process has the pipe, too: it ends when both have.
        assert select.select([bench.stdout], [], [], 10)[0], "it goes on alone"
        assert bench.stdout.read() == b""


@pytest.mark.parametrize(
    "bad", [["--rows", "0"], ["--rows", "two"], ["--steps", "3"], ["--wait-ms", "-1"]]
)
def test_the_benchmark_refuses_what_it_cannot_time(bad: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(host_time.main, bad)
    assert end.value.code == 2
