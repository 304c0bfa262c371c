"""The floor of a step: the bytes that it cannot avoid reading, whatever the kernels.

Weights of every layer once (of the experts those that the step's tokens touch), the KV that its
rows attend over, and the head. Activations and written KV are left out: they stay in L2. Divide by
the bandwidth of a plain read to get the time below which no kernel can bring the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphs.buffers import kv_bytes_per_token
from graphs.model_config import ModelConfig
from graphs.step_config import StepConfig
from graphs.weights import weight_table

# Read-only stream, bytes per second, by device name (measured; a datasheet promises more).
READ_BYTES_PER_S = {"NVIDIA H200": 4.5e12, "NVIDIA H100 80GB HBM3": 3.0e12}


@dataclass(frozen=True)
class Floor:
    """Bytes a step must read, by what for."""

    attention: int
    dense: int
    experts: int
    router: int
    head: int
    kv: int

    @property
    def total(self) -> int:
        return self.attention + self.dense + self.experts + self.router + self.head + self.kv

    def microseconds(self, bytes_per_s: float) -> float:
        return self.total / bytes_per_s * 1e6


def touched_experts(cfg: ModelConfig, tokens: int, local: int) -> float:
    """Expected local experts with at least one token, under even routing without repeats."""
    return local * (1.0 - (1.0 - cfg.experts_per_token / cfg.num_experts) ** tokens)


def step_floor(cfg: ModelConfig, step: StepConfig, *, rows: int, kv_tokens: int) -> Floor:
    """The floor of a pure decode step.

    Args:
        rows: live rows of this rank; with expert parallelism the other ranks bring as many.
        kv_tokens: KV tokens attended over, all rows together.
    """
    sizes = {"attention": 0, "dense": 0, "experts": 0, "router": 0, "head": 0}
    for name, spec in weight_table(cfg, ep_size=step.ep_size).items():
        part = _part_of(cfg, name)
        if part:
            sizes[part] += spec.nbytes
    if cfg.num_experts:
        local = cfg.num_experts // step.ep_size
        share = touched_experts(cfg, rows * step.ep_size, local) / local
        sizes["experts"] = round(sizes["experts"] * share)
    return Floor(**sizes, kv=kv_tokens * kv_bytes_per_token(cfg))


def _part_of(cfg: ModelConfig, name: str) -> str | None:
    if name.startswith("layers."):
        leaf = name.split(".", 2)[2]
        if leaf.startswith("experts_"):
            return "experts"
        if leaf.startswith("router"):
            return "router"
        dense = leaf.startswith(("gate_up", "down", "shared_", "mlp_norm"))
        return "dense" if dense else "attention"
    # An embedding lookup reads one line a token; a tied embedding is the head.
    return "head" if name == ("embed" if cfg.tie_word_embeddings else "head") else None
