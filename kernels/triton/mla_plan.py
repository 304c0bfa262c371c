"""The work list of the planned MLA kernels, made on the device from the step's lengths.

flashinfer plans on the host and cuts rows where its clusters end, so a row's bits would depend on
its neighbours. Here a token's KV is cut at fixed multiples of `cut`; one (token, split) is one work
item and gives the same bits on whichever cluster it runs. Invariants: every split of every token is
listed once; a cluster's items are contiguous; the merge list is empty, because `mla_decode.merge`
merges.

The layout is flashinfer's own, private to 0.6.18.post1 (`MLAPlanInfo` in attention/scheduler.cuh);
our kernel for Hopper reads the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap

TILE_Q = 64  # heads that one CTA of the FA3 kernel takes
TILE_KV = 64  # KV tokens of one of its iterations
ITEM_ARRAYS = (
    "q_indptr",
    "kv_indptr",
    "partial_indptr",
    "q_len",
    "kv_len",
    "q_start",
    "kv_start",
    "kv_end",
)


@dataclass(frozen=True)
class PlanLayout:
    """Where flashinfer's work arrays lie in an int32 workspace, in words.

    Attributes:
        tokens: step tokens.
        splits: splits that the longest row takes.
        num_heads: query heads; one query tile a token, so at most 128.
        num_sms: of the device; each runs one CTA, and a token's heads take 1 or 2.
    """

    tokens: int
    splits: int
    num_heads: int
    num_sms: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_heads <= 2 * TILE_Q:
            raise ValueError(f"num_heads: expected 1 … {2 * TILE_Q}, got {self.num_heads}")

    @property
    def cluster(self) -> int:
        """CTAs that share a work item, by heads."""
        return 1 if self.num_heads <= TILE_Q else 2

    @property
    def num_clusters(self) -> int:
        return self.num_sms // self.cluster

    @property
    def capacity(self) -> int:
        """Work items, rounded up to keep arrays aligned to 16 bytes."""
        return _align(self.tokens * self.splits)

    def array(self, name: str) -> int:
        """Offset of one of ITEM_ARRAYS."""
        return ITEM_ARRAYS.index(name) * self.capacity

    @property
    def work_indptr(self) -> int:
        return len(ITEM_ARRAYS) * self.capacity

    @property
    def merge(self) -> int:
        """One array of zeros [num_sms]: it serves as all five merge arrays, and says "nothing"."""
        return self.work_indptr + _align(self.num_clusters + 1)

    @property
    def words(self) -> int:
        return self.merge + _align(self.num_sms)

    def plan_info(self, part_lse_offset: int) -> list[int]:
        """flashinfer's 18 plan numbers.

        Args:
            part_lse_offset: bytes from the start of the partial outputs to that of their lse.
        """
        item = {name: self.array(name) * 4 for name in ITEM_ARRAYS}
        return [
            self.cluster,
            self.num_clusters,
            item["q_indptr"],
            item["kv_indptr"],
            item["partial_indptr"],
            *([self.merge * 4] * 5),
            item["q_len"],
            item["kv_len"],
            item["q_start"],
            item["kv_start"],
            item["kv_end"],
            self.work_indptr * 4,
            0,
            part_lse_offset,
        ]


@triton.jit
def _item_slot(rank, item_count, CLUSTERS: tl.constexpr):
    """Where the item of this rank lies: dealt to clusters in turn, every other turn backwards."""
    turn = rank // CLUSTERS
    place = rank % CLUSTERS
    cluster = tl.where(turn % 2 == 0, place, CLUSTERS - 1 - place)
    return _first_slot(cluster, item_count, CLUSTERS) + turn


@triton.jit
def _first_slot(cluster, item_count, CLUSTERS: tl.constexpr):
    """Items of all clusters before this one."""
    turns = item_count // CLUSTERS
    rest = item_count % CLUSTERS  # items of the last, partial round
    forward = tl.minimum(cluster, rest)
    backward = tl.maximum(cluster - (CLUSTERS - rest), 0)
    return cluster * turns + tl.where(turns % 2 == 0, forward, backward)


@triton.jit
def _write_item(
    ws,
    slot,
    t,
    row,
    length,
    split,
    mask,
    max_pages,
    H: tl.constexpr,
    CUT: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    # In the order of ITEM_ARRAYS.
    part = tl.where(length > CUT, (t * SPLITS + split) * H, -1)
    tl.store(ws + slot, t, mask=mask)
    tl.store(ws + CAPACITY + slot, row * max_pages, mask=mask)
    tl.store(ws + 2 * CAPACITY + slot, part, mask=mask)
    tl.store(ws + 3 * CAPACITY + slot, t * 0 + 1, mask=mask)
    tl.store(ws + 4 * CAPACITY + slot, length, mask=mask)
    tl.store(ws + 5 * CAPACITY + slot, t * 0, mask=mask)
    tl.store(ws + 6 * CAPACITY + slot, t * 0 + split * CUT, mask=mask)
    tl.store(ws + 7 * CAPACITY + slot, tl.minimum(length, (split + 1) * CUT), mask=mask)


@triton.jit
def _mla_plan(
    tok_row,  # int32 [T]
    kv_len,  # int32 [T]
    ws,  # int32 [PlanLayout.words]
    T,
    max_pages,
    H: tl.constexpr,
    CUT: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    CLUSTERS: tl.constexpr,
    WORK_INDPTR: tl.constexpr,
    MERGE: tl.constexpr,
    SMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    t = tl.arange(0, BLOCK_T)
    length = tl.load(kv_len + t, mask=t < T, other=0)
    row = tl.load(tok_row + t, mask=t < T, other=0)
    full = length // CUT
    full_count = tl.sum(full, axis=0)
    rest_tiles = (length - full * CUT + TILE - 1) // TILE
    item_count = full_count + tl.sum((rest_tiles > 0).to(tl.int32), axis=0)

    c = tl.arange(0, BLOCK_C)
    tl.store(ws + WORK_INDPTR + c, _first_slot(c, item_count, CLUSTERS), mask=c <= CLUSTERS)
    tl.store(ws + MERGE + c, c * 0, mask=c < SMS)

    # The longest items come first: whole splits, then what is left of each token, longest first.
    first_rank = tl.cumsum(full, axis=0) - full
    for split in range(0, tl.max(full, axis=0)):
        slot = _item_slot(first_rank + split, item_count, CLUSTERS)
        _write_item(
            ws, slot, t, row, length, split, split < full, max_pages, H, CUT, SPLITS, CAPACITY
        )
    order = tl.sort(rest_tiles * BLOCK_T + t, descending=True)
    left = order >= BLOCK_T
    t_left = order % BLOCK_T
    length = tl.load(kv_len + t_left, mask=left, other=0)
    row = tl.load(tok_row + t_left, mask=left, other=0)
    slot = _item_slot(full_count + t, item_count, CLUSTERS)
    _write_item(
        ws, slot, t_left, row, length, length // CUT, left, max_pages, H, CUT, SPLITS, CAPACITY
    )


def mla_plan(
    launch: Launcher,
    tok_row: torch.Tensor,
    kv_len: torch.Tensor,
    *,
    max_pages: int,
    cut: int,
    layout: PlanLayout,
    ws: torch.Tensor,
) -> None:
    """Write the work list of one step.

    Args:
        tok_row: int32 [T]; read only where kv_len is not 0.
        kv_len: int32 [T]; a token of length 0 gets no work item, and its output is not written.
        max_pages: entries a row of the page table.
        cut: tokens of a split, a multiple of 64.
        layout: of `ws`; its `splits` times `cut` must cover every length.
        ws: int32, at least layout.words.
    Raises:
        ValueError: sizes that do not fit.
    Capture-safe: one CTA.
    """
    _check(kv_len, cut, layout, ws)
    launch(
        _mla_plan,
        (1,),
        tok_row,
        kv_len,
        ws,
        layout.tokens,
        max_pages,
        H=layout.num_heads,
        CUT=cut,
        SPLITS=layout.splits,
        CAPACITY=layout.capacity,
        CLUSTERS=layout.num_clusters,
        WORK_INDPTR=layout.work_indptr,
        MERGE=layout.merge,
        SMS=layout.num_sms,
        BLOCK_T=max(16, int(triton.next_power_of_2(layout.tokens))),
        BLOCK_C=int(triton.next_power_of_2(layout.num_sms + 1)),
        TILE=TILE_KV,
        num_warps=4 if layout.tokens <= 256 else 16,
        **overlap(launch),
    )


def mla_plan_ref(
    tok_row: torch.Tensor,
    kv_len: torch.Tensor,
    *,
    max_pages: int,
    cut: int,
    layout: PlanLayout,
    ws: torch.Tensor,
) -> None:
    """`mla_plan` on the host, as a plain list of items dealt to clusters."""
    _check(kv_len, cut, layout, ws)
    rows, lengths = tok_row.tolist(), kv_len.tolist()
    whole = [(t, s) for t, n in enumerate(lengths) for s in range(n // cut)]
    rest = [(-(-(n % cut) // TILE_KV), t) for t, n in enumerate(lengths) if n % cut]
    items = whole + [(t, lengths[t] // cut) for _, t in sorted(rest, reverse=True)]
    clusters: list[list[tuple[int, int]]] = [[] for _ in range(layout.num_clusters)]
    for start in range(0, len(items), layout.num_clusters):
        turn = clusters if start // layout.num_clusters % 2 == 0 else clusters[::-1]
        for cluster, item in zip(turn, items[start:], strict=False):
            cluster.append(item)
    begin = 0
    for c, cluster in enumerate(clusters):
        ws[layout.work_indptr + c] = begin
        for slot, (t, s) in enumerate(cluster, begin):
            values = (
                t,
                rows[t] * max_pages,
                (t * layout.splits + s) * layout.num_heads if lengths[t] > cut else -1,
                1,
                lengths[t],
                0,
                s * cut,
                min(lengths[t], (s + 1) * cut),
            )
            for name, value in zip(ITEM_ARRAYS, values, strict=True):
                ws[layout.array(name) + slot] = value
        begin += len(cluster)
    ws[layout.work_indptr + layout.num_clusters] = begin
    ws[layout.merge : layout.merge + layout.num_sms] = 0


def _align(words: int) -> int:
    return -(-words // 4) * 4


def _check(kv_len: torch.Tensor, cut: int, layout: PlanLayout, ws: torch.Tensor) -> None:
    if kv_len.shape[0] != layout.tokens or ws.numel() < layout.words or ws.dtype != torch.int32:
        raise ValueError(
            f"expected {layout.tokens} tokens and an int32 workspace of {layout.words} words, "
            f"got {kv_len.shape[0]} and {ws.dtype} of {ws.numel()}"
        )
    if cut < TILE_KV or cut % TILE_KV:
        raise ValueError(f"cut must be a multiple of {TILE_KV} tokens, got {cut}")
