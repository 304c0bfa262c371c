"""The product by W_UV of few tokens, whose splits it merges while the weight comes.

A program asks for all of its weight before it waits for attention; then it only waits for that, and
merging takes none of its time. Invariants: those of `mla_absorb`; the bits are those of the kernel
for many tokens.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kernels.triton.activation import quantize_groups
from kernels.triton.mla_decode import merge_splits
from kernels.triton.overlap import await_inputs_with

# The weight is 128 rows of at most so many columns: 128 KiB of shared memory.
FEW_TOKENS, FEW_PARTS, FEW_COLUMNS = 8, 32, 512
FEW_IN_FLIGHT = {1: 16, 2: 8, 4: 4, 8: 4}  # splits together, by tokens: what registers hold


@triton.jit
def _absorb_v_few(
    o_latent,  # act [T, H, DC], row pitch o_pitch
    part_o,  # act [T, SPLITS, H, DC], or unused
    part_lse,  # f32 [T, SPLITS, H], base 2, or unused
    kv_len,  # int32 [T]
    w_uv,  # act [H*DV, DC], by tiles [BLOCK_V, DC]
    out,  # act [T, H*DV], row pitch out_pitch, or unused
    out_q,  # e4m3 [T, H*DV], row pitch out_q_pitch, or unused
    out_scale,  # fp32 [T, H*DV/128], row pitch scale_pitch, or unused
    T,
    o_pitch,
    out_pitch,
    out_q_pitch,
    scale_pitch,
    DV: tl.constexpr,
    DC: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TOKENS: tl.constexpr,  # T, to a power of two
    BLOCK_T: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_Q: tl.constexpr,
    PRECISION: tl.constexpr,
    H: tl.constexpr,
    SPLITS: tl.constexpr,  # of tokens longer than CUT; 0: all tokens are in o_latent
    SPLITS_POW2: tl.constexpr,
    GROUP: tl.constexpr,
    CUT: tl.constexpr,
    PDL: tl.constexpr,
):
    """All of the weight is asked for first, the splits are merged while it comes."""
    V_TILES: tl.constexpr = DV // BLOCK_V
    head = tl.program_id(0) // V_TILES
    c = tl.arange(0, DC)[None, :]
    w = w_uv.load([tl.program_id(0) * BLOCK_V, 0])
    t = tl.arange(0, TOKENS).to(tl.int64)
    length = await_inputs_with(kv_len + t, t < T, PDL)
    used = (length + CUT - 1) // CUT
    whole = used > 0 if SPLITS == 0 else used == 1
    x_at = o_latent + head * DC + t[:, None] * o_pitch + c
    x = tl.load(x_at, mask=whole[:, None], other=0.0)
    if SPLITS > 0:  # noqa: SIM102 -- settled by the compiler, the second on the device
        if tl.max(used, axis=0) > 1:
            first = (t * (SPLITS * H) + head)[:, None]
            many = tl.where(used > 1, used, 0)[:, None]
            merged = merge_splits(
                *(part_o, part_lse, first, many, c, many > 0), *(H, DC, SPLITS_POW2, GROUP, 0)
            )
            x = tl.where(many > 0, merged.to(x.dtype), x)
    # Tokens to the width of an instruction, the same ones again.
    COPIES: tl.constexpr = BLOCK_T // TOKENS
    x = tl.reshape(tl.broadcast_to(x[None, :, :], [COPIES, TOKENS, DC]), [BLOCK_T, DC])
    acc = tl.dot(w, tl.trans(x), input_precision=PRECISION)
    y = tl.trans(acc.to(o_latent.dtype.element_ty))
    t = tl.arange(0, BLOCK_T)
    row = t.to(tl.int64)[:, None]
    col = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    mask = t[:, None] < T
    if HAS_OUT:
        tl.store(out + row * out_pitch + col, y, mask=mask)
    if HAS_Q:
        quantized, scale = quantize_groups(y.to(tl.float32))
        tl.store(out_q + row * out_q_pitch + col, quantized, mask=mask)
        group = tl.program_id(0)
        tl.store(out_scale + t.to(tl.int64) * scale_pitch + group, scale, mask=t < T)


def cut_few(tokens: int, splits: int) -> dict[str, Any]:
    """How `_absorb_v_few` works through so many splits."""
    pow2_tokens, pow2_splits = (int(triton.next_power_of_2(n)) for n in (tokens, max(1, splits)))
    group = min(pow2_splits, FEW_IN_FLIGHT[pow2_tokens])
    return {"TOKENS": pow2_tokens, "SPLITS_POW2": pow2_splits, "GROUP": group, "num_warps": 8}
