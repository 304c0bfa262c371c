"""The packed weights that the step reads: names, shapes and dtypes, in one fixed order.

A pure function of the model and the expert-parallel size, so the arena can be laid out before a
byte is read. Matrices are [out, in], row-major; parts that one kernel reads together are stacked
by rows. The big ones of 1 or 2 bytes an element lie in tiles (`kernels.triton.weight_tiles`) where
whole tiles hold them. In FP8 every linear `name` has `name_scale`, float32, one element per 128x128
block, and a part that another follows is padded with zero rows to whole blocks
(`ModelConfig.padded`), routed experts excepted: there the scale rows alone are padded, and gate's
come before up's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphs.model_config import FP8_BLOCK, ModelConfig
from kernels.triton.weight_tiles import TILE_BYTES, TILE_ROWS, extents, tiled_shape

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1}


@dataclass(frozen=True)
class TensorSpec:
    """A dense row-major tensor; `dtype` is torch's name for it. One of rank 4 or 5 is a matrix, or
    one an expert, in tiles."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def extents(self) -> tuple[int, ...]:
        """([experts,] rows, columns) of a matrix, however it lies."""
        return extents(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def num_blocks(extent: int) -> int:
    """Scale blocks along an extent, the last one perhaps partial."""
    return -(-extent // FP8_BLOCK)


def local_experts(cfg: ModelConfig, ep_size: int) -> int:
    """Routed experts that one rank holds: rank r has [r * local, (r + 1) * local).

    Raises:
        ValueError: the experts do not divide evenly.
    """
    if ep_size < 1 or cfg.num_experts % ep_size:
        raise ValueError(
            f"ep_size: expected a divisor of {cfg.num_experts} routed experts, got {ep_size}; "
            "run on another number of ranks"
        )
    return cfg.num_experts // ep_size


def weight_table(cfg: ModelConfig, *, ep_size: int = 1) -> dict[str, TensorSpec]:
    """Every packed tensor of one rank, in the order that the step reads them.

    Names are `embed`, `layers.{i}.{part}`, `final_norm` and, unless the head is the embedding,
    `head`. Every rank has the same table; of `experts_` and of a head that ranks share
    (`is_per_rank`) each holds its own part.

    Raises:
        ValueError: `ep_size` does not divide the routed experts.
    """
    num_local = local_experts(cfg, ep_size)
    H, act = cfg.hidden_size, cfg.act_dtype
    table = {"embed": TensorSpec((cfg.vocab_size, H), act)}
    for layer in range(cfg.num_layers):
        parts = {"attn_norm": TensorSpec((H,), act)}
        parts |= _attention(cfg)
        parts |= {"mlp_norm": TensorSpec((H,), act)}
        if cfg.is_moe(layer):
            parts |= _experts(cfg, num_local)
        else:
            parts |= _mlp(cfg, "", cfg.intermediate_size)
        table |= {f"layers.{layer}.{name}": spec for name, spec in parts.items()}
    table["final_norm"] = TensorSpec((H,), act)
    if not cfg.tie_word_embeddings:
        table["head"] = TensorSpec(_matrix(cfg.head_rows, H, act), act)
    return table


def is_per_rank(cfg: ModelConfig, name: str) -> bool:
    """Whether ranks hold different parts of a tensor of `weight_table`, or of one joined."""
    return ".experts_" in name or (name == "head" and cfg.head_shards > 1)


def shared_joins(cfg: ModelConfig, transport: str) -> bool:
    """Whether the shared expert runs as one more routed expert, which every token chooses.

    Then it costs its bytes and no kernel of its own. It must be as wide as a routed one, and the
    experts must read the tokens where they lie: other transports bring other ranks' tokens, too.
    """
    whole = not cfg.is_fp8 or cfg.moe_intermediate_size % FP8_BLOCK == 0
    return transport == "local" and cfg.num_shared_experts == 1 and whole


def stored_table(cfg: ModelConfig, *, ep_size: int, transport: str) -> dict[str, TensorSpec]:
    """`weight_table` as it lies in memory: where the shared expert joins, `layers.{i}.all_{part}`
    [E + 1, ...] takes the place of `experts_{part}` and `shared_{part}`; see `add_part_views`."""
    table = weight_table(cfg, ep_size=ep_size)
    if not shared_joins(cfg, transport):
        return table
    stored = {}
    for name, spec in table.items():
        layer, _, leaf = name.rpartition(".")
        if leaf.startswith("experts_"):
            shape = (spec.shape[0] + 1, *spec.shape[1:])
            stored[f"{layer}.all_{leaf.removeprefix('experts_')}"] = TensorSpec(shape, spec.dtype)
        elif not leaf.startswith("shared_"):
            stored[name] = spec
    return stored


def add_part_views(views: dict[str, torch.Tensor]) -> None:
    """Add `experts_{part}` and `shared_{part}`, which loading knows, where they lie joined."""
    for name in [n for n in views if ".all_" in n]:
        layer, _, leaf = name.rpartition(".all_")
        views[f"{layer}.experts_{leaf}"] = views[name][:-1]
        views[f"{layer}.shared_{leaf}"] = views[name][-1]


def check_views(cfg: ModelConfig, views: Mapping[str, torch.Tensor], *, ep_size: int) -> None:
    """Refuse tensors that are not those of `weight_table`; more may be in the mapping.

    Raises:
        ValueError: names every tensor that is missing or of another shape or dtype.
    """
    problems = []
    for name, spec in weight_table(cfg, ep_size=ep_size).items():
        view = views.get(name)
        got = None if view is None else (tuple(view.shape), str(view.dtype).removeprefix("torch."))
        if got != (spec.shape, spec.dtype):
            problems.append(f"{name}: expected {list(spec.shape)} {spec.dtype}, got {got}")
    if problems:
        raise ValueError("packed weights do not fit the model: " + "; ".join(problems[:8]))


def _attention(cfg: ModelConfig) -> dict[str, TensorSpec]:
    heads, dc, act = cfg.num_heads, cfg.kv_lora_rank, cfg.act_dtype
    parts = _linear(cfg, "qkv_a", cfg.q_part_padded + cfg.latent_dim, cfg.hidden_size)
    if cfg.q_lora_rank is not None:
        parts |= {"q_a_norm": TensorSpec((cfg.q_lora_rank,), act)}
        parts |= _linear(cfg, "q_b", heads * cfg.qk_head_dim, cfg.q_lora_rank)
    # The absorbed halves of kv_b_proj: a latent is never expanded to heads.
    parts |= {
        "kv_a_norm": TensorSpec((dc,), act),
        "w_uk": TensorSpec((heads, cfg.qk_nope_head_dim, dc), act),
        "w_uv": TensorSpec((heads, cfg.v_head_dim, dc), act),
    }
    return parts | _big(cfg, "o", cfg.hidden_size, heads * cfg.v_head_dim)


def _experts(cfg: ModelConfig, num_local: int) -> dict[str, TensorSpec]:
    E, H, width = cfg.num_experts, cfg.hidden_size, cfg.moe_intermediate_size
    parts = {"router": TensorSpec((E, H), "float32")}
    if cfg.has_router_bias:
        parts["router_bias"] = TensorSpec((E,), "float32")
    weight = "float8_e4m3fn" if cfg.is_fp8 else cfg.act_dtype
    h, w = num_blocks(H), num_blocks(width)
    gate_up, down = _matrix(2 * width, H, weight, width), _matrix(H, width, weight)
    parts["experts_gate_up"] = TensorSpec((num_local, *gate_up), weight)
    if cfg.is_fp8:
        parts["experts_gate_up_scale"] = TensorSpec((num_local, 2 * w, h), "float32")
    parts["experts_down"] = TensorSpec((num_local, *down), weight)
    if cfg.is_fp8:
        parts["experts_down_scale"] = TensorSpec((num_local, h, w), "float32")
    if cfg.num_shared_experts:
        parts |= _mlp(cfg, "shared_", cfg.shared_intermediate_size)
    return parts


def _mlp(cfg: ModelConfig, prefix: str, width: int) -> dict[str, TensorSpec]:
    rows = 2 * cfg.padded(width)
    gate_up = _big(cfg, f"{prefix}gate_up", rows, cfg.hidden_size, width)
    return gate_up | _big(cfg, f"{prefix}down", cfg.hidden_size, width)


def _matrix(rows: int, cols: int, dtype: str, part: int = 0) -> tuple[int, ...]:
    """In tiles where whole ones hold it, and each part of `part` rows that it is made of."""
    item_bytes = ITEM_BYTES[dtype]
    if item_bytes > 2 or rows % TILE_ROWS or part % TILE_ROWS or cols * item_bytes % TILE_BYTES:
        return (rows, cols)
    return tiled_shape(rows, cols, item_bytes)


def _big(cfg: ModelConfig, name: str, rows: int, cols: int, part: int = 0) -> dict[str, TensorSpec]:
    """`_linear`, in tiles where they hold it."""
    table = _linear(cfg, name, rows, cols)
    dtype = table[name].dtype
    return table | {name: TensorSpec(_matrix(rows, cols, dtype, part), dtype)}


def _linear(cfg: ModelConfig, name: str, rows: int, cols: int) -> dict[str, TensorSpec]:
    if not cfg.is_fp8:
        return {name: TensorSpec((rows, cols), cfg.act_dtype)}
    return {
        name: TensorSpec((rows, cols), "float8_e4m3fn"),
        f"{name}_scale": TensorSpec((num_blocks(rows), num_blocks(cols)), "float32"),
    }
