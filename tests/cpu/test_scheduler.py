"""Who runs when: order, ageing, fair prompts, admission by pages, preemption, pause and drain.

On the device that computes nothing; `test_prefix_cache` and `test_soak` use the CPU twin too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from barriers.errors import RankError
from runtime import OutOfPages, OutOfRows, Runtime, SamplingParams, StepFailed, StepOutput
from runtime.requests import MAX_PRIORITY
from runtime.scheduler import SchedulerConfig
from tests.fake_device import FakeConfig, FakeDevice, FakeModel, answer

SIZE = FakeConfig.page_size


def make(ladder: str = "1,2,4,8,8+16", *, rows: int = 8, pages: int = 65, **config: Any) -> Runtime:
    device = FakeDevice(FakeConfig(max_rows=rows, num_pages=pages), ladder)
    return Runtime(device, SchedulerConfig(**config))  # type: ignore[arg-type]


def params(most: int) -> SamplingParams:
    return SamplingParams(max_tokens=most, ignore_eos=True)


def prompt(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, FakeModel.vocab_size, n).tolist()


def run(runtime: Runtime, steps: int = 1000) -> dict[int, list[int]]:
    """Step until nothing runs; tokens by request, and the order in which they began."""
    tokens: defaultdict[int, list[int]] = defaultdict(list)
    for _ in range(steps):
        if not runtime.num_running:
            return dict(tokens)
        take(runtime.step(), tokens)
    raise AssertionError(f"{runtime.num_running} requests never end")


def take(out: StepOutput, tokens: defaultdict[int, list[int]]) -> None:
    for request, token in zip(out.requests.tolist(), out.tokens.tolist(), strict=True):
        tokens[request].append(token)


def right(ids: list[int], most: int) -> list[int]:
    return answer(ids, most, FakeModel.vocab_size)[0]


# ------------------------------------------------------------------ the queue


def test_submit_never_raises_for_lack_of_room() -> None:
    runtime = make(rows=8, pages=9)
    wanted = {}
    for i in range(40):
        ids = prompt(20, i)
        wanted[runtime.submit(ids, params(6))] = right(ids, 6)
    assert (runtime.num_waiting, runtime.num_running) == (40, 40)
    assert run(runtime) == wanted
    assert list(wanted) == list(range(40)), "ids count up"


@pytest.mark.parametrize(
    ("ids", "most", "priority", "message"),
    [
        ([], 4, 0, "a prompt is a non-empty list"),
        ([1] * 90, 7, 0, "exceeds max_seq_len 96"),
        ([1] * 90, 4, 0, "needs 6 pages of 16 tokens and the cache has 5"),
        ([1], 4, MAX_PRIORITY + 1, r"priority must be a whole number in \[-1000, 1000\]"),
        ([1], 4, 0.5, "priority must be a whole number"),
        ([1], 4, True, "priority must be a whole number"),
    ],
)
def test_what_can_never_run_is_refused_at_submit(
    ids: list[int], most: int, priority: Any, message: str
) -> None:
    runtime = make(pages=6)
    with pytest.raises(ValueError, match=message):
        runtime.submit(ids, params(most), priority)
    assert runtime.num_running == 0
    assert runtime.stats().submitted == 0


def test_higher_priority_first_then_in_order_of_arrival() -> None:
    runtime = make("1,1+16", rows=1)
    for priority in (0, 0, 2, 1, 2):
        runtime.submit(prompt(4), params(2), priority)
    assert list(run(runtime)) == [2, 4, 3, 0, 1]


@pytest.mark.parametrize(("ageing", "passed"), [(8, 16), (1000, 200)])
def test_a_priority_level_is_worth_so_many_steps_and_nobody_starves(
    ageing: int, passed: int
) -> None:
    """A stream of requests two levels up passes one request for two levels' worth of steps."""
    runtime = make("1,1+16", rows=1, ageing_steps=ageing)
    low = runtime.submit(prompt(4), params(1), 0)
    for step in range(200):
        runtime.submit(prompt(4), params(1), 2)
        if low in runtime.step().requests.tolist():
            assert step == passed
            return
    assert passed == 200, "starved"


@pytest.mark.parametrize(("priority", "passed"), [(0, 8), (1, 0), (-1, 16)])
def test_a_stream_of_add_passes_the_queue_for_one_level_of_priority(
    priority: int, passed: int
) -> None:
    """`add` asks for every free row at once, and yet who waits in the queue gets one."""
    runtime = make("1,1+16", rows=1, ageing_steps=8)
    runtime.add(prompt(4), params(1))
    waits = runtime.submit(prompt(4), params(1), priority)
    for step in range(60):
        out = runtime.step()
        if waits in out.requests.tolist():
            assert step <= passed + 2
            return
        if step + 1 < passed:
            runtime.add(prompt(4), params(1))
        else:
            with pytest.raises(OutOfRows, match=rf"request {waits} has waited {step + 1} steps"):
                runtime.add(prompt(4), params(1))
    raise AssertionError("starved")


def test_a_large_request_that_is_due_keeps_its_pages_from_add() -> None:
    runtime = make(pages=7, ageing_steps=4)
    runtime.submit(prompt(20), params(20))  # three of six pages
    large = runtime.submit(prompt(60, 1), params(20))  # five
    runtime.add(prompt(2, 2), params(2))  # one: it has not waited long
    for _ in range(5):
        runtime.step()
    with pytest.raises(OutOfPages, match=f"free pages are due: request {large} has waited 5 steps"):
        runtime.add(prompt(2, 2), params(2))
    assert (runtime.num_running, runtime.num_waiting) == (2, 1), "nothing changed"
    run(runtime)


def test_add_takes_what_is_left_beside_one_that_is_due() -> None:
    """The first waits for a line of logits; an `add` that leaves it one row is no harm to it."""
    runtime = make(ageing_steps=4)
    wants = replace(params(40), return_logits=True)
    for _ in range(runtime.config.logits_rows):
        runtime.add(prompt(4), wants)
    first = runtime.submit(prompt(4), wants)
    for _ in range(6):
        runtime.step()
    with pytest.raises(OutOfRows, match="2 requests return their logits"):
        runtime.add(prompt(4), wants)
    for _ in range(5):
        runtime.add(prompt(4), params(4))
    with pytest.raises(OutOfRows, match=f"the free row is due: request {first}"):
        runtime.add(prompt(4), params(4))
    run(runtime)


def test_nobody_passes_a_large_request_that_waits_for_pages() -> None:
    runtime = make(pages=7)
    runtime.submit(prompt(20), params(20))  # three of six pages
    large = runtime.submit(prompt(60, 1), params(20))  # five
    small = runtime.submit(prompt(2, 2), params(20))  # two
    order = list(run(runtime))
    assert order.index(large) < order.index(small)


def test_ids_name_requests_for_ever() -> None:
    runtime = make(rows=1, ladder="1,1+16")
    first, second = (runtime.submit(prompt(3, i), params(3)) for i in range(2))
    while runtime.num_running == 2:
        runtime.step()
    row = 0
    assert runtime.step().requests.tolist() == [second]
    assert runtime.request_id(row) == second
    runtime.cancel_request(first)  # ended long ago; its row has a new owner
    assert runtime.num_running == 1
    runtime.cancel_request(second)
    runtime.cancel_request(second)
    assert runtime.num_running == 0
    with pytest.raises(ValueError, match="row 0 has no request"):
        runtime.request_id(row)
    for never in (-1, 2):
        with pytest.raises(ValueError, match=f"request {never} has never been taken"):
            runtime.cancel_request(never)


def test_cancel_in_the_queue() -> None:
    runtime = make("1,1+16", rows=1)
    ids = [runtime.submit(prompt(4, i), params(2)) for i in range(4)]
    runtime.cancel_request(ids[2])
    runtime.step()
    runtime.cancel_request(ids[1])
    assert list(run(runtime)) == [ids[0], ids[3]] or runtime.stats().finished["cancelled"] == 2
    stats = runtime.stats()
    assert (stats.finished["cancelled"], stats.finished["length"]) == (2, 2)


def test_add_takes_room_past_the_queue() -> None:
    runtime = make(rows=2, ladder="1,2,2+16")
    for _ in range(3):
        runtime.submit(prompt(4), params(9))
    row = runtime.add(prompt(5), params(4))
    assert runtime.request_id(row) == 3
    assert 3 in runtime.step().requests.tolist()
    assert len(run(runtime)) == 4


# ------------------------------------------------------------------ prompts beside decoding


def test_the_first_prompt_gets_half_of_each_step_and_the_shortest_the_rest() -> None:
    runtime = make(rows=8)  # at most 24 tokens a step
    long = runtime.submit(prompt(90), params(2))
    ids = [runtime.submit(prompt(n, n), params(60)) for n in (30, 8, 20)]
    first: dict[int, int] = {}
    for step in range(20):
        for request in runtime.step().requests.tolist():
            first.setdefault(request, step)
    # 90 tokens take eight steps of twelve; shorter prompts get by, the shortest first.
    assert first[ids[1]] < first[ids[2]] < first[ids[0]] < first[long] <= 8


def test_a_long_prompt_goes_on_under_a_stream_of_short_ones() -> None:
    runtime = make(rows=8, prefill_budget=8)
    long = runtime.submit(prompt(80), params(1))
    for step in range(40):
        runtime.submit(prompt(6, step), params(1))
        if long in runtime.step().requests.tolist():
            assert step <= 80 // 4
            return
    raise AssertionError("starved")


@pytest.mark.parametrize("budget", [1, 5, 16])
def test_a_step_takes_no_more_prompt_tokens_than_its_budget(budget: int) -> None:
    runtime = make(prefill_budget=budget)
    wanted = {}
    for n in (40, 7, 33, 1):
        ids = prompt(n, n)
        wanted[runtime.submit(ids, params(5))] = right(ids, 5)
    tokens: defaultdict[int, list[int]] = defaultdict(list)
    before = 0
    while runtime.num_running:
        take(runtime.step(), tokens)
        prefilled = runtime.stats().tokens_prefilled
        assert prefilled - before <= budget
        before = prefilled
    assert dict(tokens) == wanted
    assert before == 81


@pytest.mark.parametrize(
    ("field", "value"), [("prefill_budget", 0), ("ageing_steps", 0), ("reservation", "greedy")]
)
def test_a_configuration_that_makes_no_sense(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        replace(SchedulerConfig(), **{field: value})


# ------------------------------------------------------------------ preemption


def test_the_last_in_order_is_preempted_and_loses_no_token() -> None:
    runtime = make(rows=4, ladder="1,2,4,4+16", pages=9, reservation="lazy")
    wanted = {}
    for i in range(4):
        ids = prompt(14, i)
        wanted[runtime.submit(ids, params(50), 1 if i == 3 else 0)] = right(ids, 50)
    tokens: defaultdict[int, list[int]] = defaultdict(list)
    ended = []
    while runtime.num_running:
        out = runtime.step()
        take(out, tokens)
        ended += out.requests[out.finished].tolist()
    assert dict(tokens) == wanted
    assert runtime.stats().preemptions
    assert ended[0] == 3, "the highest is never preempted"
    assert ended == sorted(ended, key=[3, 0, 1, 2].index), "nor anyone by a later one"


@pytest.mark.parametrize("ahead", [1, 2])
def test_tokens_in_flight_of_a_preempted_row_come_once(ahead: int) -> None:
    runtime = make(rows=2, ladder="1,2,2+16", pages=7, reservation="lazy")
    wanted = {}
    for i in range(2):
        ids = prompt(15 + i, i)
        wanted[runtime.submit(ids, params(70))] = right(ids, 70)
    tokens: defaultdict[int, list[int]] = defaultdict(list)
    while runtime.num_running or runtime.num_in_flight:
        while runtime.num_in_flight < ahead and runtime.num_running:
            runtime.launch()
        take(runtime.collect(), tokens)
    assert runtime.stats().preemptions
    assert dict(tokens) == wanted


def test_rows_of_add_are_never_preempted() -> None:
    runtime = make(rows=4, ladder="1,2,4,4+16", pages=6, reservation="lazy")
    added = [runtime.add(prompt(14, i), params(40)) for i in range(2)]
    runtime.submit(prompt(14, 7), params(40))
    with pytest.raises(OutOfPages, match="nothing was launched: cancel a row"):
        run(runtime)
    assert runtime.num_waiting == 1
    assert runtime.stats().preemptions == 1
    runtime.cancel(added[1])
    assert len(run(runtime)) == 2


# ------------------------------------------------------------------ pause, drain, stats


def test_paused() -> None:
    runtime = make()
    runtime.submit(prompt(3), params(3))
    runtime.launch()
    runtime.pause()
    runtime.pause()
    for call in (runtime.launch, runtime.step, runtime.drain):
        with pytest.raises(RuntimeError, match=r"this runtime is paused; call resume\(\)"):
            call()
    assert len(runtime.collect()) == 1, "what is in flight can be collected"
    runtime.submit(prompt(4), params(3))
    runtime.resume()
    assert len(run(runtime)) == 2


@pytest.mark.parametrize("in_flight", [0, 1, 2])
def test_drain_ends_what_has_begun_and_holds_the_queue(in_flight: int) -> None:
    runtime = make(rows=2, ladder="1,2,2+16", pages=7, reservation="lazy")
    wanted = {}
    for i in range(4):
        ids = prompt(15, i)
        wanted[runtime.submit(ids, params(60), -i)] = right(ids, 60)
    tokens: defaultdict[int, list[int]] = defaultdict(list)
    while not runtime.stats().preemptions:
        take(runtime.step(), tokens)
    for _ in range(in_flight):
        runtime.launch()
    for out in runtime.drain():
        take(out, tokens)
    assert runtime.num_in_flight == 0
    assert set(tokens) == {0, 1}, "the preempted one has begun, the others have not"
    assert runtime.num_waiting == 2
    for request, got in run(runtime).items():
        tokens[request] += got
    assert dict(tokens) == wanted


def test_drain_does_not_wait_for_one_that_has_not_begun() -> None:
    """A preempted request ends although a higher one that has not begun is before it."""
    runtime = make(rows=2, ladder="1,2,2+16", pages=7, reservation="lazy")
    for i in range(2):
        runtime.submit(prompt(15, i), params(60), -i)
    while not runtime.stats().preemptions:
        runtime.step()
    higher = runtime.submit(prompt(15, 3), params(60), 100)
    runtime.drain()
    assert (runtime.num_running, runtime.num_waiting) == (1, 1)
    assert set(run(runtime)) == {higher}


class OneOfTwo(FakeDevice):
    """Rank 0 of two; `peer` says what rank 1 brings to each meeting."""

    peer: Callable[[list[Any]], list[Any]]

    def gather(self, what: str, mine: list[Any], timeout_s: float) -> list[Any]:
        return [mine, self.peer(mine)]


def one_of_two(peer: Callable[[list[Any]], list[Any]]) -> Runtime:
    device = OneOfTwo(FakeConfig(ep_size=2), "1,2,4,8,8+16")
    device.peer = peer
    return Runtime(device)  # type: ignore[arg-type]


def test_a_rank_that_has_drained_steps_on_until_all_have() -> None:
    needs = [16, 7, 0]
    runtime = one_of_two(lambda mine: [mine[0], None, needs.pop(0)])
    runtime.submit(prompt(4), params(3))
    runtime.step()
    outputs = runtime.drain()
    assert len(outputs) == 16 + 7
    assert sum(map(len, outputs)) == 2
    assert not needs


@pytest.mark.parametrize("call", ["pause", "drain"])
def test_ranks_at_different_steps_are_told_so_and_may_go_on(call: str) -> None:
    ahead = [1]
    runtime = one_of_two(lambda mine: [mine[0] + sum(ahead), None, 0])
    message = (
        rf"{call}\(\) is for all ranks at the same step, got rank 0 at step 1, rank 1 at step 2"
    )
    runtime.step()
    with pytest.raises(RankError, match=message):
        getattr(runtime, call)()
    ahead.clear()
    runtime.step()
    getattr(runtime, call)()


def test_what_another_rank_refuses_is_not_done_here() -> None:
    runtime = one_of_two(lambda mine: [mine[0], "OSError: no such file", None])
    with pytest.raises(RankError, match=r"pause\(\) was refused by rank 1.*no such file") as caught:
        runtime.pause()
    assert caught.value.ranks == (1,)
    runtime.step()


class HalfWritten:
    """Weights that were checked, and then cannot be written."""

    shared_digest = ""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def apply(self) -> None:
        if self.errors:
            raise self.errors.pop()


@pytest.mark.parametrize("where", ["here", "on rank 1"])
def test_weights_that_were_half_written_end_every_ranks_runtime(where: str) -> None:
    told = []

    def peer(mine: list[Any]) -> list[Any]:
        told.append(mine[1])
        there = len(told) == 2 and where == "on rank 1"
        return [mine[0], "OSError: cut short" if there else None, ""]

    runtime = one_of_two(peer)
    update = HalfWritten(*([OSError("cut short")] if where == "here" else []))
    runtime.engine.prepare_weights = lambda _: update
    with pytest.raises(RankError, match="writing new weights was refused by .*OSError: cut short"):
        runtime.update_weights([])
    assert told == [None, "OSError: cut short" if where == "here" else None]
    with pytest.raises(StepFailed, match="this runtime has failed, close it; .*cut short"):
        runtime.step()


def test_stats_add_up_and_are_plain_numbers() -> None:
    runtime = make()
    for i in range(3):
        runtime.submit(prompt(20, i), params(4))
    runtime.cancel_request(2)
    run(runtime)
    stats = asdict(runtime.stats())
    assert {r: n for r, n in stats["finished"].items() if n} == {"length": 2, "cancelled": 1}
    assert (stats["tokens_prefilled"], stats["tokens_decoded"]) == (40, 8)
    assert sum(stats["steps_by_key"].values()) == stats["steps"]
    assert stats["host_us_per_step"] > 0
    assert runtime.stats().to_json() == asdict(runtime.stats())


# ------------------------------------------------------------------ the cost of a step


class Instant(FakeDevice):
    """Publishes the same full step at once: what is left is the driver's own time."""

    def replay(self, key: Any) -> None:
        self.ring_step[self.step % len(self.ring_step)] = self.step + 1
        self.step += 1


def test_decoding_looks_at_no_row_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a step is counted, not timed: no mailbox, and no work per row in `launch`."""
    device = Instant(FakeConfig(max_rows=64, num_pages=64 * 6 + 1), "1,64,64+64")
    runtime = Runtime(device)  # type: ignore[arg-type]
    runtime.occupy(64, 10, 50)
    plans = [runtime._scheduler.plan(runtime._next_step)]
    for _ in range(20):
        runtime.launch()
        runtime.collect()
        plans.append(runtime._scheduler.plan(runtime._next_step))
    assert all(plan is plans[0] for plan in plans), "a plan was made anew"
    assert device.mailbox[:, 0].tolist() == [-1, -1]
