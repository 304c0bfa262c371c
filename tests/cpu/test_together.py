"""Drain, pause and new weights on two CPU ranks: all of them or none, and nobody waits for good."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from barriers.spawn import run_ranks
from tests.cpu.twins import micro_checkpoint
from tests.ep import together_cases as cases

DIRECTORY = "directory"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(micro_checkpoint(tmp_path_factory.mktemp("old"), seed=1))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(micro_checkpoint(tmp_path_factory.mktemp("new"), seed=2))


REFUSALS = {
    "value": "refused by rank 1, .* rank 1: CheckpointError: .*model.norm.weight: expected finite",
    "shape": r"refused by rank 1, .* model.norm.weight: expected shape \[32\], got \[31\]",
    "expert": "refused by rank 1, .* expected finite values",
    "other": "ranks were given different tensors",
    "running": "refused by rank 1, .* 1 requests are running on the old weights",
    "argument": "refused by rank 1, .* running must be one of refuse, keep, recompute",
    "none": "refused by rank 1, .* expected at least one tensor, got none",
}


Results = dict[tuple[Any, ...], list[dict[str, Any]]]


def ranks(case: Callable[..., Any], *args: Any, world: int = 2) -> list[Any]:
    """What the case returned on every rank."""
    outcomes = run_ranks(world, case, *args, timeout_s=200.0)
    errors = [f"rank {r}: {o.error!r}" for r, o in enumerate(outcomes) if o.error is not None]
    assert not errors, "; ".join(errors)
    assert [o.exit_code for o in outcomes] == [0] * world
    return [outcome.value for outcome in outcomes]


@pytest.fixture(scope="module")
def results(old: str, new: str) -> Results:
    """By case, what it gave on each rank; all of them in one pair of processes."""
    wanted: list[tuple[str, tuple[Any, ...]]] = [
        ("drained", (old, in_flight, waiting)) for in_flight in (0, 2) for waiting in (False, True)
    ]
    wanted += [("out_of_pages", (old,)), ("paused", (old,)), ("fresh", (new,))]
    wanted += [("updated", (old, new, how)) for how in ("nothing", DIRECTORY, *REFUSALS)]
    by_rank = ranks(cases.one_by_one, wanted)
    keys = [(name, *(a for a in args if a not in (old, new))) for name, args in wanted]
    return dict(zip(keys, map(list, zip(*by_rank, strict=True)), strict=True))


def lengths(result: dict[str, Any]) -> dict[int, int]:
    return {request: len(tokens) for request, tokens in result["texts"].items()}


# ------------------------------------------------------------------ drain, pause


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [0, 2])
@pytest.mark.parametrize("waiting", [False, True])
def test_ranks_drain_in_the_same_number_of_steps(
    results: Results, in_flight: int, waiting: bool
) -> None:
    busy, little = results["drained", in_flight, waiting]
    assert busy["steps"] == little["steps"] >= 30
    assert busy["ended"] == little["ended"]
    # A third request waits for a row while the queue is held.
    assert busy["left"] == (0 if waiting else 1)
    assert little["left"] == 0
    assert lengths(busy) == {0: 30, 1: 3, 2: 5, 3: 4}
    assert lengths(little) == {0: 2, 1: 4}


@pytest.mark.slow
def test_a_rank_without_pages_makes_room_and_the_drain_goes_on(results: Results) -> None:
    idle, short = results["out_of_pages",]
    assert (idle["refused"], short["refused"]) == (0, 1)
    assert idle["steps"] == short["steps"]
    assert lengths(short)[1] == 40, "no token was lost"
    assert lengths(short)[0] >= 20, "what came before the refusal is returned, too"


@pytest.mark.slow
def test_ranks_come_back_from_a_pause_together(results: Results) -> None:
    """The second rank comes a second later than the deadline of a step."""
    for result in results["paused",]:
        assert lengths(result) == {0: 6}
        assert "this runtime is paused; call resume()" in result["refusal"]


@pytest.mark.slow
@pytest.mark.parametrize("call", ["drain", "pause"])
def test_calls_a_step_apart_are_named_on_both_ranks(old: str, call: str) -> None:
    """The twin's step meets the others, so one rank waits for a step, the other in the call:
    equally long, so either may be the first to give up, and leave."""
    first, second = ranks(cases.apart, old, call)
    assert (first["type"], first["ranks"]) == ("RanksMissing", (1,))
    given_up = rf"waited 4\.0 s at {call}\(\): rank 1 is missing"
    assert re.match(rf"rank 1 left during {call}\(\)|{given_up}", first["error"]), first["error"]
    assert (second["type"], second["ranks"]) == ("BarrierTimeout", (0,))
    assert max(first["s"], second["s"]) < 3 * cases.DEADLINE_S


# ------------------------------------------------------------------ new weights


@pytest.mark.slow
@pytest.mark.parametrize("source", ["nothing", DIRECTORY])
def test_every_rank_writes_its_own_part(source: str, results: Results) -> None:
    for got, want in zip(results["updated", source], results["fresh",], strict=True):
        assert not got["error"]
        assert got["changed"]
        assert (got["after"], got["texts"]) == (want["after"], want["texts"])


@pytest.mark.slow
@pytest.mark.parametrize("spoil", REFUSALS)
def test_what_one_rank_refuses_no_rank_writes_and_all_can_go_on(
    spoil: str, results: Results
) -> None:
    got = results["updated", spoil]
    assert got[0]["error"] == got[1]["error"], "the same word everywhere"
    for result, want in zip(got, results["fresh",], strict=True):
        assert result["kind"] == "RankError"
        assert re.search(REFUSALS[spoil], result["error"], re.DOTALL), result["error"]
        assert not result["changed"]
        assert (result["after"], result["texts"]) == (want["after"], want["texts"])
