"""The models and ladders that the GPU tests capture: all of the `tiny` preset, two layers."""

from __future__ import annotations

from typing import Any

# Every expert is chosen, so rounding moves a result smoothly and its error has a bound.
ALL_EXPERTS = ("n_group=1", "topk_group=1", "n_routed_experts=4", "num_experts_per_tok=4")
MODELS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "fp8": ("quantization=fp8",),
    "fp32": ("dtype=float32",),
    "bf16_smooth": ALL_EXPERTS,
    "fp8_smooth": (*ALL_EXPERTS, "quantization=fp8"),
    # Widths of the published models, and heads, that both planned MLA kernels take.
    "wide": ("kv_lora_rank=512", "qk_rope_head_dim=64", "v_head_dim=128", "num_attention_heads=64"),
}
LADDER = "1,2,4,8,8+64"
# The same request meets other keys and other chunks in each.
LADDERS = (LADDER, "8+64", "8+7", "3,8,2+300,8+512")


def options_of(name: str) -> dict[str, Any]:
    """Options of `Runtime.load`: eight rows of 1,280 tokens, more than one attention split."""
    return {
        "model": "tiny",
        "layers": 2,
        "overrides": MODELS[name],
        "bs": 8,
        "max_seq_len": 1280,
        "ladder": LADDER,
        "kernels": "default",
    }
