"""How a kernel is chosen: orders of additions first, once for all keys; then the fastest per key.

Pure logic over a function that measures. The default stays unless another is clearly faster, so
that noise changes nothing: least of all bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from graphs.calls import Call
from graphs.candidates import Candidate, named
from graphs.choices import KernelChoices, Pick, SiteChoice, site_of, tokens_of

# Numbers of tokens at which orders of additions are compared, whatever the ladder: two runtimes of
# one model on one store give the same bits.
REFERENCE_TOKENS = (1, 8, 32, 128)
BITS_MARGIN = 0.05  # by which another order of additions must be faster, on average
MARGIN = 0.02  # by which another candidate of the same order must be

# (candidate, tokens) → microseconds; None where it cannot run here.
Measure = Callable[[Candidate, int], float | None]


def choose_site(
    found: Sequence[Candidate],
    tokens: Sequence[int],
    measure: Measure,
    *,
    known: SiteChoice | None = None,
    allow_inexact: bool = False,
    out_of_time: Callable[[], bool] = lambda: False,
) -> SiteChoice:
    """Choose for one site.

    Args:
        found: candidates that fit, the default first.
        tokens: numbers of tokens that the runtime has.
        known: an earlier choice, whose bits and picks stay; only what it lacks is measured.
        allow_inexact: let candidates in whose bits depend on the number of tokens.
        out_of_time: once true, what is not measured takes the default.
    """
    exact = [c for c in found if c.exact]
    times: dict[tuple[str, int], float | None] = {}

    def timed(candidate: Candidate, count: int) -> float | None:
        key = (candidate.name, count)
        if key not in times:
            times[key] = None if out_of_time() else measure(candidate, count)
        return times[key]

    bits = known.bits if known is not None else _choose_bits(exact, timed)
    same = [c for c in exact if c.bits == bits]
    if not same:
        raise ValueError(
            f"no candidate adds in the order {bits!r} that was chosen before (there are "
            f"{', '.join(sorted({c.bits for c in exact}))}); capture with --kernels default, or "
            "into another --store"
        )
    more = [c for c in found if not c.exact] if allow_inexact else []
    picks = dict(known.tokens) if known is not None else {}
    for count in sorted(set(tokens) - picks.keys()):
        picks[count] = _fastest([*same, *more], count, timed)
    return SiteChoice(bits, picks)


def _choose_bits(
    exact: Sequence[Candidate], timed: Callable[[Candidate, int], float | None]
) -> str:
    """The order of additions that is fastest over the reference numbers of tokens."""
    classes = list(dict.fromkeys(c.bits for c in exact))
    if len(classes) == 1:
        return classes[0]
    slowdown: dict[str, list[float]] = {bits: [] for bits in classes}
    for count in REFERENCE_TOKENS:
        best: dict[str, float] = {}
        for candidate in exact:
            us = timed(candidate, count)
            if us is not None:
                best[candidate.bits] = min(us, best.get(candidate.bits, us))
        if len(best) < len(classes):
            continue  # not every order was measured here: no comparison
        fastest = min(best.values())
        for bits, us in best.items():
            slowdown[bits].append(us / fastest)
    if not slowdown[classes[0]]:
        return classes[0]
    mean = {bits: fmean(values) for bits, values in slowdown.items()}
    winner = min(classes, key=lambda bits: mean[bits])
    return winner if mean[winner] * (1 + BITS_MARGIN) < mean[classes[0]] else classes[0]


def _fastest(
    found: Sequence[Candidate], count: int, timed: Callable[[Candidate, int], float | None]
) -> Pick:
    default = found[0]
    ranked = sorted(
        ((us, i, c) for i, c in enumerate(found) if (us := timed(c, count)) is not None),
        key=lambda t: t[:2],
    )
    if not ranked:
        return Pick(default.name, exact=default.exact)
    us, _, best = ranked[0]
    own = next((t for t, _, c in ranked if c is default), None)
    if own is not None and own <= us * (1 + MARGIN):
        us, best = own, default
    others = [(t, c) for t, _, c in ranked if c is not best]
    runner_up, runner_up_us = (others[0][1].name, others[0][0]) if others else (None, None)
    return Pick(best.name, us, runner_up, runner_up_us, best.exact)


def check_pins(
    choices: KernelChoices, calls: Mapping[tuple[str, int], Call], *, allow_inexact: bool
) -> KernelChoices:
    """Refuse pinned choices that do not fit what is to be captured; returns those that it needs.

    Args:
        calls: one call for each (site, tokens) of the runtime.
    Raises:
        ValueError: a site or number of tokens without a choice, an unknown kernel, or picks that
            would make bits depend on the key.
    """
    where = choices.origin
    for (site, count), call in sorted(calls.items(), key=lambda item: item[0]):
        assert (site, count) == (site_of(call), tokens_of(call))
        pinned = choices.sites.get(site)
        if pinned is None or count not in pinned.tokens:
            raise ValueError(
                f"{where} pins no kernel for {site} at {count} tokens; capture once without pins "
                "and with --save-kernels, on this ladder"
            )
        pick = pinned.tokens[count]
        candidate = named(call, pick.kernel)
        if not candidate.exact and not allow_inexact:
            raise ValueError(
                f"{where} pins {pick.kernel!r} for {site}: bits of a token would depend on how "
                "many tokens there are; give --allow-inexact to accept that"
            )
        if candidate.exact and candidate.bits != pinned.bits:
            raise ValueError(
                f"{where} pins {pick.kernel!r} for {site} at {count} tokens, which adds in the "
                f"order {candidate.bits!r}, and {pinned.bits!r} for the site: bits of a token "
                "would depend on the key; pin kernels of one order"
            )
    needed: dict[str, dict[int, Pick]] = {}
    for site, count in calls:
        needed.setdefault(site, {})[count] = choices.sites[site].tokens[count]
    sites = {site: SiteChoice(choices.sites[site].bits, picks) for site, picks in needed.items()}
    return replace(choices, sites=sites)


def fits_workspace(candidate: Candidate, call: Call, per_token: int) -> bool:
    """Whether a split product finds room for its partial sums in the arena, at every key.

    Args:
        per_token: float32 elements of workspace that the arena has for each step token.
    """
    if call.kwargs["out"].ndim == 3:
        return True  # the sums are left in parts where the result goes
    splits = getattr(candidate.plan, "splits", 1)
    n = call.args[1 if call.op == "linear" else 2].shape[0]
    return splits == 1 or splits * n <= per_token
