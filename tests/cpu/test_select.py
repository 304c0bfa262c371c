"""The choice of kernels: by a timer that says what the test wants, pins, and what ranks share."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from graphs.calls import Call, NoLauncher
from graphs.candidates import Candidate, candidates
from graphs.choices import KernelChoices, Pick, SiteChoice, tokens_of
from graphs.ops import Ops
from graphs.select import REFERENCE_TOKENS, choose_site, fits_workspace
from graphs.timing import Timing
from graphs.tuning_inputs import expert_lists, on_meta, with_tokens
from kernels.triton.grouped_plan import GroupedPlan
from kernels.triton.linear_plan import LinearPlan
from kernels.triton.router import RouterPlan
from tests.cpu.measured import linear_call, recorded_calls

A = Candidate("a", bits="one")
B = Candidate("b", bits="one")
C = Candidate("c", bits="two")
LOOSE = Candidate("loose", exact=False)


class FakeTimer:
    """Times by (name, tokens) or by name; counts what was asked."""

    def __init__(self, times: dict[Any, float | None], spread: float = 0.0) -> None:
        self.times, self.spread = times, spread
        self.asked: list[tuple[str, int]] = []

    def __call__(self, candidate: Candidate, tokens: int) -> Timing | None:
        self.asked.append((candidate.name, tokens))
        us = self.times.get((candidate.name, tokens), self.times.get(candidate.name))
        return None if us is None else Timing(us, us - self.spread, us + self.spread, 1)


# ------------------------------------------------------------------ one site


def test_the_fastest_is_taken_with_its_time_and_the_runner_up() -> None:
    timer = FakeTimer({"a": 10.0, ("b", 1): 8.0, ("b", 32): 12.0})
    choice = choose_site([A, B], [1, 32], timer)
    assert choice.bits == "one"
    assert choice.tokens[1] == Pick("b", 8.0, "a", 10.0, default_us=10.0)
    assert choice.tokens[32] == Pick("a", 10.0, "b", 12.0, default_us=10.0)


def test_the_default_stays_within_margin_and_spread() -> None:
    choice = choose_site([A, B], [1], FakeTimer({"a": 10.0, "b": 9.8}))
    assert choice.tokens[1].kernel == "a"
    assert choice.tokens[1].runner_up == "b"
    faster: dict[Any, float | None] = {"a": 10.0, "b": 9.0}
    assert choose_site([A, B], [1], FakeTimer(faster, spread=0.4)).tokens[1].kernel == "b"
    assert choose_site([A, B], [1], FakeTimer(faster, spread=0.6)).tokens[1].kernel == "a"


def test_an_order_of_additions_is_chosen_once_for_all_keys() -> None:
    times: dict[Any, float | None] = {"a": 10.0, "b": 10.0, "c": 5.0, ("c", 3): 50.0}
    choice = choose_site([A, B, C], [1, 3, 32], FakeTimer(times))
    assert choice.bits == "two"
    assert {pick.kernel for pick in choice.tokens.values()} == {"c"}


def test_an_order_that_is_slower_anywhere_is_not_taken() -> None:
    times: dict[Any, float | None] = {"a": 10.0, "b": 10.0, "c": 2.0, ("c", 128): 10.2}
    choice = choose_site([A, B, C], [1, 32, 128], FakeTimer(times))
    assert choice.bits == "one"


def test_another_order_must_be_clearly_faster() -> None:
    choice = choose_site([A, C], [1], FakeTimer({"a": 10.0, "c": 9.8}))
    assert choice.bits == "one"
    choice = choose_site([A, C], [1], FakeTimer({"a": 10.0, "c": 9.6}))
    assert choice.bits == "two"


def test_the_order_does_not_follow_the_ladder() -> None:
    times: dict[Any, float | None] = {"a": 10.0, "c": 5.0, ("c", 3): 50.0}
    ladders = ([1], [3], [1, 3, 128], [7])
    assert {choose_site([A, C], t, FakeTimer(times)).bits for t in ladders} == {"two"}


def test_another_ladder_keeps_the_order_and_measures_only_what_is_new() -> None:
    first = choose_site([A, B, C], [1, 8], FakeTimer({"a": 10.0, "b": 9.0, "c": 30.0}))
    # By now the timer says otherwise: bits must not follow it.
    timer = FakeTimer({"a": 10.0, "b": 11.0, "c": 1.0})
    second = choose_site([A, B, C], [8, 16], timer, known=first)
    assert second.bits == first.bits == "one"
    assert second.tokens[1] == first.tokens[1]
    assert second.tokens[16].kernel == "a"
    assert {tokens for _, tokens in timer.asked} == {16}


def test_bits_that_depend_on_the_batch_need_permission() -> None:
    timer = FakeTimer({"a": 10.0, "loose": 1.0})
    strict = choose_site([A, LOOSE], [8], timer)
    assert strict.tokens[8].kernel == "a"
    assert all(name != "loose" for name, _ in timer.asked)
    allowed = choose_site([A, LOOSE], [8], timer, allow_inexact=True)
    assert allowed.tokens[8] == Pick("loose", 1.0, "a", 10.0, False, 10.0)
    assert KernelChoices({"site": allowed}).inexact == ["site"]
    assert KernelChoices({"site": strict}).inexact == []


def test_a_kernel_that_does_not_run_here_is_not_chosen() -> None:
    timer = FakeTimer({"a": 10.0, "loose": None})
    assert choose_site([A, LOOSE], [1], timer, allow_inexact=True).tokens[1] == Pick(
        "a", 10.0, default_us=10.0
    )


def test_out_of_time_leaves_the_default_and_says_so() -> None:
    choice = choose_site([A, B, C], [1, 2], FakeTimer({"c": 1.0}), out_of_time=lambda: True)
    assert choice == SiteChoice("one", {1: Pick("a"), 2: Pick("a")})


def test_time_that_runs_out_between_orders_compares_nothing_by_half() -> None:
    left = iter(range(1, 100))
    timer = FakeTimer({"a": 10.0, "c": 1.0})
    choice = choose_site([A, C], [1], timer, out_of_time=lambda: next(left) > 1)
    assert choice.bits == "one"


def test_no_measurement_is_made_twice() -> None:
    timer = FakeTimer({"a": 10.0, "b": 9.0, "c": 8.0})
    choose_site([A, B, C], [*REFERENCE_TOKENS, 2], timer)
    assert len(timer.asked) == len(set(timer.asked))


def test_the_choice_does_not_depend_on_what_was_asked_first() -> None:
    times: dict[Any, float | None] = {"a": 10.0, "b": 9.0, "c": 9.5}
    choices = [
        choose_site([A, *rest], [4, 1], FakeTimer(times)) for rest in itertools.permutations([B, C])
    ]
    assert choices[0].to_json() == choices[1].to_json()


def test_a_number_of_tokens_has_its_own_default() -> None:
    times: dict[Any, float | None] = {"a": 10.0, "b": 10.0, "c": 20.0}
    choice = choose_site([A, B, C], [8, 72], FakeTimer(times), defaults={8: "b", 72: "a"})
    assert {count: pick.kernel for count, pick in choice.tokens.items()} == {8: "b", 72: "a"}
    late = choose_site([A, B, C], [8], FakeTimer({}), defaults={8: "b"}, out_of_time=lambda: True)
    assert late.tokens[8].kernel == "b"
    other = choose_site([A, B, C], [8], FakeTimer(times | {"c": 1.0}), defaults={8: "b"})
    assert other.tokens[8].kernel == "c", "a default of another order counts for nothing"


def test_an_order_that_no_longer_exists_is_refused() -> None:
    with pytest.raises(ValueError, match="no candidate adds in the order 'gone'"):
        choose_site([A], [1], FakeTimer({}), known=SiteChoice("gone", {}))


# ------------------------------------------------------------------ what calls there are


class Launched(NoLauncher):
    """Notes what would have been launched; the tests' interpreter has no kernels to list."""

    def __init__(self) -> None:
        self.kernels: list[tuple[Any, ...]] = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        self.kernels.append((kernel, grid, sorted(options.items())))


@pytest.fixture(scope="module")
def recorded() -> dict[tuple[str, int], list[Call]]:
    return recorded_calls()


def test_every_product_of_a_step_is_a_site(recorded: dict[tuple[str, int], list[Call]]) -> None:
    counts: dict[str, set[int]] = {}
    for site, tokens in recorded:
        counts.setdefault(site, set()).add(tokens)
    fp8 = "float8_e4m3fn"
    assert counts[f"linear_fp8 2112x7168 {fp8}"] == {1, 8, 32, 72}
    assert counts["linear 129280x7168 bfloat16"] == {1, 8, 32}  # the head: sampling rows
    assert counts["router 32x7168 float32"] == {1, 8, 32, 72}
    assert counts[f"grouped_gate_up 33x4096x7168 {fp8}"] == {1, 8, 32, 72}
    assert counts[f"grouped_down 33x7168x2048 {fp8}"] == {9, 72, 288, 648}
    layers = recorded[f"linear_fp8 7168x16384 {fp8}", 8]
    assert len(layers) == 5
    assert all(tokens_of(call) == 8 for call in layers)


def test_every_candidate_launches_at_every_shape(
    recorded: dict[tuple[str, int], list[Call]],
) -> None:
    meta = torch.device("meta")
    for (site, _), calls in recorded.items():
        call = on_meta(calls[0])
        found = candidates(call)
        assert len({c.name for c in found}) == len(found) >= 2, site
        assert found[0].exact
        for count in (1, 40, 300):
            tokens = count * (9 if call.op == "grouped_down" else 1)
            new = with_tokens(call, tokens, meta, workspace_elems=300 * 300_000)
            launcher = Launched()
            for candidate in found:
                if candidate.other is None:
                    candidate.run(Ops(launcher), call.replaced(dict(new)))
            assert len(launcher.kernels) >= len(found) - 1


def test_the_first_candidate_is_what_the_launcher_takes_by_itself(
    recorded: dict[tuple[str, int], list[Call]],
) -> None:
    for calls in recorded.values():
        call = on_meta(calls[0])
        own, first = Launched(), Launched()
        getattr(Ops(own), call.op)(*call.args, **call.kwargs)
        candidates(call)[0].run(Ops(first), call)
        assert own.kernels == first.kernels


def test_every_number_of_tokens_has_the_same_candidates(
    recorded: dict[tuple[str, int], list[Call]],
) -> None:
    sites: dict[str, set[frozenset[str]]] = {}
    for (site, _), calls in recorded.items():
        sites.setdefault(site, set()).add(frozenset(c.name for c in candidates(calls[0])))
    assert {site for site, names in sites.items() if len(names) > 1} == set()


def test_only_the_number_of_splits_changes_bits(
    recorded: dict[tuple[str, int], list[Call]],
) -> None:
    for calls in recorded.values():
        for candidate in candidates(calls[0]):
            if isinstance(candidate.plan, LinearPlan):
                assert candidate.bits == f"splits={candidate.plan.splits}"
            elif isinstance(candidate.plan, RouterPlan):
                tiles = "low" if candidate.plan.block_n < 64 else "tall"
                assert candidate.bits == f"block_k={candidate.plan.block_k} {tiles} tiles"
            else:
                assert candidate.bits == ("one order" if candidate.exact else "")


def test_more_splits_than_the_arena_has_room_for_do_not_fit() -> None:
    call = linear_call(4)
    split = Candidate.of(LinearPlan(64, 3))
    assert fits_workspace(split, call, 3 * 96)
    assert not fits_workspace(split, call, 3 * 96 - 1)
    assert fits_workspace(Candidate.of(LinearPlan(64, 1)), call, 0)


# ------------------------------------------------------------------ inputs


@pytest.mark.parametrize("shared", [False, True])
def test_experts_get_equal_shares_and_the_shared_one_every_token(shared: bool) -> None:
    offsets, pairs = expert_lists(36, 36, 5, 9, shared)
    counts = (offsets[1:] - offsets[:-1]).tolist()
    assert sorted(pairs.tolist()) == list(range(36))
    if shared:
        assert counts == [8, 8, 8, 8, 4]
        assert {p // 9 for p in pairs[offsets[4] :].tolist()} == {0, 1, 2, 3}
    else:
        assert max(counts) - min(counts) <= 1


def test_of_rows_from_all_ranks_only_a_share_is_live() -> None:
    offsets, _ = expert_lists(64, 16, 4, 8, False)
    assert int(offsets[-1]) == 16


# ------------------------------------------------------------------ down's chain


def _down(rows: int, num_experts: int) -> Call:
    meta = torch.device("meta")
    w = torch.empty(num_experts, rows, 256, dtype=torch.float8_e4m3fn, device=meta)
    return Call("grouped_down", (torch.empty(8, 256, device=meta), None, w), {})


@pytest.mark.parametrize(
    ("rows", "num_experts", "chains"),
    [
        # The plan's (block_n, per_sm): experts of which two, one, three programs an SM are there.
        (7168, 256, {(128, 2): {5}, (128, 1): {3}, (128, 3): {0, 8}, (64, 3): {4}}),
        (2048, 64, {(128, 2): {17}, (128, 1): {9}, (128, 3): {0, 8, 25}, (64, 3): {13}}),
        (2048, 4, {(128, 2): {4}, (128, 1): {4}, (128, 3): {0, 4, 8}, (64, 3): {4}}),
    ],
)
def test_down_chains_the_experts_that_fit_the_chip(
    rows: int, num_experts: int, chains: dict[tuple[int, int], set[int]]
) -> None:
    found: dict[tuple[int, int], set[int]] = {}
    for candidate in candidates(_down(rows, num_experts)):
        plan = candidate.plan
        assert isinstance(plan, GroupedPlan)
        found.setdefault((plan.block_n, plan.per_sm), set()).add(plan.chain)
    assert found == chains
