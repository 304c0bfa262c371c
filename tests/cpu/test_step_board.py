"""Late ranks of transports whose waits name nobody: by the steps that hosts have launched."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from barriers.config import GroupConfig
from barriers.deepep import AFTER_LATE
from barriers.errors import BarrierTimeout
from barriers.group import RankGroup
from barriers.spawn import run_ranks
from barriers.step_board import StepBoard

DEADLINE_S = 2.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _boards(world: int) -> tuple[list[StepBoard], Clock]:
    """Every rank's, in one process."""
    name, clock = secrets.token_hex(8), Clock()
    boards: list[Any] = [None] * world

    def run(rank: int) -> None:
        group = RankGroup(GroupConfig(rank, world, name, 10.0))
        boards[rank] = StepBoard(group, deadline_s=DEADLINE_S, operation="allgather", clock=clock)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(boards)
    return boards, clock


def test_who_has_not_launched_the_step_is_named_after_the_deadline() -> None:
    boards, clock = _boards(3)
    for _ in range(7):  # steps 0 to 6
        for board in boards:
            board.launch()
    boards[0].launch()  # step 7
    boards[2].launch()
    clock.now += DEADLINE_S
    boards[0].check(7)  # not yet
    clock.now += 0.1
    with pytest.raises(BarrierTimeout) as caught:
        boards[0].check(7)
    assert caught.value.ranks == (1,)
    assert "rank 0 waited 2.1 s in step 7, allgather: rank 1 is late (rank 1: process" in str(
        caught.value
    )
    boards[1].launch()
    boards[0].check(7)  # it came: whatever holds the step up now, it is nobody's host


def test_where_waits_cannot_be_ended_the_message_says_what_to_do_instead() -> None:
    name = secrets.token_hex(8)
    boards: list[Any] = [None, None]

    def run(rank: int) -> None:
        group = RankGroup(GroupConfig(rank, 2, name, 10.0))
        more = {"deadline_s": 0.0, "operation": "deepep", "first": AFTER_LATE}
        boards[rank] = StepBoard(group, **more)

    together = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join(20)
    boards[0].launch()
    with pytest.raises(BarrierTimeout) as caught:
        boards[0].check(0)
    told = str(caught.value)
    assert "; end this process (os._exit, SIGKILL), for DeepEP's kernels cannot be called" in told
    assert "close this runtime" not in told


def test_a_rank_that_runs_ahead_does_not_make_the_others_late() -> None:
    boards, clock = _boards(2)
    for board in boards:
        board.launch()
    boards[0].launch()
    clock.now += 10 * DEADLINE_S
    boards[0].check(0)  # both launched it
    with pytest.raises(BarrierTimeout):
        boards[0].check(1)


def test_a_step_that_nobody_launched_here_is_not_waited_for() -> None:
    boards, clock = _boards(2)
    clock.now += 10 * DEADLINE_S
    boards[0].check(0)
    boards[0].launch()
    clock.now += 10 * DEADLINE_S
    boards[0].restart()
    boards[0].check(0)


def _killed(config: GroupConfig) -> str:
    """The last rank is killed after it has launched the step."""
    with RankGroup(config) as group:
        clock = Clock()
        board = StepBoard(group, deadline_s=DEADLINE_S, operation="allgather", clock=clock)
        board.launch()
        group.barrier("launched")
        if group.rank == group.world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        clock.now += 2 * DEADLINE_S
        while True:
            board.check(0)


def test_a_rank_that_is_gone_is_named_even_if_it_launched() -> None:
    outcomes = run_ranks(3, _killed, timeout_s=40, linger_s=5)
    for outcome in outcomes[:2]:
        assert isinstance(outcome.error, BarrierTimeout), outcome
        assert outcome.error.ranks == (2,)
        assert "has ended" in str(outcome.error)


# ------------------------------------------------------------------ in an engine


class Board:
    """Counts, and finds rank 1 late in step `late`."""

    def __init__(self, late: int) -> None:
        self.late, self.launched, self.checked = late, 0, list[int]()

    def launch(self) -> None:
        self.launched += 1

    def check(self, step: int) -> None:
        self.checked.append(step)
        if step == self.late:
            raise BarrierTimeout("rank 1 is late", (1,))


def test_an_engine_tells_its_launches_and_gives_the_exchange_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Imported here, for the processes of the test above need none of it.
    from runtime import SamplingParams
    from tests.cpu.twins import load_micro, micro_checkpoint

    micro_checkpoint(tmp_path / "micro", seed=1)
    with load_micro(tmp_path / "micro") as runtime:
        engine, board, given_up = runtime.engine, Board(late=3), list[bool]()
        ranks = SimpleNamespace(
            board=board, check=lambda: None, abandon=lambda: given_up.append(True)
        )
        monkeypatch.setattr(engine, "ranks", cast(Any, ranks))
        monkeypatch.setattr(engine, "replay", engine._replay_told)
        runtime.add([1, 2, 3], SamplingParams(max_tokens=9, ignore_eos=True))
        for step in range(3):
            runtime.step()
            if step < 2:
                engine.check_alive()
        assert (board.launched, board.checked, given_up) == (3, [1, 2], [])
        # The fourth step does not end: nothing of it is published.
        monkeypatch.setattr(engine, "replay", lambda _: board.launch())
        with pytest.raises(BarrierTimeout, match="rank 1 is late"):
            runtime.step()
        assert given_up == [True]
        monkeypatch.undo()
