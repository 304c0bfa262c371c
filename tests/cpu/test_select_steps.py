"""What is chosen for a whole step: attention's kernel and cut, and choices that a step confirms."""

from __future__ import annotations

import pytest

from graphs.attention_choice import AttentionCut, choose_attention, cuts_for, points_for
from graphs.choices import KernelChoices, Pick, SiteChoice
from graphs.select import confirm
from graphs.step_config import StepConfig, default_cut
from graphs.timing import Timing
from tests.cpu.measured import measured_choices

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


def _confirmed(times: dict[tuple[int, str], float]) -> KernelChoices:
    """Confirmed by the time of a step by (tokens of the key, kernel)."""

    def measure(tried: KernelChoices, key: int) -> tuple[Timing, set[tuple[str, int]]]:
        count = (1, 32)[key]
        (kernel,) = {site.tokens[count].kernel for site in tried.sites.values()}
        us = times[count, kernel]
        return Timing(us, us, us, 1), {("first", count), ("second", count)}

    defaults = {(site, count): "old" for site in ("first", "second") for count in (1, 32)}
    return confirm(measured_choices(), defaults, measure, 2)


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
    assert _confirmed(times) == measured_choices()


def test_attention_in_words() -> None:
    cut = AttentionCut("flashinfer", 2048)
    assert AttentionCut.parse(str(cut)) == cut
    for bad in ("", "triton", "triton cut", "triton cut x", "triton at 512"):
        with pytest.raises(ValueError, match="expected attention such as"):
            AttentionCut.parse(bad)


def test_the_default_cut_fills_the_chip_once() -> None:
    counts = (1, 2, 4, 5, 7, 8, 16, 17, 21, 22, 32, 33, 64, 256)
    by_rows = {rows: default_cut(rows, 4096) for rows in counts}
    assert by_rows == {
        **{1: 128, 2: 256, 4: 256, 5: 256, 7: 256, 8: 320, 16: 576, 17: 768, 21: 768},
        **{22: 1088, 32: 1088, 33: 2176, 64: 2176, 256: 2176},
    }
    for rows in (1, *range(8, 65)):  # two SMs a split, of 132
        assert rows * -(-2176 // default_cut(rows, 4096)) <= 64
    for rows in (8, 16, 32, 64):
        assert rows * -(-2000 // default_cut(rows, 4096)) >= 56


@pytest.mark.parametrize(("rows", "was"), [(1, 128), (8, 256), (16, 512), (32, 1024), (64, 2048)])
def test_room_for_an_answer_takes_no_more_splits(rows: int, was: int) -> None:
    """Cut at powers of two, a prompt of 2048 tokens had no room left in its last split."""
    for length in (2048, 4096, 16384, 131072):
        splits = -(-length // default_cut(rows, length))
        assert splits <= max(-(-length // was), 32 if rows == 1 else 16)


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
