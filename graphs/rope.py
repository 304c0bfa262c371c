"""The rotary table that the step reads by position."""

from __future__ import annotations

import math

import torch

from graphs.model_config import ModelConfig, RopeConfig


def rope_table(cfg: ModelConfig, max_seq_len: int) -> torch.Tensor:
    """cos and sin of every position, scaled as the model's YaRN asks.

    Both pairings of `RopeConfig.interleave` read the same table: it has one angle a pair.

    Args:
        max_seq_len: positions, from 0.
    Returns:
        float32 [max_seq_len, qk_rope_head_dim] on the CPU: cos of each pair, then sin of each.
    Raises:
        ValueError: no positions, or more than the model was configured for.
    Source: DeepseekV3RotaryEmbedding of transformers, whose float32 operations and their order
        these are, so that the bits are equal too.
    """
    if not 1 <= max_seq_len <= cfg.max_position:
        raise ValueError(
            f"max_seq_len: expected 1 … {cfg.max_position} (max_position_embeddings), got "
            f"{max_seq_len}; lower --max-seq-len, or extend the model with "
            "--override max_position_embeddings=…"
        )
    inv_freq = _inv_freq(cfg.rope, cfg.qk_rope_head_dim)
    angles = torch.arange(max_seq_len).float()[:, None] * inv_freq
    scale = cfg.rope.table_scale
    return torch.cat((angles.cos() * scale, angles.sin() * scale), dim=-1)


def _inv_freq(rope: RopeConfig, dim: int) -> torch.Tensor:
    wavelengths = rope.theta ** (torch.arange(0, dim, 2).float() / dim)
    if rope.kind == "default":
        return 1.0 / wavelengths
    # Fast pairs keep their frequency, slow ones are stretched by `factor`, those between blend.
    low, high = _correction_range(rope, dim)
    ramp = torch.clamp((torch.arange(dim // 2).float() - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _correction_range(rope: RopeConfig, dim: int) -> tuple[float, float]:
    """The pairs that turn `beta_fast` and `beta_slow` times within the original context."""

    def pair_of(turns: float) -> float:
        per_turn = rope.original_max_position / (turns * 2 * math.pi)
        return dim * math.log(per_turn) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high
