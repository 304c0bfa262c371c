"""Which tokens a row may draw: top-k, then top-p over those, then min-p. No sort.

With tokens ordered by processed logit, the lower id first among equals:
  top-k  keeps the first k;
  top-p  keeps, of these and with their probabilities scaled to sum 1, the shortest beginning whose
         sum reaches p;
  min-p  keeps tokens at least min_p times as probable as the first.
Each keeps a beginning of the order, so the kept set is (threshold, last id among its equals). The
threshold is found exactly, by search over the order-preserving integers of the fp32 logits; each
round reads the row once and tries three thresholds. Invariants: one CTA a row, sums in one fixed
order; a row without filters is not read. Masked tokens (-inf) are never kept.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap
from kernels.triton.sample import num_chunks

MINUS_INF_KEY = tl.constexpr(-2139095041)  # order_key(-inf)
LINES, LANES = 8, 2048  # of one tile: a thread adds LINES values to its own sum
EQUALS = 8192  # columns of one tile of the search among equals


@triton.jit
def order_key(x):
    """fp32 as int32 in the same order; -0.0 counts as 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def order_value(key):
    """The fp32 of an int32 `order_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def inverse_temperature(temperature):
    """1 / temperature; greedy rows (0) count as 1, and nothing overflows."""
    return tl.where(temperature > 0.0, tl.minimum(tl.div_rn(1.0, temperature), 1e30), 1.0)


@triton.jit
def is_kept(y, col, z, keep_value, keep_id, min_z):
    """Whether tokens are in the kept set.

    Args:
        y, col, z: processed logit, token id, and (y - top) / temperature.
        keep_value, keep_id: scalars of `filter_tokens`.
        min_z: log(min_p).
    """
    first = (y > keep_value) | ((y == keep_value) & (col <= keep_id))
    return first & (y > float("-inf")) & (z >= min_z)


@triton.jit
def _tile(row, i, V: tl.constexpr, LINES: tl.constexpr, LANES: tl.constexpr):
    """Tile i of a row (fp32 [V]) and its columns, [LINES, LANES]; -inf past the end."""
    line = tl.arange(0, LINES)[:, None]
    col = i * (LINES * LANES) + line * LANES + tl.arange(0, LANES)[None, :]
    return tl.load(row + col, mask=col < V, other=float("-inf")), col


@triton.jit
def _weights_from(
    row,  # fp32 [V]
    top,
    scale,
    t1,
    t2,
    t3,
    MASS: tl.constexpr,
    V: tl.constexpr,
    LINES: tl.constexpr,
    LANES: tl.constexpr,
):
    """What the tokens of at least t1, t2, t3 weigh: their mass, or 1 each (exact to 2**24)."""
    a1 = tl.zeros([LANES], tl.float32)
    a2 = tl.zeros([LANES], tl.float32)
    a3 = tl.zeros([LANES], tl.float32)
    for i in range(0, tl.cdiv(V, LINES * LANES)):
        y, _ = _tile(row, i, V, LINES, LANES)
        if MASS:
            weight = tl.exp((y - top) * scale)
        else:
            weight = tl.full([LINES, LANES], 1.0, tl.float32)
        a1 += tl.sum(tl.where(y >= t1, weight, 0.0), axis=0)
        a2 += tl.sum(tl.where(y >= t2, weight, 0.0), axis=0)
        a3 += tl.sum(tl.where(y >= t3, weight, 0.0), axis=0)
    return tl.sum(a1, axis=0), tl.sum(a2, axis=0), tl.sum(a3, axis=0)


@triton.jit
def _search(
    row,  # fp32 [V]
    top,
    scale,
    low,
    high,
    need,
    MASS: tl.constexpr,
    V: tl.constexpr,
    LINES: tl.constexpr,
    LANES: tl.constexpr,
):
    """The largest key from which on the tokens weigh at least `need`.

    `low` (int64) is known to be such a key, `high` not to be. Returns the key, the weight from it
    on (inf if never computed) and the weight of what lies above it. Counts stop early where exactly
    `need` tokens are found: nothing then lies between the key and the smallest of them.
    """
    at_low = need + float("inf")
    at_high = need * 0.0
    while (high - low > 1) & (MASS | (at_low != need)):
        width = high - low
        k1, k2, k3 = low + width // 4, low + width // 2, low + width * 3 // 4
        a1, a2, a3 = _weights_from(
            row,
            top,
            scale,
            order_value(k1.to(tl.int32)),
            order_value(k2.to(tl.int32)),
            order_value(k3.to(tl.int32)),
            MASS,
            V,
            LINES,
            LANES,
        )
        e1, e2, e3 = a1 >= need, a2 >= need, a3 >= need
        low = tl.where(e3, k3, tl.where(e2, k2, tl.where(e1, k1, low)))
        high = tl.where(e3, high, tl.where(e2, k3, tl.where(e1, k2, k1)))
        at_low = tl.where(e3, a3, tl.where(e2, a2, tl.where(e1, a1, at_low)))
        at_high = tl.where(e3, at_high, tl.where(e2, a3, tl.where(e1, a2, a1)))
    return low, at_low, at_high


@triton.jit
def _nth_equal(row, value, n, V: tl.constexpr, EQUALS: tl.constexpr):
    """The id of the n-th token (from 1) whose logit is `value`; V if there are fewer."""
    found = n * 0 + V
    seen = n * 0
    for i in range(0, V, EQUALS):
        col = i + tl.arange(0, EQUALS)
        equal = (tl.load(row + col, mask=col < V, other=float("-inf")) == value) & (col < V)
        here = tl.sum(equal.to(tl.int32), axis=0)
        if (seen < n) & (seen + here >= n):
            nth = equal & (seen + tl.cumsum(equal.to(tl.int32), 0) == n)
            found = tl.min(tl.where(nth, col, V), axis=0)
        seen += here
    return found


@triton.jit
def _kept_mass(
    row,  # fp32 [V]
    top,
    scale,
    keep_value,
    keep_id,
    V: tl.constexpr,
    LINES: tl.constexpr,
    LANES: tl.constexpr,
):
    total = tl.zeros([LANES], tl.float32)
    for i in range(0, tl.cdiv(V, LINES * LANES)):
        y, col = _tile(row, i, V, LINES, LANES)
        z = (y - top) * scale
        kept = is_kept(y, col, z, keep_value, keep_id, float("-inf"))
        total += tl.sum(tl.where(kept, tl.exp(z), 0.0), axis=0)
    return tl.sum(total, axis=0)


@triton.jit
def _filter(
    processed,  # fp32 [S, V]
    active,  # int32 [S]
    sample_row,  # int32 [S]
    proc_max,  # fp32 [S, C]
    temperature,  # fp32 [R]
    top_k,  # int32 [R]
    top_p,  # fp32 [R]
    keep_value,  # fp32 [S]
    keep_id,  # int32 [S]
    V: tl.constexpr,
    C: tl.constexpr,
    C2: tl.constexpr,
    LOG_V: tl.constexpr,
    LINES: tl.constexpr,
    LANES: tl.constexpr,
    EQUALS: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    s = tl.program_id(0).to(tl.int64)
    if tl.load(active + s) == 0:
        return
    r = tl.load(sample_row + s).to(tl.int64)
    t, k, p = tl.load(temperature + r), tl.load(top_k + r), tl.load(top_p + r)
    by_k = (t > 0.0) & (k > 0) & (k < V)
    by_p = (t > 0.0) & (p < 1.0)
    value = t * 0.0 + float("-inf")
    last = k * 0 + V
    if by_k | by_p:
        row = processed + s * V
        scale = inverse_temperature(t)
        c = tl.arange(0, C2)
        tops = tl.load(proc_max + s * C + c, mask=c < C, other=float("-inf"))
        top = tl.max(tops, axis=0)
        high = order_key(top).to(tl.int64) + 1
        if by_k:
            # Each chunk has a token of its own maximum: a cheap first bound for a small k.
            least = tl.min(tl.where(c < C, tops, top), axis=0)
            low = tl.where(k <= C, order_key(least), MINUS_INF_KEY).to(tl.int64)
            need = k.to(tl.float32)
            key, found, above = _search(row, top, scale, low, high, need, False, V, LINES, LANES)
            value = order_value(key.to(tl.int32))
            if found != need:
                last = _nth_equal(row, value, k - above.to(tl.int32), V, EQUALS)
        if by_p:
            need = p * _kept_mass(row, top, scale, value, last, V, LINES, LANES)
            # All tokens further down weigh less than 1 - p together, the first one weighing 1.
            least = top - (LOG_V + 1.0 - tl.log(1.0 - p)) / scale
            low = tl.maximum(order_key(value), order_key(least)).to(tl.int64)
            key, found, above = _search(row, top, scale, low, high, need, True, V, LINES, LANES)
            cut = order_value(key.to(tl.int32))
            each = tl.exp((cut - top) * scale)
            count = tl.minimum(tl.maximum(tl.ceil((need - above) / each), 1.0), V)
            count = tl.where(each > 0.0, count, V).to(tl.int32)
            nth = _nth_equal(row, cut, count, V, EQUALS)
            last = tl.where(cut == value, tl.minimum(last, nth), nth)
            value = cut
    tl.store(keep_value + s, value)
    tl.store(keep_id + s, last)


def filter_tokens(
    launch: Launcher,
    processed: torch.Tensor,
    active: torch.Tensor,
    sample_row: torch.Tensor,
    *,
    proc_max: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    keep_value: torch.Tensor,
    keep_id: torch.Tensor,
) -> None:
    """The part of the kept set that top-k and top-p decide; min-p is a threshold as it stands.

    Args:
        processed, active, proc_max: of `process_logits`.
        sample_row: int32 [S], request row.
        temperature: fp32 [max_rows]; a greedy row (0) is not filtered.
        top_k: int32 [max_rows]; 0 is off.
        top_p: fp32 [max_rows], in (0, 1]; 1 is off.
        keep_value: fp32 [S]; tokens above it are kept, -inf where all are.
        keep_id: int32 [S]; of those equal to it, the ids up to this one are.
    Raises:
        ValueError: processed logits that are not fp32 and contiguous.
    Capture-safe.
    Source: top-p is arXiv:1904.09751 section 3.1; min-p is arXiv:2407.01082.
    """
    rows, vocab = processed.shape
    _check_filter(processed, proc_max)
    launch(
        _filter,
        (rows,),
        *(processed, active, sample_row, proc_max, temperature, top_k, top_p, keep_value, keep_id),
        V=vocab,
        C=num_chunks(vocab),
        C2=triton.next_power_of_2(num_chunks(vocab)),
        LOG_V=math.log(vocab),
        LINES=LINES,
        LANES=LANES,
        EQUALS=EQUALS,
        num_warps=16,
        **overlap(launch),
    )


def filter_tokens_ref(
    processed: torch.Tensor,
    active: torch.Tensor,
    sample_row: torch.Tensor,
    *,
    proc_max: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    keep_value: torch.Tensor,
    keep_id: torch.Tensor,
) -> None:
    """`filter_tokens` in plain torch, by sorting."""
    _check_filter(processed, proc_max)
    vocab = processed.shape[1]
    row = sample_row.clamp(min=0).long()
    t, k, p = temperature[row], top_k[row], top_p[row]
    by_k, by_p = (t > 0) & (k > 0) & (k < vocab), (t > 0) & (p < 1)
    keep_value[active != 0], keep_id[active != 0] = -torch.inf, vocab
    at = ((active != 0) & (by_k | by_p)).nonzero()[:, 0]
    if not len(at):
        return
    y, ids = processed[at].sort(dim=1, descending=True, stable=True)
    z = (y.double() - y[:, :1]) * inverse_temperature_ref(t[at]).double()[:, None]
    kept = torch.where(by_k[at], k[at], vocab).long()[:, None]
    weight = z.exp().masked_fill(torch.arange(vocab) >= kept, 0.0)
    running = weight.cumsum(1)
    enough = running >= p[at].double()[:, None] * running[:, -1:]
    reached = enough.int().argmax(1, keepdim=True) + 1
    kept = torch.where(by_p[at, None], torch.minimum(kept, reached), kept)
    keep_value[at] = y.gather(1, kept - 1)[:, 0]
    keep_id[at] = ids.gather(1, kept - 1)[:, 0].int()


def inverse_temperature_ref(temperature: torch.Tensor) -> torch.Tensor:
    """`inverse_temperature` in plain torch."""
    inverse = (1 / temperature).clamp(max=1e30)
    return torch.where(temperature > 0, inverse, torch.ones_like(temperature))


def is_kept_ref(
    y: torch.Tensor,
    z: torch.Tensor,
    keep_value: torch.Tensor,
    keep_id: torch.Tensor,
    min_z: torch.Tensor,
) -> torch.Tensor:
    """`is_kept` for whole rows: y, z are [n, V], the others [n]."""
    equal = (y == keep_value[:, None]) & (torch.arange(y.shape[1]) <= keep_id[:, None])
    return ((y > keep_value[:, None]) | equal) & (y > -torch.inf) & (z >= min_z[:, None])


def _check_filter(processed: torch.Tensor, proc_max: torch.Tensor) -> None:
    want = (processed.shape[0], num_chunks(processed.shape[1]))
    if processed.dtype != torch.float32 or not processed.is_contiguous():
        raise ValueError(
            f"processed must be contiguous float32, got {processed.dtype}, strides "
            f"{processed.stride()}"
        )
    if tuple(proc_max.shape) != want:
        raise ValueError(f"proc_max must be {want}, got {tuple(proc_max.shape)}")
