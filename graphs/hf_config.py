"""A Hugging Face `config.json` as plain `ModelConfig` fields.

Reads what transformers 4 writes (`rope_theta`, `rope_scaling`, `torch_dtype`) and what 5 writes
(`rope_parameters`, `dtype`). Keys that this file does not read are ignored. Nothing structural has
a default: a missing width is an error, not a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

ARCHITECTURE = "DeepseekV3ForCausalLM"
MODEL_TYPES = ("deepseek_v3", "kimi_k2")
DTYPES = ("bfloat16", "float16", "float32")
FP8_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}

# HF key -> (our field, smallest value). All required.
_WIDTHS = {
    "hidden_size": ("hidden_size", 1),
    "vocab_size": ("vocab_size", 1),
    "num_hidden_layers": ("num_hidden_layers", 1),
    "first_k_dense_replace": ("first_k_dense_replace", 0),
    "num_attention_heads": ("num_heads", 1),
    "kv_lora_rank": ("kv_lora_rank", 1),
    "qk_nope_head_dim": ("qk_nope_head_dim", 1),
    "qk_rope_head_dim": ("qk_rope_head_dim", 1),
    "v_head_dim": ("v_head_dim", 1),
    "intermediate_size": ("intermediate_size", 1),
    "max_position_embeddings": ("max_position", 1),
}
# Required only where a layer has experts.
_MOE_WIDTHS = {
    "moe_intermediate_size": ("moe_intermediate_size", 1),
    "n_routed_experts": ("num_experts", 1),
    "num_experts_per_tok": ("experts_per_token", 1),
}
# HF key -> the one value whose meaning the step implements (absent means it).
_FIXED: dict[str, Any] = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "attention_bias": False,
    "moe_layer_freq": 1,
}
_OTHER = (
    "q_lora_rank",
    "num_key_value_heads",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "n_shared_experts",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_interleave",
    "tie_word_embeddings",
    "eos_token_id",
    "bos_token_id",
    "dtype",
    "torch_dtype",
    "quantization",
    "quantization_config",
)
OVERRIDE_KEYS = (*_WIDTHS, *_MOE_WIDTHS, *_FIXED, *_OTHER)


class UnsupportedModel(ValueError):
    """A model that this runtime does not compute: names the field, its value, what is accepted."""


def refuse(key: str, expected: str, got: Any, remedy: str = "") -> UnsupportedModel:
    """The error for one config field."""
    return UnsupportedModel(f"{key}: expected {expected}, got {got!r}" + (remedy and f"; {remedy}"))


def fields_from_hf(hf: Mapping[str, Any], *, layers: int | None) -> dict[str, Any]:
    """Translate a config dict; `rope` comes back as a dict of `RopeConfig` fields.

    Args:
        hf: a parsed `config.json`, overrides applied.
        layers: run only the first so many layers; None means all.
    Raises:
        UnsupportedModel: another architecture, an unsupported value, a missing or mistyped field.
    """
    check_architecture(hf)
    for key, value in _FIXED.items():
        if hf.get(key, value) != value:
            raise refuse(key, repr(value), hf[key], "no other value is implemented")
    fields: dict[str, Any] = {
        field: _integer(hf, key, least) for key, (field, least) in _WIDTHS.items()
    }
    fields["num_layers"] = fields["num_hidden_layers"] if layers is None else layers
    fields |= _attention_fields(hf)
    fields |= _moe_fields(hf, needed=fields["first_k_dense_replace"] < fields["num_hidden_layers"])
    fields["rope"] = _rope_fields(hf)
    fields["rms_eps"] = _number(hf, "rms_norm_eps", 1e-6)
    fields["tie_word_embeddings"] = _flag(hf, "tie_word_embeddings", False)
    fields["eos_token_ids"] = token_ids(hf, "eos_token_id")
    fields["bos_token_id"] = next(iter(token_ids(hf, "bos_token_id")), None)
    fields["act_dtype"] = _dtype(hf)
    fields["weight_format"] = _weight_format(hf)
    return fields


def token_ids(hf: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """An id, a list of ids or null as a tuple of ids."""
    value = hf.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise refuse(key, "a token id, a list of token ids or null", value)
    return tuple(ids)


def check_architecture(hf: Mapping[str, Any]) -> None:
    """
    Raises:
        UnsupportedModel: a config of another architecture than the step computes.
    """
    named = hf.get("architectures")
    if named is None and hf.get("model_type") in MODEL_TYPES:
        return
    if named != [ARCHITECTURE]:
        got = named if named is not None else f"model_type {hf.get('model_type')!r}"
        raise refuse(
            "architectures", repr([ARCHITECTURE]), got, "use a DeepSeek-V3-style checkpoint"
        )


def _attention_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    heads = hf["num_attention_heads"]
    if hf.get("num_key_value_heads") not in (None, heads):
        raise refuse(
            "num_key_value_heads",
            f"{heads}, as num_attention_heads, or null",
            hf["num_key_value_heads"],
            "latent attention has one latent for all heads",
        )
    if "q_lora_rank" not in hf:
        raise refuse("q_lora_rank", "an integer or null", "nothing", "add it to config.json")
    rank = None if hf["q_lora_rank"] is None else _integer(hf, "q_lora_rank", 1)
    return {"q_lora_rank": rank}


def _moe_fields(hf: Mapping[str, Any], *, needed: bool) -> dict[str, Any]:
    if not needed and hf.get("n_routed_experts") is None:
        return {"num_experts": 0, "num_shared_experts": 0}
    fields: dict[str, Any] = {f: _integer(hf, k, least) for k, (f, least) in _MOE_WIDTHS.items()}
    for key in ("n_group", "topk_group"):
        fields[key] = 1 if hf.get(key) is None else _integer(hf, key, 1)
    shared = hf.get("n_shared_experts", 1)
    fields["num_shared_experts"] = 0 if shared is None else _integer(hf, "n_shared_experts", 0, 1)
    fields["norm_topk_prob"] = _flag(hf, "norm_topk_prob", True)
    fields["routed_scaling_factor"] = _number(hf, "routed_scaling_factor", 2.5)
    return fields


def _rope_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    # transformers 5 prefers rope_scaling too where a file has both.
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise refuse("rope_scaling", "an object or null", rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise refuse("rope type", "'default' or 'yarn'", kind, "no other rope is implemented")
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise refuse("partial_rotary_factor", "1.0", rope.get("partial_rotary_factor"))
    theta = {"rope_theta": rope.get("rope_theta", hf.get("rope_theta", 10000.0))}
    fields: dict[str, Any] = {
        "kind": kind,
        "theta": _number(theta, "rope_theta"),
        "interleave": _flag(hf, "rope_interleave", True),
    }
    return fields | (_yarn_fields(hf, rope) if kind == "yarn" else {})


def _yarn_fields(hf: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    original = "original_max_position_embeddings"
    if hf.get(original, rope.get(original)) is None:
        before = _integer(hf, "max_position_embeddings", 1)
    else:
        # transformers lets the outer key win over the one inside.
        before = _integer(hf if hf.get(original) is not None else rope, original, 1)
    ratio = hf["max_position_embeddings"] / before
    factor = ratio if rope.get("factor") is None else _number(rope, "factor")
    optional = {
        key: None if rope.get(key) is None else _number(rope, key)
        for key in ("mscale", "mscale_all_dim", "attention_factor")
    }
    return {
        "factor": factor,
        "original_max_position": before,
        # transformers reads 0 and null as "not given" here.
        "beta_fast": _number(rope, "beta_fast") if rope.get("beta_fast") else 32.0,
        "beta_slow": _number(rope, "beta_slow") if rope.get("beta_slow") else 1.0,
        "truncate": _flag(rope, "truncate", True),
        **optional,
    }


def _dtype(hf: Mapping[str, Any]) -> str:
    value = hf.get("dtype") or hf.get("torch_dtype")
    if value not in DTYPES:
        raise refuse("dtype", " or ".join(DTYPES), value, "add --override dtype=bfloat16")
    return str(value)


def _weight_format(hf: Mapping[str, Any]) -> str:
    quant = hf.get("quantization_config")
    if quant is None:
        return "plain"
    if not isinstance(quant, dict):
        raise refuse("quantization_config", "an object or null", quant)
    accepted: dict[str, tuple[Any, ...]] = {
        "quant_method": ("fp8",),
        "weight_block_size": ([128, 128],),
        "fmt": ("e4m3", None),
        "activation_scheme": ("dynamic", None),
        # ue8m0 says that the stored scales are powers of two; they are float32 all the same.
        "scale_fmt": ("float", "ue8m0", None),
    }
    for key, values in accepted.items():
        if quant.get(key) not in values:
            raise refuse(
                f"quantization_config.{key}",
                repr(values[0]),
                quant.get(key),
                "use a bf16 checkpoint, or an FP8 one with 128x128 blocks",
            )
    return "fp8"


def _integer(hf: Mapping[str, Any], key: str, least: int, default: int | None = None) -> int:
    value = hf.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        got = "nothing" if key not in hf else value
        raise refuse(key, f"an integer >= {least}", got, "correct config.json or --override it")
    return value


def _number(hf: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = hf.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        got = "nothing" if key not in hf else value
        raise refuse(key, "a finite number", got, "correct config.json or --override it")
    return float(value)


def _flag(hf: Mapping[str, Any], key: str, default: bool) -> bool:
    value = hf.get(key, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise refuse(key, "true or false", value, "correct config.json or --override it")
    return value
