"""The router's product: fp32 weights, tokens of 16 bits, on tensor cores without losing a bit.

An fp32 number is the exact sum of three bf16 numbers, so its product with a bf16 token is the sum
of three products that a tensor core makes exactly and adds in fp32. Without tensor cores the same
product waits for shared memory most of its time. Invariants: the weights are read and taken apart
before a program waits for the step; every program takes one block of K, whose length depends on
the weight alone; the instructions of a token's result do not depend on how many tokens there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap
from kernels.triton.tiles import load_tile, matmul_rows

BLOCK_K = 128  # the longest block of which three copies fit in registers
TOKEN_BLOCKS = (16, 32, 64)
# Programs that one weight is cut into where it is tall enough: about one for each SM.
PROGRAMS = 112
PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


@triton.jit
def _leading(value):
    """The leading 8 significant bits of fp32 values: what bf16 holds exactly."""
    return (value.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _product(
    high,  # PIECE [BLOCK_N, BLOCK_K]
    middle,
    low,
    x,  # PIECE [BLOCK_K, BLOCK_T]
):
    """fp32 [BLOCK_N, BLOCK_T]: (high + middle + low) @ x. Small terms first, for they add up."""
    return tl.dot(high, x) + (tl.dot(middle, x) + tl.dot(low, x))


@triton.jit
def _router_kernel(
    x,  # bf16, f16 or f32 [T, K], pitch X_PITCH
    w,  # f32 [N, K], pitch W_PITCH
    dst,  # f32 [SPLITS, T, N]
    num_tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    X_PITCH: tl.constexpr,
    W_PITCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    X_PIECES: tl.constexpr,
    PIECE: tl.constexpr,  # bf16
    PDL: tl.constexpr,
):
    t0 = tl.program_id(0) * BLOCK_T
    n0 = tl.program_id(1) * BLOCK_N
    split = tl.program_id(2)
    k = split * BLOCK_K
    # No step writes the weights, and the previous kernel keeps few of the chip's SMs busy.
    weight = load_tile(w, n0, k, N, K, W_PITCH, BLOCK_N, BLOCK_K, False, EVEN_N, EVEN_K)
    high = _leading(weight)
    rest = weight - high
    middle = _leading(rest)
    low = (rest - middle).to(PIECE)
    high, middle = high.to(PIECE), middle.to(PIECE)
    await_inputs(PDL)
    token = load_tile(x, t0, k, num_tokens, K, X_PITCH, BLOCK_T, BLOCK_K, False, False, EVEN_K)
    token = tl.trans(token)
    if X_PIECES == 1:
        acc = _product(high, middle, low, token.to(PIECE))
    else:
        token = token.to(tl.float32)
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for _ in tl.static_range(X_PIECES):
            piece = _leading(token)
            token -= piece
            acc += _product(high, middle, low, piece.to(PIECE))
    t = t0 + tl.arange(0, BLOCK_T)
    n = n0 + tl.arange(0, BLOCK_N)
    at = dst + (tl.cast(split, tl.int64) * num_tokens + t[:, None]) * N + n[None, :]
    tl.store(at, tl.trans(acc), mask=(t < num_tokens)[:, None] & (n < N)[None, :])


@dataclass(frozen=True)
class RouterPlan:
    """How the product is cut; the number of tokens has no say in it.

    Attributes:
        block_n: experts of a program: 16, 32 or 64. With 64 another instruction multiplies, whose
            sums may round differently.
        block_k: elements of K of a program, a power of two. Changes bits.
        warps: of a program: 4 or 8.
    """

    block_n: int
    block_k: int = BLOCK_K
    warps: int = 4

    def __post_init__(self) -> None:
        if self.block_n not in (16, 32, 64) or self.warps not in (4, 8):
            raise ValueError(f"expected block_n 16, 32 or 64 and 4 or 8 warps, got {self}")
        if self.block_k < 16 or self.block_k & (self.block_k - 1):
            raise ValueError(f"block_k must be a power of two of at least 16, got {self.block_k}")


def router_plan(n: int, k: int) -> RouterPlan:
    """The plan for `n` experts of `k` elements: as tall as leaves every SM a program."""
    block_k = min(BLOCK_K, max(16, triton.next_power_of_2(k)))
    splits = triton.cdiv(k, block_k)
    tall = [b for b in (64, 32) if triton.cdiv(n, b) * splits >= PROGRAMS]
    return RouterPlan(tall[0] if tall else 16, block_k)


def router_parts(n: int, k: int) -> int:
    """Parts that the product is left in, by the launcher's own plan."""
    return -(-k // router_plan(n, k).block_k)


def router(
    launch: Launcher,
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    out: torch.Tensor,
    plan: RouterPlan | None = None,
) -> None:
    """out.sum(0) = x @ w.T; products are exact, sums fp32.

    Args:
        x: bf16, f16 or f32 [T, K]; the row pitch may exceed K.
        w: fp32 [N, K]; the row pitch may exceed K.
        out: fp32 [router_parts(N, K), T, N], contiguous: parts that the reader adds up, in an order
            that does not depend on T.
        plan: instead of `router_plan`'s, for measurements and pinned choices; of as many parts.
    Raises:
        ValueError: shapes, dtypes or parts that do not fit.
    Capture-safe: no sync, no allocation.
    Source: the split is that of "bf16x3" products; x is exact in bf16, so nothing is dropped.
    """
    plan = plan or router_plan(w.shape[0], w.shape[1])
    _check(x, w, out)
    (num_tokens, k), n = x.shape, w.shape[0]
    splits = triton.cdiv(k, plan.block_k)
    if out.shape[0] != splits:
        raise ValueError(
            f"a {n}x{k} router in blocks of {plan.block_k} leaves {splits} parts, got room for "
            f"{out.shape[0]}; size it with router_parts"
        )
    # Tokens in several pieces take the registers of the tallest tile.
    blocks = TOKEN_BLOCKS if PIECES[x.dtype] == 1 else TOKEN_BLOCKS[:-1]
    block_t = next((b for b in blocks if b >= num_tokens), blocks[-1])
    launch(
        _router_kernel,
        (triton.cdiv(num_tokens, block_t), triton.cdiv(n, plan.block_n), splits),
        x,
        w,
        out,
        num_tokens,
        N=n,
        K=k,
        X_PITCH=x.stride(0),
        W_PITCH=w.stride(0),
        BLOCK_N=plan.block_n,
        BLOCK_T=block_t,
        BLOCK_K=plan.block_k,
        EVEN_N=n % plan.block_n == 0,
        EVEN_K=k % plan.block_k == 0,
        X_PIECES=PIECES[x.dtype],
        PIECE=_piece_type(),
        num_warps=plan.warps,
        **overlap(launch),
    )


def router_ref(x: torch.Tensor, w: torch.Tensor, *, out: torch.Tensor) -> None:
    """`router` in plain torch: all of it in the first part."""
    _check(x, w, out)
    out.zero_()[0].copy_(matmul_rows(x.float(), w))


def _piece_type() -> tl.dtype:
    """bf16; Triton's interpreter multiplies that wrongly, and fp32 holds the same values."""
    return tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16


def _check(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or x.shape[0] == 0:
        raise ValueError(f"x [T, K] and w [N, K] expected, got {list(x.shape)}, {list(w.shape)}")
    if x.dtype not in PIECES or w.dtype != torch.float32 or out.dtype != torch.float32:
        raise ValueError(
            "router takes x of bfloat16, float16 or float32 and w and out of float32, "
            f"got {x.dtype}, {w.dtype} and {out.dtype}"
        )
    if out.ndim != 3 or tuple(out.shape[1:]) != (x.shape[0], w.shape[0]) or not out.is_contiguous():
        raise ValueError(
            f"out must be [parts, {x.shape[0]}, {w.shape[0]}] and contiguous, "
            f"got {list(out.shape)}, strides {out.stride()}"
        )
    if x.stride(1) != 1 or w.stride(1) != 1:
        raise ValueError("x and w need a last stride of 1; pass the rows of a contiguous buffer")
