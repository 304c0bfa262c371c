"""The operations of a step, bound once to a backend.

On a device every operation is a launcher of `kernels.triton`; on the CPU twin it is that launcher's
oracle. Both take the same arguments and fill the same buffers, so the step is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kernels.triton import (
    activation,
    advance,
    draw_pipeline,
    expert_lists,
    expert_sum,
    grouped_down,
    grouped_gate_up,
    intake,
    linear,
    logits_counts,
    mla_absorb_q,
    mla_absorb_v,
    mla_decode,
    mla_prep,
    mla_query,
    norm,
    router,
    routing,
    settle,
    token_masks,
)
from kernels.triton.launch import Launcher, Ordinary

Op = Callable[..., None]


class Ops:
    """One bound callable per operation; `launch` None binds the oracles (the CPU twin)."""

    def __init__(self, launch: Launcher | None) -> None:
        self.launch = launch

        def bind(kernel: Op, ref: Op) -> Op:
            return ref if launch is None else partial(kernel, launch)

        self.intake = bind(intake.intake, intake.intake_ref)
        self.advance = bind(advance.advance, advance.advance_ref)
        self.copy_masks = bind(token_masks.copy_masks, token_masks.copy_masks_ref)
        self.answer = bind(settle.answer, settle.answer_ref)
        self.settle = bind(settle.settle, settle.settle_ref)
        self.embed = bind(norm.embed, norm.embed_ref)
        self.add_rmsnorm = bind(norm.add_rmsnorm, norm.add_rmsnorm_ref)
        self.gather_add_rmsnorm = bind(norm.gather_add_rmsnorm, norm.gather_add_rmsnorm_ref)
        self.quantize = bind(activation.quantize, activation.quantize_ref)
        self.silu_mul = bind(activation.silu_mul, activation.silu_mul_ref)
        self.linear = bind(linear.linear, linear.linear_ref)
        self.linear_fp8 = bind(linear.linear_fp8, linear.linear_fp8_ref)
        self.mla_prep = bind(mla_prep.mla_prep, mla_prep.mla_prep_ref)
        self.latent_query = bind(mla_query.latent_query, mla_query.latent_query_ref)
        self.absorb_q = bind(mla_absorb_q.absorb_q, mla_absorb_q.absorb_q_ref)
        self.absorb_v = bind(mla_absorb_v.absorb_v, mla_absorb_v.absorb_v_ref)
        self.mla_decode = bind(mla_decode.mla_decode, mla_decode.mla_decode_ref)
        self.router = bind(router.router, router.router_ref)
        self.route = bind(routing.route, routing.route_ref)
        self.align = bind(expert_lists.align, expert_lists.align_ref)
        self.combine = bind(expert_sum.combine, expert_sum.combine_ref)
        self.grouped_gate_up = bind(
            grouped_gate_up.grouped_gate_up, grouped_gate_up.grouped_gate_up_ref
        )
        self.grouped_down = bind(grouped_down.grouped_down, grouped_down.grouped_down_ref)
        self.count_tokens = bind(logits_counts.count_tokens, logits_counts.count_tokens_ref)
        self.sample = bind(draw_pipeline.sample_step, draw_pipeline.sample_step_ref)

    def ordinary(self) -> Ops:
        """The same operations without dependent launches."""
        return Ops(None if self.launch is None else Ordinary(self.launch))
