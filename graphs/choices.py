"""Which candidate each operation of a runtime takes, by its shape and number of tokens.

Invariants: all numbers of tokens of one shape take candidates of one order of additions, so a
token's bits do not depend on the key; a choice is a value, shared, stored and pinned as text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graphs.attention_choice import AttentionCut
from graphs.calls import Call, op_names
from graphs.candidates import ONLY, PLANS, Candidate, candidates, named
from graphs.ops import Op, Ops
from kernels.triton.weight_tiles import extents

SCHEMA = 1


def site_of(call: Call) -> str:
    """The operation, shape and format that a choice is made for."""
    w = call.args[1 if call.op in ("linear", "router") else 2]
    shape = "x".join(str(extent) for extent in extents(tuple(w.shape)))
    return f"{call.op} {shape} {str(w.dtype).removeprefix('torch.')}"


def tokens_of(call: Call) -> int:
    """Rows of activations: what the choice within one order of additions goes by."""
    return int(call.args[0].shape[0])


@dataclass(frozen=True)
class Pick:
    """What one number of tokens takes.

    Attributes:
        kernel: name of the candidate.
        us: its time; None where nothing was measured.
        runner_up, runner_up_us: the best of the others; None where there was none.
        exact: bits of a token do not depend on how many tokens there are.
        default_us: time of the first candidate of the order, which stands where whole steps are not
            faster for another.
    """

    kernel: str
    us: float | None = None
    runner_up: str | None = None
    runner_up_us: float | None = None
    exact: bool = True
    default_us: float | None = None


@dataclass(frozen=True)
class SiteChoice:
    """All picks of one site.

    Attributes:
        bits: the one order of additions of its exact picks.
        tokens: pick by number of tokens.
    """

    bits: str
    tokens: Mapping[int, Pick]

    def to_json(self) -> dict[str, Any]:
        picks = {str(t): asdict(self.tokens[t]) for t in sorted(self.tokens)}
        return {"bits": self.bits, "tokens": picks}

    @classmethod
    def from_json(cls, record: Any) -> SiteChoice:
        """Raises ValueError: not what `to_json` gives."""
        try:
            picks = {int(t): Pick(**pick) for t, pick in record["tokens"].items()}
            return cls(str(record["bits"]), picks)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected bits and tokens, got {record!r:.120} ({error})") from error


@dataclass(frozen=True)
class KernelChoices:
    """The choices of one runtime; without any, every launcher chooses for itself.

    Attributes:
        sites: by `site_of`.
        attention: None leaves it to the runtime's options.
        origin: where they come from: "default", "measured", "stored" or a file.
        note: what was not done to choose them, for people; "" if nothing is missing.
    """

    sites: Mapping[str, SiteChoice] = field(default_factory=dict)
    attention: str | None = None
    origin: str = "default"
    note: str = ""

    def candidate(self, call: Call) -> Candidate:
        """What the call takes.

        Raises:
            ValueError: the choices know the shape and not this number of tokens.
        """
        if call.op not in PLANS:
            return ONLY
        site = self.sites.get(site_of(call))
        if site is None:
            return candidates(call)[0]
        pick = site.tokens.get(tokens_of(call))
        if pick is None:
            known = ", ".join(str(t) for t in sorted(site.tokens))
            raise ValueError(
                f"{site_of(call)}: no kernel is chosen for {tokens_of(call)} tokens (for {known}); "
                "capture with this ladder to choose one, or use --kernels default"
            )
        return named(call, pick.kernel)

    @property
    def inexact(self) -> list[str]:
        """Sites of which some bits depend on the number of tokens."""
        return [
            name
            for name, site in self.sites.items()
            if not all(pick.exact for pick in site.tokens.values())
        ]

    @property
    def digest(self) -> str:
        """Of what is chosen, not of the times; "default" where nothing is."""
        if not self.sites:
            return "default"
        chosen = {
            name: {str(t): pick.kernel for t, pick in site.tokens.items()}
            for name, site in self.sites.items()
        }
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def kernels(self) -> tuple[str | None, str]:
        """Attention and `digest`: two captures that agree in it run the same kernels."""
        return self.attention, self.digest

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "origin": self.origin,
            "note": self.note,
            "attention": self.attention,
            "inexact": self.inexact,
            "sites": {name: self.sites[name].to_json() for name in sorted(self.sites)},
        }

    @classmethod
    def from_json(cls, record: Any, *, origin: str) -> KernelChoices:
        """Raises ValueError: malformed, or of another schema."""
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            got = record.get("schema") if isinstance(record, dict) else type(record).__name__
            raise ValueError(
                f"{origin}: expected kernel choices of schema {SCHEMA}, got {got!r}; write them "
                "with python -m runtime.capture --save-kernels"
            )
        sites = record.get("sites")
        if not isinstance(sites, dict):
            raise ValueError(f"{origin}: expected a table of sites, got {sites!r:.80}")
        try:
            read = {str(n): SiteChoice.from_json(s) for n, s in sites.items()}
            attention = record.get("attention")
            if attention is not None:
                AttentionCut.parse(str(attention))
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error
        return cls(read, attention, origin, str(record.get("note", "")))


class ChosenOps(Ops):
    """Operations that run what was chosen for them.

    Args:
        inner: runs whatever has no candidates.

    Attributes:
        choices: replaced once they are made; captured graphs keep what they were captured with.
        met: (site, tokens) of the calls so far.
    """

    def __init__(self, inner: Ops, choices: KernelChoices) -> None:
        self.launch, self.inner, self.choices = inner.launch, inner, choices
        self.met: set[tuple[str, int]] = set()
        for name in op_names(inner):
            setattr(self, name, self._chosen(name) if name in PLANS else getattr(inner, name))

    def _chosen(self, name: str) -> Op:
        def run(*args: Any, **kwargs: Any) -> None:
            call = Call(name, args, kwargs)
            if self.choices.sites:
                self.met.add((site_of(call), tokens_of(call)))
                self.choices.candidate(call).run(self.inner, call)
            else:
                getattr(self.inner, name)(*args, **kwargs)

        return run
