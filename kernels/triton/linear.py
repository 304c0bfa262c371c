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
from kernels.triton.overlap import (
    OFF,
    await_inputs,
    await_inputs_streaming,
    overlap,
    prefetch_rows,
    release_dependents,
)
from kernels.triton.tiles import (
    BLOCK_K_BYTES,
    BUDGET_BYTES,
    FP8_GROUP,
    FP32_BLOCK_N,
    check_fp8,
    check_scale,
    dequantize_blocks,
    dequantize_rows,
    load_scale,
    load_tile,
    matmul_rows,
    pipeline_stages,
    store_tokens_major,
    tile_source,
)

TOKEN_BLOCKS = (16, 32, 64, 128)
FP32_TOKEN_BLOCKS = (16, 32)
# The plan must be the same on every chip, so it counts on a fixed number of SMs.
MIN_PROGRAMS = 120
UNSPLIT_PROGRAMS = 112
SHORT_PRODUCT_BYTES = 32 << 20  # below it a second launch costs more than narrow tiles
SUM_BLOCK = 512
MANY_SPLITS, SUM_MANY_BLOCK = 8, 32  # from here on a program takes fewer results


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
    for kb in tl.range(begin, end, num_stages=STAGES):
        k = kb * BLOCK_K
        wt = load_tile(w, n0, k, N, K, W_PITCH, BLOCK_N, BLOCK_K, W_TMA, EVEN_N, EVEN_K)
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
        prefetch_rows(w_rows, n0, begin * 128, N, K, W_PITCH, BLOCK_N, PREFETCH * 128)
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
            wt = load_tile(w, n0, k, N, K, W_PITCH, BLOCK_N, 128, W_TMA, EVEN_N, EVEN_K)
            xt = load_tile(x, t0, k, num_tokens, K, X_PITCH, BLOCK_T, 128, X_TMA, False, EVEN_K)
            acc += tl.dot(wt, tl.trans(xt)) * scale[None, :]
    release_dependents(PDL)
    n = n0 + tl.arange(0, BLOCK_N)
    if SPLITS > 1:
        dst += tl.cast(split, tl.int64) * num_tokens * N
    store_tokens_major(dst, acc, n, t, num_tokens, N, OUT_PITCH)


@triton.jit
def _sum_splits_kernel(
    partial,  # f32 [SPLITS, T, N]
    out,  # [T, N], pitch OUT_PITCH
    num_tokens,
    N: tl.constexpr,
    OUT_PITCH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(num_tokens, tl.int64) * N
    acc = tl.load(partial + i, mask=i < size, other=0.0)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(partial + split * size + i, mask=i < size, other=0.0)
    at = i
    if OUT_PITCH != N:
        at = (i // N) * OUT_PITCH + i % N
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=i < size)


@triton.jit
def _sum_many_splits_kernel(
    partial,  # f32 [SPLITS, T, N]
    out,  # [T, N], pitch OUT_PITCH
    num_tokens,
    N: tl.constexpr,
    OUT_PITCH: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """All splits of a few results at once: one after the other they would take a latency each."""
    await_inputs(PDL)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(num_tokens, tl.int64) * N
    split = tl.arange(0, SPLITS_POW2)[:, None]
    inside = (split < SPLITS) & (i < size)[None, :]
    parts = tl.load(partial + split * size + i[None, :], mask=inside, other=0.0)
    at = i
    if OUT_PITCH != N:
        at = (i // N) * OUT_PITCH + i % N
    tl.store(out + at, tl.sum(parts, 0).to(out.dtype.element_ty), mask=i < size)


@dataclass(frozen=True)
class LinearPlan:
    """How a product is cut; the number of tokens has no say in it.

    Attributes:
        block_n: weight rows of a tile: 64 or 128; of fp32 weights 32 or 64.
        splits: parts that K is cut into, added up in order. The one choice that changes bits.
        unroll: blocks of K that one turn of the loop takes (FP8 only).
        per_sm: programs that are to share an SM; decides how deep each is pipelined.
        prefetch: blocks of K whose weights are asked for before the inputs are there.
    """

    block_n: int
    splits: int
    unroll: int = 1
    per_sm: int = 2
    prefetch: int = 4

    def __post_init__(self) -> None:
        if self.block_n not in (32, 64, 128) or min(self.splits, self.unroll) < 1:
            raise ValueError(
                "expected block_n 32 (fp32 weights), 64 or 128 and at least one split and block, "
                f"got {self}"
            )
        if self.per_sm not in BUDGET_BYTES:
            raise ValueError(f"expected 1 to 3 programs an SM, got {self}")
        if self.prefetch & (self.prefetch - 1):
            raise ValueError(f"prefetch must be 0 or a power of two, got {self.prefetch}")


def linear_plan(n: int, k: int, *, elem_bytes: int, tokens: int | None = None) -> LinearPlan:
    """The plan for a weight's shape and format.

    Wide weights fill the chip by themselves. Narrow ones are cut along K, unless tiles of half the
    height are enough and the product is so short that a second launch would cost more. fp32 weights
    have no tensor cores: they are cut until twice the chip is busy.

    Args:
        elem_bytes: of the weight: 1 (e4m3), 2 or 4.
        tokens: if they are known, tiles may suit them; they have no say in the splits.
    """
    if elem_bytes == 1 and tokens is not None and tokens <= FEW_TOKENS and (n, k) in MEASURED_FEW:
        return MEASURED_FEW[n, k]
    if elem_bytes == 1 and (n, k) in MEASURED:
        return MEASURED[n, k]
    if elem_bytes == 4:
        block_n = FP32_BLOCK_N if n > FP32_BLOCK_N // 2 else FP32_BLOCK_N // 2
        tall = triton.cdiv(n, block_n)
        splits = min(triton.cdiv(2 * MIN_PROGRAMS, tall), max(1, k // 64))
        return LinearPlan(block_n, splits, prefetch=2)
    min_split_k = 512 // elem_bytes
    wide = triton.cdiv(n, 128)
    if wide >= UNSPLIT_PROGRAMS:
        return LinearPlan(128, 1)
    if triton.cdiv(n, 64) >= UNSPLIT_PROGRAMS and n * k * elem_bytes <= SHORT_PRODUCT_BYTES:
        return LinearPlan(64, 1)
    splits = min(triton.cdiv(MIN_PROGRAMS, wide), max(1, k // min_split_k))
    return LinearPlan(128, splits) if splits > 1 else LinearPlan(64, 1)


def linear_workspace_elems(num_tokens: int, n: int, k: int, *, elem_bytes: int) -> int:
    """fp32 elements of workspace that one product needs: 0 where K is not split."""
    splits = linear_plan(n, k, elem_bytes=elem_bytes).splits
    return splits * num_tokens * n if splits > 1 else 0


# FP8 products whose best cut was measured on an H200, by (N, K): h200_plan_sweep.json of
# bench/results, and h200_ops_quick.json for the first one. Its programs ask for all that they read
# before they wait: 1 us of a layer at 1 row.
MEASURED = {
    (2112, 7168): LinearPlan(64, 8, prefetch=8),
    (7168, 16384): LinearPlan(64, 2, unroll=2),
    (4096, 7168): LinearPlan(64, 4, unroll=2),
    (7168, 2048): LinearPlan(64, 1, per_sm=1),
    (36864, 7168): LinearPlan(64, 1, unroll=2),
    (7168, 18432): LinearPlan(64, 2, unroll=2),
}
# The same where tiles of at most so many tokens are enough.
FEW_TOKENS = 32
MEASURED_FEW = {(36864, 7168): LinearPlan(128, 1, per_sm=3)}


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
        w: [N, K] of x's dtype, or fp32: then x is widened and the product is IEEE fp32.
        out: act dtype or fp32 [T, N]; or fp32 [splits, T, N], then the K splits are left for the
            reader to add up in order (`tiles.load_parts`).
        workspace: fp32, at least `linear_workspace_elems` elements; its contents are lost.
        plan: instead of `linear_plan`'s, for measurements and pinned choices.
    Raises:
        ValueError: shapes or dtypes that do not fit, or too little workspace.
    Capture-safe: no sync, no allocation.
    """
    _check_product(x, w, out)
    if w.dtype not in (x.dtype, torch.float32) or x.element_size() == 1:
        raise ValueError(f"linear takes w of x's dtype {x.dtype} or float32, got {w.dtype}")
    plan = plan or linear_plan(w.shape[0], w.shape[1], elem_bytes=w.element_size())
    if w.dtype == torch.float32:
        tiles = _Tiles.of(x, w, plan, token_blocks=FP32_TOKEN_BLOCKS, bulk=False)
        kernel, sources = _linear_fp32_kernel, {}
    else:
        tiles = _Tiles.of(x, w, plan)
        kernel, sources = _linear_kernel, tiles.sources
    dst = tiles.destination(out, workspace)
    launch(
        kernel,
        tiles.grid,
        tiles.x,
        tiles.w,
        w,
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
        w: e4m3 [N, K].
        ws: fp32 [ceil(N/128), ceil(K/128)].
        out: act dtype or fp32 [T, N]; or fp32 [splits, T, N], then the K splits are left for the
            reader to add up in order (`tiles.load_parts`).
        workspace: fp32, at least `linear_workspace_elems` elements; its contents are lost.
        plan: instead of `linear_plan`'s, for measurements and pinned choices.
    Raises:
        ValueError: shapes or dtypes that do not fit, or too little workspace.
    Capture-safe: no sync, no allocation.
    """
    _check_product(xq, w, out)
    check_fp8("xq", xq)
    check_fp8("w", w)
    groups = triton.cdiv(w.shape[1], FP8_GROUP)
    check_scale("xs", xs, (xq.shape[0], groups), pitched=True)
    check_scale("ws", ws, (triton.cdiv(w.shape[0], FP8_GROUP), groups))
    tiles = _Tiles.of(xq, w, plan or linear_plan(*w.shape, elem_bytes=1, tokens=xq.shape[0]))
    dst = tiles.destination(out, workspace)
    launch(
        _linear_fp8_kernel,
        tiles.grid,
        tiles.x,
        xs,
        tiles.w,
        ws,
        w,
        dst,
        xq.shape[0],
        **tiles.constexprs(dst, launch),
        **tiles.sources,
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
        num_tokens, (n, k) = x.shape[0], w.shape
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
            w_pitch=w.stride(0),
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
        if self.plan.splits == 1 or out.ndim == 3:
            return
        if self.plan.splits > MANY_SPLITS:
            launch(
                _sum_many_splits_kernel,
                (triton.cdiv(self.num_tokens * self.n, SUM_MANY_BLOCK),),
                dst,
                out,
                self.num_tokens,
                N=self.n,
                OUT_PITCH=out.stride(0),
                SPLITS=self.plan.splits,
                SPLITS_POW2=triton.next_power_of_2(self.plan.splits),
                BLOCK=SUM_MANY_BLOCK,
                num_warps=4,
                **overlap(launch),
            )
            return
        launch(
            _sum_splits_kernel,
            (triton.cdiv(self.num_tokens * self.n, SUM_BLOCK),),
            dst,
            out,
            self.num_tokens,
            N=self.n,
            OUT_PITCH=out.stride(0),
            SPLITS=self.plan.splits,
            BLOCK=SUM_BLOCK,
            num_warps=4,
            **overlap(launch),
        )


def _check_product(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x [T, K] and w [N, K] expected, got {list(x.shape)}, {list(w.shape)}")
    if tuple(out.shape[-2:]) != (x.shape[0], w.shape[0]) or x.shape[0] == 0:
        raise ValueError(
            f"out must be [{x.shape[0]}, {w.shape[0]}] with at least one row, got {list(out.shape)}"
        )
    if out.ndim == 3 and (out.dtype != torch.float32 or not out.is_contiguous()):
        raise ValueError(f"parts must be contiguous float32, got {out.dtype} {out.stride()}")
    if x.stride(1) != 1 or w.stride(1) != 1 or out.stride(-1) != 1:
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
    _store_ref(out, matmul_rows(x.float(), w.float()))


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
    _store_ref(out, matmul_rows(dequantize_rows(xq, xs), dequantize_blocks(w, ws)))


def _store_ref(out: torch.Tensor, product: torch.Tensor) -> None:
    """The oracle does not split K: all is in the first part."""
    if out.ndim == 2:
        out.copy_(product)
    else:
        out.zero_()[0].copy_(product)
