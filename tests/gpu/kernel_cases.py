"""Each kernel with its oracle, its arguments and how close its outputs must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kernels.triton import (
    activation,
    expert_lists,
    expert_sum,
    grouped_down,
    grouped_gate_up,
    linear,
    mla_absorb_q,
    mla_absorb_v,
    mla_decode,
    mla_plan,
    mla_prep,
    mla_query,
    norm,
    random_init,
    routing,
    sample,
    stream,
)
from tests.gpu.kernel_inputs import (
    BF16,
    EXPERTS,
    F32,
    FP8,
    HEADS,
    HIDDEN,
    LATENT,
    NOPE,
    Q_LORA,
    ROPE,
    VOCAB,
    Arguments,
    absorb_q,
    absorb_v,
    add_rmsnorm,
    align,
    combine,
    decode,
    down,
    embed,
    fill,
    fp8_linear,
    gate_up,
    gather,
    greedy,
    latent_query,
    norm_of_experts,
    norm_of_parts,
    plain_linear,
    plan,
    prep,
    quantize,
    route,
    route_of_parts,
    silu_mul,
    words,
)


@dataclass(frozen=True)
class Case:
    """One launch.

    Attributes:
        make: arguments by name, from a seed and a number of tokens; tensors on the CPU.
        outputs: name -> largest difference, relative to the value and to the root mean square; 0 is
            equal. e4m3 outputs may differ by one step in one element of fifty.
    """

    kernel: Callable[..., None]
    ref: Callable[..., None]
    make: Callable[[int, int], Arguments]
    outputs: dict[str, float]


CASES: dict[str, Case] = {
    "embed": Case(norm.embed, norm.embed_ref, embed, {"out": 0}),
    "add_rmsnorm": Case(
        norm.add_rmsnorm, norm.add_rmsnorm_ref, add_rmsnorm,
        {"x": 0, "out": 2**-7, "out_scale": 2**-7, "out_q": 2**-3},
    ),
    "gather_add_rmsnorm": Case(
        norm.gather_add_rmsnorm, norm.gather_add_rmsnorm_ref, gather, {"out": 2**-7}
    ),
    "norm_of_parts": Case(
        norm.add_rmsnorm, norm.add_rmsnorm_ref, norm_of_parts,
        {"x": 2**-7, "out": 2**-6, "out_scale": 2**-6, "out_q": 2**-3},
    ),
    "norm_of_experts": Case(
        norm.add_rmsnorm, norm.add_rmsnorm_ref, norm_of_experts,
        {"x": 2**-7, "out": 2**-6, "out_scale": 2**-6, "out_q": 2**-3},
    ),
    # The query is rounded to bf16 between the two products.
    "latent_query": Case(
        mla_query.latent_query, mla_query.latent_query_ref, latent_query, {"out": 2**-6}
    ),
    "quantize": Case(
        activation.quantize, activation.quantize_ref, quantize,
        {"out_scale": 1e-6, "out_q": 2**-3},
    ),
    "silu_mul": Case(
        activation.silu_mul, activation.silu_mul_ref, silu_mul,
        {"out": 2**-7, "out_scale": 1e-5, "out_q": 2**-3},
    ),
    "linear": Case(
        linear.linear, linear.linear_ref, plain_linear(VOCAB, HIDDEN, BF16), {"out": 1e-3}
    ),
    "linear_router": Case(
        linear.linear, linear.linear_ref, plain_linear(EXPERTS, HIDDEN, F32), {"out": 1e-5}
    ),
    "linear_fp8_qkv_a": Case(
        linear.linear_fp8, linear.linear_fp8_ref,
        fp8_linear(Q_LORA + LATENT + ROPE, HIDDEN), {"out": 2**-7},
    ),
    "linear_fp8_q_b": Case(
        linear.linear_fp8, linear.linear_fp8_ref,
        fp8_linear(HEADS * (NOPE + ROPE), Q_LORA), {"out": 2**-7},
    ),
    "mla_prep": Case(
        mla_prep.mla_prep, mla_prep.mla_prep_ref, prep,
        {"kv_cache": 2**-7, "out": 2**-7, "out_scale": 2**-7, "out_q": 2**-3},
    ),
    "absorb_q": Case(mla_absorb_q.absorb_q, mla_absorb_q.absorb_q_ref, absorb_q, {"out": 2**-7}),
    "absorb_v": Case(mla_absorb_v.absorb_v, mla_absorb_v.absorb_v_ref, absorb_v, {"out": 2**-7}),
    # Probabilities are rounded to bf16 before they meet the values.
    "mla_decode": Case(mla_decode.mla_decode, mla_decode.mla_decode_ref, decode, {"out": 2**-6}),
    "mla_plan": Case(mla_plan.mla_plan, mla_plan.mla_plan_ref, plan, {"ws": 0}),
    "route": Case(routing.route, routing.route_ref, route, {"out_ids": 0, "out_weights": 1e-5}),
    "route_of_parts": Case(
        routing.route, routing.route_ref, route_of_parts, {"out_ids": 0, "out_weights": 1e-5}
    ),
    "align": Case(expert_lists.align, expert_lists.align_ref, align, {"offsets": 0, "pairs": 0}),
    "combine": Case(expert_sum.combine, expert_sum.combine_ref, combine, {"out": 2**-7}),
    "grouped_gate_up": Case(
        grouped_gate_up.grouped_gate_up, grouped_gate_up.grouped_gate_up_ref, gate_up(False),
        {"out": 2**-7},
    ),
    "grouped_gate_up_fp8": Case(
        grouped_gate_up.grouped_gate_up, grouped_gate_up.grouped_gate_up_ref, gate_up(True),
        {"out_scale": 1e-3, "out": 2**-3},
    ),
    "grouped_down": Case(
        grouped_down.grouped_down, grouped_down.grouped_down_ref, down(False), {"out": 2**-7}
    ),
    "grouped_down_fp8": Case(
        grouped_down.grouped_down, grouped_down.grouped_down_ref, down(True), {"out": 2**-7}
    ),
    "greedy": Case(sample.greedy, sample.greedy_ref, greedy, {"out_token": 0, "out_logprob": 1e-5}),
    "fill_random": Case(
        random_init.fill_random, random_init.fill_random_ref, fill(BF16), {"out": 0}
    ),
    "fill_random_fp8": Case(
        random_init.fill_random, random_init.fill_random_ref, fill(FP8), {"out": 0}
    ),
    "read_words": Case(stream.read_words, stream.read_words_ref, words, {"out": 0}),
}  # fmt: skip
# Of these the first token's result is compared between steps of every size.
BY_TOKEN = (
    *("linear", "linear_router", "linear_fp8_qkv_a", "linear_fp8_q_b"),
    *("absorb_q", "absorb_v", "latent_query"),
)
