"""Decode attention over the paged latent cache: split-KV with fixed cuts.

Invariants: a token's KV is cut at fixed multiples of `cut` and walked in fixed tiles, all in fp32;
so a token's bits depend on its own query and KV alone. Nothing past a token's kv_len is read as
data: the last, partial tile is loaded masked. Splits are left as `mla_merge` describes, for
`absorb_v` to add up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.triton.launch import HOPPER, Launcher, TensorMap
from kernels.triton.mla_merge import check_parts
from kernels.triton.overlap import await_inputs_streaming, overlap

LOG2_E = 1.4426950408889634
REF_BYTES = 64 << 20  # of gathered KV that the oracle holds at a time


class _Tile(NamedTuple):
    """Heads and KV tokens of a tile; functions of the model's shape, dtype and page size only."""

    heads: int
    tokens: int
    warps: int
    stages: int


@triton.jit
def _attend(
    q_latent,  # act [BLOCK_H, BLOCK_C]
    q_rope,  # act [BLOCK_H, BLOCK_R]
    latent,  # act [BLOCK_N, BLOCK_C]
    rope,  # act [BLOCK_N, BLOCK_R]
    live,  # i1 [BLOCK_N], or unused
    scale,
    high,  # fp32 [BLOCK_H]: running maximum score, in powers of two
    total,  # fp32 [BLOCK_H]: running sum of weights
    acc,  # fp32 [BLOCK_H, BLOCK_C]: running sum of weighted latents
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take one tile of KV into the running softmax."""
    score = tl.dot(q_rope, tl.trans(rope), input_precision=PRECISION)
    score = tl.dot(q_latent, tl.trans(latent), score, input_precision=PRECISION) * scale
    if MASKED:
        score = tl.where(live[None, :], score, float("-inf"))
    new_high = tl.maximum(high, tl.max(score, axis=1))
    weight = tl.exp2(score - new_high[:, None])
    decay = tl.exp2(high - new_high)
    total = total * decay + tl.sum(weight, axis=1)
    acc = acc * decay[:, None]
    acc = tl.dot(weight.to(latent.dtype), latent, acc, input_precision=PRECISION)
    return new_high, total, acc


@triton.jit
def _mla_decode(
    q,  # act [T, H, DC+DR], row pitch q_pitch
    kv,  # act [num_slots, DC+DR]
    latents,  # the same, in blocks [BLOCK_N, BLOCK_C]
    ropes,  # the same, in blocks [BLOCK_N, BLOCK_R]
    page_table,  # int32 [max_rows, max_pages], row pitch table_pitch
    tok_row,  # int32 [T]
    kv_len,  # int32 [T]
    out,  # act [T, H, DC], row pitch out_pitch
    part_o,  # fp32 [T, SPLITS, H, DC]
    part_lse,  # fp32 [T, SPLITS, H]
    scale,
    q_pitch,
    table_pitch,
    out_pitch,
    H: tl.constexpr,
    DC: tl.constexpr,
    DR: tl.constexpr,
    PAGE: tl.constexpr,
    CUT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs_streaming(PDL)
    HEAD_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    t = (tl.program_id(0) // HEAD_TILES).to(tl.int64)
    split = tl.program_id(1)
    length = tl.load(kv_len + t)
    begin = split * CUT
    h = ((tl.program_id(0) % HEAD_TILES) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    out_at = out + t * out_pitch + h * DC + c
    out_mask = (h < H) & (c < DC)
    if begin >= length:
        if split == 0:
            tl.store(out_at, tl.zeros([BLOCK_H, BLOCK_C], tl.float32), mask=out_mask)
        return
    end = tl.minimum(begin + CUT, length)
    r = tl.arange(0, BLOCK_R)[None, :]
    q_at = q + t * q_pitch + h * (DC + DR)
    q_latent = tl.load(q_at + c, mask=out_mask, other=0.0)
    q_rope = tl.load(q_at + DC + r, mask=(h < H) & (r < DR), other=0.0)
    pages = page_table + tl.load(tok_row + t).to(tl.int64) * table_pitch

    high = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    tail = begin + (end - begin) // BLOCK_N * BLOCK_N
    for n0 in tl.range(begin, tail, BLOCK_N, num_stages=STAGES):
        # A tile lies within a page. Columns past DC or DR meet zeros in the query.
        slot = tl.load(pages + n0 // PAGE) * PAGE + n0 % PAGE
        latent = latents.load([slot, 0])
        rope = ropes.load([slot, DC])
        high, total, acc = _attend(
            q_latent, q_rope, latent, rope, high, scale, high, total, acc, False, PRECISION
        )
    if tail < end:
        n = tail + tl.arange(0, BLOCK_N)
        live = n < end
        slot = tl.load(pages + n // PAGE, mask=live, other=0).to(tl.int64) * PAGE + n % PAGE
        kv_at = kv + slot[:, None] * (DC + DR)
        latent = tl.load(kv_at + c, mask=live[:, None] & (c < DC), other=0.0)
        rope = tl.load(kv_at + DC + r, mask=live[:, None] & (r < DR), other=0.0)
        high, total, acc = _attend(
            q_latent, q_rope, latent, rope, live, scale, high, total, acc, True, PRECISION
        )
    o = acc / total[:, None]
    if length <= CUT:
        tl.store(out_at, o, mask=out_mask)
    else:
        part = (t * SPLITS + split) * H + h
        tl.store(part_o + part * DC + c, o, mask=out_mask)
        lse = (high + tl.log2(total))[:, None]
        tl.store(part_lse + part, lse, mask=h < H)


def num_splits(max_seq_len: int, cut: int) -> int:
    """Splits that the longest row takes: slots of the partial buffers."""
    return -(-max_seq_len // cut)


def mla_decode(
    launch: Launcher,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    page_table: torch.Tensor,
    tok_row: torch.Tensor,
    kv_len: torch.Tensor,
    *,
    page_size: int,
    softmax_scale: float,
    cut: int,
    out: torch.Tensor,
    part_o: torch.Tensor,
    part_lse: torch.Tensor,
) -> None:
    """Attend with every token of the step over its own row's latent KV.

    Args:
        q: act [T, H, dc+dr], absorbed: latent part, then rotated part.
        kv_cache: act [num_slots, dc+dr], contiguous.
        page_table: int32 [max_rows, max_pages].
        tok_row: int32 [T]; read only where kv_len is not 0.
        kv_len: int32 [T], tokens to attend to; 0 gives zeros.
        page_size: tokens, a power of two of at least 16.
        softmax_scale: of the scores, before the softmax.
        cut: tokens of a split, a multiple of 64 and of page_size where that is smaller.
        out: act [T, H, dc]: of tokens of one split, and zeros of those of none.
        part_o: float32 [T, num_splits, H, dc]: of the others, each split by itself.
        part_lse: float32 [T, num_splits, H], likewise; see `mla_merge`.
    Raises:
        ValueError: shapes that do not fit.
    Capture-safe.
    Source: DeepSeek-V2 report, section 2.1.2; split-KV after FlashDecoding (Dao et al., 2023).
    """
    _check(q, kv_cache, page_table, page_size, cut, out, part_o, part_lse)
    tokens, num_heads, dc = out.shape
    dr = q.shape[2] - dc
    splits = part_o.shape[1]
    tile = _tile(q, page_size, launch.arch)
    block_c, block_r = _pow2(dc), _pow2(dr)
    launch(
        _mla_decode,
        (tokens * triton.cdiv(num_heads, tile.heads), splits),
        q,
        kv_cache,
        TensorMap(kv_cache, (tile.tokens, block_c)),
        TensorMap(kv_cache, (tile.tokens, block_r)),
        page_table,
        tok_row,
        kv_len,
        out,
        part_o,
        part_lse,
        float(softmax_scale) * LOG2_E,
        q.stride(0),
        page_table.stride(0),
        out.stride(0),
        H=num_heads,
        DC=dc,
        DR=dr,
        PAGE=page_size,
        CUT=cut,
        SPLITS=splits,
        BLOCK_H=tile.heads,
        BLOCK_C=block_c,
        BLOCK_R=block_r,
        BLOCK_N=tile.tokens,
        STAGES=tile.stages,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        **overlap(launch),
    )


def mla_decode_ref(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    page_table: torch.Tensor,
    tok_row: torch.Tensor,
    kv_len: torch.Tensor,
    *,
    page_size: int,
    softmax_scale: float,
    cut: int,
    out: torch.Tensor,
    part_o: torch.Tensor,
    part_lse: torch.Tensor,
) -> None:
    """`mla_decode` in plain torch; `out` gets the sum over splits at once, besides the splits.

    Tokens are batched with others of the same padded length, which follows from their own length,
    so here too a token's result does not depend on its neighbours.
    """
    _check(q, kv_cache, page_table, page_size, cut, out, part_o, part_lse)
    padded = torch.where(kv_len > 0, 2 ** torch.log2(kv_len.clamp(min=16).float()).ceil().int(), 0)
    out[padded == 0] = 0.0
    for length in sorted(set(padded.tolist()) - {0}):
        tokens = (padded == length).nonzero()[:, 0]
        limit = max(1, REF_BYTES // (length * q.shape[2] * 4))
        at = torch.arange(length)
        page_of = (at // page_size).clamp(max=page_table.shape[1] - 1)
        for some in tokens.split(limit):
            pages = page_table[tok_row[some].long()][:, page_of].long()
            live = at < kv_len[some, None]
            slots = torch.where(live, pages * page_size + at % page_size, 0)
            score, value = _scores(q[some], kv_cache[slots], live, softmax_scale, out.shape[2])
            out[some] = torch.bmm(score.softmax(-1), value).to(q.dtype)
            for split in range(min(part_o.shape[1], -(-length // cut))):
                begin = split * cut
                has = (kv_len[some] > max(begin, cut)).nonzero()[:, 0]
                one = score[has, :, begin : begin + cut]
                part_o[some[has], split] = torch.bmm(
                    one.softmax(-1), value[has, begin : begin + cut]
                ).to(part_o.dtype)
                part_lse[some[has], split] = one.logsumexp(-1) * LOG2_E


def _scores(
    q: torch.Tensor, kv: torch.Tensor, live: torch.Tensor, scale: float, dc: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 scores [N, H, L], and values [N, L, dc], from q act [N, H, D], kv act [N, L, D] and
    live [N, L]."""
    # Slots that are not live may hold NaN, which a weight of zero would not hide.
    wide = kv.float().masked_fill_(~live[..., None], 0.0)
    score = torch.bmm(q.float(), wide.mT).mul_(scale)
    return score.masked_fill_(~live[:, None], float("-inf")), wide[..., :dc]


def _tile(q: torch.Tensor, page_size: int, arch: str) -> _Tile:
    heads = min(64, max(16, int(triton.next_power_of_2(q.shape[1]))))
    if q.dtype.itemsize != 2:
        # Exact fp32 products run on the plain cores, out of registers.
        return _Tile(heads if q.shape[2] <= 128 else 16, 16, 8, 1)
    if arch != HOPPER:
        # The pipeliner keeps one buffer more there; a tile of 64 would not fit beside the query.
        return _Tile(heads if heads == 64 else 16, min(32, page_size), 8, 2)
    # 64 heads take two warp groups, each with half of the value columns. Fewer heads take the
    # warp-level product where its accumulator fits in registers, and are padded to 64 elsewhere.
    # (With KV as its left operand, Triton 3.6 makes a product that reads past its shared memory.)
    if heads == 64 or q.shape[2] > 200:
        return _Tile(64, min(64, page_size), 8, 2)
    return _Tile(heads, min(64, page_size), 4, 2)


def _pow2(width: int) -> int:
    return max(16, int(triton.next_power_of_2(width)))


def _check(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    cut: int,
    out: torch.Tensor,
    part_o: torch.Tensor,
    part_lse: torch.Tensor,
) -> None:
    if page_size < 16 or page_size & (page_size - 1) or cut % min(64, page_size):
        raise ValueError(
            f"page_size must be a power of two of at least 16, and cut a multiple of "
            f"{min(64, page_size)}; got {page_size} and {cut}"
        )
    if q.shape[2] != kv_cache.shape[1] or q.shape[:2] != out.shape[:2]:
        raise ValueError(
            f"q must be [T, H, {kv_cache.shape[1]}] and out [T, H, dc], "
            f"got {list(q.shape)} and {list(out.shape)}"
        )
    if not kv_cache.is_contiguous() or q.stride()[1:] != (q.shape[2], 1):
        raise ValueError(
            f"kv_cache and the rows of q must be contiguous, got strides {kv_cache.stride()} and "
            f"{q.stride()}"
        )
    want = num_splits(page_table.shape[1] * page_size, cut)
    if part_o.shape[1] != want or part_o.dtype != torch.float32:
        raise ValueError(
            f"part_o must be float32 [T, {want}, H, dc] ({page_table.shape[1]} pages of "
            f"{page_size} tokens cut at {cut}), got {part_o.dtype} {list(part_o.shape)}"
        )
    check_parts(part_o, part_lse, out)
