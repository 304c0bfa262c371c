"""The barriers' protocols hold in every interleaving, and the checker finds each wrong one out."""

from __future__ import annotations

import pytest

from barriers.model import MUTANTS, PROTOCOLS, explore
from barriers.model_machine import Protocol

BY_NAME = {p.name: p for p in (*PROTOCOLS, *MUTANTS)}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)
def test_protocol_holds(protocol: Protocol, ranks: int) -> None:
    result = explore(protocol, ranks)
    assert result.violation == "", "\n".join(result.trace)
    assert result.states > 100


@pytest.mark.parametrize("name", ["tag", "epoch"])
def test_protocol_holds_for_four_ranks(name: str) -> None:
    """Coarse: payloads arrive at once, and a rank's lanes and reads are one move each."""
    result = explore(BY_NAME[name], 4, coarse=True)
    assert result.violation == "", "\n".join(result.trace)
    assert result.states > 100_000


@pytest.mark.parametrize(
    ("name", "violation"),
    [
        ("tag waiting for == 0", "no rank can go on"),
        ("tag without its reset", "has not entered it"),
        ("phase under replay", "has not entered it"),
        ("two graphs on one signal matrix", "has not entered it"),
        ("tag signalled without a release", "reads payload"),
    ],
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_mutant_is_found_out(name: str, violation: str, ranks: int) -> None:
    result = explore(BY_NAME[name], ranks)
    assert violation in result.violation
    assert result.trace


def test_every_mutant_is_tested() -> None:
    assert {m.name for m in MUTANTS} == {
        "tag waiting for == 0",
        "tag without its reset",
        "phase under replay",
        "two graphs on one signal matrix",
        "tag signalled without a release",
    }


def test_phase_fails_only_from_the_second_replay_on() -> None:
    result = explore(BY_NAME["phase under replay"], 2)
    assert "in barrier 2 and leaves it" in result.violation


def test_the_coarse_exploration_finds_mutants_too() -> None:
    for name in ("tag without its reset", "phase under replay", "two graphs on one signal matrix"):
        assert explore(BY_NAME[name], 3, coarse=True).violation


def test_trace_is_readable() -> None:
    result = explore(BY_NAME["phase under replay"], 2)
    assert result.trace[0] == "rank 0 writes payload 1 to its peers"
    assert any(line.startswith("signal 1 of rank") for line in result.trace)
