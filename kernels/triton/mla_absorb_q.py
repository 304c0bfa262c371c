"""The per-head product by W_UK, which brings queries into the latent space, and their rotation.

Invariants: those of `mla_absorb`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher
from kernels.triton.mla_absorb import Tile, precision, token_tile
from kernels.triton.mla_prep import rope_pair, rope_ref
from kernels.triton.overlap import await_inputs, overlap
from kernels.triton.tiles import einsum_rows

TILES_PER_CTA = 4  # token tiles that share one read of W_UK


@triton.jit
def _absorb_q(
    q,  # act [T, H, DN + 2*HALF], row pitch q_pitch
    w_uk,  # act [H, DN, DC]
    tok_pos,  # int32 [T]
    tok_row,  # int32 [T]
    rope_table,  # fp32 [max_seq_len, 2*HALF]
    out,  # act [T, H, DC + 2*HALF], row pitch out_pitch
    T,
    q_pitch,
    out_pitch,
    DN: tl.constexpr,
    DC: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILES: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    C_TILES: tl.constexpr = (DC + BLOCK_C - 1) // BLOCK_C
    head = tl.program_id(0) // (C_TILES + 1)
    tile = tl.program_id(0) % (C_TILES + 1)
    first_t = tl.program_id(1) * (BLOCK_T * TILES)
    last_t = tl.minimum(first_t + BLOCK_T * TILES, T)
    q_head = q + head * (DN + 2 * HALF)
    out_head = out + head * (DC + 2 * HALF)
    if tile < C_TILES:
        c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        n = tl.arange(0, BLOCK_N)
        w = tl.load(
            w_uk + head.to(tl.int64) * (DN * DC) + n[:, None] * DC + c[None, :],
            mask=(n[:, None] < DN) & (c[None, :] < DC),
            other=0.0,
        )
        await_inputs(PDL)
        for t0 in range(first_t, last_t, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            real = tl.load(tok_row + t, mask=t < T, other=-1) >= 0
            x = tl.load(
                q_head + t.to(tl.int64)[None, :] * q_pitch + n[:, None],
                mask=real[None, :] & (n[:, None] < DN),
                other=0.0,
            )
            y = tl.dot(tl.trans(w), x, input_precision=PRECISION).to(q.dtype.element_ty)
            at = out_head + t.to(tl.int64)[:, None] * out_pitch + c[None, :]
            tl.store(at, tl.trans(y), mask=(t[:, None] < T) & (c[None, :] < DC))
    else:
        await_inputs(PDL)
        pair = tl.arange(0, PAIRS)[None, :]
        for t0 in range(first_t, last_t, BLOCK_T):
            t = (t0 + tl.arange(0, BLOCK_T))[:, None]
            real = tl.load(tok_row + t, mask=t < T, other=-1) >= 0
            pos = tl.load(tok_pos + t, mask=real, other=0).to(tl.int64)
            first, second = rope_pair(
                q_head + t.to(tl.int64) * q_pitch + DN,
                rope_table + pos * (2 * HALF),
                pair,
                real & (pair < HALF),
                0,
                HALF,
                INTERLEAVE,
                0,
                q.dtype.element_ty,
            )
            at = out_head + t.to(tl.int64) * out_pitch + DC + pair
            tl.store(at, first, mask=(t < T) & (pair < HALF))
            tl.store(at + HALF, second, mask=(t < T) & (pair < HALF))


def absorb_q(
    launch: Launcher,
    q: torch.Tensor,
    w_uk: torch.Tensor,
    tok_pos: torch.Tensor,
    tok_row: torch.Tensor,
    rope_table: torch.Tensor,
    *,
    interleave: bool,
    out: torch.Tensor,
) -> None:
    """Bring each head's query into the latent space and rotate its positional part.

    Args:
        q: act [T, H*(dn+dr)]; the row pitch may exceed the width.
        w_uk: act [H, dn, dc].
        tok_pos: int32 [T].
        tok_row: int32 [T]; -1 is padding and gives zeros, whatever q holds.
        rope_table: float32 [max_seq_len, dr]: cos of each pair, then sin of each.
        interleave: see `mla_prep`.
        out: act [T, H, dc+dr]: q_nope @ w_uk, then the rotated part.
    Raises:
        ValueError: shapes that do not fit.
    Capture-safe.
    Source: DeepSeek-V2 report, section 2.1.2 (absorption of W_UK into W_UQ).
    """
    _check_q(q, w_uk, rope_table, out)
    num_heads, dn, dc = w_uk.shape
    half = rope_table.shape[1] // 2
    tile = _q_tile(w_uk)
    block_t = token_tile(q)
    launch(
        _absorb_q,
        (
            num_heads * (triton.cdiv(dc, tile.rows) + 1),
            triton.cdiv(q.shape[0], block_t * TILES_PER_CTA),
        ),
        q,
        w_uk,
        tok_pos,
        tok_row,
        rope_table,
        out,
        q.shape[0],
        q.stride(0),
        out.stride(0),
        DN=dn,
        DC=dc,
        HALF=half,
        BLOCK_N=tile.steps,
        BLOCK_C=tile.rows,
        BLOCK_T=block_t,
        TILES=TILES_PER_CTA,
        PAIRS=triton.next_power_of_2(half),
        INTERLEAVE=bool(interleave),
        PRECISION=precision(q),
        num_warps=4,
        # A second buffer for tokens would only take room from other CTAs where there is one tile.
        num_stages=1 if q.shape[0] <= block_t else 2,
        **overlap(launch),
    )


def absorb_q_ref(
    q: torch.Tensor,
    w_uk: torch.Tensor,
    tok_pos: torch.Tensor,
    tok_row: torch.Tensor,
    rope_table: torch.Tensor,
    *,
    interleave: bool,
    out: torch.Tensor,
) -> None:
    """`absorb_q` in plain torch."""
    _check_q(q, w_uk, rope_table, out)
    num_heads, dn, dc = w_uk.shape
    pad = (tok_row < 0)[:, None]
    heads = q.masked_fill(pad, 0.0).view(q.shape[0], num_heads, -1)
    out[..., :dc] = einsum_rows("thn,hnc->thc", heads[..., :dn].float(), w_uk.float())
    angles = rope_table[tok_pos.clamp(min=0).long()][:, None]
    out[..., dc:] = rope_ref(heads[..., dn:], angles, interleave=interleave)


def _q_tile(w_uk: torch.Tensor) -> Tile:
    _, dn, dc = w_uk.shape
    steps = max(16, triton.next_power_of_2(dn))
    # One tile of W_UK is 32 KB and four CTAs share an SM: all of it is in flight at once.
    rows = min(128 if w_uk.dtype.itemsize == 2 else 32, max(16, triton.next_power_of_2(dc)))
    return Tile(rows, steps)


def _check_q(
    q: torch.Tensor, w_uk: torch.Tensor, rope_table: torch.Tensor, out: torch.Tensor
) -> None:
    num_heads, dn, dc = w_uk.shape
    dr = rope_table.shape[1]
    want_q, want = (q.shape[0], num_heads * (dn + dr)), (q.shape[0], num_heads, dc + dr)
    if dr % 2 or tuple(q.shape) != want_q or tuple(out.shape) != want:
        raise ValueError(
            f"q must be {want_q} and out {want}, with an even rotary part {dr}; "
            f"got q {list(q.shape)}, out {list(out.shape)}"
        )
    if not w_uk.is_contiguous() or out.stride()[1:] != (dc + dr, 1) or q.stride(1) != 1:
        raise ValueError(
            "w_uk, and the rows of q and out, must be contiguous; "
            f"got strides {w_uk.stride()}, {q.stride()} and {out.stride()}"
        )
