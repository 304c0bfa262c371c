"""Splits of a token's KV, added up in order: what split-KV attention leaves for its reader.

A token of one split is in `out` already. Of every other, split s is in `part_o`, normalised by its
own sum of 2**score, whose log2 is in `part_lse`. Invariants: splits are added in their order in
fp32, and a split that a token does not have is never taken in; so the bits follow from the token's
own splits, whoever adds them, and however many tokens or splits it takes at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap

MERGE_HEADS = 4  # heads of one merge CTA
LN_2 = 0.6931471805599453
MERGE_GROUP = 2  # splits whose loads are issued together


@triton.jit
def merge_splits(
    part_o,  # fp32 or act [T, SPLITS, H, DC]
    part_lse,  # fp32 [T, SPLITS, H], base 2
    first,  # int64 [R]: the row's line of split 0, (token * SPLITS) * H + head
    used,  # int32 [R]: splits of the row; 0 reads nothing and gives zeros
    c,  # int32 [C]
    H: tl.constexpr,
    DC: tl.constexpr,
    SPLITS_POW2: tl.constexpr,
    GROUP: tl.constexpr,
):
    """fp32 [R, C]: the weighted sum over splits."""
    R: tl.constexpr = first.shape[0]
    C: tl.constexpr = c.shape[0]
    s = tl.arange(0, SPLITS_POW2)[None, :]
    # A maximum is the same in any order; the sums below are not.
    lse = tl.load(part_lse + first[:, None] + s * H, mask=s < used[:, None], other=float("-inf"))
    high = tl.where(used > 0, tl.max(lse, axis=1), 0.0)
    acc = tl.zeros([R, C], tl.float32)
    total = tl.zeros([R], tl.float32)
    for s0 in tl.range(0, tl.max(used, axis=0), GROUP):
        for i in tl.static_range(GROUP):
            inside = s0 + i < used
            at = first + (s0 + i) * H
            weight = tl.exp2(tl.load(part_lse + at, mask=inside, other=float("-inf")) - high)
            mask = inside[:, None] & (c < DC)[None, :]
            o = tl.load(part_o + at[:, None] * DC + c[None, :], mask=mask, other=0.0)
            acc = tl.where(inside[:, None], acc + o.to(tl.float32) * weight[:, None], acc)
            total = tl.where(inside, total + weight, total)
    return acc / tl.where(used > 0, total, 1.0)[:, None]


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
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLITS_POW2: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    t = tl.program_id(0).to(tl.int64)
    splits = (tl.load(kv_len + t) + CUT - 1) // CUT
    if splits == 1:
        return
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, BLOCK_C)
    used = tl.where(h < H, splits, 0)
    first = t * SPLITS * H + h
    o = merge_splits(part_o, part_lse, first, used, c, H, DC, SPLITS_POW2, GROUP)
    mask = (h < H)[:, None] & (c < DC)[None, :]
    at = out + t * out_pitch + h[:, None] * DC + c[None, :]
    tl.store(at, o, mask=mask)


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

    A step does not launch it: `absorb_v` adds them up where it reads them. It completes attention
    that is measured or checked alone.

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
        BLOCK_H=MERGE_HEADS,
        BLOCK_C=max(16, triton.next_power_of_2(dc)),
        SPLITS_POW2=triton.next_power_of_2(part_o.shape[1]),
        GROUP=MERGE_GROUP,
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
    unused = torch.arange(part_o.shape[1], device=used.device) >= used[:, None]
    lse = part_lse.masked_fill(unused[..., None], float("-inf"))
    # As 2**x: torch's own takes another path, and other bits, for the last elements of a tensor.
    weight = torch.exp((lse - lse.amax(1, keepdim=True).nan_to_num(neginf=0.0)) * LN_2)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    parts = part_o.float().masked_fill(unused[..., None, None], 0.0)
    merged = (parts * weight[..., None]).sum(1)
    keep = (used == 1)[:, None, None]
    out.copy_(torch.where(keep, out.float(), merged))


def check_parts(part_o: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor) -> None:
    """Refuse partial results that do not fit `out` [T, H, dc].

    Raises:
        ValueError: other shapes or dtypes, or not contiguous.
    """
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
