"""The rotary table against transformers' own, bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from graphs.model_config import ModelConfig
from graphs.presets import PRESETS
from graphs.rope import rope_table
from tests.cpu.checkpoints import YARN, as_transformers_4, small_config

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 50000.0},
    "yarn": YARN,
    "yarn-deepseek": YARN | {"factor": 40.0, "mscale_all_dim": 1.0},
    "yarn-kimi": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "rope_theta": 50000.0},
    "yarn-plain": {k: v for k, v in YARN.items() if "mscale" not in k and "beta" not in k},
    "yarn-attention-factor": YARN | {"attention_factor": 0.7},
    "yarn-not-truncated": YARN | {"truncate": False},
}


@pytest.mark.parametrize("style", [4, 5])
@pytest.mark.parametrize("name", ROPES)
def test_table_has_the_bits_of_transformers(name: str, style: int) -> None:
    # 64 dimensions, so that YaRN's ramp falls inside.
    config = small_config(rope_parameters=dict(ROPES[name]), qk_rope_head_dim=64)
    hf = config.to_dict() | {"architectures": ["DeepseekV3ForCausalLM"], "dtype": "float32"}
    if style == 4:
        as_transformers_4(hf)
    table = rope_table(ModelConfig.from_hf(hf), 500)
    cos, sin = DeepseekV3RotaryEmbedding(config)(torch.zeros(1), torch.arange(500)[None])
    assert table.dtype == torch.float32
    assert torch.equal(table, torch.cat((cos[0, :, :32], sin[0, :, :32]), dim=-1))


def test_deepseek_v3_extends_slow_pairs_only() -> None:
    cfg = ModelConfig.from_hf(PRESETS["deepseek-v3"])
    plain = rope_table(ModelConfig.from_hf(PRESETS["deepseek-v3"] | {"rope_scaling": None}), 2)
    table = rope_table(cfg, 2)
    assert torch.equal(table[1, :10], plain[1, :10])  # fast pairs: as before
    assert torch.allclose(table[1, 63], plain[1, 63] / 40)  # the slowest: stretched by the factor


@pytest.mark.parametrize("length", [0, 513])
def test_length_outside_the_model_is_refused(length: int) -> None:
    hf = small_config().to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]}
    with pytest.raises(ValueError, match="max_seq_len: expected 1 … 512"):
        rope_table(ModelConfig.from_hf(hf | {"dtype": "float32"}), length)
