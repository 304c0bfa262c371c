"""`allgather`: the reference transport, plain collectives over NCCL or gloo, any device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist

from barriers.transport import (
    BufferSpec,
    Received,
    Stateless,
    TransportConfig,
    check_combine,
    check_dispatch,
    quantize,
    weighted_sum,
    wire_buffers,
    wire_views,
)
from kernels.triton.launch import Launcher

# torch renamed it in 2.13.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Meeting(Protocol):
    """Ranks come together before collectives (`barriers.host_meeting.HostMeeting`)."""

    def collectives(
        self, layer: int, operation: str, *, opens_step: bool
    ) -> AbstractContextManager[None]: ...


class AllGather(Stateless):
    """Every token to every rank, every partial sum back.

    Slow where that is simpler. Before they are captured, its collectives must have run once.

    Args:
        buffers: tensors by the names of `AllGather.buffers`.
        group: a torch process group of config.world ranks, in rank order.
        launch: None runs the kernels' oracles.
        meeting: names the rank that does not come; without it a collective's own time-out speaks.
    """

    name = "allgather"
    live = "its collectives belong to the communicator of this process"

    def __init__(
        self,
        config: TransportConfig,
        buffers: Mapping[str, torch.Tensor],
        group: Any,
        launch: Launcher | None,
        meeting: Meeting | None = None,
    ) -> None:
        check_group(config.rank, config.world, group, shares="experts")
        self.config = config
        self._buffers, self._group, self._launch = buffers, group, launch
        self._meeting = meeting
        self._out = wire_views(buffers)

    @staticmethod
    def buffers(config: TransportConfig) -> Iterator[BufferSpec]:
        """All of it ordinary memory of this rank."""
        yield from wire_buffers(config, "scratch")
        rows, hidden, top_k = config.capacity, config.hidden, config.top_k
        yield "scratch", "ep_send_x", (rows, hidden), config.row_dtype
        if config.fp8:
            yield "scratch", "ep_send_scale", (rows, config.groups), "float32"
        yield "scratch", "ep_send_ids", (rows, top_k), "int32"
        yield "scratch", "ep_send_weights", (rows, top_k), "float32"
        yield "scratch", "ep_foreign", (config.recv_rows, top_k), "bool"
        yield "scratch", "ep_returned", (config.recv_rows, hidden), config.act_dtype
        yield "scratch", "ep_total", (rows, hidden), "float32"

    def dispatch(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        layer: int = 0,
        opens_step: bool = False,
    ) -> Received:
        check_dispatch(self.config, x, scale, ids, weights)
        b, tokens = self._buffers, x.shape[0]
        if self.config.fp8 and scale is None:
            quantize(self._launch, x, b["ep_send_x"][:tokens], b["ep_send_scale"][:tokens])
        else:
            b["ep_send_x"][:tokens].copy_(x)
            if scale is not None:
                b["ep_send_scale"][:tokens].copy_(scale)
        b["ep_send_ids"].fill_(-1)[:tokens].copy_(ids)
        b["ep_send_weights"][:tokens].copy_(weights)
        with self._met(layer, "dispatch", opens_step=opens_step):
            for part in ("x", "scale", "ids", "weights"):
                if f"ep_send_{part}" in b:
                    self._gather(b[f"ep_recv_{part}"], b[f"ep_send_{part}"])
        self._renumber(b["ep_recv_ids"])
        return self._out

    def combine(
        self,
        out: torch.Tensor,
        y: torch.Tensor,
        received: Received,
        ids: torch.Tensor,
        shared: torch.Tensor | None,
        *,
        layer: int = 0,
    ) -> None:
        check_combine(self.config, out, y, received, shared)
        b, tokens = self._buffers, out.shape[0]
        weighted_sum(self._launch, y, received.ids, received.weights, None, b["ep_partial"])
        with self._met(layer, "combine", opens_step=False):
            returned, partial = as_bytes(b["ep_returned"]), as_bytes(b["ep_partial"])
            dist.all_to_all_single(returned, partial, group=self._group)
        total = b["ep_total"][:tokens].zero_()
        for of_rank in b["ep_returned"].view(self.config.world, self.config.capacity, -1):
            # A rank without an expert of the token returns zeros, which leave the sum's bits alone.
            total.add_(of_rank[:tokens])
        if shared is not None:
            total.add_(shared)
        out.copy_(total)

    def _met(self, layer: int, operation: str, *, opens_step: bool) -> AbstractContextManager[None]:
        if self._meeting is None:
            return nullcontext()
        return self._meeting.collectives(layer, operation, opens_step=opens_step)

    def _gather(self, out: torch.Tensor, mine: torch.Tensor) -> None:
        ALL_GATHER(as_bytes(out), as_bytes(mine), group=self._group)

    def _renumber(self, ids: torch.Tensor) -> None:
        """Renumber to this rank's experts, -1 for others', without a temporary tensor."""
        foreign = self._buffers["ep_foreign"]
        ids.sub_(self.config.expert_start)
        torch.lt(ids, 0, out=foreign)
        ids.masked_fill_(foreign, -1)
        torch.ge(ids, self.config.local_experts, out=foreign)
        ids.masked_fill_(foreign, -1)


def check_group(rank: int, world: int, group: Any, *, shares: str) -> None:
    """Raises ValueError where `group` is not these ranks in order; `shares`: what they share."""
    size, found = dist.get_world_size(group), dist.get_rank(group)
    if (size, found) != (world, rank):
        raise ValueError(
            f"expected rank {rank} of {world}, got a process group in which this is rank {found} "
            f"of {size}; make the group from the ranks that share the {shares}"
        )


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 view: collectives then carry every dtype, bit for bit."""
    return tensor.view(-1).view(torch.uint8)
