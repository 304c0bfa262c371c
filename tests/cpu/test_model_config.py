"""Configs in: transformers 4 and 5, presets, overrides, and every refusal by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from graphs.model_config import ModelConfig, UnsupportedModel, parse_overrides
from graphs.presets import PRESETS
from graphs.weights import (
    add_part_views,
    check_views,
    shared_joins,
    stored_table,
    weight_table,
)
from tests.cpu.checkpoints import YARN, as_transformers_4, small_config

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def hf(**changes: Any) -> dict[str, Any]:
    """A config.json as transformers 5 writes it."""
    config = small_config(**changes).to_dict()
    return config | {"architectures": ["DeepseekV3ForCausalLM"], "dtype": "float32"}


def read(changes: dict[str, Any] | None = None, **options: Any) -> ModelConfig:
    return ModelConfig.from_hf(hf() | (changes or {}), **options)


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 7000.0}, YARN])
def test_transformers_4_and_5_say_the_same(rope: dict[str, Any]) -> None:
    five = hf(rope_parameters=dict(rope))
    four = dict(five)
    as_transformers_4(four)
    assert "rope_parameters" not in four
    assert "dtype" not in four
    assert ModelConfig.from_hf(four) == ModelConfig.from_hf(five)


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 7000.0}, YARN])
def test_softmax_scale_is_that_of_transformers(rope: dict[str, Any]) -> None:
    config = small_config(rope_parameters=dict(rope))
    cfg = ModelConfig.from_hf(config.to_dict() | {"dtype": "float32"})
    assert cfg.softmax_scale == pytest.approx(DeepseekV3Attention(config, 0).scaling, rel=1e-12)


def test_every_field_of_deepseek_v3() -> None:
    cfg = ModelConfig.from_hf(PRESETS["deepseek-v3"])
    assert (cfg.num_layers, cfg.first_k_dense_replace, cfg.num_heads) == (61, 3, 128)
    assert (cfg.num_experts, cfg.experts_per_token, cfg.n_group, cfg.topk_group) == (256, 8, 8, 4)
    assert (cfg.weight_format, cfg.act_dtype, cfg.latent_dim) == ("fp8", "bfloat16", 576)
    assert cfg.softmax_scale == pytest.approx(192**-0.5 * 1.3688879454113936**2)
    assert cfg.rope.interleave
    assert cfg.has_router_bias
    assert (cfg.eos_token_ids, cfg.bos_token_id) == ((1,), 0)


@pytest.mark.parametrize(
    ("preset", "billions"),
    [("moonlight", 15.96), ("deepseek-v3", 671.03), ("kimi-k2", 1026.4)],
)
def test_presets_have_the_published_number_of_parameters(preset: str, billions: float) -> None:
    cfg = ModelConfig.from_hf(PRESETS[preset])
    table = weight_table(ModelConfig.from_hf(PRESETS[preset], overrides={"quantization": "none"}))
    elements = sum(spec.nbytes // {"float32": 4}.get(spec.dtype, 2) for spec in table.values())
    assert elements / 1e9 == pytest.approx(billions, rel=2e-3)
    assert cfg.num_layers == cfg.num_hidden_layers


def test_kimi_k2_is_accepted_by_its_architecture() -> None:
    cfg = ModelConfig.from_hf(PRESETS["kimi-k2"])
    assert PRESETS["kimi-k2"]["model_type"] == "kimi_k2"
    assert (cfg.num_experts, cfg.num_heads, cfg.n_group) == (384, 64, 1)


def test_model_type_is_enough_where_no_architecture_is_named() -> None:
    assert read({"architectures": None}) == read()


def test_layers_runs_the_first_ones() -> None:
    cfg = read(layers=2)
    assert (cfg.num_layers, cfg.num_hidden_layers) == (2, 3)


def test_digest_changes_with_any_field() -> None:
    assert read().digest() == read().digest()
    variants = [read(layers=2), read({"rms_norm_eps": 1e-5}), read(overrides={"dtype": "bfloat16"})]
    assert len({read().digest(), *(v.digest() for v in variants)}) == 4


def test_defaults_are_those_of_transformers() -> None:
    short = {k: v for k, v in hf().items() if k not in ("rope_interleave", "norm_topk_prob")}
    cfg = ModelConfig.from_hf(short | {"n_group": None, "topk_group": None})
    assert cfg.rope.interleave
    assert cfg.norm_topk_prob
    assert (cfg.n_group, cfg.topk_group) == (1, 1)
    assert cfg.latent_rms_eps == 1e-6


def test_several_stop_ids() -> None:
    assert read({"eos_token_id": [5, 6]}).eos_token_ids == (5, 6)
    assert read({"eos_token_id": None}).eos_token_ids == ()


def test_a_dense_model_needs_no_expert_fields() -> None:
    config = {k: v for k, v in hf().items() if "expert" not in k and "moe" not in k}
    cfg = ModelConfig.from_hf(config | {"first_k_dense_replace": 3})
    assert (cfg.num_experts, cfg.num_shared_experts) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures: .*DeepseekV3.*Llama"),
        ({"architectures": None, "model_type": "llama"}, "architectures: .*model_type 'llama'"),
        ({"scoring_func": "softmax"}, "scoring_func: expected 'sigmoid', got 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method: expected 'noaux_tc', got 'greedy'"),
        ({"attention_bias": True}, "attention_bias: expected False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: expected 1, got 2"),
        ({"num_key_value_heads": 2}, "num_key_value_heads: expected 4.*got 2"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type: .*'yarn', got 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "rope factor: .*got 0.5"),
        ({"rope_scaling": "yarn"}, "rope_scaling: expected an object or null, got 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method: expected 'fp8'.*'awq'"),
        (
            {"quantization_config": FP8 | {"weight_block_size": [1, 128]}},
            "weight_block_size: .*128",
        ),
        ({"quantization_config": FP8 | {"fmt": "e5m2"}}, "fmt: expected 'e4m3', got 'e5m2'"),
        ({"quantization_config": FP8 | {"activation_scheme": "static"}}, "scheme: .*'static'"),
        ({"dtype": "int8"}, "dtype: expected bfloat16 or float16 or float32, got 'int8'"),
        ({"dtype": None}, "dtype: .*got None; add --override dtype="),
        ({"hidden_size": -1}, "hidden_size: expected an integer >= 1, got -1"),
        ({"hidden_size": 64.5}, "hidden_size: expected an integer >= 1, got 64.5"),
        ({"vocab_size": True}, "vocab_size: expected an integer >= 1, got True"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: expected an even number, got 7"),
        ({"q_lora_rank": 0}, "q_lora_rank: expected an integer >= 1, got 0"),
        ({"n_routed_experts": 6}, "n_group: expected a divisor of n_routed_experts = 6, got 4"),
        ({"n_group": 8}, "n_group: expected at most 4, two experts a group, got 8"),
        ({"topk_group": 5}, "topk_group: expected at most n_group = 4, got 5"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok: expected at most 4.*2 kept.*got 5"),
        ({"n_shared_experts": -1}, "n_shared_experts: expected an integer >= 0, got -1"),
        ({"norm_topk_prob": 1}, "norm_topk_prob: expected true or false, got 1"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: expected a finite number, got '1e-6'"),
        ({"rms_norm_eps": 0.0}, "rms_eps: expected a positive number, got 0.0"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor: .*got nan"),
        ({"eos_token_id": "</s>"}, "eos_token_id: expected a token id.*got '</s>'"),
    ],
)
def test_unsupported_field_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        read(changes)


@pytest.mark.parametrize("key", ["hidden_size", "q_lora_rank", "n_routed_experts", "v_head_dim"])
def test_missing_width_is_named(key: str) -> None:
    config = hf()
    del config[key]
    with pytest.raises(UnsupportedModel, match=f"{key}: expected an integer.*got 'nothing'"):
        ModelConfig.from_hf(config)


@pytest.mark.parametrize("layers", [0, 4])
def test_layers_outside_the_model_is_refused(layers: int) -> None:
    with pytest.raises(UnsupportedModel, match=f"layers: expected 1 … 3, .*got {layers}"):
        read(layers=layers)


def test_overrides_replace_what_the_file_says() -> None:
    texts = ["n_routed_experts=16", "q_lora_rank=null", "dtype=bfloat16", "rope_theta=5e5"]
    cfg = read(overrides=parse_overrides([*texts, "quantization=fp8", "rope_interleave=false"]))
    assert (cfg.num_experts, cfg.q_lora_rank, cfg.act_dtype) == (16, None, "bfloat16")
    assert (cfg.rope.theta, cfg.rope.interleave, cfg.is_fp8) == (5e5, False, True)


def test_override_of_heads_moves_the_kv_heads_along() -> None:
    assert read(overrides={"num_attention_heads": 2}).num_heads == 2


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_override_of_rope_replaces_the_other_spelling(key: str) -> None:
    yarn = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    config = hf(rope_parameters={"rope_type": "default", "rope_theta": 7000.0})
    rope = ModelConfig.from_hf(config, overrides={key: yarn}).rope
    assert (rope.kind, rope.factor, rope.theta) == ("yarn", 2.0, 7000.0)


def test_override_can_drop_quantization() -> None:
    cfg = read({"quantization_config": FP8}, overrides={"quantization": "none"})
    assert cfg.weight_format == "plain"


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["n_experts=4"], "n_experts.*did you mean .*n_shared_experts"),
        (["zzz=4"], "expected a config.json key that this runtime reads, got 'zzz'$"),
        (["hidden_size"], "expected key=value, got 'hidden_size'"),
        (["hidden_size=1", "hidden_size=2"], "override hidden_size: expected one value"),
        (["dtype=float16", "torch_dtype=float32"], "expected one of dtype and torch_dtype"),
        (["quantization=fp8", "quantization_config=null"], "one of quantization and"),
        (["rope_theta=1e4", 'rope_scaling={"rope_theta": 5}'], "expected rope_theta once"),
    ],
)
def test_wrong_override_is_refused(texts: list[str], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        parse_overrides(texts)


@pytest.mark.parametrize(
    ("overrides", "layers", "words"),
    [
        ({"num_hidden_layers": 2}, 1, "--layers 1 and override num_hidden_layers=2 contradict"),
        ({"quantization": "int4"}, None, "quantization: expected fp8 or none, got 'int4'"),
        ({"n_group": 3}, None, "n_group: expected a divisor of n_routed_experts = 8, got 3"),
    ],
)
def test_contradictory_override_is_refused(
    overrides: dict[str, Any], layers: int | None, words: str
) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        read(layers=layers, overrides=overrides)


def test_config_needs_no_torch() -> None:
    code = "import sys, graphs.model_config, graphs.presets; assert 'torch' not in sys.modules"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_fp8_parts_begin_at_whole_blocks() -> None:
    cfg = read(overrides={"quantization": "fp8"})
    table = weight_table(cfg, ep_size=2)
    assert (cfg.q_part_width, cfg.q_part_padded) == (24, 128)
    assert table["layers.0.qkv_a"].shape == (128 + 24, 64)
    assert table["layers.0.qkv_a_scale"].shape == (2, 1)
    assert table["layers.0.gate_up"].shape == (256, 64)  # 80 rows padded to 128, twice
    assert table["layers.1.experts_gate_up"].shape == (4, 48, 64)  # not padded
    assert table["layers.1.experts_gate_up_scale"].shape == (4, 2, 1)
    assert table["layers.1.router"].dtype == "float32"


def test_the_shared_expert_lies_behind_the_routed_ones_where_it_joins_them() -> None:
    cfg = read(overrides={"quantization": "none", "n_shared_experts": 1})
    table = weight_table(cfg)
    stored = stored_table(cfg, ep_size=1, transport="local")
    assert stored["layers.1.all_gate_up"].shape == (9, *table["layers.1.shared_gate_up"].shape)
    assert sum(s.nbytes for s in stored.values()) == sum(s.nbytes for s in table.values())
    views = {n: torch.empty(s.shape, dtype=getattr(torch, s.dtype)) for n, s in stored.items()}
    add_part_views(views)
    check_views(cfg, views, ep_size=1)
    views["layers.1.shared_down"].fill_(3)
    assert (views["layers.1.all_down"][-1] == 3).all()
    # Not where other ranks' tokens come, nor where it is wider than a routed expert.
    assert stored_table(cfg, ep_size=2, transport="rdep") == weight_table(cfg, ep_size=2)
    assert not shared_joins(read(overrides={"n_shared_experts": 2}), "local")


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="ep_size: expected a divisor of 8 routed experts, got 3"):
        weight_table(read(), ep_size=3)
