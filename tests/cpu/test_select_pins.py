"""Chosen kernels by name: operations take them, files pin them, ranks and the store share them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from capture_cache.errors import CorruptBundle
from capture_cache.store import Store
from graphs.calls import Call
from graphs.candidates import ONLY, TORCH_MM, candidates, named, plan_name
from graphs.choices import ChosenOps, KernelChoices, Pick, SiteChoice, site_of
from graphs.ops import Ops
from graphs.select import check_pins
from kernels.triton.grouped_plan import GATE_UP_PLAN
from kernels.triton.linear_plan import LinearPlan
from kernels.triton.weight_tiles import tiled_shape
from runtime.config import RuntimeConfig
from runtime.selection import choose
from runtime.tuning import Tuner, pinned, share
from tests.cpu.measured import OPTIONS, linear_call, measured_choices, recorded_calls


@pytest.fixture(scope="module")
def recorded() -> dict[tuple[str, int], list[Call]]:
    return recorded_calls()


# ------------------------------------------------------------------ names


def test_a_name_is_a_plan_whether_listed_or_not() -> None:
    call = linear_call(4)
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
        named(linear_call(4), name)
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
    spy, ops = _chosen(KernelChoices({site_of(linear_call(4)): site}))
    for tokens in (8, 4):
        call = linear_call(tokens)
        ops.linear(*call.args, **call.kwargs)
    ops.greedy()
    assert spy.plans == [many, few, "greedy"]
    with pytest.raises(ValueError, match="no kernel is chosen for 5 tokens .for 4, 8."):
        ops.linear(*linear_call(5).args, **linear_call(5).kwargs)


def test_without_choices_the_launcher_chooses() -> None:
    spy, ops = _chosen(KernelChoices())
    ops.linear(*linear_call(4).args, **linear_call(4).kwargs)
    assert spy.plans == [None]
    assert KernelChoices().candidate(Call("route", (), {})) is ONLY


# ------------------------------------------------------------------ pins


def _pins(name: str = "", bits: str = "splits=1", tokens: int = 4) -> KernelChoices:
    name = name or plan_name(LinearPlan(64, 1))
    return KernelChoices(
        {site_of(linear_call(4)): SiteChoice(bits, {tokens: Pick(name)})}, origin="pins.json"
    )


def _calls(*tokens: int) -> dict[tuple[str, int], Call]:
    return {(site_of(linear_call(t)), t): linear_call(t) for t in tokens}


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


def test_cublas_is_known_only_where_weights_lie_in_rows() -> None:
    call = linear_call(4)
    rows = call.replaced({1: torch.zeros(128, 256, dtype=torch.bfloat16)})
    tiles = call.replaced({1: torch.zeros(tiled_shape(128, 256, 2), dtype=torch.bfloat16)})
    assert site_of(rows) == site_of(tiles) == "linear 128x256 bfloat16"
    assert [c.name for c in candidates(rows)] == [*(c.name for c in candidates(tiles)), TORCH_MM]
    with pytest.raises(ValueError, match=r"'torch.mm' \(it takes weights in rows, .*; known: bl"):
        named(tiles, TORCH_MM)


def test_of_pins_for_more_than_there_is_only_the_needed_ones_count() -> None:
    assert check_pins(_pins(), {}, allow_inexact=False).sites == {}
    site = _pins().sites[site_of(linear_call(4))]
    more = {8: site.tokens[4], 4: site.tokens[4]}
    wide = dataclasses.replace(
        _pins(),
        sites={site_of(linear_call(4)): SiteChoice("splits=1", more), "linear 1x1 float32": site},
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


@pytest.mark.parametrize("origin", ["measured", "stored"])
def test_choices_of_several_ranks_say_that_no_whole_step_was_timed(
    tmp_path: Path, origin: str
) -> None:
    options = RuntimeConfig.of(**OPTIONS, kernels="tune")
    selection, nobody = choose(options, compile_only=True), cast(Any, None)
    step = dataclasses.replace(selection.step, ep_size=2, transport="rdep")
    two = dataclasses.replace(selection, step=step)
    tuner = StoredOnly(two, options, Store(tmp_path / "s"), nobody, nobody, nobody, nobody)
    without_ops = cast(Any, SimpleNamespace(ops=None))
    kept = tuner.confirm(dataclasses.replace(measured_choices(), origin=origin), without_ops, {})
    assert kept.sites == measured_choices().sites
    assert "no whole step" in kept.note
    assert "no whole step" in kept.to_json()["note"]
    ranks = cast(Any, SimpleNamespace(group=FakeGroup()))
    assert share(ranks, kept) == kept, "other ranks say so, too"
    default = tuner.confirm(KernelChoices(), without_ops, {})
    assert default.note == "", "nothing was measured that would need it"
