"""Which checkpoint tensor fills which rows of which packed weight.

The one place that knows the Hugging Face names; loading and seeded random weights both follow it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum

from graphs.model_config import FP8_BLOCK, ModelConfig
from graphs.weights import num_blocks


class Kind(Enum):
    """How a tensor is brought in."""

    CAST = "cast"  # to the packed tensor's dtype
    LINEAR = "linear"  # stays or becomes FP8 in an FP8 model, else cast
    KV_B = "kv_b"  # dequantised and split by head into w_uk and w_uv


@dataclass(frozen=True)
class Part:
    """One checkpoint tensor, or one expert's slab of a fused one, and where it goes.

    Attributes:
        source: the checkpoint's name.
        shape: of the slab.
        target: packed name; of a KV_B part its prefix, "layers.3.".
        row: first row in the target, or in the expert's slab of it.
        expert: global index where the target has a leading expert dimension.
        num_fused: slabs in `source`, indexed by expert; 0 where it is not fused.
    """

    source: str
    shape: tuple[int, ...]
    target: str
    kind: Kind
    row: int = 0
    expert: int | None = None
    num_fused: int = 0

    @property
    def source_shape(self) -> tuple[int, ...]:
        return (self.num_fused, *self.shape) if self.num_fused else self.shape

    @property
    def slab(self) -> int | None:
        """The index of this part in a fused source."""
        return self.expert if self.num_fused else None

    @property
    def scale_source(self) -> str:
        """Where an FP8 tensor's block scales are."""
        return self.source + "_scale_inv"

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return (num_blocks(self.shape[0]), num_blocks(self.shape[1]))

    @property
    def scale_source_shape(self) -> tuple[int, ...]:
        return (self.num_fused, *self.scale_shape) if self.num_fused else self.scale_shape

    @property
    def scale_row(self) -> int:
        """Every part begins a scale block, even where an expert's `up` weights do not."""
        return num_blocks(self.row)


def checkpoint_parts(cfg: ModelConfig, fused: Collection[str] = ()) -> Iterator[Part]:
    """All parts of the layers that run, all experts included, in a fixed order.

    Args:
        fused: checkpoint names; a layer's experts are read fused if `gate_up_proj` is among them.
    """
    H, V = cfg.hidden_size, cfg.vocab_size
    yield Part("model.embed_tokens.weight", (V, H), "embed", Kind.CAST)
    for layer in range(cfg.num_layers):
        here, there = f"model.layers.{layer}", f"layers.{layer}"
        yield Part(f"{here}.input_layernorm.weight", (H,), f"{there}.attn_norm", Kind.CAST)
        yield from _attention(cfg, f"{here}.self_attn", there)
        yield Part(f"{here}.post_attention_layernorm.weight", (H,), f"{there}.mlp_norm", Kind.CAST)
        if not cfg.is_moe(layer):
            yield from _mlp(cfg, f"{here}.mlp", f"{there}.", cfg.intermediate_size)
            continue
        yield from _router(cfg, f"{here}.mlp.gate", there)
        if f"{here}.mlp.experts.gate_up_proj" in fused:
            yield from _fused_experts(cfg, f"{here}.mlp.experts", there)
        else:
            yield from _experts(cfg, f"{here}.mlp.experts", there)
        if cfg.num_shared_experts:
            width = cfg.shared_intermediate_size
            yield from _mlp(cfg, f"{here}.mlp.shared_experts", f"{there}.shared_", width)
    yield Part("model.norm.weight", (H,), "final_norm", Kind.CAST)
    if not cfg.tie_word_embeddings:
        yield Part("lm_head.weight", (V, H), "head", Kind.CAST)


def padded_rows(cfg: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """(packed name, first, end) of the rows that no part fills: zero in every model."""
    for layer in range(cfg.num_layers):
        there = f"layers.{layer}"
        if cfg.q_part_padded > cfg.q_part_width:
            yield f"{there}.qkv_a", cfg.q_part_width, cfg.q_part_padded
        prefix, width = "", cfg.intermediate_size
        if cfg.is_moe(layer):
            prefix, width = "shared_", cfg.shared_intermediate_size
        padded = cfg.padded(width)
        if padded > width:
            yield f"{there}.{prefix}gate_up", width, padded
            yield f"{there}.{prefix}gate_up", padded + width, 2 * padded


def _attention(cfg: ModelConfig, here: str, there: str) -> Iterator[Part]:
    H, heads, dc = cfg.hidden_size, cfg.num_heads, cfg.kv_lora_rank
    query, qkv_a = heads * cfg.qk_head_dim, f"{there}.qkv_a"
    if cfg.q_lora_rank is None:
        yield Part(f"{here}.q_proj.weight", (query, H), qkv_a, Kind.LINEAR)
    else:
        rank = cfg.q_lora_rank
        yield Part(f"{here}.q_a_proj.weight", (rank, H), qkv_a, Kind.LINEAR)
        yield Part(f"{here}.q_a_layernorm.weight", (rank,), f"{there}.q_a_norm", Kind.CAST)
        yield Part(f"{here}.q_b_proj.weight", (query, rank), f"{there}.q_b", Kind.LINEAR)
    yield Part(
        f"{here}.kv_a_proj_with_mqa.weight",
        (cfg.latent_dim, H),
        qkv_a,
        Kind.LINEAR,
        row=cfg.q_part_padded,
    )
    yield Part(f"{here}.kv_a_layernorm.weight", (dc,), f"{there}.kv_a_norm", Kind.CAST)
    both = heads * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    yield Part(f"{here}.kv_b_proj.weight", (both, dc), f"{there}.", Kind.KV_B)
    yield Part(f"{here}.o_proj.weight", (H, heads * cfg.v_head_dim), f"{there}.o", Kind.LINEAR)


def _router(cfg: ModelConfig, here: str, there: str) -> Iterator[Part]:
    E = cfg.num_experts
    yield Part(f"{here}.weight", (E, cfg.hidden_size), f"{there}.router", Kind.CAST)
    if cfg.has_router_bias:
        bias = f"{here}.e_score_correction_bias"
        yield Part(bias, (E,), f"{there}.router_bias", Kind.CAST)


def _mlp(cfg: ModelConfig, here: str, there: str, width: int) -> Iterator[Part]:
    H, rows = cfg.hidden_size, {"gate_proj": 0, "up_proj": cfg.padded(width)}
    for name, row in rows.items():
        source = f"{here}.{name}.weight"
        yield Part(source, (width, H), f"{there}gate_up", Kind.LINEAR, row=row)
    yield Part(f"{here}.down_proj.weight", (H, width), f"{there}down", Kind.LINEAR)


def _experts(cfg: ModelConfig, here: str, there: str) -> Iterator[Part]:
    H, width = cfg.hidden_size, cfg.moe_intermediate_size
    gate_up, down = f"{there}.experts_gate_up", f"{there}.experts_down"
    for e in range(cfg.num_experts):
        for name, row in {"gate_proj": 0, "up_proj": width}.items():
            source = f"{here}.{e}.{name}.weight"
            yield Part(source, (width, H), gate_up, Kind.LINEAR, row=row, expert=e)
        source = f"{here}.{e}.down_proj.weight"
        yield Part(source, (H, width), down, Kind.LINEAR, expert=e)


def _fused_experts(cfg: ModelConfig, here: str, there: str) -> Iterator[Part]:
    H, width, E = cfg.hidden_size, cfg.moe_intermediate_size, cfg.num_experts
    shapes = {"gate_up": (2 * width, H), "down": (H, width)}
    for e in range(E):
        for name, shape in shapes.items():
            source, target = f"{here}.{name}_proj", f"{there}.experts_{name}"
            yield Part(source, shape, target, Kind.LINEAR, expert=e, num_fused=E)


def fused_blocks_fit(cfg: ModelConfig) -> bool:
    """Whether fused FP8 experts can be cut at gate | up without splitting a scale block."""
    return cfg.moe_intermediate_size % FP8_BLOCK == 0
