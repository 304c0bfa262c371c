"""Decode attention through our own kernel for Hopper, planned on the device and merged by us."""

from __future__ import annotations

import torch

from graphs.model_config import ModelConfig
from graphs.planned_mla import PlannedMla, no_hopper
from kernels.cuda.mla_decode import PAGE, hopper_mla
from kernels.triton.launch import Launcher
from kernels.triton.mla_plan import TILE_Q, PlanLayout


class HopperMla(PlannedMla):
    """`hopper_mla` for one model: `plan` once a step, `run` once a layer; both capture-safe.

    Raises:
        ValueError: sizes that the kernel does not take.
    """

    def __init__(self, *, num_heads: int, page_size: int, softmax_scale: float, cut: int) -> None:
        super().__init__(
            num_heads=num_heads, page_size=page_size, softmax_scale=softmax_scale, cut=cut
        )
        if page_size != PAGE:
            raise ValueError(
                f"--attention hopper takes pages of {PAGE} tokens, got {page_size}; use "
                f"--page-size {PAGE} or another attention"
            )

    @staticmethod
    def available(model: ModelConfig, page_size: int) -> tuple[bool, str]:
        """Whether this process can run the kernel for this model, and the reason."""
        reason = HopperMla.unfit_here(model, page_size) or no_hopper("our own MLA")
        return (not reason), reason or "our own MLA for Hopper"

    @staticmethod
    def unfit_here(model: ModelConfig, page_size: int) -> str:
        """Why the kernel does not take this model in such pages; empty if it does."""
        if page_size != PAGE:
            return f"our own MLA takes pages of {PAGE} tokens, not {page_size}"
        if model.num_heads not in (TILE_Q, 2 * TILE_Q):
            return f"our own MLA takes {TILE_Q} or {2 * TILE_Q} heads, not {model.num_heads}"
        return PlannedMla.unfit(model)

    def attend(
        self,
        launch: Launcher,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        page_table: torch.Tensor,
        *,
        layout: PlanLayout,
        ws: torch.Tensor,
        part_o: torch.Tensor,
        part_lse: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """As `PlannedMla.attend`."""
        hopper_mla(
            launch,
            q,
            kv_cache,
            page_table,
            softmax_scale=self.softmax_scale,
            layout=layout,
            ws=ws,
            out=out,
            part_o=part_o,
            part_lse=part_lse,
        )
