"""Expert routing: a token's experts, an expert's tokens, and the sum of what the experts return.

Words: a pair p = t*K + k is one (token, choice); id -1 is "no expert" (padding, another rank's).
Invariants: everything is ordered by index, never by arrival, so nothing depends on scheduling; an
id is -1 or in range whatever the logits are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap
from kernels.triton.tiles import num_parts, sigmoid_rows, sum_parts

ALIGN_BLOCK = 2048
LIST_ELEMS = 8192  # tokens times experts that one program lists the pairs of
PART_ELEMS = 16384  # of the router's parts that a program of eight warps has in flight
FULL_SPAN = 128  # experts that a warp takes side by side: four a lane, 16 bytes
COMBINE_BLOCK = 512  # 4 elements a thread: the rows of all K choices are in flight at once
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
    left = tl.where(group < GROUPS, _sort_key(score, group, GROUPS), _LOWEST)
    for _ in tl.static_range(TOPK_GROUPS):
        left = tl.where(left == tl.max(left, axis=0), _LOWEST, left)
    return (left == _LOWEST) & (group < GROUPS)


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
def _best_of_few(choice, expert, real, open, E: tl.constexpr, K: tl.constexpr, K2: tl.constexpr):
    """(int32 [K2] ids by descending choice, int32 [H, L] which of them an expert is, or -1)."""
    key = tl.where(real & open, _sort_key(choice, expert, E), _LOWEST)
    k = tl.arange(0, K2)
    ids = tl.zeros([K2], tl.int32)
    slot = tl.full(choice.shape, -1, tl.int32)
    for i in tl.static_range(K):
        best = tl.max(tl.max(key, axis=0), axis=0)
        slot = tl.where(key == best, i, slot)
        key = tl.where(key == best, _LOWEST, key)
        ids = tl.where(k == i, (E - 1 - (best & 0xFFFFFFFF)).to(tl.int32), ids)
    return ids, slot


@triton.jit
def _best_of_many(choice, expert, real, open, E: tl.constexpr, K: tl.constexpr, K2: tl.constexpr):
    """As `_best_of_few`, for experts across all lanes: a warp reduces int32 in one instruction."""
    order = tl.where(real & open, _order(choice), _LOWEST32)
    k = tl.arange(0, K2)
    ids = tl.zeros([K2], tl.int32)
    slot = tl.full(choice.shape, -1, tl.int32)
    for i in tl.static_range(K):
        best = tl.max(tl.max(order, axis=0), axis=0)
        index = tl.min(tl.min(tl.where(order == best, expert, E), axis=0), axis=0)
        slot = tl.where(expert == index, i, slot)
        order = tl.where(expert == index, _LOWEST32, order)
        ids = tl.where(k == i, index, ids)
    return ids, slot


@triton.jit
def _list_pairs(
    slots,  # int8 [T, E2]: which of a token's choices the expert is; -1 for none
    offsets,  # int32 [E+1]
    pairs,  # int32 [T * COLS]
    num_tokens,
    E: tl.constexpr,
    E2: tl.constexpr,
    T2: tl.constexpr,
    COLS: tl.constexpr,
):
    """As `_align`, by one program: every (token, expert) at once, and its place is a sum."""
    t = tl.arange(0, T2)[:, None]
    e = tl.arange(0, E2)
    slot = tl.load(slots + t * E2 + e[None, :], mask=t < num_tokens, other=-1).to(tl.int32)
    found = (slot >= 0) & (e < E)[None, :]  # past E nobody writes
    rank = tl.cumsum(found.to(tl.int32), axis=0)
    count = tl.sum(found.to(tl.int32), axis=0)
    end = tl.cumsum(count, axis=0)
    tl.store(offsets + e, end - count, mask=e < E)
    tl.store(offsets + E, tl.sum(count, axis=0))
    at = (end - count)[None, :] + rank - 1
    tl.store(pairs + at, t * COLS + slot, mask=found)


@triton.jit
def _route(
    logits,  # fp32 [PARTS, T, E], pitches part_stride and logits_pitch
    bias,  # fp32 [E], or unused
    tok_row,  # int32 [T]
    out_ids,  # int32 [T, COLS]
    out_weights,  # fp32 [T, COLS]
    offsets,  # int32 [LISTED+1], or unused
    pairs,  # int32 [T * COLS], or unused
    slots,  # int8 [T, LISTED2], or unused
    arrivals,  # int32 [1], zero before and after, or unused
    ready,  # int32 [LISTED], or unused
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
    LISTED: tl.constexpr,  # experts whose pairs are listed as well; 0 for none
    LISTED2: tl.constexpr,
    T2: tl.constexpr,
    RESETS: tl.constexpr,
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
    open = real
    if TOPK_GROUPS < GROUPS:
        key = tl.reshape(tl.where(real, _sort_key(choice, expert, E), _LOWEST), [G2, S2])
        kept = tl.broadcast_to(_keep_groups(key, GROUPS, SIZE, G2, TOPK_GROUPS)[:, None], [G2, S2])
        open = tl.reshape(kept, [G2 * S2 // SPAN, SPAN])
    if SPAN < _FULL_SPAN:
        ids, slot = _best_of_few(choice, expert, real, open, E, K, K2)
    else:
        ids, slot = _best_of_many(choice, expert, real, open, E, K, K2)
    k = tl.arange(0, K2)
    # The scores without bias.
    weight = tl.gather(tl.reshape(score, [G2 * S2]), ids // SIZE * S2 + ids % SIZE, 0)
    if NORMALIZE:
        weight = tl.div_rn(weight, tl.sum(tl.where(k < K, weight, 0.0), axis=0) + _EPSILON)
    ids = tl.where(live, tl.where(k < K, ids, SHARED_ID), -1)
    weight = tl.where(live, tl.where(k < K, weight * scaling, 1.0), 0.0)
    tl.store(out_ids + t * COLS + k, ids, mask=k < COLS)
    tl.store(out_weights + t * COLS + k, weight, mask=k < COLS)
    if LISTED > 0:
        slot = tl.where(live, slot, -1)
        tl.store(slots + t * LISTED2 + expert, slot.to(tl.int8), mask=real)
        if LISTED > E:
            tl.store(slots + t * LISTED2 + E, tl.where(live, K, -1).to(tl.int8))
        # The last program to arrive has all slots before it: its add acquires what the others' adds
        # released, each for all threads of its program. Whoever that is, the lists are the same.
        tl.debug_barrier()
        num_tokens = tl.num_programs(0)
        if tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == num_tokens - 1:
            tl.store(arrivals, 0)
            _list_pairs(slots, offsets, pairs, num_tokens, LISTED, LISTED2, T2, COLS)
            if RESETS:
                e = tl.arange(0, LISTED2)
                tl.store(ready + e, tl.zeros([LISTED2], tl.int32), mask=e < LISTED)


@triton.jit
def _align(
    ids,  # int32 [N]
    offsets,  # int32 [E+1]
    pairs,  # int32 [N]
    ready,  # int32 [E], or unused
    N,
    expert_start,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    RESETS: tl.constexpr,
    PDL: tl.constexpr,
):
    """CTA e reads all ids twice, so that it needs nothing from its neighbours."""
    await_inputs(PDL)
    e = tl.program_id(0)
    if RESETS:
        tl.store(ready + e, 0)
    lane = tl.arange(0, BLOCK)
    lower = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for i in range(NUM_BLOCKS):
        pair = i * BLOCK + lane
        local = tl.load(ids + pair, mask=pair < N, other=-1) - expert_start
        lower += ((local >= 0) & (local < e)).to(tl.int32)
        equal += (local == e).to(tl.int32)
    at = tl.sum(lower, axis=0)
    count = tl.sum(equal, axis=0)
    tl.store(offsets + e, at)
    if e == tl.num_programs(0) - 1:
        tl.store(offsets + e + 1, at + count)
    if count == 0:
        return
    for i in range(NUM_BLOCKS):
        pair = i * BLOCK + lane
        found = (tl.load(ids + pair, mask=pair < N, other=-1) - expert_start) == e
        rank = tl.cumsum(found.to(tl.int32), axis=0)
        tl.store(pairs + at + rank - 1, pair, mask=found)
        at += tl.sum(found.to(tl.int32), axis=0)


@triton.jit
def _combine(
    y,  # act [T*K, H]
    ids,  # int32 [T, K]
    weights,  # fp32 [T, K]
    shared,  # act [T, H], row pitch shared_pitch, or unused
    out,  # act [T, H], row pitch out_pitch
    shared_pitch,
    out_pitch,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    t = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        pair = t * K + k
        # A row without an expert may hold anything, so it is not even read.
        real = tl.load(ids + pair) >= 0
        weight = tl.load(weights + pair, mask=real, other=0.0)
        value = tl.load(y + pair * H + col, mask=(col < H) & real, other=0.0)
        total += weight * value.to(tl.float32)
    if HAS_SHARED:
        total += tl.load(shared + t * shared_pitch + col, mask=col < H, other=0.0).to(tl.float32)
    tl.store(out + t * out_pitch + col, total, mask=col < H)


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
    offsets: torch.Tensor | None = None,
    pairs: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    arrivals: torch.Tensor | None = None,
    ready: torch.Tensor | None = None,
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
        offsets, pairs: given, the pairs of each expert are listed as by `align` from expert 0 on;
            for sizes that `lists_fit` accepts.
        slots: int8 [T, list_width(experts)], given with them; its contents are lost.
        arrivals: int32 [1], given with them: zero before and after.
        ready: int32 [experts], may be given with them: is set to zero, for the experts' products.
    Raises:
        ValueError: counts that do not divide or do not suffice, or shapes that do not fit.
    Capture-safe.
    Source: `DeepseekV3TopkRouter` of transformers; DeepSeek-V3 report, section 2.1.2.
    """
    columns = top_k + (shared_id is not None)
    size = _check_route(logits, bias, num_groups, topk_groups, top_k, columns, out_ids, out_weights)
    listed = _check_lists(logits, shared_id, out_ids, offsets, pairs, slots, arrivals, ready)
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
        out_ids if offsets is None else offsets,
        out_ids if pairs is None else pairs,
        out_ids if slots is None else slots,
        out_ids if arrivals is None else arrivals,
        out_ids if ready is None else ready,
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
        LISTED=listed,
        LISTED2=list_width(listed),
        T2=triton.next_power_of_2(num_tokens) if listed else 1,
        RESETS=ready is not None,
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
    offsets: torch.Tensor | None = None,
    pairs: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    arrivals: torch.Tensor | None = None,
    ready: torch.Tensor | None = None,
) -> None:
    """`route` in plain torch."""
    columns = top_k + (shared_id is not None)
    size = _check_route(logits, bias, num_groups, topk_groups, top_k, columns, out_ids, out_weights)
    _check_lists(logits, shared_id, out_ids, offsets, pairs, slots, arrivals, ready)
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
    if offsets is not None and pairs is not None:
        align_ref(out_ids, expert_start=0, offsets=offsets, pairs=pairs, ready=ready)


def lists_fit(num_tokens: int, num_experts: int) -> bool:
    """Whether `route` lists so many pairs faster than a kernel of its own (`align`) does."""
    tile = triton.next_power_of_2(num_tokens) * list_width(num_experts)
    return bool(tile <= LIST_ELEMS)


def list_width(num_experts: int) -> int:
    """Slots of a token, one for each expert, in whole 16 bytes."""
    return max(16, int(triton.next_power_of_2(num_experts)))


def align(
    launch: Launcher,
    ids: torch.Tensor,
    *,
    expert_start: int,
    offsets: torch.Tensor,
    pairs: torch.Tensor,
    ready: torch.Tensor | None = None,
) -> None:
    """List the pairs of each local expert: pairs[offsets[e]:offsets[e+1]], ascending.

    Args:
        ids: int32 [T, K], contiguous; other ranks' experts and -1 are left out.
        expert_start: id of local expert 0.
        offsets: int32 [E_local+1].
        pairs: int32 [T*K]; pair ids t*K + k. Entries from offsets[E_local] on are not written.
        ready: int32 [E_local], is set to zero, for the experts' products; may be left out.
    Raises:
        ValueError: ids strided, or pairs too short.
    Capture-safe.
    """
    _check_align(ids, pairs)
    _check_ready(ready, offsets.shape[0] - 1)
    num_pairs = ids.numel()
    block = min(ALIGN_BLOCK, max(128, triton.next_power_of_2(num_pairs)))
    launch(
        _align,
        (offsets.shape[0] - 1,),
        ids,
        offsets,
        pairs,
        ids if ready is None else ready,
        num_pairs,
        expert_start,
        BLOCK=block,
        NUM_BLOCKS=triton.cdiv(num_pairs, block),
        RESETS=ready is not None,
        num_warps=max(1, min(8, block // 256)),
        **overlap(launch),
    )


def align_ref(
    ids: torch.Tensor,
    *,
    expert_start: int,
    offsets: torch.Tensor,
    pairs: torch.Tensor,
    ready: torch.Tensor | None = None,
) -> None:
    """`align` in plain torch."""
    _check_align(ids, pairs)
    if ready is not None:
        ready.zero_()
    num_local = offsets.shape[0] - 1
    local = ids.flatten().long() - expert_start
    local = torch.where((local < 0) | (local >= num_local), num_local, local)
    ends = torch.bincount(local, minlength=num_local + 1).cumsum(0)[:num_local]
    offsets[0] = 0
    offsets[1:] = ends
    num_listed = int(ends[-1])
    pairs[:num_listed] = local.argsort(stable=True)[:num_listed]


def combine(
    launch: Launcher,
    y: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    shared: torch.Tensor | None,
    *,
    out: torch.Tensor,
) -> None:
    """out[t] = sum over k, in order, of weights[t,k] * y[t*K+k], + shared[t]; fp32, rounded once.

    Args:
        y: act [T*K, H], contiguous; a row whose id is -1 is never read.
        ids: int32 [T, K].
        weights: fp32 [T, K].
        shared: act [T, H] or None.
        out: act [T, H].
    Raises:
        ValueError: shapes that do not fit, or strided ids, weights or y.
    Capture-safe.
    """
    _check_combine(y, ids, weights, shared, out)
    launch(
        _combine,
        (out.shape[0], triton.cdiv(out.shape[1], COMBINE_BLOCK)),
        y,
        ids,
        weights,
        out if shared is None else shared,
        out,
        0 if shared is None else shared.stride(0),
        out.stride(0),
        H=out.shape[1],
        K=ids.shape[1],
        BLOCK=COMBINE_BLOCK,
        HAS_SHARED=shared is not None,
        num_warps=4,
        **overlap(launch),
    )


def combine_ref(
    y: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    shared: torch.Tensor | None,
    *,
    out: torch.Tensor,
) -> None:
    """`combine` in plain torch."""
    _check_combine(y, ids, weights, shared, out)
    rows = y.view(*ids.shape, -1)
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for k in range(ids.shape[1]):
        term = weights[:, k, None] * rows[:, k].float()
        total += term.masked_fill_((ids[:, k] < 0)[:, None], 0.0)
    if shared is not None:
        total += shared.float()
    out.copy_(total)


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


def _check_lists(
    logits: torch.Tensor,
    shared_id: int | None,
    ids: torch.Tensor,
    offsets: torch.Tensor | None,
    pairs: torch.Tensor | None,
    slots: torch.Tensor | None,
    arrivals: torch.Tensor | None,
    ready: torch.Tensor | None,
) -> int:
    """Experts whose pairs are to be listed; 0 for no lists."""
    given = (offsets, pairs, slots, arrivals)
    if offsets is None or pairs is None or slots is None or arrivals is None:
        if any(tensor is not None for tensor in (*given, ready)):
            raise ValueError("expected offsets, pairs, slots and arrivals together, or none")
        return 0
    _check_align(ids, pairs)
    routed, rows = logits.shape[-1], ids.shape[0]
    experts = routed + (shared_id is not None)
    if offsets.shape[0] != experts + 1 or shared_id not in (None, routed):
        raise ValueError(
            f"lists are of all {routed} experts and a shared one behind them, got {offsets.shape} "
            f"offsets and shared_id {shared_id}; use align for other lists"
        )
    if not lists_fit(rows, experts):
        raise ValueError(
            f"expected at most {LIST_ELEMS} tokens times experts, each rounded up to a power of "
            f"two, got {rows} and {experts}; use align for more"
        )
    if (
        tuple(slots.shape) != (rows, list_width(experts))
        or not slots.is_contiguous()
        or (slots.dtype, arrivals.dtype) != (torch.int8, torch.int32)
    ):
        raise ValueError(
            f"expected slots int8 {(rows, list_width(experts))} and arrivals int32, "
            f"got {slots.dtype} {tuple(slots.shape)} and {arrivals.dtype}"
        )
    _check_ready(ready, experts)
    return int(experts)


def _check_ready(ready: torch.Tensor | None, experts: int) -> None:
    if ready is not None and (tuple(ready.shape), ready.dtype) != ((experts,), torch.int32):
        raise ValueError(f"ready must be int32 [{experts}], got {ready.dtype} {list(ready.shape)}")


def _check_align(ids: torch.Tensor, pairs: torch.Tensor) -> None:
    if not ids.is_contiguous() or pairs.numel() < ids.numel():
        raise ValueError(
            f"ids must be contiguous and pairs hold {ids.numel()} entries, "
            f"got strides {ids.stride()} and {pairs.numel()} entries"
        )


def _check_combine(
    y: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    shared: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    rows, width = out.shape
    want = ((rows * ids.shape[1], width), (rows, ids.shape[1]), (rows, ids.shape[1]))
    got = (tuple(y.shape), tuple(ids.shape), tuple(weights.shape))
    if got != want or (shared is not None and shared.shape != out.shape):
        raise ValueError(
            f"y, ids, weights and shared must be {want} and {(rows, width)}, "
            f"got {got} and {None if shared is None else tuple(shared.shape)}"
        )
    if not (y.is_contiguous() and ids.is_contiguous() and weights.is_contiguous()):
        raise ValueError(
            "y, ids and weights must be contiguous, "
            f"got strides {y.stride()}, {ids.stride()}, {weights.stride()}"
        )
