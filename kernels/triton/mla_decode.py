"""Decode attention over the paged latent cache: split-KV with fixed cuts, and the ordered merge.

Invariants: a token's KV is cut at fixed multiples of `cut`, walked in fixed tiles, and its splits
are added in order, all in fp32; so a token's bits depend on its own query and KV alone. Nothing
past a token's kv_len is read as data: the last, partial tile is loaded masked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher, TensorMap
from kernels.triton.overlap import await_inputs, await_inputs_streaming, overlap

MERGE_HEADS = 4  # heads of one merge CTA
MERGE_BYTES = 16  # of one element's splits in flight: one after the other would take a latency each
LONG_CUT = 2048  # tokens; from here on most rows have one split, and there is nothing to merge
HOPPER = "sm_90"
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


@triton.jit
def _load_splits(
    part_o,
    part_lse,
    line,  # int64 [R, 1]: of the first of them
    left,  # int32 [R, 1]: how many there are, from it on
    c,
    lines,
    H: tl.constexpr,
    DC: tl.constexpr,
    GROUP: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """(fp32 [R, 1], fp32 or act [R, C]) of GROUP splits; what is not there weighs nothing.

    All of them are asked for before the first is looked at.
    """
    lses, parts = tl.tuple([]), tl.tuple([])
    for i in tl.static_range(GROUP):
        at, mask = line + i * H, i < left
        if i < AHEAD:
            mask = lines
        lses += (tl.load(part_lse + at, mask=mask, other=float("-inf")),)
        parts += (tl.load(part_o + at * DC + c, mask=mask & (c < DC), other=0.0),)
    return lses, parts


@triton.jit
def _add_splits(total, acc, high, lses, parts, left, GROUP: tl.constexpr, AHEAD: tl.constexpr):
    """The sum of weights and the weighted sum, with GROUP more splits."""
    for i in tl.static_range(GROUP):
        weight, o = tl.exp2(lses[i] - high), parts[i].to(tl.float32)
        if i < AHEAD:
            weight, o = tl.where(i < left, weight, 0.0), tl.where(i < left, o, 0.0)
        total += weight
        acc = tl.fma(o, tl.broadcast_to(weight, acc.shape), acc)
    return total, acc


@triton.jit
def merge_splits(
    part_o,  # fp32 or act [T, SPLITS, H, DC]
    part_lse,  # fp32 [T, SPLITS, H], base 2
    first,  # int64 [R, 1]: lines of the first splits; a token's are H lines apart
    used,  # int32 [R, 1]: splits to add, 0 where there is no line
    c,  # [1, C]
    lines,  # i1 [R, 1]: whether there is such a line
    H: tl.constexpr,
    DC: tl.constexpr,
    SPLITS_POW2: tl.constexpr,
    GROUP: tl.constexpr,  # splits that are in flight together
    AHEAD: tl.constexpr,  # of them, such that are loaded before `used` is known
):
    """fp32 [R, C]: each line's splits by their weights, added in order; NaN where there are none.

    Every element is a chain of fused steps of its own, so its bits depend neither on the lines
    beside it nor on GROUP: two kernels that merge so come to the same.
    """
    lses, parts = _load_splits(part_o, part_lse, first, used, c, lines, H, DC, GROUP, AHEAD)
    split = tl.arange(0, SPLITS_POW2)[None, :]
    every = tl.load(part_lse + first + split * H, mask=split < used, other=float("-inf"))
    high = tl.max(every, axis=1)[:, None]
    total = tl.zeros(used.shape, tl.float32)
    acc = tl.zeros([used.shape[0], c.shape[1]], tl.float32)
    total, acc = _add_splits(total, acc, high, lses, parts, used, GROUP, AHEAD)
    if SPLITS_POW2 > GROUP:
        for s in tl.range(GROUP, tl.max(tl.max(used, axis=1), axis=0), GROUP):
            line, left = first + s * H, used - s
            lses, parts = _load_splits(part_o, part_lse, line, left, c, lines, H, DC, GROUP, 0)
            total, acc = _add_splits(total, acc, high, lses, parts, left, GROUP, 0)
    return acc / total


@triton.jit
def _merge(
    kv_len,  # int32 [T]
    part_o,  # fp32 or act [T, SPLITS, H, DC]
    part_lse,  # fp32 [T, SPLITS, H], base 2
    out,  # act [T, H, DC], row pitch out_pitch
    out_pitch,
    H: tl.constexpr,
    DC: tl.constexpr,
    CUT: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_POW2: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    t = tl.program_id(0).to(tl.int64)
    used = (tl.load(kv_len + t) + CUT - 1) // CUT
    # The first is settled by the compiler, the second on the device.
    if AHEAD == 0:  # noqa: SIM102
        if used == 1:
            return
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    first, used = t * (SPLITS * H) + h, tl.where(h < H, used, 0)
    o = merge_splits(part_o, part_lse, first, used, c, h < H, H, DC, SPLITS_POW2, GROUP, AHEAD)
    at = out + t * out_pitch + h * DC + c
    tl.store(at, tl.where(used > 0, o, 0.0), mask=(h < H) & (c < DC) & (used != 1))


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
        out: act [T, H, dc].
        part_o: float32 [T, num_splits, H, dc], scratch.
        part_lse: float32 [T, num_splits, H], scratch.
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
    if splits > 1:
        merge(launch, kv_len, part_o, part_lse, cut=cut, out=out)


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
    """`mla_decode` in plain torch; the scratch is left alone.

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
            out[some] = _attention(q[some], kv_cache[slots], live, softmax_scale, out.shape[2])


def _attention(
    q: torch.Tensor, kv: torch.Tensor, live: torch.Tensor, scale: float, dc: int
) -> torch.Tensor:
    """act [N, H, dc] from q act [N, H, D], kv act [N, L, D] and live [N, L]."""
    # Slots that are not live may hold NaN, which a weight of zero would not hide.
    wide = kv.float().masked_fill_(~live[..., None], 0.0)
    score = torch.bmm(q.float(), wide.mT).mul_(scale)
    score.masked_fill_(~live[:, None], float("-inf"))
    return torch.bmm(score.softmax(-1), wide[..., :dc]).to(q.dtype)


def merge(
    launch: Launcher,
    kv_len: torch.Tensor,
    part_o: torch.Tensor,
    part_lse: torch.Tensor,
    *,
    cut: int,
    out: torch.Tensor,
) -> None:
    """Add the splits of every token, in order; leave tokens of one split, zero those of none.

    Args:
        kv_len: int32 [T].
        part_o: float32 or act [T, num_splits, H, dc], each split normalised by its own sum.
        part_lse: float32 [T, num_splits, H], log2 of each split's sum of 2**score.
        cut: tokens of a split; token t has ceil(kv_len[t] / cut) of them.
        out: act [T, H, dc].
    Raises:
        ValueError: shapes that do not fit.
    Capture-safe.
    """
    check_parts(part_o, part_lse, out)
    tokens, num_heads, dc = out.shape
    launch(
        _merge,
        (tokens, triton.cdiv(num_heads, MERGE_HEADS)),
        kv_len,
        part_o,
        part_lse,
        out,
        out.stride(0),
        H=num_heads,
        DC=dc,
        CUT=cut,
        SPLITS=part_o.shape[1],
        SPLITS_POW2=int(triton.next_power_of_2(part_o.shape[1])),
        BLOCK_H=MERGE_HEADS,
        BLOCK_C=_pow2(dc),
        GROUP=MERGE_BYTES // part_o.element_size(),
        AHEAD=2 if part_o.shape[1] > 1 and cut < LONG_CUT else 0,
        num_warps=4,
        **overlap(launch),
    )


def merge_ref(
    kv_len: torch.Tensor,
    part_o: torch.Tensor,
    part_lse: torch.Tensor,
    *,
    cut: int,
    out: torch.Tensor,
) -> None:
    """`merge` in plain torch."""
    check_parts(part_o, part_lse, out)
    used = -(-kv_len // cut)
    unused = torch.arange(part_o.shape[1]) >= used[:, None]
    lse = part_lse.masked_fill(unused[..., None], float("-inf"))
    weight = torch.exp2(lse - lse.amax(1, keepdim=True).nan_to_num(neginf=0.0))
    weight = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    parts = part_o.float().masked_fill(unused[..., None, None], 0.0)
    merged = (parts * weight[..., None]).sum(1)
    keep = (used == 1)[:, None, None]
    out.copy_(torch.where(keep, out.float(), merged))


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


def check_parts(part_o: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor) -> None:
    """Refuse splits of attention that do not fit its output."""
    tokens, num_heads, dc = out.shape
    splits = part_o.shape[1]
    want = ((tokens, splits, num_heads, dc), (tokens, splits, num_heads))
    if (tuple(part_o.shape), tuple(part_lse.shape)) != want or part_lse.dtype != torch.float32:
        raise ValueError(
            f"part_o and part_lse must be {want[0]} and float32 {want[1]}, "
            f"got {list(part_o.shape)} and {part_lse.dtype} {list(part_lse.shape)}"
        )
    if not part_o.is_contiguous() or not part_lse.is_contiguous() or out.stride()[1:] != (dc, 1):
        raise ValueError(
            "part_o, part_lse and the rows of out must be contiguous, "
            f"got strides {part_o.stride()}, {part_lse.stride()} and {out.stride()}"
        )
