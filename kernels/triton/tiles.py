"""Pieces shared by the matrix kernels: loading tiles and scales, and how deep to pipeline them.

Invariant: which way a tile is loaded changes no value, so no bit of a product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import ALIGNMENT, Arg, TensorMap
from kernels.triton.overlap import prefetch_rows
from kernels.triton.weight_tiles import in_tiles

FP8_GROUP = 128  # elements that share one scale
BLOCK_K_BYTES = 128  # of a tile's row: the full swizzle span of the bulk copy engine
# Of pipeline buffers, by the number of programs that are to share a Hopper SM.
BUDGET_BYTES = {1: 208 << 10, 2: 112 << 10, 3: 74 << 10}
FP32_BLOCK_N = 64  # weight rows of a tile without tensor cores: its operands live in registers
MAX_STAGES = 10
MAX_SCALE_SPAN = 8  # scales of a row that `load_scale` stages at once


@triton.jit
def tile_line(row, col, COLS: tl.constexpr, TILE_COLS: tl.constexpr):
    """Where (row, col) of a matrix in tiles lies, in lines of TILE_COLS elements."""
    return (row // 128 * (COLS // TILE_COLS) + col // TILE_COLS) * 128 + row % 128


@triton.jit
def load_tile(
    src,  # [rows, COLS] row-major, pointer or tensor map
    row,
    col,
    end_row,
    COLS: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_R: tl.constexpr,
    EVEN_C: tl.constexpr,
    TILED: tl.constexpr = False,  # src is [rows * COLS / BLOCK_C, BLOCK_C]: see `weight_tiles`
):
    """The [BLOCK_R, BLOCK_C] tile at (row, col), zero outside the matrix.

    Of a matrix in tiles it is a whole one, or its upper or lower half.
    """
    if TILED:
        line = tile_line(row, col, COLS, BLOCK_C)
        if TMA:
            tile = src.load([line, 0])
        else:
            r = tl.arange(0, BLOCK_R)
            c = tl.arange(0, BLOCK_C)
            corner = src + tl.cast(line, tl.int64) * BLOCK_C
            tile = tl.load(corner + r[:, None] * BLOCK_C + c[None, :])
    elif TMA:
        tile = src.load([row, col])
    else:
        # A 64-bit corner and 32-bit offsets inside the tile: half the address registers.
        r = tl.arange(0, BLOCK_R)
        c = tl.arange(0, BLOCK_C)
        inside = tl.full([BLOCK_R, BLOCK_C], True, tl.int1)
        if not EVEN_R:
            inside = inside & (r < end_row - row)[:, None]
        if not EVEN_C:
            inside = inside & (c < COLS - col)[None, :]
        corner = src + tl.cast(row, tl.int64) * PITCH + col
        tile = tl.load(corner + r[:, None] * PITCH + c[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def prefetch_weight(
    src,  # the weight behind a plain pointer
    row,
    col,
    end_row,
    COLS: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    TILE_COLS: tl.constexpr,
    TILED: tl.constexpr,
):
    """`prefetch_rows`, of a matrix in tiles the same elements."""
    if TILED:
        for i in tl.static_range(SPAN // TILE_COLS):
            line = tile_line(row, col + i * TILE_COLS, COLS, TILE_COLS)
            inside = tl.where(col + i * TILE_COLS < COLS, line + ROWS, line)
            prefetch_rows(src, line, 0, inside, TILE_COLS, TILE_COLS, ROWS, TILE_COLS)
    else:
        prefetch_rows(src, row, col, end_row, COLS, PITCH, ROWS, SPAN)


@triton.jit
def store_tokens_major(dst, acc, n, t, num_tokens, N: tl.constexpr, PITCH: tl.constexpr):
    """Write acc [BLOCK_N, BLOCK_T] to dst[t, n], the part inside the matrix."""
    at = dst + t.to(tl.int64)[:, None] * PITCH + n[None, :]
    inside = (t < num_tokens)[:, None] & (n < N)[None, :]
    tl.store(at, tl.trans(acc).to(dst.dtype.element_ty), mask=inside)


@triton.jit
def load_scale(
    scale,  # f32 [rows, GROUPS], pitch PITCH
    row,  # i32 [BLOCK]
    live,  # bool [BLOCK]
    group,
    GROUPS: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One scale of each row, zero where a row is not live."""
    if BLOCK < 32:
        column = tl.load(scale + group + row * PITCH, mask=live, other=0.0)
    else:
        # Loaded straight into the layout of the product, every thread would hold the addresses of a
        # quarter of the rows. A few groups at once stay one element a thread; the sum picks one of
        # them exactly.
        SPAN: tl.constexpr = 8 if BLOCK == 32 else 4
        near = group // SPAN * SPAN + tl.arange(0, SPAN)
        inside = live[:, None] & (near < GROUPS)[None, :]
        span = tl.load(scale + row[:, None] * PITCH + near[None, :], mask=inside, other=0.0)
        column = tl.sum(tl.where((near == group)[None, :], span, 0.0), 1)
    return column


@triton.jit
def ask_parts(
    at,  # pointers into the first part
    mask,
    part_stride,  # elements from one part to the next
    PARTS: tl.constexpr,  # 0: not in parts
):
    """The loads of what a product left, its result or its K splits, for `add_parts`."""
    parts = tl.tuple([tl.load(at, mask=mask, other=0.0)])
    for part in tl.static_range(1, PARTS):
        parts += (tl.load(at + part * part_stride, mask=mask, other=0.0),)
    return parts


@triton.jit
def add_parts(parts, zero, PARTS: tl.constexpr, act: tl.constexpr):
    """The product of `ask_parts`: its result, or the sum of its K splits in order, from `zero` on
    (`hold_loads`), rounded to act."""
    value = parts[0]
    if PARTS > 0:
        value += zero
        for part in tl.static_range(1, PARTS):
            value += parts[part]
        value = value.to(act)
    return value


@triton.jit
def hold_loads(PDL: tl.constexpr):
    """fp32 0.0, which the compiler does not know before every load above has been asked for.

    To save registers it adds up what is there before it asks for more, and so takes a latency for
    every few loads. Sums that begin with this zero cannot begin early. Nothing is waited for here
    but the other warps, and without PDL, as in the interpreter, it is a plain zero.
    """
    zero = 0.0
    if PDL != 0:
        word = tl.inline_asm_elementwise(
            "{ .reg .pred p, q; setp.lt.s32 q, $1, 0; barrier.cta.red.or.pred p, 0, q;"
            " selp.b32 $0, 1, 0, p; }",
            "=r,r",
            [tl.program_id(0)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        zero = word.to(tl.float32, bitcast=True)
    return zero


def num_parts(product: torch.Tensor) -> int:
    """K splits of a product that was left in parts, fp32 [S, T, N]; 0 for one that was not."""
    return product.shape[0] if product.ndim == 3 else 0


def sum_parts(product: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`add_parts` in plain torch: [T, N]."""
    if product.ndim == 2:
        return product
    total = product[0].clone()
    for part in product[1:]:
        total += part
    return total.to(dtype)


def pipeline_stages(weight_rows: int, tokens: int, budget: int) -> int:
    """As many stages as fit, so that enough bytes are in flight to hide the latency of HBM."""
    scales = tokens * MAX_SCALE_SPAN * 4
    return min(MAX_STAGES, budget // ((weight_rows + tokens) * BLOCK_K_BYTES + scales))


def tile_source(matrix: torch.Tensor, block: tuple[int, int]) -> Arg:
    """`matrix` behind a tensor map if the bulk copy engine can read it, else as it is; one in tiles
    as the lines that `tile_line` counts."""
    if in_tiles(matrix):
        matrix = matrix.view(-1, matrix.shape[-1])
    size = matrix.element_size()
    at = matrix.storage_offset() * size if matrix.device.type == "meta" else matrix.data_ptr()
    if at % ALIGNMENT or matrix.stride(0) * size % ALIGNMENT:
        return matrix
    return TensorMap(matrix, block)


def check_fp8(name: str, tensor: torch.Tensor) -> None:
    """Refuse anything but e4m3."""
    if tensor.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{name} must be float8_e4m3fn, got {tensor.dtype}")


def check_scale(
    name: str, scale: torch.Tensor | None, shape: tuple[int, ...], *, pitched: bool = False
) -> None:
    """Refuse scales that do not fit; `pitched` allows rows that are further apart."""
    if scale is None:
        raise ValueError(f"{name} must be float32 {list(shape)} for FP8 operands, got None")
    dense = scale.stride(-1) == 1 if pitched else scale.is_contiguous()
    if tuple(scale.shape) != shape or scale.dtype != torch.float32 or not dense:
        raise ValueError(
            f"{name} must be float32 {list(shape)}, {'last stride 1' if pitched else 'contiguous'};"
            f" got {scale.dtype} {list(scale.shape)} with strides {list(scale.stride())}"
        )


def check_ready(ready: torch.Tensor | None, experts: int) -> None:
    """Refuse counters of finished experts that are not one for each."""
    if ready is not None and (ready.dtype, tuple(ready.shape)) != (torch.int32, (experts,)):
        raise ValueError(f"ready must be int32 [{experts}], got {ready.dtype} {list(ready.shape)}")


def dequantize_rows(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 values of e4m3 `q` [..., K] with scales [..., ceil(K/128)]."""
    return q.float() * scale.repeat_interleave(FP8_GROUP, -1)[..., : q.shape[-1]]


def dequantize_blocks(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 values of e4m3 `q` [N, K] with scales [ceil(N/128), ceil(K/128)]."""
    return dequantize_rows(q, scale.repeat_interleave(FP8_GROUP, 0)[: q.shape[0]])


def matmul_rows(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x @ w.T of fp32 [M, K] and [N, K], for oracles that run on the CPU.

    BLAS takes another path, and other bits, for a few rows than for many; padded to 16, a row's
    bits do not depend on how many rows come with it.
    """
    rows = x.shape[0]
    if rows >= 16:
        return x @ w.T
    return (torch.nn.functional.pad(x, (0, 0, 0, 16 - rows)) @ w.T)[:rows]


def einsum_rows(equation: str, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """torch.einsum of x [M, …] padded like the rows of `matmul_rows`, and for the same reason."""
    rows = x.shape[0]
    if rows >= 16:
        return torch.einsum(equation, x, w)
    padded = torch.cat([x, x.new_zeros(16 - rows, *x.shape[1:])])
    return torch.einsum(equation, padded, w)[:rows]


def sigmoid_rows(x: torch.Tensor) -> torch.Tensor:
    """Sigmoid, for oracles that run on the CPU.

    torch's own takes another path, and other bits, for the last few elements of a tensor than for
    the others; its `exp` does not.
    """
    return 1.0 / (1.0 + torch.exp(-x))
