"""Decode attention through our own kernel for Hopper, planned on the device and merged by us."""

from __future__ import annotations

import torch

from graphs.model_config import ModelConfig
from graphs.planned_mla import PlannedMla, no_hopper
from kernels.cuda.mla_decode import PAGE, hopper_mla
from kernels.triton.launch import Launcher
from kernels.triton.mla_decode import merge
from kernels.triton.mla_plan import TILE_Q


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

    def run(
        self,
        launch: Launcher,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        page_table: torch.Tensor,
        kv_len: torch.Tensor,
        *,
        ws: torch.Tensor,
        part_o: torch.Tensor,
        part_lse: torch.Tensor,
        out: torch.Tensor,
        merges: bool = True,
    ) -> None:
        """Attend with every token of the planned step.

        A token of length 0 gets zeros from the merge, and nothing where none runs: `absorb_v` does
        not look at what such a token has.

        Args:
            q: bf16 [T, H, 576], absorbed: latent part, then rotated part.
            kv_cache: bf16 [num_slots, 576], contiguous.
            page_table: int32 [max_rows, max_pages], contiguous.
            kv_len: int32 [T], as planned.
            ws: int32, as planned.
            part_o: bf16 [T, splits, H, 512], scratch.
            part_lse: float32 [T, splits, H], scratch.
            out: bf16 [T, H, 512].
            merges: False leaves the splits of a token longer than `cut` where they are.
        Raises:
            ValueError: buffers that do not fit.
        """
        self.check(kv_cache, page_table, part_o)
        hopper_mla(
            launch,
            q,
            kv_cache,
            page_table,
            softmax_scale=self.softmax_scale,
            layout=self.layout(launch, part_o),
            ws=ws,
            out=out,
            part_o=part_o,
            part_lse=part_lse,
        )
        if merges and part_o.shape[1] > 1:
            merge(launch, kv_len, part_o, part_lse, cut=self.cut, out=out)
