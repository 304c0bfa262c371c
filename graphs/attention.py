"""Which kernel the decode attention takes; the choice is made at capture and recorded.

All implementations cut a row's KV at fixed multiples of `cut` and merge in that order, so a row's
bits do not depend on its neighbours. They differ in bits from each other: a runtime uses one of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch

from graphs.flashinfer_mla import FlashinferMla
from graphs.hopper_mla import HopperMla
from graphs.model_config import ModelConfig
from graphs.ops import Ops
from graphs.step_config import StepConfig
from kernels.triton.mla_absorb_v import Parts, takes_parts

Buffers = Mapping[str, torch.Tensor]


class Attention(Protocol):
    """Decode attention of a step: `plan` once, then `run` once a layer; both capture-safe.

    `run` returns what it has left in splits, if it does not merge them itself.

    Attributes:
        libraries: host libraries that hold kernels of it which we did not compile.
    """

    @property
    def libraries(self) -> tuple[Path, ...]: ...

    def plan(self, b: Buffers) -> None: ...

    def run(self, b: Buffers, kv_cache: torch.Tensor) -> Parts | None: ...


class TritonAttention:
    """Split-KV decode by our own kernel; takes any shape and needs no plan."""

    def __init__(self, cfg: ModelConfig, config: StepConfig, ops: Ops) -> None:
        self._cfg, self._config, self._ops = cfg, config, ops

    @property
    def libraries(self) -> tuple[Path, ...]:
        """All its kernels are ours."""
        return ()

    def plan(self, b: Buffers) -> None:
        """Nothing to plan: a token's splits follow from its own length."""

    def run(self, b: Buffers, kv_cache: torch.Tensor) -> None:
        self._ops.mla_decode(
            b["q_latent"],
            kv_cache,
            b["page_table"],
            b["tok_row"],
            b["kv_len"],
            page_size=self._config.page_size,
            softmax_scale=self._cfg.softmax_scale,
            cut=self._config.cut,
            out=b["o_latent"],
            part_o=b["part_o"],
            part_lse=b["part_lse"],
        )


class PlannedAttention:
    """An MLA kernel that works through a plan made on the device."""

    kernel: type[FlashinferMla] | type[HopperMla]

    def __init__(self, cfg: ModelConfig, config: StepConfig, ops: Ops) -> None:
        assert ops.launch is not None, "the CPU twin has no such kernels"
        self._launch, self._value_dim = ops.launch, cfg.v_head_dim
        self._mla = self.kernel(
            num_heads=cfg.num_heads,
            page_size=config.page_size,
            softmax_scale=cfg.softmax_scale,
            cut=config.cut,
        )

    @property
    def libraries(self) -> tuple[Path, ...]:
        """flashinfer's own; of our kernels, none."""
        return (self._mla.library(),) if isinstance(self._mla, FlashinferMla) else ()

    def plan(self, b: Buffers) -> None:
        """Write the work list of a step, for all its layers."""
        self._mla.plan(
            self._launch,
            b["tok_row"],
            b["kv_len"],
            page_table=b["page_table"],
            ws=b["mla_plan"],
            part_o=b["part_o"],
        )

    def run(self, b: Buffers, kv_cache: torch.Tensor) -> Parts | None:
        """Splits are left to `absorb_v` where it takes so many, else our merge adds them."""
        tokens, splits, _, dc = b["part_o"].shape
        left = takes_parts(tokens, splits, dv=self._value_dim, dc=dc, act_bytes=2)
        self._mla.run(
            self._launch,
            b["q_latent"],
            kv_cache,
            b["page_table"],
            b["kv_len"],
            ws=b["mla_plan"],
            part_o=b["part_o"],
            part_lse=b["part_lse"],
            out=b["o_latent"],
            merges=not left,
        )
        return Parts(b["part_o"], b["part_lse"], self._mla.cut) if left else None


class FlashinferAttention(PlannedAttention):
    """flashinfer's FA3 kernel."""

    kernel = FlashinferMla


class HopperAttention(PlannedAttention):
    """Our own kernel for Hopper."""

    kernel = HopperMla


def attend(
    attention: Attention, ops: Ops, b: Buffers, kv_cache: torch.Tensor, w_uv: torch.Tensor
) -> None:
    """A layer's attention, from the absorbed query to the input of the product by W_O.

    Every layer of a step runs it, and a choice of attention is timed by it.

    Args:
        b: buffers of a key; "o" is written as it is there: plain, quantised or both.
        kv_cache: act [num_slots, dc+dr], of the layer.
        w_uv: act [H, dv, dc], of the layer.
    """
    parts = attention.run(b, kv_cache)
    attended, plain = (b["o_latent"], b["kv_len"], w_uv), b.get("o")
    if plain is None:
        ops.absorb_v(*attended, parts=parts, out_q=b["o_q"], out_scale=b["o_s"])
        return
    ops.absorb_v(*attended, parts=parts, out=plain)
    if "o_q" in b:
        ops.quantize(plain, out_q=b["o_q"], out_scale=b["o_s"])


ATTENTION: Mapping[str, Callable[[ModelConfig, StepConfig, Ops], Attention]] = {
    "triton": TritonAttention,
    "flashinfer": FlashinferAttention,
    "hopper": HopperAttention,
}
