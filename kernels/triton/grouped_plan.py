"""How the products of the routed experts are cut, and what their launchers check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from kernels.triton.launch import Arg, Launcher, TensorMap
from kernels.triton.overlap import OFF, overlap
from kernels.triton.tiles import (
    BLOCK_K_BYTES,
    BUDGET_BYTES,
    FP8_GROUP,
    FP32_BLOCK_N,
    check_fp8,
    check_scale,
    pipeline_stages,
    tile_source,
)
from kernels.triton.weight_tiles import TILE_ROWS, check_tiles, extents, in_tiles

BLOCK_N = 128  # weight rows of a tile; one quantisation group of the experts' hidden activation
PAIR_BLOCKS = (16, 32, 64)  # pairs of a tile; an expert's own count chooses, on the device


@dataclass(frozen=True)
class GroupedPlan:
    """How the experts' products are cut; changes no bit.

    Attributes:
        block_n: weight rows of a tile: 64 or 128; FP8 gate_up takes 128, a quantisation group.
        per_sm: programs that are to share an SM; decides how deep each is pipelined.
        prefetch: blocks of K whose weights are asked for before the inputs are there: 0, 1, 2 or 4.
        chain: of down: programs of so many experts, the first ones, wait for their own expert's
            hidden activation instead of for all of gate_up, and so fill its tail; about as many
            experts as have programs on the chip at once. Of gate_up: not 0 lets down's programs
            start as soon as there is room for them. Without `ready`, and where there are fewer
            pairs than experts, all wait for all.
    """

    block_n: int = BLOCK_N
    per_sm: int = 2
    prefetch: int = 0
    chain: int = 0

    def __post_init__(self) -> None:
        if self.block_n not in (64, 128) or self.per_sm not in BUDGET_BYTES:
            raise ValueError(f"expected block_n 64 or 128 and 1 to 3 programs, got {self}")
        if self.prefetch not in (0, 1, 2, 4):
            raise ValueError(f"expected prefetch 0, 1, 2 or 4, got {self}")
        if self.chain < 0:
            raise ValueError(f"expected a number of experts to chain, 0 for none, got {self}")


# Measured in whole steps on an H200 (h200_weight_tiles.json of bench/results). Why 8: so many
# experts of DeepSeek-V3 have their programs, 56 each, on the chip at once, three an SM.
GATE_UP_PLAN = GroupedPlan(chain=1)
DOWN_PLAN = GroupedPlan(per_sm=3, prefetch=1, chain=8)


@dataclass(frozen=True)
class Tiles:
    """How the experts' weights are cut, and how the kernel reads them.

    Attributes:
        lines: the weights behind a plain pointer.
        compact: there are fewer pairs than experts, and a program looks for its own.
        options: constexprs that both kernels have, and how they are launched.
    """

    w: Arg
    lines: torch.Tensor
    grid: tuple[int, int]
    compact: bool
    options: dict[str, Any]

    @classmethod
    def of(
        cls,
        launch: Launcher,
        plan: GroupedPlan,
        w: torch.Tensor,
        rows: int,
        halves: int,
        num_pairs: int,
        most: int,
        *,
        fp8: bool,
    ) -> Tiles:
        """Cut w [E, halves * rows, K]; a program takes the same tile of each half.

        Args:
            w: or the same in tiles.
            most: pairs that an expert has if no token chooses it twice; taller tiles would only
                take registers. (An expert with more is still right, tile after tile.)
        """
        num_experts, _, k = extents(tuple(w.shape))
        lines = w.view(-1, w.shape[-1])
        block_n = FP32_BLOCK_N if w.dtype == torch.float32 else plan.block_n
        if fp8 and halves == 2 and block_n != FP8_GROUP:
            raise ValueError(f"FP8 gate_up needs block_n {FP8_GROUP}, got {plan}")
        block_k = BLOCK_K_BYTES // w.element_size()
        source = lines if w.dtype == torch.float32 else tile_source(lines, (block_n, block_k))
        bulk = isinstance(source, TensorMap)
        highest = next((h for h in PAIR_BLOCKS if h >= most), PAIR_BLOCKS[-1]) if bulk else 16
        per_sm = plan.per_sm if fp8 else 2
        if fp8 and halves == 2 and highest > 32:
            per_sm = 1  # two tall fp32 accumulators and a partial product take all registers
        budget = BUDGET_BYTES[per_sm]
        stages = {
            height: max(2, pipeline_stages(halves * block_n, height, budget))
            for height in PAIR_BLOCKS
        }
        compact = num_pairs < num_experts
        options = {
            "E": num_experts,
            "E_POW2": triton.next_power_of_2(num_experts),
            "COMPACT": compact,
            "K": k,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "FP8": fp8,
            "W_TMA": bulk,
            "EVEN_N": rows % block_n == 0,
            "EVEN_K": k % block_k == 0,
            "TILED": in_tiles(w),
            "HIGHEST": highest,
            **{f"STAGES_{height}": stages[height] for height in PAIR_BLOCKS},
            # Which expert a slot of a compact grid takes is known only once the lists are there.
            "PREFETCH": plan.prefetch if bulk and not compact and launch.pdl != OFF else 0,
            "num_warps": max(4, block_n * halves // 32),  # a warp group for each tile of 128 rows
            "num_stages": stages[highest],
            **overlap(launch),
        }
        return cls(
            w=source,
            lines=lines,
            # No more experts can have pairs than there are pairs: idle programs cost a step, too.
            grid=(triton.cdiv(rows, block_n), min(num_experts, num_pairs)),
            compact=compact,
            options=options,
        )


def or_stand_in(scale: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    return stand_in if scale is None else scale


def check_operands(
    name: str,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    w: torch.Tensor,
    w_scale: torch.Tensor | None,
    halves: int = 1,
) -> tuple[int, int]:
    """(E, rows of a half) of weights that fit the activations, which are FP8 if they have scales.

    Args:
        name: of the activations, for messages.
        halves: parts of an expert's rows, each with whole tiles and scale rows of its own.
    """
    num_experts, rows, k = _check_weight(w, x, halves)
    if x_scale is not None:
        groups, scale_rows = triton.cdiv(k, FP8_GROUP), halves * triton.cdiv(rows, FP8_GROUP)
        check_fp8(name, x)
        check_scale(f"{name}_scale", x_scale, (x.shape[0], groups))
        check_scale("w_scale", w_scale, (num_experts, scale_rows, groups))
    return num_experts, rows


def _check_weight(w: torch.Tensor, x: torch.Tensor, halves: int) -> tuple[int, int, int]:
    if w.ndim not in (3, 5):
        raise ValueError(f"weights must be [E, rows, K], or that in tiles, got {list(w.shape)}")
    num_experts, rows, k = extents(tuple(w.shape))
    if x.ndim != 2 or x.shape[1] != k or x.stride(1) != 1 or x.shape[0] == 0:
        raise ValueError(
            f"activations must be [at least 1, {k}] with last stride 1 for weights {list(w.shape)},"
            f" got {list(x.shape)} with strides {list(x.stride())}"
        )
    if w.dtype != x.dtype or not w.is_contiguous():
        raise ValueError(
            f"weights must be contiguous and of the activations' {x.dtype}, got {w.dtype}"
            f" with strides {list(w.stride())}"
        )
    check_tiles(w)
    if in_tiles(w) and rows % (halves * TILE_ROWS):
        raise ValueError(
            f"each of {halves} halves must be whole tiles of {TILE_ROWS} rows, got {rows} rows "
            "together; keep such weights in rows"
        )
    return num_experts, rows // halves, k


def check_lists(
    offsets: torch.Tensor, pairs: torch.Tensor, num_experts: int, num_pairs: int
) -> None:
    for name, tensor, size in (
        ("offsets", offsets, num_experts + 1),
        ("pairs", pairs, num_pairs),
    ):
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != (size,):
            raise ValueError(
                f"{name} must be int32 [{size}], got {tensor.dtype} {list(tensor.shape)}"
            )


def check_out(out: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype | None) -> None:
    if tuple(out.shape) != shape or not out.is_contiguous() or dtype not in (None, out.dtype):
        raise ValueError(
            f"out must be contiguous {list(shape)} of {dtype or 'the act dtype'},"
            f" got {out.dtype} {list(out.shape)} with strides {list(out.stride())}"
        )
