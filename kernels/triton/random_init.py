"""Seeded random tensors made on the device: weights of presets and inputs of benchmarks.

Every element is a hash of (seed, offset + flat index) and nothing else, so the same values come
from any chip, any split of a tensor over calls, and the CPU oracle, bit for bit. A matrix in tiles
gets the values that it would have in rows. Invariant: the only roundings are one integer-to-fp32
conversion, one fp32 multiplication and the conversion to the tensor's dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher
from kernels.triton.weight_tiles import extents, in_tiles, put_rows

BLOCK = 4096
REF_CHUNK = 1 << 22  # elements that the oracle holds as int64 at once
STEPS = (
    1 << 24
)  # a draw is an odd number of steps in (-STEPS, STEPS), exact in fp32, plus the mean's
MAX_MEAN_SCALES = 64  # |mean| / scale beyond it would overflow the integer draw
_MASK = 0xFFFFFFFF


@triton.jit
def _mix(h):
    """Finaliser of MurmurHash3 (A. Appleby, public domain): a bijection of uint32."""
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _fill_kernel(
    out,  # [size]
    size,
    offset,
    key_low,  # u32 as i32, odd
    key_high,  # u32 as i32, odd
    first,  # i32, odd: the least draw
    step,  # f32
    COLS: tl.constexpr,  # of a matrix in tiles; 0: out lies as it is counted
    TILE_COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counter = i
    if COLS > 0:
        group = i // (128 * COLS) * 128
        line = (i % (128 * COLS)).to(tl.int32) // TILE_COLS
        col = line // 128 * TILE_COLS + (i % TILE_COLS).to(tl.int32)
        counter = (group + line % 128) * COLS + col
    counter += offset
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key_low = tl.cast(key_low, tl.uint32, bitcast=True)
    key_high = tl.cast(key_high, tl.uint32, bitcast=True)
    bits = _mix(_mix(low ^ key_low) ^ high ^ key_high)
    # The mean joins as an integer: a floating-point sum would be fused with the product on the GPU,
    # and not on the CPU.
    draw = (bits >> 8).to(tl.int32) * 2 + first
    value = draw.to(tl.float32) * step
    tl.store(out + i, value.to(out.dtype.element_ty), mask=i < size)


def fill_random(
    launch: Launcher,
    out: torch.Tensor,
    *,
    seed: int,
    scale: float,
    mean: float = 0.0,
    offset: int = 0,
) -> None:
    """Fill `out` with values uniform in (mean - scale, mean + scale).

    Args:
        out: contiguous, bf16, fp16, fp32 or e4m3; of rank 4 or 5 matrices in tiles
            (`weight_tiles`), else of any shape.
        seed: any integer; taken modulo 2^64.
        scale: above 0.
        mean: at most 64 scales from 0.
        offset: counter of the first element; a tensor filled in parts continues it.
    Raises:
        ValueError: an argument outside these bounds.
    Capture-safe: no sync, no allocation.
    """
    first, step = _check(out, scale, mean, offset)
    key_low, key_high = (key - (1 << 32) if key >> 31 else key for key in _keys(seed))
    launch(
        _fill_kernel,
        (triton.cdiv(out.numel(), BLOCK),),
        out,
        out.numel(),
        offset,
        key_low,
        key_high,
        first,
        step,
        COLS=extents(tuple(out.shape))[-1] if in_tiles(out) else 0,
        TILE_COLS=out.shape[-1] if in_tiles(out) else 1,
        BLOCK=BLOCK,
        num_warps=4,
    )


def fill_random_ref(
    out: torch.Tensor, *, seed: int, scale: float, mean: float = 0.0, offset: int = 0
) -> None:
    """Oracle of `fill_random`: the same bits."""
    if in_tiles(out):
        rows = torch.empty(extents(tuple(out.shape)), dtype=out.dtype, device=out.device)
        fill_random_ref(rows, seed=seed, scale=scale, mean=mean, offset=offset)
        put_rows(out.flatten(0, -4), 0, rows.flatten(0, -2))
        return
    first, step = _check(out, scale, mean, offset)
    key_low, key_high = _keys(seed)
    factor = torch.tensor(step, dtype=torch.float32, device=out.device)
    flat = out.view(-1)
    for begin in range(0, flat.numel(), REF_CHUNK):
        end = min(begin + REF_CHUNK, flat.numel())
        counter = torch.arange(begin, end, dtype=torch.int64, device=out.device) + offset
        inner = _mix_ref((counter & _MASK) ^ key_low)
        bits = _mix_ref(inner ^ (counter >> 32) ^ key_high)
        draw = (bits >> 8) * 2 + first
        flat[begin:end] = (draw.to(torch.float32) * factor).to(out.dtype)


def _mix_ref(h: torch.Tensor) -> torch.Tensor:
    """`_mix` on uint32 values in int64: products wrap modulo 2^64, which keeps the low half."""
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _MASK
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def _keys(seed: int) -> tuple[int, int]:
    """Two uint32 keys of a seed, odd: an argument that is now and then a multiple of 16 would make
    another kernel of the same code."""
    low = int(_mix_ref(torch.tensor((seed & _MASK) ^ 0x9E3779B9)))
    high = int(_mix_ref(torch.tensor(((seed >> 32) & _MASK) ^ low)))
    return low | 1, high | 1


def _check(out: torch.Tensor, scale: float, mean: float, offset: int) -> tuple[int, float]:
    """The least draw, an odd integer, and the fp32 value of a step; a value is draw * step."""
    if not out.is_contiguous() or out.numel() == 0:
        raise ValueError(
            "fill_random takes a contiguous tensor with elements,"
            f" got {list(out.shape)} with strides {list(out.stride())}"
        )
    if out.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn):
        raise ValueError(f"fill_random takes bf16, fp16, fp32 or e4m3, got {out.dtype}")
    if not scale > 0 or not abs(mean) <= MAX_MEAN_SCALES * scale:
        raise ValueError(
            f"scale must be above 0 and |mean| at most {MAX_MEAN_SCALES} scales, got scale {scale},"
            f" mean {mean}; fill a constant with fill_"
        )
    if offset < 0:
        raise ValueError(f"offset must not be negative, got {offset}")
    step = float(torch.tensor(scale / STEPS, dtype=torch.float32))
    return 2 * round(mean / step / 2) - (STEPS - 1), step
