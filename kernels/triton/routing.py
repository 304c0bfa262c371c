"""Expert routing: a token's experts. An expert's tokens are in `expert_lists`, the sum of what the
experts return in `expert_sum`.

Words: a pair p = t*K + k is one (token, choice); id -1 is "no expert" (padding, another rank's).
Invariants, of all three: everything is ordered by index, never by arrival, so nothing depends on
scheduling; an id is -1 or in range whatever the logits are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap
from kernels.triton.tiles import num_parts, sigmoid_rows, sum_parts

PART_ELEMS = 16384  # of the router's parts that a program of eight warps has in flight
FULL_SPAN = 128  # experts that a warp takes side by side: four a lane, 16 bytes
EPSILON = 1e-20  # keeps the normalising sum away from zero

_LOWEST = tl.constexpr(-(2**63))
_LOWEST32 = tl.constexpr(-(2**31))
_FULL_SPAN = tl.constexpr(FULL_SPAN)
_EPSILON = tl.constexpr(EPSILON)


@triton.jit
def _flip(bits):
    """Map int32 float bits to integers of the same order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _order(value):
    """int32 of the same order as fp32 values; NaN on top, as in topk."""
    # The sign of a NaN differs between machines, so its bits cannot be used.
    return tl.where(value == value, _flip(value.to(tl.int32, bitcast=True)), 0x7FFFFFFF)


@triton.jit
def _sort_key(value, index, N: tl.constexpr):
    """int64 keys, all different: by fp32 value, then lower index first."""
    return (_order(value).to(tl.int64) << 32) | (N - 1 - index).to(tl.int64)


@triton.jit
def _key_value(key):
    return _flip((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _ranks(key):
    """int32 [N]: how many of the keys [N] are larger. All at once: no choice waits for another."""
    larger = tl.expand_dims(key, 0) > tl.expand_dims(key, 1)
    return tl.sum(larger.to(tl.int32), axis=1)


@triton.jit
def _keep_groups(
    key,  # int64 [G2, S2] sort keys of the choices, _LOWEST where there is no expert
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    G2: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
):
    """bool [G2]: the best groups by the sum of their two best choices."""
    best = tl.max(key, axis=1)
    score = _key_value(best)
    if SIZE > 1:
        score += _key_value(tl.max(tl.where(key == best[:, None], _LOWEST, key), axis=1))
    group = tl.arange(0, G2)
    return _ranks(tl.where(group < GROUPS, _sort_key(score, group, GROUPS), _LOWEST)) < TOPK_GROUPS


@triton.jit
def _sum_logits(
    at,  # fp32 pointers [H, L] into the first part
    real,  # bool [H, L]
    part_stride,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """fp32 [H, L]: the sum of all parts, in an order that the shapes alone set.

    All parts of a chunk are in flight at once: one after the other they would take a latency each.
    They lie across the warps, so every warp ends up with all the sums.
    """
    total = tl.zeros(at.shape, tl.float32)
    for first in tl.static_range(0, PARTS, CHUNK):
        part = first + tl.arange(0, CHUNK)[:, None, None]
        inside = (part < PARTS) & real[None, :, :]
        value = tl.load(at[None, :, :] + part * part_stride, mask=inside, other=0.0)
        total += tl.sum(value, axis=0)
    return total


@triton.jit
def _spread(
    src,  # fp32 [E]
    index,  # int32 [H, L]
    real,  # bool [H, L]
    COPIES: tl.constexpr,
):
    """fp32 [H, L]: src[index], zero where it is not real, for every warp as in `_sum_logits`.

    A plain load would be dealt out among the warps, and all that depends on it, too.
    """
    first = tl.arange(0, COPIES)[:, None, None] == 0
    return tl.sum(tl.load(src + index[None, :, :], mask=first & real[None, :, :], other=0.0), 0)


@triton.jit
def _best_of_many(choice, expert, open, E: tl.constexpr, K: tl.constexpr):
    """int32 [H, L]: rank of the K best among open experts, -1 for the others; `_ranks` for many.

    They lie across all lanes, so a warp reduces int32 in one instruction.
    """
    order = tl.where(open, _order(choice), _LOWEST32)
    slot = tl.full(choice.shape, -1, tl.int32)
    for i in tl.static_range(K):
        best = tl.max(tl.max(order, axis=0), axis=0)
        index = tl.min(tl.min(tl.where(order == best, expert, E), axis=0), axis=0)
        slot = tl.where(expert == index, i, slot)
        order = tl.where(expert == index, _LOWEST32, order)
    return slot


@triton.jit
def _route(
    logits,  # fp32 [PARTS, T, E], pitches part_stride and logits_pitch
    bias,  # fp32 [E], or unused
    tok_row,  # int32 [T]
    out_ids,  # int32 [T, COLS]
    out_weights,  # fp32 [T, COLS]
    logits_pitch,
    part_stride,
    scaling,
    E: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,  # experts a group
    G2: tl.constexpr,
    S2: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    COLS: tl.constexpr,  # K, and one more for the shared expert
    SHARED_ID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,  # parts that are loaded at once
    SPAN: tl.constexpr,  # experts that lie across the lanes of a warp
    PDL: tl.constexpr,
):
    # [E2 / SPAN, SPAN], row-major the same as [G2, S2].
    place = tl.arange(0, G2 * S2 // SPAN)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    expert = place
    real = place < E
    if S2 != SIZE:
        expert = place // S2 * SIZE + place % S2
        real = (place // S2 < GROUPS) & (place % S2 < SIZE)
    if HAS_BIAS:  # no step writes it
        if SPAN < _FULL_SPAN:
            shift = tl.load(bias + expert, mask=real, other=0.0)
        else:
            shift = _spread(bias, expert, real, CHUNK)
    await_inputs(PDL)
    t = tl.program_id(0).to(tl.int64)
    live = tl.load(tok_row + t) >= 0
    score = tl.sigmoid(
        _sum_logits(logits + t * logits_pitch + expert, real, part_stride, PARTS, CHUNK)
    )
    choice = score
    if HAS_BIAS:
        choice += shift
    key = tl.where(real, _sort_key(choice, expert, E), _LOWEST)
    if TOPK_GROUPS < GROUPS:
        grouped = tl.reshape(key, [G2, S2])
        kept = _keep_groups(grouped, GROUPS, SIZE, G2, TOPK_GROUPS)
        key = tl.reshape(tl.where(kept[:, None], grouped, _LOWEST), key.shape)
    if SPAN < _FULL_SPAN:
        rank = _ranks(tl.reshape(key, [SPAN]))
        slot = tl.where(rank < K, rank, -1)
        expert, score = tl.reshape(expert, [SPAN]), tl.reshape(score, [SPAN])
        real = tl.reshape(real, [SPAN])
    else:
        # Places behind a group have the numbers of the next group's experts.
        expert = tl.where(real, expert, E)
        slot = _best_of_many(choice, expert, key != _LOWEST, E, K)
    factor = scaling
    if NORMALIZE:  # one division a token: a product may be an ulp off the quotient
        factor = tl.div_rn(scaling, tl.sum(tl.where(slot >= 0, score, 0.0)) + _EPSILON)
    chosen = live & (slot >= 0)
    tl.store(out_ids + t * COLS + slot, expert, mask=chosen)
    tl.store(out_weights + t * COLS + slot, score * factor, mask=chosen)
    # The shared expert's column; of a padded token, all.
    k = tl.arange(0, K2)
    rest = (k < COLS) & ((k >= K) | (live == 0))
    tl.store(out_ids + t * COLS + k, tl.where(live, SHARED_ID, -1) + k * 0, mask=rest)
    tl.store(out_weights + t * COLS + k, tl.where(live, 1.0, 0.0) + k * 0.0, mask=rest)


def route(
    launch: Launcher,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    tok_row: torch.Tensor,
    *,
    num_groups: int,
    topk_groups: int,
    top_k: int,
    normalize: bool,
    scaling: float,
    shared_id: int | None = None,
    out_ids: torch.Tensor,
    out_weights: torch.Tensor,
) -> None:
    """Choose top_k experts a token by sigmoid score plus bias, among the best groups of experts.

    A group's score is the sum of its two best choices. Ties go to the lower index; NaN counts as
    the largest value, so it is chosen and its weight is NaN (with `normalize`, the whole row's).

    Args:
        logits: fp32 [T, E], the row pitch may exceed E; or [S, T, E], parts that are added up here.
        bias: fp32 [E], only for the choice, or None.
        tok_row: int32 [T]; -1 is padding and gets ids -1, weights 0.
        num_groups, topk_groups: E is cut into num_groups equal groups; topk_groups of them compete.
        top_k: experts a token.
        normalize: divide the weights by their sum.
        scaling: multiplies the weights.
        shared_id: of an expert that every real token goes to as well, with weight 1 and last.
        out_ids: int32 [T, top_k], by descending choice; with shared_id [T, top_k + 1].
        out_weights: fp32, as out_ids.
    Raises:
        ValueError: counts that do not divide or do not suffice, or shapes that do not fit.
    Capture-safe.
    Source: `DeepseekV3TopkRouter` of transformers; DeepSeek-V3 report, section 2.1.2.
    """
    columns = top_k + (shared_id is not None)
    size = _check_route(logits, bias, num_groups, topk_groups, top_k, columns, out_ids, out_weights)
    num_tokens, experts = logits.shape[-2:]
    parts, groups2, size2 = (
        max(1, num_parts(logits)),
        *map(triton.next_power_of_2, (num_groups, size)),
    )
    tile = groups2 * size2
    chunk = min(triton.next_power_of_2(parts), max(1, PART_ELEMS // tile))
    launch(
        _route,
        (num_tokens,),
        logits,
        logits if bias is None else bias,
        tok_row,
        out_ids,
        out_weights,
        logits.stride(-2),
        logits.stride(0) if parts > 1 else 0,
        float(scaling),
        E=experts,
        GROUPS=num_groups,
        SIZE=size,
        G2=groups2,
        S2=size2,
        TOPK_GROUPS=topk_groups,
        K=top_k,
        K2=triton.next_power_of_2(columns),
        COLS=columns,
        SHARED_ID=-1 if shared_id is None else shared_id,
        HAS_BIAS=bias is not None,
        NORMALIZE=normalize,
        PARTS=parts,
        CHUNK=chunk,
        SPAN=min(tile, FULL_SPAN),
        # The order in which parts are added goes by the warps: they must not go by the tokens.
        num_warps=max(1, min(8, chunk * tile // 256)),
        **overlap(launch),
    )


def route_ref(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    tok_row: torch.Tensor,
    *,
    num_groups: int,
    topk_groups: int,
    top_k: int,
    normalize: bool,
    scaling: float,
    shared_id: int | None = None,
    out_ids: torch.Tensor,
    out_weights: torch.Tensor,
) -> None:
    """`route` in plain torch."""
    columns = top_k + (shared_id is not None)
    size = _check_route(logits, bias, num_groups, topk_groups, top_k, columns, out_ids, out_weights)
    scores = sigmoid_rows(sum_parts(logits, torch.float32))
    choice = scores if bias is None else scores + bias
    grouped = choice.view(-1, num_groups, size)
    group_score = grouped.topk(min(2, size), dim=-1)[0].sum(-1)
    # A stable sort puts the lower index first among equals; topk promises no order.
    best_groups = group_score.sort(dim=1, descending=True, stable=True)[1][:, :topk_groups]
    dropped = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, best_groups, False)
    choice = grouped.masked_fill(dropped[..., None], float("-inf")).flatten(1)
    ids = choice.sort(dim=1, descending=True, stable=True)[1][:, :top_k]
    weights = scores.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(1, keepdim=True) + EPSILON)
    weights = weights * scaling
    if shared_id is not None:
        ids = torch.nn.functional.pad(ids, (0, 1), value=shared_id)
        weights = torch.nn.functional.pad(weights, (0, 1), value=1.0)
    padded = (tok_row < 0)[:, None]
    out_ids.copy_(ids.masked_fill(padded, -1))
    out_weights.copy_(weights.masked_fill(padded, 0.0))


def _check_route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    num_groups: int,
    topk_groups: int,
    top_k: int,
    columns: int,
    out_ids: torch.Tensor,
    out_weights: torch.Tensor,
) -> int:
    rows, experts = logits.shape[-2:]
    size = experts // num_groups
    if size * num_groups != experts or not 1 <= topk_groups <= num_groups:
        raise ValueError(
            f"{experts} experts must divide into num_groups, of which 1 to num_groups are kept; "
            f"got num_groups {num_groups}, topk_groups {topk_groups}"
        )
    if not 1 <= top_k <= topk_groups * size:
        raise ValueError(
            f"top_k must be 1 to {topk_groups * size} (topk_groups {topk_groups} of {size} experts "
            f"each), got {top_k}"
        )
    if logits.dtype != torch.float32 or (bias is not None and bias.dtype != torch.float32):
        raise ValueError(
            "logits and bias must be float32 (the choice is sensitive), "
            f"got {logits.dtype} and {None if bias is None else bias.dtype}"
        )
    for name, t in (("out_ids", out_ids), ("out_weights", out_weights)):
        if tuple(t.shape) != (rows, columns) or not t.is_contiguous():
            raise ValueError(
                f"{name} must be [{rows}, {columns}] and contiguous, "
                f"got {list(t.shape)}, strides {t.stride()}"
            )
    return int(size)
