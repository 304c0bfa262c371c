"""Which kernels and plans an operation can take: all of them right, not all of them as fast.

A candidate is `exact` if a token's bits depend on that token alone. Two exact candidates with the
same `bits` give the same bits, so either may serve any key; with other `bits` they add in another
order, and then all keys and ranks must take the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graphs.calls import Call, Hook
from graphs.ops import Ops

OURS = "triton"


@dataclass(frozen=True)
class Candidate:
    """One way to do an operation.

    Attributes:
        name: unique within the operation and shape.
        bits: its order of additions; equal names, equal bits.
        exact: bits of a token do not depend on how many tokens there are.
        plan: what the launcher takes as `plan=`; None leaves it its own choice.
        other: another library's kernel, with the operation's own parameters.
    """

    name: str
    bits: str = ""
    exact: bool = True
    plan: Any = None
    other: Callable[[Call], None] | None = None

    def run(self, ops: Ops, call: Call) -> None:
        """Launch it with the arguments of `call`."""
        if self.other is not None:
            self.other(call)
        elif self.plan is None:
            getattr(ops, call.op)(*call.args, **call.kwargs)
        else:
            getattr(ops, call.op)(*call.args, **call.kwargs, plan=self.plan)


DEFAULT = Candidate("default")
Candidates = Callable[[Call], list[Candidate]]


def candidates(call: Call) -> list[Candidate]:
    """Every candidate for a call, the launcher's own choice first."""
    return [DEFAULT]


def run_every(ops: Ops, found: Candidates = candidates) -> Hook:
    """A hook that runs every candidate of each call that is ours, to list or to warm kernels."""

    def run(call: Call) -> None:
        for candidate in found(call):
            if candidate.other is None:
                candidate.run(ops, call)

    return run
