"""Dense matrix products of a step: few tokens against weights that are streamed once.

The weight tile is the first operand of each tile product and the tokens the second ("swap-AB"), so
a handful of tokens still fills a tensor-core instruction. Invariants: the K order and the number of
K splits are functions of (N, K, number format) only, and every tile height along the tokens uses
the same instruction family and the same block along K: a token's bits depend on that token alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Arg, Launcher, TensorMap
from kernels.triton.linear_plan import LinearPlan, linear_plan
from kernels.triton.linear_splits import sum_splits
from kernels.triton.overlap import (
    OFF,
    await_inputs_streaming,
    overlap,
    prefetch_rows,
    release_dependents,
)
from kernels.triton.tiles import (
    BLOCK_K_BYTES,
    BUDGET_BYTES,
    FP8_GROUP,
    check_fp8,
    check_scale,
    dequantize_blocks,
    dequantize_rows,
    load_scale,
    load_tile,
    matmul_rows,
    pipeline_stages,
    prefetch_weight,
    store_tokens_major,
    tile_source,
)
from kernels.triton.weight_tiles import as_rows, check_tiles, extents, in_tiles

TOKEN_BLOCKS = (16, 32, 64, 128)
FP32_TOKEN_BLOCKS = (16, 32)


@triton.jit
def _split_range(split, BLOCKS: tl.constexpr, SPLITS: tl.constexpr):
    """The K blocks [begin, end) of one split."""
    if SPLITS == 1:
        return 0, BLOCKS
    return split * BLOCKS // SPLITS, (split + 1) * BLOCKS // SPLITS


@triton.jit
def _linear_kernel(
    x,  # bf16 or f16 [T, K], pitch X_PITCH
    w,  # as x [N, K], pitch W_PITCH
    w_rows,  # w behind a plain pointer
    dst,  # out [T, N], pitch OUT_PITCH; with splits f32 [SPLITS, T, N]
    num_tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    X_PITCH: tl.constexpr,
    W_PITCH: tl.constexpr,
    OUT_PITCH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILED: tl.constexpr,  # w lies in tiles: `weight_tiles`
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    t0 = tl.program_id(0) * BLOCK_T
    n0 = tl.program_id(1) * BLOCK_N
    split = tl.program_id(2)
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    begin, end = _split_range(split, blocks, SPLITS)
    if PREFETCH > 0:
        span: tl.constexpr = PREFETCH * BLOCK_K
        prefetch_weight(w_rows, n0, begin * BLOCK_K, N, K, W_PITCH, BLOCK_N, span, BLOCK_K, TILED)
    await_inputs_streaming(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for kb in tl.range(begin, end, num_stages=STAGES):
        k = kb * BLOCK_K
        wt = load_tile(w, n0, k, N, K, W_PITCH, BLOCK_N, BLOCK_K, W_TMA, EVEN_N, EVEN_K, TILED)
        xt = load_tile(x, t0, k, num_tokens, K, X_PITCH, BLOCK_T, BLOCK_K, X_TMA, False, EVEN_K)
        acc = tl.dot(wt, tl.trans(xt), acc)
    release_dependents(PDL)
    t = t0 + tl.arange(0, BLOCK_T)
    n = n0 + tl.arange(0, BLOCK_N)
    if SPLITS > 1:
        dst += tl.cast(split, tl.int64) * num_tokens * N
    store_tokens_major(dst, acc, n, t, num_tokens, N, OUT_PITCH)


@triton.jit
def _linear_fp32_kernel(
    x,  # act [T, K], pitch X_PITCH
    w,  # f32 [N, K], pitch W_PITCH
    w_rows,  # w behind a plain pointer
    dst,  # out [T, N], pitch OUT_PITCH; with splits f32 [SPLITS, T, N]
    num_tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    X_PITCH: tl.constexpr,
    W_PITCH: tl.constexpr,
    OUT_PITCH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    t0 = tl.program_id(0) * BLOCK_T
    n0 = tl.program_id(1) * BLOCK_N
    split = tl.program_id(2)
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    begin, end = _split_range(split, blocks, SPLITS)
    if PREFETCH > 0:
        prefetch_rows(w_rows, n0, begin * BLOCK_K, N, K, W_PITCH, BLOCK_N, PREFETCH * BLOCK_K)
    await_inputs_streaming(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    # The widened tokens pass through the loop's carried values, one block ahead. Where Triton 3.6
    # sees a 16-bit load behind an fp32 operand it takes TF32 tensor cores on sm_100, "ieee" or not.
    xt = load_tile(
        x, t0, begin * BLOCK_K, num_tokens, K, X_PITCH, BLOCK_T, BLOCK_K, False, False, EVEN_K
    ).to(tl.float32)
    for kb in tl.range(begin, end, num_stages=STAGES):
        wt = load_tile(w, n0, kb * BLOCK_K, N, K, W_PITCH, BLOCK_N, BLOCK_K, False, EVEN_N, EVEN_K)
        ahead = tl.minimum(kb + 1, end - 1) * BLOCK_K
        next_xt = load_tile(
            x, t0, ahead, num_tokens, K, X_PITCH, BLOCK_T, BLOCK_K, False, False, EVEN_K
        ).to(tl.float32)
        acc = tl.dot(wt, tl.trans(xt), acc, input_precision="ieee")
        xt = next_xt
    release_dependents(PDL)
    t = t0 + tl.arange(0, BLOCK_T)
    n = n0 + tl.arange(0, BLOCK_N)
    if SPLITS > 1:
        dst += tl.cast(split, tl.int64) * num_tokens * N
    store_tokens_major(dst, acc, n, t, num_tokens, N, OUT_PITCH)


@triton.jit
def _linear_fp8_kernel(
    x,  # e4m3 [T, K], pitch X_PITCH
    x_scale,  # f32 [T, K/128], pitch SCALE_PITCH
    w,  # e4m3 [N, K], pitch W_PITCH
    w_scale,  # f32 [N/128, K/128]
    w_rows,  # w behind a plain pointer
    dst,  # out [T, N], pitch OUT_PITCH; with splits f32 [SPLITS, T, N]
    num_tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    X_PITCH: tl.constexpr,
    SCALE_PITCH: tl.constexpr,
    W_PITCH: tl.constexpr,
    OUT_PITCH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILED: tl.constexpr,  # w lies in tiles: `weight_tiles`
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,  # blocks of K in one turn of the loop
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    t0 = tl.program_id(0) * BLOCK_T
    n0 = tl.program_id(1) * BLOCK_N
    split = tl.program_id(2)
    blocks: tl.constexpr = (K + 127) // 128
    t = t0 + tl.arange(0, BLOCK_T)
    begin, end = _split_range(split, blocks, SPLITS)
    if PREFETCH > 0:
        span: tl.constexpr = PREFETCH * 128
        prefetch_weight(w_rows, n0, begin * 128, N, K, W_PITCH, BLOCK_N, span, 128, TILED)
    await_inputs_streaming(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for first in tl.range(begin, end, UNROLL, num_stages=STAGES):
        for i in tl.static_range(UNROLL):
            kb = first + i
            if UNROLL > 1:
                kb = tl.minimum(kb, end - 1)
            k = kb * 128
            scale = load_scale(x_scale, t, t < num_tokens, kb, blocks, SCALE_PITCH, BLOCK_T)
            scale *= tl.load(w_scale + (n0 // 128) * blocks + kb)
            if UNROLL > 1:
                # A turn that is not full takes the last block again, and adds nothing.
                scale *= tl.where(first + i < end, 1.0, 0.0)
            wt = load_tile(w, n0, k, N, K, W_PITCH, BLOCK_N, 128, W_TMA, EVEN_N, EVEN_K, TILED)
            xt = load_tile(x, t0, k, num_tokens, K, X_PITCH, BLOCK_T, 128, X_TMA, False, EVEN_K)
            acc += tl.dot(wt, tl.trans(xt)) * scale[None, :]
    release_dependents(PDL)
    n = n0 + tl.arange(0, BLOCK_N)
    if SPLITS > 1:
        dst += tl.cast(split, tl.int64) * num_tokens * N
    store_tokens_major(dst, acc, n, t, num_tokens, N, OUT_PITCH)


def linear(
    launch: Launcher,
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    out: torch.Tensor,
    workspace: torch.Tensor | None = None,
    plan: LinearPlan | None = None,
) -> None:
    """out = x @ w.T, accumulated in fp32.

    Args:
        x: act dtype [T, K]; the row pitch may exceed K.
        w: [N, K] of x's dtype, which may lie in tiles (`weight_tiles`), or fp32: then x is widened
            and the product is IEEE fp32.
        out: act dtype or fp32 [T, N]; or fp32 [splits, T, N], then the K splits are left for the
            reader to add up in order (`tiles.add_parts`).
        workspace: fp32, at least `linear_workspace_elems` elements; its contents are lost.
        plan: instead of `linear_plan`'s, for measurements and pinned choices.
    Raises:
        ValueError: shapes or dtypes that do not fit, or too little workspace.
    Capture-safe: no sync, no allocation.
    """
    _check_product(x, w, out)
    if w.dtype not in (x.dtype, torch.float32) or x.element_size() == 1:
        raise ValueError(f"linear takes w of x's dtype {x.dtype} or float32, got {w.dtype}")
    plan = plan or linear_plan(*extents(tuple(w.shape)), elem_bytes=w.element_size())
    if w.dtype == torch.float32:
        tiles = _Tiles.of(x, w, plan, token_blocks=FP32_TOKEN_BLOCKS, bulk=False)
        kernel, sources = _linear_fp32_kernel, {}
    else:
        tiles = _Tiles.of(x, w, plan)
        kernel, sources = _linear_kernel, tiles.sources | {"TILED": in_tiles(w)}
    dst = tiles.destination(out, workspace)
    launch(
        kernel,
        tiles.grid,
        tiles.x,
        tiles.w,
        w.view(-1, w.shape[-1]),
        dst,
        x.shape[0],
        **tiles.constexprs(dst, launch),
        **sources,
        BLOCK_K=tiles.block_k,
        num_warps=tiles.num_warps,
        num_stages=tiles.stages,
        **overlap(launch),
    )
    tiles.sum_splits(launch, dst, out)


def linear_fp8(
    launch: Launcher,
    xq: torch.Tensor,
    xs: torch.Tensor,
    w: torch.Tensor,
    ws: torch.Tensor,
    *,
    out: torch.Tensor,
    workspace: torch.Tensor | None = None,
    plan: LinearPlan | None = None,
) -> None:
    """out = (xq * xs) @ (w * ws).T with scales per 128 of K (x) and per 128x128 block (w).

    Each block of K is multiplied in FP8, then scaled and added in fp32.

    Args:
        xq: e4m3 [T, K]; the row pitch may exceed K.
        xs: fp32 [T, ceil(K/128)].
        w: e4m3 [N, K], or the same in tiles (`weight_tiles`).
        ws: fp32 [ceil(N/128), ceil(K/128)].
        out: act dtype or fp32 [T, N]; or fp32 [splits, T, N], then the K splits are left for the
            reader to add up in order (`tiles.add_parts`).
        workspace: fp32, at least `linear_workspace_elems` elements; its contents are lost.
        plan: instead of `linear_plan`'s, for measurements and pinned choices.
    Raises:
        ValueError: shapes or dtypes that do not fit, or too little workspace.
    Capture-safe: no sync, no allocation.
    """
    _check_product(xq, w, out)
    check_fp8("xq", xq)
    check_fp8("w", w)
    n, k = extents(tuple(w.shape))
    groups = triton.cdiv(k, FP8_GROUP)
    check_scale("xs", xs, (xq.shape[0], groups), pitched=True)
    check_scale("ws", ws, (triton.cdiv(n, FP8_GROUP), groups))
    tiles = _Tiles.of(xq, w, plan or linear_plan(n, k, elem_bytes=1, tokens=xq.shape[0]))
    dst = tiles.destination(out, workspace)
    launch(
        _linear_fp8_kernel,
        tiles.grid,
        tiles.x,
        xs,
        tiles.w,
        ws,
        w.view(-1, w.shape[-1]),
        dst,
        xq.shape[0],
        **tiles.constexprs(dst, launch),
        **tiles.sources,
        TILED=in_tiles(w),
        UNROLL=tiles.unroll,
        SCALE_PITCH=xs.stride(0),
        num_warps=tiles.num_warps,
        num_stages=tiles.stages,
        **overlap(launch),
    )
    tiles.sum_splits(launch, dst, out)


@dataclass(frozen=True)
class _Tiles:
    """How one product is cut, and its operands as the kernel reads them."""

    x: Arg
    w: Arg
    num_tokens: int
    n: int
    k: int
    x_pitch: int
    w_pitch: int
    plan: LinearPlan
    fp32: bool  # weights without tensor cores: more warps hide more latency
    unroll: int
    block_t: int
    block_k: int
    stages: int

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        w: torch.Tensor,
        plan: LinearPlan,
        *,
        token_blocks: tuple[int, ...] = TOKEN_BLOCKS,
        bulk: bool = True,
    ) -> _Tiles:
        num_tokens, (n, k) = x.shape[0], extents(tuple(w.shape))
        block_t = next((b for b in token_blocks if b >= num_tokens), token_blocks[-1])
        block_k = BLOCK_K_BYTES // w.element_size()
        # The tallest tile takes the registers of two: neither a neighbour nor a second block.
        budget = BUDGET_BYTES[plan.per_sm if block_t < 128 else 1]
        unroll = plan.unroll if block_t < 128 else 1
        return cls(
            x=tile_source(x, (block_t, block_k)) if bulk else x,
            w=tile_source(w, (plan.block_n, block_k)) if bulk else w,
            num_tokens=num_tokens,
            n=n,
            k=k,
            x_pitch=x.stride(0),
            w_pitch=w.stride(-2),
            plan=plan,
            fp32=w.dtype == torch.float32,
            unroll=unroll,
            block_t=block_t,
            block_k=block_k,
            stages=max(2, pipeline_stages(plan.block_n, block_t, budget) // unroll),
        )

    @property
    def grid(self) -> tuple[int, int, int]:
        # Token tiles first: programs that share a weight tile run together, and HBM is read once.
        return (
            triton.cdiv(self.num_tokens, self.block_t),
            triton.cdiv(self.n, self.plan.block_n),
            self.plan.splits,
        )

    @property
    def num_warps(self) -> int:
        return 8 if self.fp32 else self.plan.block_n // 16  # a warp group for each 64 weight rows

    def constexprs(self, dst: torch.Tensor, launch: Launcher) -> dict[str, Any]:
        block_n, splits = self.plan.block_n, self.plan.splits
        return {
            "N": self.n,
            "K": self.k,
            "X_PITCH": self.x_pitch,
            "W_PITCH": self.w_pitch,
            "OUT_PITCH": self.n if splits > 1 else dst.stride(-2),
            "SPLITS": splits,
            "BLOCK_N": block_n,
            "BLOCK_T": self.block_t,
            "EVEN_N": self.n % block_n == 0,
            "EVEN_K": self.k % self.block_k == 0,
            "STAGES": self.stages,
            "PREFETCH": 0 if launch.pdl == OFF else self.plan.prefetch,
        }

    @property
    def sources(self) -> dict[str, Any]:
        return {"X_TMA": isinstance(self.x, TensorMap), "W_TMA": isinstance(self.w, TensorMap)}

    def destination(self, out: torch.Tensor, workspace: torch.Tensor | None) -> torch.Tensor:
        """Where the product kernel writes: `out`, or the workspace if K is split."""
        if out.ndim == 3 and out.shape[0] != self.plan.splits:
            raise ValueError(
                f"a {self.n}x{self.k} product has {self.plan.splits} parts, got room for "
                f"{out.shape[0]}; size it with linear_plan"
            )
        if self.plan.splits == 1 or out.ndim == 3:
            return out
        need = self.plan.splits * self.num_tokens * self.n
        if workspace is None or workspace.numel() < need or workspace.dtype != torch.float32:
            got = "none" if workspace is None else f"{workspace.numel()} of {workspace.dtype}"
            raise ValueError(
                f"a {self.n}x{self.k} product of {self.num_tokens} tokens is split in "
                f"{self.plan.splits}"
                f" along K and needs {need} float32 elements of workspace, got {got};"
                " size it with linear_workspace_elems"
            )
        return workspace

    def sum_splits(self, launch: Launcher, dst: torch.Tensor, out: torch.Tensor) -> None:
        if self.plan.splits > 1 and out.ndim == 2:
            sum_splits(launch, dst, out=out, splits=self.plan.splits)


def _check_product(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
    check_tiles(w)
    size = extents(tuple(w.shape))
    if x.ndim != 2 or len(size) != 2 or x.shape[1] != size[1]:
        raise ValueError(f"x [T, K] and w [N, K] expected, got {list(x.shape)}, {list(w.shape)}")
    if tuple(out.shape[-2:]) != (x.shape[0], size[0]) or x.shape[0] == 0:
        raise ValueError(
            f"out must be [{x.shape[0]}, {size[0]}] with at least one row, got {list(out.shape)}"
        )
    if out.ndim == 3 and (out.dtype != torch.float32 or not out.is_contiguous()):
        raise ValueError(f"parts must be contiguous float32, got {out.dtype} {out.stride()}")
    if x.stride(1) != 1 or w.stride(-1) != 1 or out.stride(-1) != 1:
        raise ValueError(
            "x, w and out need a last stride of 1; pass the rows of a contiguous buffer"
        )


def linear_ref(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    out: torch.Tensor,
    workspace: torch.Tensor | None = None,
) -> None:
    """Oracle of `linear`: fp32 product, one rounding."""
    _check_product(x, w, out)
    _store_ref(out, matmul_rows(x.float(), as_rows(w).float()))


def linear_fp8_ref(
    xq: torch.Tensor,
    xs: torch.Tensor,
    w: torch.Tensor,
    ws: torch.Tensor,
    *,
    out: torch.Tensor,
    workspace: torch.Tensor | None = None,
) -> None:
    """Oracle of `linear_fp8`: dequantise both operands, fp32 product, one rounding."""
    _check_product(xq, w, out)
    _store_ref(out, matmul_rows(dequantize_rows(xq, xs), dequantize_blocks(as_rows(w), ws)))


def _store_ref(out: torch.Tensor, product: torch.Tensor) -> None:
    """The oracle does not split K: all is in the first part."""
    if out.ndim == 2:
        out.copy_(product)
    else:
        out.zero_()[0].copy_(product)
