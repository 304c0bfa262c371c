"""A rank that cannot start: the others are told at once, and why."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from barriers.config import GroupConfig
from barriers.errors import RankError, RanksMissing
from barriers.group import RankGroup
from barriers.packets import address_of
from barriers.refusal import MAX_REASON, tell_failure

TIMEOUT_S = 8.0  # of a meeting; being told takes a fraction of it
REASON = "ValueError: bs must be at least 1, got 0"


def _run(
    world: int, failing: set[int], *, late: dict[int, float] | None = None, patience_s: float = 5.0
) -> list[tuple[Exception | None, float]]:
    """What each rank ended with, and after how many seconds; ranks as threads."""
    name = secrets.token_hex(8)
    ends: list[Any] = [None] * world

    def run(rank: int) -> None:
        time.sleep((late or {}).get(rank, 0.0))
        config, began, error = GroupConfig(rank, world, name, TIMEOUT_S), time.monotonic(), None
        try:
            if rank in failing:
                tell_failure(config, REASON, wait_s=patience_s)
            else:
                RankGroup(config).close()
        except Exception as e:  # compared below
            error = e
        ends[rank] = (error, time.monotonic() - began)

    threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank did not come back"
    return ends


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("late", [{}, {0: 0.4}, {2: 0.4}, {1: 0.4}])
def test_the_others_are_told_at_once_and_why(failing: int, late: dict[int, float]) -> None:
    for rank, (error, took) in enumerate(_run(3, {failing}, late=late)):
        assert took < 2.0, f"rank {rank} waited {took:.1f} s"
        if rank == failing:
            assert error is None
            continue
        assert isinstance(error, RankError), error
        assert not isinstance(error, RanksMissing)
        assert error.ranks == (failing,)
        assert f"rank {failing} could not start: {REASON}; correct that" in str(error)


def test_ranks_that_fail_alike_do_not_wait_for_each_other() -> None:
    assert all(error is None and took < 2.0 for error, took in _run(4, {0, 1, 2, 3}))


@pytest.mark.parametrize("rank", [0, 1])
def test_nobody_to_tell_ends_the_wait(rank: int) -> None:
    began = time.monotonic()
    tell_failure(GroupConfig(rank, 2, secrets.token_hex(8)), REASON, wait_s=0.3)
    assert time.monotonic() - began < 1.5


def test_one_rank_has_nobody_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("opened a socket")

    monkeypatch.setattr("barriers.refusal.open_socket", forbidden)
    tell_failure(GroupConfig(0, 1, "alone"), REASON)


def test_a_long_reason_is_cut() -> None:
    name, got = secrets.token_hex(8), list[Exception]()

    def other() -> None:
        try:
            RankGroup(GroupConfig(0, 2, name, TIMEOUT_S))
        except RankError as e:
            got.append(e)

    thread = threading.Thread(target=other)
    thread.start()
    tell_failure(GroupConfig(1, 2, name), "x" * 10_000)
    thread.join(10)
    assert "x" * MAX_REASON + ";" in str(got[0])


def test_a_stranger_does_not_end_the_telling() -> None:
    name = secrets.token_hex(8)
    teller = threading.Thread(
        target=tell_failure, args=(GroupConfig(0, 2, name), REASON), kwargs={"wait_s": 5.0}
    )
    teller.start()
    _until(lambda: _knock(name, b"hello?"))
    with pytest.raises(RankError, match="rank 0 could not start"):
        RankGroup(GroupConfig(1, 2, name, TIMEOUT_S))
    teller.join(10)
    assert not teller.is_alive()


def _knock(name: str, words: bytes) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        try:
            link.connect(address_of(name))
        except OSError:
            return False
        link.send(words)
        return True


def _until(act: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not act():
        assert time.monotonic() < deadline
        time.sleep(0.01)
