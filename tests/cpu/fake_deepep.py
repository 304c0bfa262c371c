"""A model of DeepEP's legacy `Buffer` on the CPU: its shapes, its unordered rows, its parity.

Ranks exchange through a gloo group, or there is one rank. As upstream: every low-latency call works
in front of one of two buffers, cleans the flags of the other and flips on the host; a call whose
flags were not cleaned finds the old ones. Rows of an expert lie in another order at every call.
What nobody wrote holds NaN.

Source: the interface of deep_ep/buffer.py (legacy) of https://github.com/deepseek-ai/DeepEP; the
arithmetic is that of its kernels in plain torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from graphs.capture import Captured, TwinBackend
from graphs.keys import GraphKey

E4M3_MAX = 448.0


class FakeBuffer:
    """One rank's buffer.

    Attributes:
        index: which buffer the next low-latency call takes.
        calls: names of all calls.
        stale: calls that found flags of an earlier call.
        fail: names of calls that raise after they have flipped, as an allocation that fails would.
    """

    def __init__(
        self,
        group: Any,
        nvlink_bytes: int,
        rdma_bytes: int,
        *,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        explicitly_destroy: bool = False,
    ) -> None:
        assert explicitly_destroy
        assert bool(rdma_bytes) == low_latency_mode
        assert bool(nvlink_bytes) != low_latency_mode
        self.group, self.num_qps = group, num_qps_per_rank
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)
        self.index, self.calls, self.stale = 0, [], 0
        self.fail: set[str] = set()
        self.destroyed = False
        self._dirty = [False, False]
        self._random = random.Random(self.rank)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        capacity: int, hidden: int, world: int, num_experts: int
    ) -> int:
        return 4 * num_experts * capacity * (2 * hidden + 16)

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk: torch.Tensor,
        capacity: int,
        num_experts: int,
        use_fp8: bool = True,
    ) -> Any:
        tokens, hidden = x.shape
        slots, local = self.world * capacity, num_experts // self.world
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert topk.dtype == torch.int64
        assert topk.shape[0] == tokens <= capacity
        assert topk.is_contiguous()
        assert slots % 4 == 0
        assert not use_fp8 or hidden % 512 == 0
        assert self.num_qps == local
        self._flip("low_latency_dispatch")
        rows, scale = _cast(x) if use_fp8 else (x, None)
        sent = self._exchange((_bytes(rows), scale, topk))
        got = torch.empty(local, slots, hidden, dtype=rows.dtype)
        _bytes(got).fill_(0x7F)
        # Scales lie with the rows innermost.
        scales = torch.full((local, hidden // 128, slots), float("nan")).transpose(1, 2)
        counts = torch.zeros(local, dtype=torch.int32)
        places = []
        for e in range(local):
            chosen = [
                (source, t, k)
                for source, (_, _, ids) in enumerate(sent)
                for t, k in (ids == self.rank * local + e).nonzero().tolist()
            ]
            self._random.shuffle(chosen)
            for slot, (source, t, k) in enumerate(chosen):
                _bytes(got[e, slot]).copy_(sent[source][0][t])
                if use_fp8:
                    scales[e, slot] = sent[source][1][t]
                places.append((source, t, k, e, slot))
            counts[e] = len(chosen)
        return (got, scales) if use_fp8 else got, counts, places, None, None

    def low_latency_combine(
        self,
        y: torch.Tensor,
        topk: torch.Tensor,
        weights: torch.Tensor,
        places: Any,
        out: torch.Tensor,
    ) -> Any:
        assert y.dtype == torch.bfloat16
        assert y.dim() == 3
        assert y.shape[0] == self.num_qps
        assert y.is_contiguous()
        assert weights.dtype == torch.float32
        assert out.shape == (topk.shape[0], y.shape[2])
        self._flip("low_latency_combine")
        back = self._exchange({(s, t, k): y[e, slot] for s, t, k, e, slot in places})
        found = {at[1:]: row for part in back for at, row in part.items() if at[0] == self.rank}
        total = torch.zeros(out.shape)
        for t in range(out.shape[0]):
            for k in range(topk.shape[1]):
                if topk[t, k] >= 0:
                    total[t] += weights[t, k] * found[t, k].float()
        out.copy_(total)
        return out, None, None

    def get_dispatch_layout(self, topk: torch.Tensor, num_experts: int) -> Any:
        assert topk.dtype == torch.int64
        owner = torch.where(topk >= 0, topk // (num_experts // self.world), -1)
        in_rank = torch.stack([(owner == r).any(1) for r in range(self.world)], 1)
        per_expert = torch.bincount(topk[topk >= 0], minlength=num_experts).int()
        return in_rank.sum(0).int(), None, per_expert, in_rank, None

    def dispatch(
        self,
        x: Any,
        *,
        num_tokens_per_rank: torch.Tensor,
        is_token_in_rank: torch.Tensor,
        num_tokens_per_expert: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        num_worst_tokens: int,
    ) -> Any:
        self.calls.append("dispatch")
        rows, scale = x if isinstance(x, tuple) else (x, None)
        local = num_tokens_per_expert.shape[0] // self.world
        sent = self._exchange((_bytes(rows), scale, topk_idx, topk_weights, is_token_in_rank))
        got = torch.empty(num_worst_tokens, rows.shape[1], dtype=rows.dtype)
        _bytes(got).fill_(0x7F)
        scales = None
        if scale is not None:
            scales = torch.full((num_worst_tokens, scale.shape[1]), float("nan"))
        ids = torch.full((num_worst_tokens, topk_idx.shape[1]), -1, dtype=torch.int64)
        weights = torch.full(ids.shape, float("nan"))
        sources = []
        for source, (their_rows, their_scale, their_ids, their_weights, mine) in enumerate(sent):
            for t in mine[:, self.rank].nonzero().flatten().tolist():
                at = len(sources)
                _bytes(got[at]).copy_(their_rows[t])
                if scales is not None:
                    scales[at] = their_scale[t]
                own = their_ids[t] - self.rank * local
                listed = (their_ids[t] >= 0) & (own >= 0) & (own < local)
                ids[at] = torch.where(listed, own, -1)
                weights[at] = torch.where(listed, their_weights[t], 0.0)
                sources.append((source, t))
        rows_got = got if scales is None else (got, scales)
        return rows_got, ids, weights, [], (sources, topk_idx.shape[0]), None

    def combine(self, x: torch.Tensor, handle: Any, bias: torch.Tensor | None = None) -> Any:
        self.calls.append("combine")
        sources, tokens = handle
        back = self._exchange({at: x[row] for row, at in enumerate(sources)})
        total = torch.zeros(tokens, x.shape[1]) if bias is None else bias.float()
        for part in back:  # ranks in order
            for (source, t), row in part.items():
                if source == self.rank:
                    total[t] += row.float()
        return total.to(x.dtype), None, None

    def destroy(self) -> None:
        self.destroyed = True

    def _flip(self, name: str) -> None:
        self.calls.append(name)
        self.stale += self._dirty[self.index]
        self._dirty = [self.index == 0, self.index == 1]
        self.index = 1 - self.index
        if name in self.fail:
            raise RuntimeError("CUDA out of memory")

    def _exchange(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, value, group=self.group)
        return parts


class FrozenBackend(TwinBackend):
    """Graphs as CUDA's are: a replay makes the calls in front of the buffer of its capture."""

    def __init__(self, upstream: FakeBuffer) -> None:
        self._upstream = upstream
        self.live: list[GraphKey] = []

    def capture_live(self, key: GraphKey, run: Callable[[], None]) -> Captured:
        self.live.append(key)
        frozen = self._upstream.index

        def launch() -> None:
            # The host's index is not touched by a replay.
            held, self._upstream.index = self._upstream.index, frozen
            run()
            self._upstream.index = held

        return Captured(key, launch)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def _cast(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Upstream's quantiser: times 448 / amax, not divided by amax / 448."""
    groups = x.float().view(x.shape[0], -1, 128)
    amax = groups.abs().amax(2).clamp_min(1e-4)
    rows = (groups * (E4M3_MAX / amax)[:, :, None]).to(torch.float8_e4m3fn)
    return rows.view(x.shape), amax / E4M3_MAX
