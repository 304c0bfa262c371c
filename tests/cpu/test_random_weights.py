"""Presets' weights: seeded, the same on any number of ranks, of a size that a model can run on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from graphs.hf_layout import Kind, checkpoint_parts
from graphs.model_config import ModelConfig
from graphs.presets import PRESETS
from graphs.random_weights import random_weights
from graphs.weights import weight_table
from tests.cpu.checkpoints import Tensors, empty_views, unpacked

ODD = {"moe_intermediate_size": 136, "intermediate_size": 200, "kv_lora_rank": 72}


def tiny(**overrides: Any) -> ModelConfig:
    return ModelConfig.from_hf(PRESETS["tiny"], overrides=overrides)


def filled(cfg: ModelConfig, *, seed: int = 0, ep_rank: int = 0, ep_size: int = 1) -> Tensors:
    views = empty_views(cfg, ep_size=ep_size)
    random_weights(cfg, views, seed=seed, ep_rank=ep_rank, ep_size=ep_size)
    return views


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_every_row_is_filled_and_padding_is_zero(quantization: str) -> None:
    cfg = tiny(quantization=quantization, **ODD)
    views = filled(cfg)
    for name, view in views.items():
        assert view.float().isfinite().all(), name
    if cfg.is_fp8:
        assert not views["layers.0.qkv_a"][96:128].float().any()
        assert not views["layers.0.gate_up"][200:256].float().any()
        assert not views["layers.1.shared_gate_up"][392:].float().any()


def test_the_seed_decides_every_bit() -> None:
    a, b, other = filled(tiny(), seed=3), filled(tiny(), seed=3), filled(tiny(), seed=4)
    assert all(same(a[name], b[name]) for name in a)
    assert not any(same(a[name], other[name]) for name in a)


def test_no_two_tensors_are_alike() -> None:
    state = unpacked(tiny(), filled(tiny()))
    heads = [tuple(value.flatten()[:8].tolist()) for value in state.values()]
    assert len(set(heads)) == len(heads)


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_a_rank_has_the_experts_of_a_run_on_one(quantization: str) -> None:
    cfg = tiny(quantization=quantization)
    whole = filled(cfg)
    for ep_rank in (0, 3):
        for name, view in filled(cfg, ep_rank=ep_rank, ep_size=4).items():
            mine = whole[name]
            if ".experts_" in name:
                mine = mine[4 * ep_rank : 4 * ep_rank + 4]
            assert same(view, mine), name


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_linears_keep_the_size_of_their_input(quantization: str) -> None:
    cfg = tiny(quantization=quantization)
    state = unpacked(cfg, filled(cfg))
    gains = {
        part.source: float(state[part.source].float().std()) * part.shape[1] ** 0.5
        for part in checkpoint_parts(cfg)
        if part.kind is not Kind.CAST
    }
    # FP8 scales differ by up to a quarter, and a small matrix has one of them.
    assert all(abs(gain - 1) < (0.3 if cfg.is_fp8 else 0.03) for gain in gains.values()), gains
    assert sum(gains.values()) / len(gains) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("overrides", [{}, {"quantization": "fp8"}, {"tie_word_embeddings": True}])
def test_a_model_can_run_on_them(overrides: dict[str, Any]) -> None:
    cfg = tiny(**overrides, dtype="float32")
    hf = {k: v for k, v in PRESETS["tiny"].items() if k != "torch_dtype"}
    hf["tie_word_embeddings"] = cfg.tie_word_embeddings
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**hf)).eval()
    model.load_state_dict(_fused(unpacked(cfg, filled(cfg)), cfg), strict=False)
    tokens = torch.randint(0, cfg.vocab_size, (8, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
    sizes = [float(h.square().mean().sqrt()) for h in out.hidden_states]
    assert all(0.1 < size < 8 for size in sizes), sizes
    assert 2 < float(out.logits.std()) < 8
    best = out.logits.topk(2).values
    assert float((best[..., 0] - best[..., 1]).median()) > 0.5
    assert len(out.logits.argmax(-1).unique()) > 80


def _fused(state: Tensors, cfg: ModelConfig) -> Tensors:
    """The state dict as the module of transformers 5 has it."""
    state = {name: value.float() for name, value in state.items()}
    for layer in range(cfg.first_k_dense_replace, cfg.num_layers):
        here = f"model.layers.{layer}.mlp.experts"
        parts = {
            proj: [state.pop(f"{here}.{e}.{proj}_proj.weight") for e in range(cfg.num_experts)]
            for proj in ("gate", "up", "down")
        }
        both = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        state[f"{here}.gate_up_proj"] = torch.stack(both)
        state[f"{here}.down_proj"] = torch.stack(parts["down"])
    return state


def test_a_gpu_needs_a_launcher() -> None:
    cfg = tiny()
    views = {
        name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
        for name, spec in weight_table(cfg).items()
    }
    with pytest.raises(ValueError, match="random weights on meta: expected a launcher, got None"):
        random_weights(cfg, views, seed=0)


def test_rank_outside_the_node_is_refused() -> None:
    with pytest.raises(ValueError, match="ep_rank: expected 0 … 1, got 2"):
        random_weights(tiny(), {}, seed=0, ep_rank=2, ep_size=2)
