"""Which weights a step asks into L2 ahead of time, which kernel asks, and for how many bytes.

A step reads its weights in a fixed order, so while short kernels leave HBM idle the first bytes of
what is read next can already travel. The sizes change no bit; they are what was measured to pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

MIB = 1 << 20
L2_BYTES = 50 * MIB  # of a Hopper chip: what is asked for beyond it pushes out what was asked first
Spans = Sequence[torch.Tensor]  # what an operation asks for: parts of weights, flat


@dataclass(frozen=True)
class AheadPlan:
    """Bytes that a kernel of a layer asks for, 0 for none: `asker_weight`.

    Attributes:
        norm_qkv_a: attention's norm, of the query and KV projection.
        prep_q_b, prep_w_uk: `mla_prep`, of the query's second projection and of W_UK.
        query_w_uv, query_o: `latent_query` at its end, of W_UV and of the output projection: then
            comes attention, which nothing overlaps.
        merge_w_uv, merge_o: the merge of attention's splits, of the same.
        absorb_o: `absorb_v`, of the output projection. Where nothing is merged, `merge_o` instead.
        norm_router: the norm before the experts, of the router's weights.
        norm_gate_up: the norm before the MLP, of what is read first there for certain: a dense
            layer's gate and up, or the shared expert's where it joins the routed ones.
        route_gate_up, align_gate_up: `route` and `align`, of the same.
        norm_head: the last norm, of the head.
    """

    norm_qkv_a: int = 0
    prep_q_b: int = 0
    prep_w_uk: int = 0
    query_w_uv: int = 0
    query_o: int = 0
    merge_w_uv: int = 0
    merge_o: int = 0
    absorb_o: int = 0
    norm_router: int = 0
    norm_gate_up: int = 0
    route_gate_up: int = 0
    align_gate_up: int = 0
    norm_head: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if not 0 <= size <= L2_BYTES or size % 16:
                raise ValueError(
                    f"{field.name}: expected 0 … {L2_BYTES} bytes in multiples of 16, got {size}"
                )


NOTHING_AHEAD = AheadPlan()
AHEAD_PLAN = AheadPlan(
    norm_qkv_a=15 * MIB,
    prep_q_b=8 * MIB,
    prep_w_uk=8 * MIB,
    merge_w_uv=8 * MIB,
    merge_o=8 * MIB,
    norm_router=8 * MIB,
    norm_gate_up=16 * MIB,
)


class AskAhead:
    """The requests of one part of a step: each goes on in a weight where the one before stopped."""

    def __init__(self, plan: AheadPlan) -> None:
        self._plan = plan
        self._asked: dict[str, int] = {}

    def by(self, asker: str, **weights: torch.Tensor) -> Spans:
        """What `asker` is to ask for, by the plan; empty parts are left out.

        Args:
            weights: contiguous, by the names that the plan has for them, the first needed first.
        """
        spans = [self._next(asker, name, weight) for name, weight in weights.items()]
        return [s for s in spans if s.numel()]

    def _next(self, asker: str, name: str, weight: torch.Tensor) -> torch.Tensor:
        size: int = getattr(self._plan, f"{asker}_{name}")
        begin = self._asked.get(name, 0)
        self._asked[name] = begin + size
        each = weight.element_size()
        return weight.view(-1)[begin // each : (begin + size) // each]
