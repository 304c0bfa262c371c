"""Decode attention for Hopper, in CUDA C++: one work item of `mla_plan` after another."""

from __future__ import annotations

import torch

from kernels.cuda.source import CudaKernel
from kernels.triton.launch import Launcher, TensorMap
from kernels.triton.mla_plan import TILE_KV, TILE_Q, PlanLayout
from kernels.triton.overlap import OFF

LATENT, WIDTH = 512, 576  # of a KV token: the part that is value, too, and all of it
PAGE = TILE_KV  # KV tokens of a page: what one copy moves
TILE_COLS = 64  # bf16 of a swizzled row of shared memory
WARP_ROWS = 16  # heads that one warp writes
NUM_WARPS = 12  # scores, values and loads: a warpgroup each
LOG2_E = 1.4426950408889634

HOPPER_MLA = CudaKernel(
    name="hopper_mla",
    where="kernels.cuda.mla_decode:HOPPER_MLA",
    file="mla_decode.cu",
    params=(
        *("q_map", "kv_map", "out_map", "part_map", "cache", "page_table", "work", "part_lse"),
        *("capacity", "work_indptr", "table_entries", "num_pages", "scale"),
    ),
    constexprs=("CLUSTER", "BLOCKS"),
    cluster="CLUSTER",
    shared_bytes=232448,  # all that a block may have
)


def hopper_mla(
    launch: Launcher,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    page_table: torch.Tensor,
    *,
    softmax_scale: float,
    layout: PlanLayout,
    ws: torch.Tensor,
    out: torch.Tensor,
    part_o: torch.Tensor,
    part_lse: torch.Tensor,
) -> None:
    """Attend with every token of a planned step; `mla_decode.merge` adds its splits.

    A token of one split gets its result in `out`, one of several in `part_o` and `part_lse`; a
    token of length 0 gets nothing.

    Args:
        q: bf16 [T, H, 576], contiguous, H 64 or 128; latent part, then rotated part.
        kv_cache: bf16 [num_slots, 576], contiguous, in pages of 64 tokens.
        page_table: int32 [max_rows, max_pages], contiguous.
        softmax_scale: of the scores, before the softmax.
        layout: of `ws`.
        ws: int32, written by `mla_plan` for this step and a cut in multiples of 64.
        out: bf16 [T, H, 512], contiguous.
        part_o: bf16 [T, splits, H, 512], scratch.
        part_lse: float32 [T, splits, H], scratch; in base 2.
    Raises:
        ValueError: shapes that do not fit.
    Capture-safe. A token's bits depend on its own query and KV alone.
    Source: two products a KV block after FlashAttention-3 (Shah et al., 2024) and FlashMLA's
        description of its kernel for Hopper; the code is our own.
    """
    _check(q, kv_cache, out, part_o, layout)
    blocks = layout.cluster
    launch(
        HOPPER_MLA,
        (layout.num_clusters,),
        TensorMap(q.view(-1, WIDTH), (TILE_Q, TILE_COLS)),
        TensorMap(kv_cache, (PAGE // blocks, TILE_COLS)),
        TensorMap(out.view(-1, LATENT), (WARP_ROWS, TILE_COLS)),
        TensorMap(part_o.view(-1, LATENT), (WARP_ROWS, TILE_COLS)),
        kv_cache,
        page_table,
        ws,
        part_lse,
        layout.capacity,
        layout.work_indptr,
        page_table.numel(),
        kv_cache.shape[0] // PAGE,
        float(softmax_scale) * LOG2_E,
        num_warps=NUM_WARPS,
        num_stages=0,
        pdl=launch.pdl != OFF,
        CLUSTER=blocks,
        BLOCKS=blocks,
    )


def _check(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
    part_o: torch.Tensor,
    layout: PlanLayout,
) -> None:
    tokens, heads, width = q.shape
    if heads not in (TILE_Q, 2 * TILE_Q) or width != WIDTH or kv_cache.shape[1] != WIDTH:
        raise ValueError(
            f"expected {TILE_Q} or {2 * TILE_Q} heads and rows of {WIDTH}, got q of "
            f"{tuple(q.shape)} and a cache of {tuple(kv_cache.shape)}; use another attention"
        )
    shapes = (tuple(out.shape), tuple(part_o.shape), (layout.tokens, layout.num_heads))
    if shapes != ((tokens, heads, LATENT), (tokens, layout.splits, heads, LATENT), (tokens, heads)):
        raise ValueError(
            f"out, part_o and the plan must be for {tokens} tokens of {heads} heads, got {shapes}"
        )
    if not (q.is_contiguous() and kv_cache.is_contiguous() and out.is_contiguous()):
        raise ValueError("q, kv_cache and out must be contiguous")
