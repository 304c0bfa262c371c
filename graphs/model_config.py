"""What the decode step has to know about a model: one frozen record, checked once.

Built from a Hugging Face `config.json` (`ModelConfig.from_hf`); everything that sizes memory or
selects code is a pure function of it. Imports neither torch nor numpy.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from barriers.vocabulary_parts import part_of, part_rows
from capture_cache.dataclass import dataclass
from graphs.hf_config import (
    DTYPES,
    UnsupportedModel,
    fields_from_hf,
    refuse,
)
from graphs.hf_overrides import apply_overrides, parse_overrides

__all__ = ["FP8_BLOCK", "ModelConfig", "RopeConfig", "UnsupportedModel", "parse_overrides"]

FP8_BLOCK = 128  # rows and columns that share one weight scale


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the last `qk_rope_head_dim` dimensions of a head.

    Attributes:
        kind: "default" or "yarn"; the fields below `interleave` matter for YaRN only.
        theta: base wavelength.
        interleave: pairs are (0, 1), (2, 3) … as DeepSeek stores them; else (0, d/2), (1, d/2+1) ….
        original_max_position: tokens, before the extension.
        attention_factor: multiplies cos and sin; None derives it from the mscales.
    Source: YaRN, arXiv:2309.00071; `_compute_yarn_parameters` of transformers for the defaults.
    """

    kind: str
    theta: float
    interleave: bool = True
    factor: float = 1.0
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None

    @property
    def table_scale(self) -> float:
        """The factor in every cos and sin."""
        if self.kind == "default":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    @property
    def softmax_factor(self) -> float:
        """The factor in the softmax scale."""
        if self.kind == "default" or not self.mscale_all_dim:
            return 1.0
        return _mscale(self.factor, self.mscale_all_dim) ** 2


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3-style model and how much of it runs.

    Attributes:
        num_layers: layers to run, the first of `num_hidden_layers`.
        num_hidden_layers: decoder layers that the checkpoint has, next-token layers not counted.
        first_k_dense_replace: layers below it have a dense MLP, the others experts.
        q_lora_rank: None where one matrix makes the queries.
        num_experts: routed experts of a layer; 0 where no layer has any.
        rms_eps: of the hidden-size norms.
        latent_rms_eps: of `q_a_layernorm` and `kv_a_layernorm`, which transformers and DeepSeek's
            own code build without the configured epsilon.
        act_dtype: of activations, KV cache and unquantised weights: bfloat16, float16 or float32.
        weight_format: "plain" keeps linear weights in `act_dtype`; "fp8" in e4m3 with one float32
            scale per 128x128 block.
        max_position: tokens that the rotary embedding was configured for.
        head_shards: ranks that share the head by vocabulary; rank r holds `head_rows` of its rows,
            from r * head_rows on.
    Raises:
        UnsupportedModel: fields that contradict each other.
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    num_hidden_layers: int
    first_k_dense_replace: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    rope: RopeConfig
    moe_intermediate_size: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_shared_experts: int = 0
    has_router_bias: bool = True
    rms_eps: float = 1e-6
    latent_rms_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position: int = 4096
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    act_dtype: str = "bfloat16"
    weight_format: str = "plain"
    head_shards: int = 1

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_rope()
        if self.first_k_dense_replace < self.num_layers or self.num_experts:
            self._check_experts()

    @classmethod
    def from_hf(
        cls,
        hf: Mapping[str, Any],
        *,
        layers: int | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> ModelConfig:
        """Read a parsed `config.json` of transformers 4 or 5.

        Args:
            layers: run only the first so many layers.
            overrides: HF keys, `dtype` or `quantization` (fp8 | none) that replace the file's;
                from strings with `parse_overrides`.
        Raises:
            UnsupportedModel: names the field, what it holds and what is accepted.
        """
        hf = apply_overrides(hf, overrides or {}, layers=layers)
        fields = fields_from_hf(hf, layers=layers)
        return cls(**{**fields, "rope": RopeConfig(**fields["rope"])})

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Elements that a token puts in the KV cache: normed latent, then rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        return float(self.qk_head_dim**-0.5 * self.rope.softmax_factor)

    @property
    def is_fp8(self) -> bool:
        return self.weight_format == "fp8"

    @property
    def rope_interleave(self) -> bool:
        return self.rope.interleave

    @property
    def q_part_width(self) -> int:
        """Rows of `qkv_a` that make the query, or its low-rank latent."""
        return self.q_lora_rank or self.num_heads * self.qk_head_dim

    @property
    def q_part_padded(self) -> int:
        """The first row of `qkv_a` that makes the KV latent."""
        return self.padded(self.q_part_width)

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared experts, which are one MLP."""
        return self.num_shared_experts * self.moe_intermediate_size

    def padded(self, rows: int) -> int:
        """Rows that a part takes where another part follows: FP8 scale blocks must not straddle."""
        return -(-rows // FP8_BLOCK) * FP8_BLOCK if self.is_fp8 else rows

    @property
    def head_rows(self) -> int:
        """Rows of the head that a rank holds, in whole tiles where ranks share it."""
        if self.head_shards == 1:
            return self.vocab_size
        return part_rows(self.vocab_size, self.head_shards)

    def head_range(self, rank: int) -> range:
        """Tokens whose rows of the head a rank holds; what lies past them counts nowhere."""
        return part_of(self.vocab_size, self.head_shards, rank)

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace

    def digest(self) -> str:
        """sha256 of every field, the same in every process."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def _check_sizes(self) -> None:
        for name in (
            *("hidden_size", "vocab_size", "num_hidden_layers", "num_heads", "kv_lora_rank"),
            *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size"),
            *("max_position", "rms_eps", "latent_rms_eps", "routed_scaling_factor"),
        ):
            if not getattr(self, name) > 0:
                raise refuse(name, "a positive number", getattr(self, name))
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise refuse("q_lora_rank", "a positive integer or null", self.q_lora_rank)
        if not 1 <= self.num_layers <= self.num_hidden_layers:
            expected = f"1 … {self.num_hidden_layers}, the layers of the model"
            raise refuse("layers", expected, self.num_layers, "leave --layers out to run all")
        if self.act_dtype not in DTYPES:
            raise refuse("dtype", " or ".join(DTYPES), self.act_dtype)
        if self.weight_format not in ("plain", "fp8"):
            raise refuse("quantization", "fp8 or none", self.weight_format)

    def _check_rope(self) -> None:
        rope = self.rope
        if self.qk_rope_head_dim % 2:
            raise refuse("qk_rope_head_dim", "an even number", self.qk_rope_head_dim)
        if rope.kind not in ("default", "yarn"):
            raise refuse("rope type", "'default' or 'yarn'", rope.kind)
        if not rope.theta > 1:
            raise refuse("rope_theta", "a number above 1", rope.theta)
        if not rope.factor >= 1:
            raise refuse("rope factor", "a number >= 1", rope.factor, "YaRN extends a context")
        for name in ("original_max_position", "beta_fast", "beta_slow"):
            if not getattr(rope, name) > 0:
                raise refuse(f"rope {name}", "a positive number", getattr(rope, name))

    def _check_experts(self) -> None:
        E, groups = self.num_experts, self.n_group
        for name in ("num_experts", "experts_per_token", "moe_intermediate_size", "topk_group"):
            if getattr(self, name) < 1:
                raise refuse(name, "a positive integer", getattr(self, name))
        if self.num_shared_experts < 0:
            raise refuse("n_shared_experts", "0 or more", self.num_shared_experts)
        if groups < 1 or E % groups:
            expected = f"a divisor of n_routed_experts = {E}"
            raise refuse("n_group", expected, groups, "override n_group or n_routed_experts")
        if groups > 1 and E // groups < 2:
            # A group is scored by its two best experts.
            expected = f"at most {E // 2}, two experts a group"
            raise refuse("n_group", expected, groups, "override n_group or n_routed_experts")
        if self.topk_group > groups:
            expected = f"at most n_group = {groups}"
            raise refuse("topk_group", expected, self.topk_group, "override topk_group")
        kept = self.topk_group * (E // groups)
        if self.experts_per_token > kept:
            expected = f"at most {kept}, the experts of the {self.topk_group} kept groups"
            raise refuse(
                "num_experts_per_tok",
                expected,
                self.experts_per_token,
                "override num_experts_per_tok, topk_group or n_group",
            )
