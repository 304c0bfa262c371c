"""The barriers' protocols hold in every interleaving, and the checker finds each wrong one out."""

from __future__ import annotations

import pytest

from barriers.model import MUTANTS, PROTOCOLS, compare, explore
from barriers.model_machine import Protocol

BY_NAME = {p.name: p for p in (*PROTOCOLS, *MUTANTS)}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)
def test_protocol_holds(protocol: Protocol, ranks: int) -> None:
    result = explore(protocol, ranks)
    assert result.violation == "", "\n".join(result.trace)
    assert result.states > 100


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)
def test_protocol_holds_for_four_ranks(protocol: Protocol) -> None:
    """All interleavings: what the reduction leaves out, it leaves out of nobody's sight."""
    result = explore(protocol, 4, reduced=True)
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


# ------------------------------------------------------------------ the reduction


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)
def test_the_reduction_reaches_the_states_of_the_full_machine(
    protocol: Protocol, ranks: int
) -> None:
    """No more, no fewer: each of its states stands for some of the full machine's, and the other
    way round."""
    full, reduced, apart = compare(protocol, ranks)
    assert (full.violation, reduced.violation, apart) == ("", "", 0)
    assert reduced.states < full.states


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.release], ids=lambda m: m.name)
def test_the_reduction_finds_every_mutant_out(mutant: Protocol, ranks: int) -> None:
    result = explore(mutant, ranks, reduced=True)
    assert result.violation
    assert result.trace


def test_the_reduction_refuses_what_it_would_not_see() -> None:
    with pytest.raises(ValueError, match="need the full machine"):
        explore(BY_NAME["tag signalled without a release"], 2, reduced=True)


def test_the_reduction_notices_a_word_that_stops_satisfying_a_wait() -> None:
    result = explore(BY_NAME["tag waiting for == 0"], 2, reduced=True)
    assert "enough to leave barrier 1, and now sees -1" in result.violation


def test_trace_is_readable() -> None:
    result = explore(BY_NAME["phase under replay"], 2)
    assert result.trace[0] == "rank 0 writes payload 1 to its peers"
    assert any(line.startswith("signal 1 of rank") for line in result.trace)
