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
from graphs.timing import MARGIN, Timing, clearly_faster
from kernels.triton.weight_tiles import extents

# Numbers of tokens at which orders of additions are compared, whatever the ladder: two runtimes of
# one model on one store give the same bits.
REFERENCE_TOKENS = (1, 8, 32, 128)

# (candidate, tokens) → its time; None where it cannot run here.
Measure = Callable[[Candidate, int], Timing | None]


def choose_site(
    found: Sequence[Candidate],
    tokens: Sequence[int],
    measure: Measure,
    *,
    known: SiteChoice | None = None,
    defaults: Mapping[int, str] | None = None,
    allow_inexact: bool = False,
    out_of_time: Callable[[], bool] = lambda: False,
) -> SiteChoice:
    """Choose for one site.

    Args:
        found: candidates that fit, the default first.
        tokens: numbers of tokens that the runtime has.
        defaults: by number of tokens, the name of its own default where that is another.
        known: an earlier choice, whose bits and picks stay; only what it lacks is measured.
        allow_inexact: let candidates in whose bits depend on the number of tokens.
        out_of_time: once true, what is not measured takes the default.
    """
    exact = [c for c in found if c.exact]
    times: dict[tuple[str, int], Timing | None] = {}

    def timed(candidate: Candidate, count: int) -> Timing | None:
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
        own = (defaults or {}).get(count)
        ordered = sorted(same, key=lambda c: c.name != own)
        picks[count] = _fastest([*ordered, *more], count, timed)
    return SiteChoice(bits, picks)


def _choose_bits(
    exact: Sequence[Candidate], timed: Callable[[Candidate, int], Timing | None]
) -> str:
    """The order of additions for all numbers of tokens, judged at the references."""
    classes = list(dict.fromkeys(c.bits for c in exact))
    default = classes[0]
    if len(classes) == 1:
        return default
    best: dict[str, list[float]] = {bits: [] for bits in classes}
    for count in REFERENCE_TOKENS:
        here: dict[str, float] = {}
        for candidate in exact:
            time = timed(candidate, count)
            if time is not None:
                here[candidate.bits] = min(time.us, here.get(candidate.bits, time.us))
        if len(here) < len(classes):
            return default  # not every order was measured: no comparison
        for bits, us in here.items():
            best[bits].append(us)
    faster = [bits for bits in classes[1:] if clearly_faster(best[bits], best[default])]
    return min(faster, key=lambda bits: fmean(_over(best[bits], best[default])), default=default)


def _over(times: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(times, others, strict=True)]


def _fastest(
    found: Sequence[Candidate], count: int, timed: Callable[[Candidate, int], Timing | None]
) -> Pick:
    """The fastest; the first of them unless another is faster beyond margin and spread."""
    default = found[0]
    ranked = sorted(
        ((time.us, i, c, time) for i, c in enumerate(found) if (time := timed(c, count))),
        key=lambda t: t[:2],
    )
    if not ranked:
        return Pick(default.name, exact=default.exact)
    us, _, best, time = ranked[0]
    own = next((t for _, _, c, t in ranked if c is default), None)
    if own is not None and not (us < own.us * (1 - MARGIN) and time.high < own.low):
        us, best = own.us, default
    others = [(t, c) for t, _, c, _ in ranked if c is not best]
    runner_up, runner_up_us = (others[0][1].name, others[0][0]) if others else (None, None)
    default_us = None if own is None else own.us
    return Pick(best.name, us, runner_up, runner_up_us, best.exact, default_us)


def confirm(
    choices: KernelChoices,
    defaults: Mapping[tuple[str, int], str],
    measure: Callable[[KernelChoices, int], tuple[Timing, set[tuple[str, int]]]],
    num_keys: int,
) -> KernelChoices:
    """Keep what a key has chosen only where its whole step is faster for it.

    A kernel that is faster by itself may be slower between others, whose weights share the caches
    with its own. The order of additions stays as it was chosen.

    Args:
        defaults: name of the first candidate of the chosen order, by site and tokens.
        measure: (choices, index of a key) → time of that key's step with them, and the (site,
            tokens) that it meets.
    """
    kept = choices
    for key in range(num_keys):
        _, met = measure(kept, key)
        plain = _with_defaults(kept, met, defaults)
        if plain.digest == kept.digest:
            continue
        before, _ = measure(plain, key)
        chosen, _ = measure(kept, key)
        again, _ = measure(plain, key)
        if not chosen.us < min(before.us, again.us):
            kept = plain
    return kept


def _with_defaults(
    choices: KernelChoices,
    met: set[tuple[str, int]],
    defaults: Mapping[tuple[str, int], str],
) -> KernelChoices:
    """The first candidate of the chosen order at every (site, tokens) that was met."""
    sites = dict(choices.sites)
    for name, count in sorted(met):
        site = sites[name]
        pick = site.tokens[count]
        if not pick.exact or pick.kernel == defaults[name, count]:
            continue
        us = pick.default_us
        plain = Pick(defaults[name, count], us, pick.kernel, pick.us, default_us=us)
        sites[name] = SiteChoice(site.bits, {**site.tokens, count: plain})
    return replace(choices, sites=sites)


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
    n = extents(tuple(call.args[1 if call.op == "linear" else 2].shape))[0]
    return splits == 1 or splits * n <= per_token
