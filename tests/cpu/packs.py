"""What tests of packed weights share: models at a size for tests, and arenas to compare."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from capture_cache.arena import HostArena
from capture_cache.layout import ArenaLayout, Entry
from graphs.devices import bind_views
from graphs.model_config import ModelConfig
from graphs.model_source import ModelSource, resolve_model
from graphs.weights import weight_table
from tests.cpu.checkpoints import as_fp8, random_model, save_model, small_config

# A preset's structure at a size for tests: what is not named stays the preset's.
SMALL = {
    "hidden_size": 128,
    "vocab_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 72,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}


def small_preset(name: str, quantization: str) -> tuple[ModelConfig, ModelSource]:
    overrides = {**SMALL, "quantization": quantization}
    return resolve_model(name, overrides=overrides)


def weights_layout(model: ModelConfig, ep_size: int) -> ArenaLayout:
    """A weights section as the runtime's, with what it computes itself behind."""
    table = weight_table(model, ep_size=ep_size)
    entries = [Entry("weights", n, s.shape, s.dtype) for n, s in table.items()]
    return ArenaLayout.build([*entries, Entry("weights", "rope_table", (16, 8), "float32")])


def poisoned_arena(model: ModelConfig, ep_size: int) -> tuple[HostArena, dict[str, torch.Tensor]]:
    """Poisoned, so that a byte that nobody writes is seen."""
    arena = HostArena(weights_layout(model, ep_size))
    for place in arena.layout.places:
        arena.bytes_of(place.entry.name)[:] = 0xFF
    return arena, bind_views(arena, arena.layout, "cpu")


def same_weights(a: HostArena, b: HostArena) -> bool:
    return all(
        np.array_equal(a.bytes_of(p.entry.name), b.bytes_of(p.entry.name)) for p in a.layout.places
    )


def odd_checkpoint(path: Path, fp8: bool = False) -> Path:
    """A checkpoint whose matrices are no multiple of a scale block."""
    save_model(path, random_model(small_config(), dtype=torch.bfloat16))
    if fp8:
        as_fp8(path)
    return path
