"""What the planned MLA kernels share: the sizes they take, the work list, the partial results.

A token's KV is cut at fixed multiples; `mla_plan` deals the pieces to pairs of SMs, a kernel works
through them, and `merge` adds a token's pieces in order. The objects own no device memory: work
list and partial results are buffers of the step (`workspace`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from graphs.model_config import ModelConfig
from kernels.triton.launch import Launcher
from kernels.triton.mla_decode import merge
from kernels.triton.mla_plan import TILE_KV, TILE_Q, PlanLayout, mla_plan

LATENT_DIM, ROPE_DIM = 512, 64  # what the kernels are written for
MAX_HEADS = 2 * TILE_Q  # one query tile for each of two SMs
MAX_SMS = 160  # sizes the workspace the same on every Hopper chip


class PlannedMla(ABC):
    """Base of `FlashinferMla` and `HopperMla`: `plan` once a step; capture-safe.

    Args:
        num_heads: query heads.
        page_size: KV tokens of a page.
        softmax_scale: of the scores.
        cut: KV tokens of a split, a multiple of 64.
    Raises:
        ValueError: sizes that the kernels do not take.
    """

    def __init__(self, *, num_heads: int, page_size: int, softmax_scale: float, cut: int) -> None:
        if not 1 <= num_heads <= MAX_HEADS or cut % TILE_KV:
            raise ValueError(
                f"planned MLA takes 1 … {MAX_HEADS} heads and cuts in multiples of {TILE_KV}, "
                f"got {num_heads} and {cut}"
            )
        self.num_heads, self.page_size, self.cut = num_heads, page_size, cut
        self.softmax_scale = softmax_scale

    @staticmethod
    def unfit(model: ModelConfig) -> str:
        """Why the kernel does not take this model; empty if it does."""
        got = (model.kv_lora_rank, model.qk_rope_head_dim)
        if got != (LATENT_DIM, ROPE_DIM):
            return (
                f"planned MLA takes a latent of {LATENT_DIM} and a rotary part of {ROPE_DIM}, "
                f"not {got}"
            )
        if model.act_dtype != "bfloat16":
            return f"planned MLA takes bfloat16, not {model.act_dtype}"
        if model.num_heads > MAX_HEADS:
            return f"planned MLA takes at most {MAX_HEADS} heads a token, not {model.num_heads}"
        return ""

    @staticmethod
    def workspace(
        tokens: int, num_heads: int, splits: int
    ) -> list[tuple[str, tuple[int, ...], str]]:
        """(name, shape, dtype) of the buffers that `plan` and `run` take; a function of sizes only.

        Args:
            tokens: step tokens of the largest key.
            splits: splits that the longest row takes.
        """
        words = PlanLayout(tokens, splits, num_heads, MAX_SMS).words
        return [
            ("mla_plan", (words,), "int32"),
            ("part_o", (tokens, splits, num_heads, LATENT_DIM), "bfloat16"),
            ("part_lse", (tokens, splits, num_heads), "float32"),
        ]

    def plan(
        self,
        launch: Launcher,
        tok_row: torch.Tensor,
        kv_len: torch.Tensor,
        *,
        page_table: torch.Tensor,
        ws: torch.Tensor,
        part_o: torch.Tensor,
    ) -> None:
        """Write the step's work list.

        Args:
            tok_row, kv_len: int32 [T]; kv_len 0 is padding.
            page_table: int32 [max_rows, max_pages].
            ws: int32, the "mla_plan" buffer.
            part_o: the buffer that `run` will get; gives the number of splits.
        """
        mla_plan(
            launch,
            tok_row,
            kv_len,
            max_pages=page_table.shape[1],
            cut=self.cut,
            layout=self.layout(launch, part_o),
            ws=ws,
        )

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
        layout = self.layout(launch, part_o)
        buffers = {"ws": ws, "part_o": part_o, "part_lse": part_lse, "out": out}
        self.attend(launch, q, kv_cache, page_table, layout=layout, **buffers)
        if merges and part_o.shape[1] > 1:
            merge(launch, kv_len, part_o, part_lse, cut=self.cut, out=out)

    @abstractmethod
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
        """`run` without its checks and its merge: `out` of tokens of one split, parts of others."""

    def layout(self, launch: Launcher, part_o: torch.Tensor) -> PlanLayout:
        """Of the work list, for the launcher's device.

        Raises:
            ValueError: a device of more SMs than the list has room for.
        """
        if launch.num_sms > MAX_SMS:
            raise ValueError(
                f"the plan is sized for {MAX_SMS} SMs, got {launch.num_sms}; raise MAX_SMS"
            )
        return PlanLayout(part_o.shape[0], part_o.shape[1], self.num_heads, launch.num_sms)

    def check(self, kv_cache: torch.Tensor, page_table: torch.Tensor, part_o: torch.Tensor) -> None:
        """Raises ValueError: buffers that do not fit."""
        if part_o.dtype != torch.bfloat16 or kv_cache.dtype != torch.bfloat16:
            raise ValueError(
                f"kv_cache and part_o must be bfloat16, got {kv_cache.dtype} and {part_o.dtype}"
            )
        if not page_table.is_contiguous() or not kv_cache.is_contiguous():
            raise ValueError("page_table and kv_cache must be contiguous")
        # The kernels multiply row and width in 32 bits.
        if part_o.numel() >= 2**32 or page_table.numel() * self.page_size >= 2**32:
            raise ValueError(
                f"partial results of {part_o.numel()} elements and a page table of "
                f"{page_table.numel()} entries pass the kernel's 32-bit offsets; "
                "use a longer cut, fewer step tokens or --attention triton"
            )


def no_hopper(kernel: str) -> str:
    """Why this process cannot run kernels of sm_90a; empty if it can."""
    if not torch.cuda.is_available():
        return f"{kernel} needs a CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return "" if (major, minor) == (9, 0) else f"{kernel} needs sm_90, this is sm_{major}{minor}"
