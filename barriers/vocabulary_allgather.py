"""A cut head over plain collectives, NCCL or gloo, any device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from barriers.allgather import ALL_GATHER, AllGather, Meeting, as_bytes, check_group
from barriers.transport import BufferSpec
from barriers.vocabulary import VocabularyConfig, check_gather, check_scatter, head_buffers
from barriers.watch import NO_LAYER


class VocabularyAllGather:
    """Every row to every rank, and to each rank its rows' slices.

    Before they are captured, its collectives must have run once.

    Args:
        buffers: tensors by the names of `VocabularyAllGather.buffers`.
        group: a torch process group of config.world ranks, in rank order.
        meeting: names the rank that does not come; without it a collective's own time-out speaks.
    """

    name = "allgather"
    live = AllGather.live

    def __init__(
        self,
        config: VocabularyConfig,
        buffers: Mapping[str, torch.Tensor],
        group: Any,
        meeting: Meeting | None = None,
    ) -> None:
        check_group(config.rank, config.world, group, shares="head")
        self.config, self.part = config, buffers["head_part"]
        self._rows, self._send = buffers["head_rows"], buffers["head_send"]
        self._returned = buffers["head_returned"]
        self._group, self._meeting = group, meeting

    @staticmethod
    def buffers(config: VocabularyConfig) -> Iterator[BufferSpec]:
        """All of it ordinary memory of this rank."""
        yield from head_buffers(config, "scratch")
        yield "scratch", "head_send", (config.capacity, config.hidden), config.act_dtype
        yield "scratch", "head_returned", (config.rows, config.per), "float32"

    def gather(self, final: torch.Tensor, *, opens_step: bool = False) -> torch.Tensor:
        check_gather(self.config, final)
        self._send[: final.shape[0]].copy_(final)
        with self._met("head", opens_step=opens_step):
            ALL_GATHER(as_bytes(self._rows), as_bytes(self._send), group=self._group)
        return self._rows

    def scatter(self, part: torch.Tensor, out: torch.Tensor) -> None:
        check_scatter(self.config, part, out, self.part)
        with self._met("sample", opens_step=False):
            returned, sent = as_bytes(self._returned), as_bytes(part)
            dist.all_to_all_single(returned, sent, group=self._group)
        config, count = self.config, out.shape[0]
        by_rank = self._returned.view(config.world, config.capacity, config.per)
        for rank, slices in enumerate(by_rank):
            begin, end = config.columns_of(rank)
            out[:, begin:end].copy_(slices[:count, : end - begin])

    def _met(self, operation: str, *, opens_step: bool) -> AbstractContextManager[None]:
        if self._meeting is None:
            return nullcontext()
        return self._meeting.collectives(NO_LAYER, operation, opens_step=opens_step)
