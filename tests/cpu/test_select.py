"""The choice of kernels: by a timer that says what the test wants, pins, and what ranks share."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from capture_cache.errors import CorruptBundle
from capture_cache.store import Store
from graphs.attention_choice import (
    AttentionCut,
    choose_attention,
    copies_for,
    cuts_for,
    example,
    points_for,
)
from graphs.calls import Call, NoLauncher
from graphs.candidates import ONLY, TORCH_MM, Candidate, candidates, named, plan_name
from graphs.choices import ChosenOps, KernelChoices, Pick, SiteChoice, site_of, tokens_of
from graphs.devices import bind_views
from graphs.ops import Ops
from graphs.select import REFERENCE_TOKENS, check_pins, choose_site, confirm, fits_workspace
from graphs.step_config import StepConfig, default_cut
from graphs.timing import Timing
from graphs.tuning_inputs import expert_lists, on_meta, with_tokens
from graphs.weights import add_part_views
from kernels.triton.grouped import GATE_UP_PLAN
from kernels.triton.linear import LinearPlan
from kernels.triton.router import RouterPlan
from runtime.config import RuntimeConfig
from runtime.selection import choose
from runtime.tuning import Tuner, pinned, record_calls, share

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


OPTIONS: dict[str, Any] = {
    "model": "deepseek-v3",
    "layers": 5,
    "overrides": ("n_routed_experts=32",),
    "bs": 32,
    "ladder": "1,8,32,8+64",
    "device": "cpu",
    "num_pages": 3,
}


@pytest.fixture(scope="module")
def recorded() -> dict[tuple[str, int], list[Call]]:
    selection = choose(RuntimeConfig.of(**OPTIONS), compile_only=True)
    views = bind_views(None, selection.layout, torch.device("meta"))
    add_part_views(views)
    return {key: list(calls) for key, calls in record_calls(selection, views).items()}


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
    call = _linear(4)
    split = Candidate.of(LinearPlan(64, 3))
    assert fits_workspace(split, call, 3 * 96)
    assert not fits_workspace(split, call, 3 * 96 - 1)
    assert fits_workspace(Candidate.of(LinearPlan(64, 1)), call, 0)


# ------------------------------------------------------------------ names


def _linear(tokens: int, dtype: torch.dtype = torch.bfloat16) -> Call:
    x, w = torch.zeros(tokens, 256, dtype=dtype), torch.zeros(96, 256, dtype=dtype)
    return Call("linear", (x, w), {"out": torch.zeros(tokens, 96, dtype=dtype), "workspace": None})


def test_a_name_is_a_plan_whether_listed_or_not() -> None:
    call = _linear(4)
    for candidate in candidates(call):
        assert named(call, candidate.name) == candidate
    free = LinearPlan(64, 7, unroll=3, per_sm=3, prefetch=8)
    assert named(call, plan_name(free)).plan == free


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cutlass", "expected words such as block_n=128, got 'cutlass'"),
        ("block_n=128", "expected all of block_n, per_sm, prefetch, splits, unroll"),
        ("block_n=100 splits=1", "expected block_n 32 (fp32 weights), 64 or 128"),
        ("block_n=128 splits=0", "64 or 128 and at least one split"),
        ("block_n=128 splits=1 stages=9", "got 'stages=9'"),
    ],
)
def test_an_unknown_kernel_is_named_with_those_there_are(name: str, message: str) -> None:
    with pytest.raises(ValueError, match="known: block_n=") as refusal:
        named(_linear(4), name)
    assert message in str(refusal.value)


def test_fp8_gate_up_is_not_cut_below_a_quantisation_group(
    recorded: dict[tuple[str, int], list[Call]],
) -> None:
    call = next(c[0] for (s, _), c in recorded.items() if s.startswith("grouped_gate_up"))
    name = plan_name(dataclasses.replace(GATE_UP_PLAN, block_n=64))
    assert name not in {c.name for c in candidates(call)}
    with pytest.raises(ValueError, match="FP8 gate_up takes block_n 128"):
        named(call, name)


# ------------------------------------------------------------------ operations take their choice


class Spy:
    """An `Ops` whose linear notes the plan that it is given."""

    def __init__(self) -> None:
        self.launch = None
        self.plans: list[Any] = []
        self.greedy = lambda *args, **kwargs: self.plans.append("greedy")

    def linear(self, *args: Any, **kwargs: Any) -> None:
        self.plans.append(kwargs.get("plan"))


def _chosen(choices: KernelChoices) -> tuple[Spy, Any]:
    spy = Spy()
    inner = cast(Ops, SimpleNamespace(launch=None, linear=spy.linear, greedy=spy.greedy))
    return spy, cast(Any, ChosenOps(inner, choices))


def test_an_operation_runs_with_the_plan_for_its_number_of_tokens() -> None:
    few, many = LinearPlan(64, 1), LinearPlan(128, 1)
    site = SiteChoice("splits=1", {4: Pick(plan_name(few)), 8: Pick(plan_name(many))})
    spy, ops = _chosen(KernelChoices({site_of(_linear(4)): site}))
    for tokens in (8, 4):
        call = _linear(tokens)
        ops.linear(*call.args, **call.kwargs)
    ops.greedy()
    assert spy.plans == [many, few, "greedy"]
    with pytest.raises(ValueError, match="no kernel is chosen for 5 tokens .for 4, 8."):
        ops.linear(*_linear(5).args, **_linear(5).kwargs)


def test_without_choices_the_launcher_chooses() -> None:
    spy, ops = _chosen(KernelChoices())
    ops.linear(*_linear(4).args, **_linear(4).kwargs)
    assert spy.plans == [None]
    assert KernelChoices().candidate(Call("route", (), {})) is ONLY


# ------------------------------------------------------------------ pins


def _pins(name: str = "", bits: str = "splits=1", tokens: int = 4) -> KernelChoices:
    name = name or plan_name(LinearPlan(64, 1))
    return KernelChoices(
        {site_of(_linear(4)): SiteChoice(bits, {tokens: Pick(name)})}, origin="pins.json"
    )


def _calls(*tokens: int) -> dict[tuple[str, int], Call]:
    return {(site_of(_linear(t)), t): _linear(t) for t in tokens}


def test_pins_that_fit_pass() -> None:
    assert check_pins(_pins(), _calls(4), allow_inexact=False) == _pins()
    check_pins(_pins(TORCH_MM), _calls(4), allow_inexact=True)


@pytest.mark.parametrize(
    ("pins", "calls", "message"),
    [
        (_pins(), _calls(4, 8), "pins.json pins no kernel for linear 96x256 bfloat16 at 8 tokens"),
        (KernelChoices(origin="pins.json"), _calls(4), "pins no kernel for linear 96x256"),
        (_pins("cublas"), _calls(4), "linear has no kernel 'cublas'"),
        (_pins(TORCH_MM), _calls(4), "give --allow-inexact to accept that"),
        (_pins(bits="splits=2"), _calls(4), "bits of a token would depend on the key"),
    ],
)
def test_pins_that_do_not_fit_are_refused(
    pins: KernelChoices, calls: dict[tuple[str, int], Call], message: str
) -> None:
    with pytest.raises(ValueError, match="pins|no kernel") as refusal:
        check_pins(pins, calls, allow_inexact=False)
    assert message in str(refusal.value)


def test_of_pins_for_more_than_there_is_only_the_needed_ones_count() -> None:
    assert check_pins(_pins(), {}, allow_inexact=False).sites == {}
    site = _pins().sites[site_of(_linear(4))]
    more = {8: site.tokens[4], 4: site.tokens[4]}
    wide = dataclasses.replace(
        _pins(),
        sites={site_of(_linear(4)): SiteChoice("splits=1", more), "linear 1x1 float32": site},
    )
    assert check_pins(wide, _calls(4), allow_inexact=False) == _pins()


def test_the_fingerprint_says_what_was_asked(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    path.write_text("one")
    asked = RuntimeConfig("tiny", kernels=str(path)).kernels_asked
    assert asked.startswith("pinned ")
    path.write_text("two")
    assert RuntimeConfig("tiny", kernels=str(path)).kernels_asked != asked
    assert RuntimeConfig("tiny").kernels_asked == "auto"
    assert RuntimeConfig("tiny", allow_inexact=True).kernels_asked == "auto, inexact ones too"


def test_choices_survive_the_file(tmp_path: Path) -> None:
    site = SiteChoice("splits=1", {4: Pick("x", 1.5, "y", 2.0), 8: Pick("z", exact=False)})
    choices = KernelChoices({"linear 1x1 float32": site}, "triton cut 2048", "measured")
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(choices.to_json()))
    read = pinned(RuntimeConfig("tiny", kernels=str(path)))
    assert read == dataclasses.replace(choices, origin=str(path))
    assert read.digest == choices.digest != KernelChoices().digest == "default"
    # The report of a capture holds them, too.
    path.write_text(json.dumps({"ledger": {"choices": choices.to_json()}}))
    assert pinned(RuntimeConfig("tiny", kernels=str(path))) == read


def test_the_digest_is_of_kernels_and_not_of_times() -> None:
    def digest(pick: Pick) -> str:
        return KernelChoices({"s": SiteChoice("b", {1: pick})}).digest

    assert digest(Pick("x", 1.0, "y", 2.0)) == digest(Pick("x", 3.0))
    assert digest(Pick("x")) != digest(Pick("y"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected auto, tune, default or a file of kernel choices"),
        ("{", "expected auto, tune, default or a file of kernel choices"),
        ("[]", "expected kernel choices of schema 1, got 'list'"),
        ('{"schema": 9}', "expected kernel choices of schema 1, got 9"),
        ('{"schema": 1}', "expected a table of sites"),
        ('{"schema": 1, "sites": {"s": {"tokens": {}}}}', "expected bits and tokens"),
        ('{"schema": 1, "sites": {"s": {"bits": "", "tokens": {"x": {}}}}}', "invalid literal"),
        ('{"schema": 1, "sites": {}, "attention": "fa4"}', "expected attention such as 'triton"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "kernels.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="kernels.json") as refusal:
        pinned(RuntimeConfig("tiny", kernels=str(path)))
    assert message in str(refusal.value)


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="--allow-inexact goes with kernels that are measured"):
        RuntimeConfig("tiny", kernels="default", allow_inexact=True)
    with pytest.raises(ValueError, match="--tune-seconds 0: expected more than 0"):
        RuntimeConfig("tiny", tune_s=0)


# ------------------------------------------------------------------ attention


def _attention(times: dict[tuple[int, int], float]) -> AttentionCut:
    """The choice among cuts 1024 (the default), 512 and 2048, by (cut, rows)."""
    cuts = [AttentionCut("triton", cut) for cut in (1024, 512, 2048)]
    points = [(1, 2000), (64, 2000)]
    choice, measured = choose_attention(cuts, points, lambda c, rows, _: times[c.cut, rows])
    assert measured["triton cut 512"] == [times[512, 1], times[512, 64]]
    return choice


def test_attention_is_one_choice_over_all_points() -> None:
    own = {(1024, 1): 10.0, (1024, 64): 100.0}
    slower_at_many = {(512, 1): 5.0, (512, 64): 120.0}
    better = {(2048, 1): 10.0, (2048, 64): 80.0}
    assert _attention(own | slower_at_many | better).cut == 2048
    worse_at_one = {(2048, 1): 12.0, (2048, 64): 60.0}
    assert _attention(own | slower_at_many | worse_at_one).cut == 1024
    as_good = {(2048, 1): 9.9, (2048, 64): 98.0}
    assert _attention(own | slower_at_many | as_good).cut == 1024


# ------------------------------------------------------------------ whole steps


def _measured() -> KernelChoices:
    """Two sites that have left their default at 1 and at 32 tokens."""
    picks = {t: Pick("new", 8.0, "third", 9.0, default_us=10.0) for t in (1, 32)}
    sites = {name: SiteChoice("one", dict(picks)) for name in ("first", "second")}
    return KernelChoices(sites, None, "measured")


def _confirmed(times: dict[tuple[int, str], float]) -> KernelChoices:
    """Confirmed by the time of a step by (tokens of the key, kernel)."""

    def measure(tried: KernelChoices, key: int) -> tuple[Timing, set[tuple[str, int]]]:
        count = (1, 32)[key]
        (kernel,) = {site.tokens[count].kernel for site in tried.sites.values()}
        us = times[count, kernel]
        return Timing(us, us, us, 1), {("first", count), ("second", count)}

    defaults = {(site, count): "old" for site in ("first", "second") for count in (1, 32)}
    return confirm(_measured(), defaults, measure, 2)


def test_a_key_keeps_its_kernels_only_if_its_step_is_faster() -> None:
    times = {(1, "old"): 100.0, (1, "new"): 90.0, (32, "old"): 200.0, (32, "new"): 201.0}
    kept = _confirmed(times)
    assert {s.tokens[1].kernel for s in kept.sites.values()} == {"new"}
    assert kept.sites["first"].tokens[32] == Pick("old", 10.0, "new", 8.0, default_us=10.0)
    assert {s.bits for s in kept.sites.values()} == {"one"}


def test_a_step_goes_back_to_the_default_for_its_number_of_tokens() -> None:
    site = SiteChoice("one", {t: Pick("new", 8.0, "third", 9.0, default_us=10.0) for t in (1, 32)})
    choices = KernelChoices({"site": site}, None, "measured")

    def measure(tried: KernelChoices, key: int) -> tuple[Timing, set[tuple[str, int]]]:
        count = (1, 32)[key]
        us = 2.0 if tried.sites["site"].tokens[count].kernel == "new" else 1.0
        return Timing(us, us, us, 1), {("site", count)}

    kept = confirm(choices, {("site", 1): "few", ("site", 32): "many"}, measure, 2)
    assert {t: p.kernel for t, p in kept.sites["site"].tokens.items()} == {1: "few", 32: "many"}


def test_a_step_that_is_faster_keeps_everything() -> None:
    times = {(t, k): us for t in (1, 32) for k, us in (("old", 10.0), ("new", 9.0))}
    assert _confirmed(times) == _measured()


def test_attention_in_words() -> None:
    cut = AttentionCut("flashinfer", 2048)
    assert AttentionCut.parse(str(cut)) == cut
    for bad in ("", "triton", "triton cut", "triton cut x", "triton at 512"):
        with pytest.raises(ValueError, match="expected attention such as"):
            AttentionCut.parse(bad)


def test_the_default_cut_fills_the_chip_once() -> None:
    by_rows = {rows: default_cut(rows, 4096) for rows in (1, 7, 8, 16, 17, 21, 22, 32, 33, 64, 256)}
    assert by_rows == {
        **{1: 256, 7: 256, 8: 320, 16: 576, 17: 768, 21: 768},
        **{22: 1088, 32: 1088, 33: 2176, 64: 2176, 256: 2176},
    }
    for rows in range(8, 65):  # two SMs a split, of 132
        assert rows * -(-2176 // default_cut(rows, 4096)) <= 64
    for rows in (8, 16, 32, 64):
        assert rows * -(-2000 // default_cut(rows, 4096)) >= 56


@pytest.mark.parametrize(("rows", "was"), [(1, 256), (8, 256), (16, 512), (32, 1024), (64, 2048)])
def test_room_for_an_answer_takes_no_more_splits(rows: int, was: int) -> None:
    """Cut at powers of two, a prompt of 2048 tokens had no room left in its last split."""
    for length in (2048, 4096, 16384, 131072):
        splits = -(-length // default_cut(rows, length))
        assert splits <= max(-(-length // was), 16)


@pytest.mark.parametrize("page_size", [16, 64, 512, 4096])
@pytest.mark.parametrize("max_rows", [1, 3, 32, 300])
def test_the_default_cut_limits_the_splits(max_rows: int, page_size: int) -> None:
    for max_seq_len in (1, 64, 4096, 32768, 131072, 163840):
        cut = default_cut(max_rows, max_seq_len, page_size)
        step = StepConfig(max_rows, max_seq_len, 2, page_size, cut)  # it refuses what does not fit
        assert step.splits <= (32 if max_rows == 1 else 16)
        assert cut % 64 == 0
    assert default_cut(1, 131072) == 4096
    assert default_cut(8, 32768) == 2048


@pytest.mark.parametrize("max_seq_len", [64, 2000, 4096, 32768, 163840])
def test_points_and_cuts_fit_the_length(max_seq_len: int) -> None:
    cuts = cuts_for(max_seq_len, 64)
    assert cuts
    assert all(-(-max_seq_len // cut) <= 64 for cut in cuts)
    for max_rows in (1, 2, 8, 48, 256):
        points = points_for(max_rows, max_seq_len)
        assert all(1 <= context < max_seq_len and rows <= max_rows for rows, context in points)
        assert max(rows for rows, _ in points) == min(64, max_rows)


def test_an_example_lies_in_pages_of_its_own() -> None:
    selection = choose(RuntimeConfig.of(model="tiny", device="cpu", bs=2, max_seq_len=256))
    model, step = selection.model, selection.step
    calls = example(model, step, 2, 130, torch.device("cpu"), 3)
    used = [c.args[2][c.args[3].long(), :3].flatten().tolist() for c in calls]
    pages = list(itertools.chain(*used))
    assert len(set(pages)) == len(pages) == 18
    assert 0 not in pages
    assert max(pages) * step.page_size < calls[0].args[1].shape[0]
    assert copies_for(model, 1, 100, 0) == 1
    assert copies_for(model, 1, 100, 1 << 40) == 32


# ------------------------------------------------------------------ inputs, ranks, store


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


class FakeGroup:
    """Two ranks that meet one after another: rank 0 first, then rank 1 with the same answers."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}

    def allgather(self, what: str, value: Any, **_: Any) -> list[Any]:
        assert len(json.dumps(value)) < 4096 - 100
        return [SimpleNamespace(value=self.said.setdefault(what, value))]


@pytest.mark.parametrize("sites", [0, 1, 40])
def test_every_rank_takes_what_rank_0_says(sites: int) -> None:
    table = {f"linear {i}": SiteChoice("b", {t: Pick("k") for t in range(9)}) for i in range(sites)}
    choices = KernelChoices(table, "triton cut 512", "measured")
    ranks = cast(Any, SimpleNamespace(group=FakeGroup()))
    assert share(ranks, choices) == choices
    assert share(ranks, None) == choices


def test_the_store_keeps_records(tmp_path: Path) -> None:
    store, digest = Store(tmp_path), "ab" * 32
    assert store.load_record(digest) is None
    store.publish_record(digest, {"a": 1})
    store.publish_record(digest, {"a": 2})
    assert store.load_record(digest) == {"a": 2}
    assert store.entries() == []
    (meta,) = tmp_path.rglob("meta.json")
    meta.write_bytes(meta.read_bytes().replace(b'"a": 2', b'"a": 3'))
    with pytest.raises(CorruptBundle):
        store.load_record(digest)
    with pytest.raises(ValueError, match="64 hex digits"):
        store.load_record("../x")


# ------------------------------------------------------------------ what the store has


class StoredOnly(Tuner):
    """A tuner without a device: it can look things up, and any measurement would fail."""

    def _compile(self, *_: Any) -> None:
        """There is no chip."""

    def _digest(self, site: str) -> str:
        return hashlib.sha256(site.encode()).hexdigest()


def test_auto_takes_what_was_kept_and_else_the_default(
    recorded: dict[tuple[str, int], list[Call]], tmp_path: Path
) -> None:
    options = RuntimeConfig.of(**OPTIONS)
    assert options.kernels == "auto"
    selection, nobody = choose(options, compile_only=True), cast(Any, None)
    tuner = StoredOnly(selection, options, Store(tmp_path / "s"), nobody, nobody, nobody, nobody)
    assert tuner.choose(recorded) == KernelChoices()
    (site, count), default, other = next(
        (at, found[0], c)
        for at, calls in sorted(recorded.items())
        for found in [candidates(calls[0])]
        for c in found
        if c.exact and c.bits != found[0].bits and sum(s == at[0] for s, _ in recorded) > 1
    )
    kept = SiteChoice(other.bits, {count: Pick(other.name, 1.0, default.name, 2.0)})
    tuner.store.publish_record(tuner._digest(site), kept.to_json())
    chosen = tuner.choose(recorded)
    assert (chosen.origin, list(chosen.sites)) == ("stored", [site])
    assert chosen.sites[site].tokens[count] == kept.tokens[count]
    assert chosen.sites[site].tokens.keys() == {n for s, n in recorded if s == site}
    for tokens, pick in chosen.sites[site].tokens.items():
        # Numbers of tokens that were not measured keep to the order that was chosen.
        assert named(recorded[site, tokens][0], pick.kernel).bits == other.bits
    assert tuner.measured == 0


def test_a_tuner_goes_back_to_the_default_for_each_number_of_tokens(
    recorded: dict[tuple[str, int], list[Call]], tmp_path: Path
) -> None:
    options = RuntimeConfig.of(**OPTIONS, kernels="tune")
    selection, nobody = choose(options, compile_only=True), cast(Any, None)
    store, ignore = Store(tmp_path / "s"), cast(Any, lambda *_: None)
    tuner = StoredOnly(selection, options, store, nobody, nobody, nobody, ignore)
    counts: dict[str, list[int]] = {}
    for site, count in recorded:
        counts.setdefault(site, []).append(count)
    for site, there in counts.items():
        first = candidates(recorded[site, there[0]][0])[0]
        kept = SiteChoice(first.bits, {count: Pick(first.name) for count in there})
        store.publish_record(tuner._digest(site), kept.to_json())
    tuner.choose(recorded)
    assert tuner._defaults == {at: candidates(calls[0])[0].name for at, calls in recorded.items()}
