"""Which kernels and plans an operation can take: all of them right, not all of them as fast.

A candidate is `exact` if a token's bits depend on that token alone. Two exact candidates with the
same `bits` give the same bits, so either may serve any key; with other `bits` they add in another
order, and then all keys and ranks must take the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from graphs.calls import Call, Hook
from graphs.ops import Ops
from kernels.triton.grouped_plan import DOWN_PLAN, GATE_UP_PLAN, GroupedPlan
from kernels.triton.linear_plan import LinearPlan, linear_plan
from kernels.triton.router import RouterPlan, router_plan
from kernels.triton.tiles import FP8_GROUP
from kernels.triton.weight_tiles import extents, in_tiles

Plan = LinearPlan | GroupedPlan | RouterPlan
PLANS: dict[str, type[Plan]] = {
    "linear": LinearPlan,
    "linear_fp8": LinearPlan,
    "router": RouterPlan,
    "grouped_gate_up": GroupedPlan,
    "grouped_down": GroupedPlan,
}
TORCH_MM = "torch.mm"
# Programs that a product is cut into by tiles of 64 rows and splits, of at least four blocks of K:
# one, one and a third, and two for each SM of a Hopper chip, whatever the chip is.
PROGRAMS = (132, 176, 264)


@dataclass(frozen=True)
class Candidate:
    """One way to do an operation.

    Attributes:
        name: unique within the operation and shape; a plan's fields in words, or a library's call.
        bits: its order of additions; equal names, equal bits.
        exact: bits of a token do not depend on how many tokens there are.
        plan: what the launcher takes as `plan=`; None where another library's kernel runs.
        other: that kernel, with the operation's own parameters.
    """

    name: str
    bits: str = ""
    exact: bool = True
    plan: Plan | None = None
    other: Callable[[Call], None] | None = None

    @classmethod
    def of(cls, plan: Plan) -> Candidate:
        """Our kernel with a plan; of its fields only the cut along K changes bits, and of the
        router's tiles the height, for it decides the tensor cores' instruction."""
        bits = "one order"
        if isinstance(plan, LinearPlan):
            bits = f"splits={plan.splits}"
        elif isinstance(plan, RouterPlan):
            bits = f"block_k={plan.block_k} {'low' if plan.block_n < 64 else 'tall'} tiles"
        return cls(plan_name(plan), bits, plan=plan)

    def run(self, ops: Ops, call: Call) -> None:
        """Launch it with the arguments of `call`."""
        if self.other is not None:
            self.other(call)
        elif self.plan is None:
            getattr(ops, call.op)(*call.args, **call.kwargs)
        else:
            getattr(ops, call.op)(*call.args, **call.kwargs, plan=self.plan)


ONLY = Candidate("the only one")
Candidates = Callable[[Call], list[Candidate]]


def candidates(call: Call) -> list[Candidate]:
    """Every candidate for a call, the launcher's own choice first."""
    if call.op in ("linear", "linear_fp8"):
        return [*(Candidate.of(p) for p in _linear_plans(call)), *_libraries(call)]
    if call.op == "router":
        return [Candidate.of(p) for p in _router_plans(call)]
    if call.op in PLANS:
        return [Candidate.of(p) for p in _grouped_plans(call)]
    return [ONLY]


def named(call: Call, name: str) -> Candidate:
    """The candidate of that name; any valid plan has one, listed above or not.

    Raises:
        ValueError: no such candidate; says what there is.
    """
    for found in candidates(call):
        if found.name == name:
            return found
    kind = PLANS.get(call.op)
    try:
        if kind is None:
            raise ValueError(f"{call.op} has no plans")
        if name == TORCH_MM:
            raise ValueError("it takes weights in rows, of the dtype of the activations")
        plan = _parse(kind, name)
        if isinstance(plan, GroupedPlan) and not _fits(plan, call):
            raise ValueError("FP8 gate_up takes block_n 128")
        return Candidate.of(plan)
    except ValueError as error:
        known = "; ".join(c.name for c in candidates(call))
        raise ValueError(f"{call.op} has no kernel {name!r} ({error}); known: {known}") from error


def plan_name(plan: Plan) -> str:
    """A plan in words, as `named` reads them."""
    return " ".join(f"{f.name}={getattr(plan, f.name)}" for f in fields(plan))


def run_every(ops: Ops, found: Candidates = candidates) -> Hook:
    """A hook that runs every candidate of each call that is ours, to list or to warm kernels."""

    def run(call: Call) -> None:
        for candidate in found(call):
            if candidate.other is None:
                candidate.run(ops, call)

    return run


def _parse(kind: type[Plan], text: str) -> Plan:
    known = {f.name for f in fields(kind)}
    given: dict[str, int] = {}
    for word in text.split():
        key, _, value = word.partition("=")
        if key not in known or not value.isdigit():
            raise ValueError(f"expected words such as block_n=128, got {word!r}")
        given[key] = int(value)
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"expected all of {', '.join(sorted(known))}") from error


def _linear_plans(call: Call) -> list[LinearPlan]:
    """The default first. Where the result is left in parts for the reader to add up, the layout of
    the step has settled how many."""
    w, out = call.args[1 if call.op == "linear" else 2], call.kwargs.get("out")
    n, k = extents(tuple(w.shape))
    default = linear_plan(n, k, elem_bytes=w.element_size(), tokens=call.args[0].shape[0])
    plans = _fp32_plans(default, k) if w.element_size() == 4 else _narrow_plans(default, call, n, k)
    if out is not None and out.ndim == 3:
        plans = [p for p in plans if p.splits == out.shape[0]]
    return list(dict.fromkeys(plans))


def _fp32_plans(default: LinearPlan, k: int) -> list[LinearPlan]:
    """Without tensor cores: half as many splits, or twice."""
    counts = (default.splits // 2, default.splits * 2)
    others = [replace(default, splits=s) for s in counts if 1 <= s <= k // 64]
    return [default, replace(default, prefetch=0), *others]


def _narrow_plans(default: LinearPlan, call: Call, n: int, k: int) -> list[LinearPlan]:
    """Narrow tiles with as many splits as keep a chip busy, and the plans for few tokens and for
    many: the same candidates at every number of tokens, the default of this one first."""
    elem_bytes = call.args[0].element_size()
    tiles, blocks = -(-n // 64), k * elem_bytes // 128
    counts = [max(1, round(programs / tiles)) for programs in PROGRAMS]
    unrolls = (1, 2) if call.op == "linear_fp8" else (1,)
    others = (linear_plan(n, k, elem_bytes=elem_bytes, tokens=tokens) for tokens in (1, None))
    plans = [p for own in (default, *others) for p in (own, replace(own, per_sm=1))]
    for splits in (default.splits, *(s for s in counts if s == 1 or blocks // s >= 4)):
        plans += [LinearPlan(64, splits, unroll=unroll) for unroll in unrolls]
    return plans


def _router_plans(call: Call) -> list[RouterPlan]:
    """The layout of the step has settled the number of parts, and with it the cut along K."""
    default = router_plan(*call.args[1].shape)
    plans = [default, replace(default, warps=8)]
    plans += [replace(default, block_n=block_n) for block_n in (16, 32, 64)]
    return list(dict.fromkeys(plans))


def _grouped_plans(call: Call) -> list[GroupedPlan]:
    """The default first; the others chain as many experts as fit the chip by their own cut."""
    default = GATE_UP_PLAN if call.op == "grouped_gate_up" else DOWN_PLAN
    others = [
        default,
        *(replace(default, per_sm=per_sm) for per_sm in (1, 2, 3)),
        replace(default, block_n=64),
        *(replace(default, prefetch=blocks) for blocks in (0, 1, 2)),
    ]
    if call.op == "grouped_down":
        others = [replace(p, chain=_chain(p, call)) for p in others]
    plans = [default, *others, replace(default, chain=0)]
    return [p for p in dict.fromkeys(plans) if _fits(p, call)]


def _chain(plan: GroupedPlan, call: Call) -> int:
    """Experts of down whose programs are on a chip at the same time; the last one in part."""
    num_experts, rows, _ = extents(tuple(call.args[2].shape))
    tiles = -(-rows // plan.block_n)
    return min(num_experts, -(-plan.per_sm * PROGRAMS[0] // tiles))


def _fits(plan: GroupedPlan, call: Call) -> bool:
    """FP8 gate_up quantises a tile as one group."""
    fp8 = call.args[2].element_size() == 1
    return not (call.op == "grouped_gate_up" and fp8 and plan.block_n != FP8_GROUP)


def _libraries(call: Call) -> list[Candidate]:
    """cuBLAS picks its order of additions by the number of tokens, and knows no tiles."""
    w = call.args[1]
    if call.op != "linear" or w.dtype != call.args[0].dtype or in_tiles(w):
        return []
    return [Candidate(TORCH_MM, exact=False, other=_mm)]


def _mm(call: Call) -> None:
    x, w, out = call.args[0], call.args[1], call.kwargs["out"]
    if out.dtype == x.dtype:
        torch.mm(x, w.T, out=out)
    else:
        _mm_widened(x, w, out)


def _mm_widened(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> Any:
    return torch.mm(x, w.T, out_dtype=out.dtype, out=out)
