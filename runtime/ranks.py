"""What a rank holds beside its arena: the group, peer memory, the watch over waits, the transport.

One process a GPU, started by `torchrun`; a process without its variables is a world of one. Ranks
meet at start, compare what they were started with, and from then on share nothing but the number of
steps.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from barriers.allgather import AllGather
from barriers.config import GroupConfig
from barriers.deepep import DeepEpLowLatency, DeepEpNormal
from barriers.device_barrier import DeviceWatch
from barriers.errors import RankError
from barriers.group import RankGroup
from barriers.host_meeting import HostMeeting
from barriers.rdep import Rdep, load_rdep, peer_layout, peer_views
from barriers.symmetric_device import DeviceMemory
from barriers.transport import DEEPEP, Local, Transport, TransportConfig
from capture_cache.driver import Device
from capture_cache.store import Store
from kernels.triton.launch import Launcher

CONNECT_S = 60.0  # for a process group, NCCL and NVSHMEM to come up; hosts are busy then


class Ranks:
    """This rank's side of a run.

    Args:
        config: rank, world and meeting point.
        fields: what every rank must have been started with; a difference names both values.
        deadline_s: of every wait for a peer.
    """

    def __init__(
        self, config: GroupConfig, fields: Mapping[str, str], *, deadline_s: float
    ) -> None:
        self.rank, self.world, self.deadline_s = config.rank, config.world, deadline_s
        self._open = ExitStack()
        self._watch: DeviceWatch | None = None
        self.group = self._open.enter_context(RankGroup(config, fields))

    def transport(
        self,
        name: str,
        config: TransportConfig,
        views: Mapping[str, torch.Tensor],
        launch: Launcher | None,
        store: Store,
    ) -> Transport:
        """Make the transport `name`; every rank calls this alike.

        Args:
            views: of the arena; the transport's own buffers are among them where it has some there.
            launch: None on the CPU twin.
        Raises:
            RankError: a rank failed, or did not come; raised on all of them.
        """
        if name == "local":
            return Local(config, launch)
        if name == "allgather":
            return self._allgather(config, views, launch)
        if name in DEEPEP:
            return self._deepep(name, config, views, launch)
        return self._rdep(config, views, store)

    def _allgather(
        self, config: TransportConfig, views: Mapping[str, torch.Tensor], launch: Launcher | None
    ) -> Transport:
        group = self._process_group(launch is not None)
        meeting = None
        if launch is None:
            # torch has one time-out for connecting and for every collective after it.
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=self.deadline_s))
            step = views["step"]
            deadline_ms = round(self.deadline_s * 1e3)
            meeting = HostMeeting(self.group, deadline_ms=deadline_ms, step=lambda: int(step[0]))
            self._open.callback(meeting.close)
        return AllGather(config, views, group, launch, meeting)

    def _process_group(self, on_device: bool) -> Any:
        """torch's group over all ranks, for transports that need one; made once."""
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl" if on_device else "gloo",
                rank=self.rank,
                world_size=self.world,
                store=self._meeting_store(),
                device_id=torch.device("cuda", torch.cuda.current_device()) if on_device else None,
                timeout=datetime.timedelta(seconds=max(self.deadline_s, CONNECT_S)),
            )
            self._open.callback(dist.destroy_process_group)
        return dist.group.WORLD

    def _meeting_store(self) -> Any:
        """For one process group; torchrun's would still hold the keys of an earlier runtime's."""
        tcp_store: Any = dist.TCPStore  # type: ignore[attr-defined]
        mine = None
        if self.rank == 0:
            mine = tcp_store("127.0.0.1", 0, self.world, True, wait_for_workers=False)
        port = self.group.allgather("process group", mine and mine.port)[0].value
        return mine or tcp_store("127.0.0.1", port, self.world, False)

    def _deepep(
        self,
        name: str,
        config: TransportConfig,
        views: Mapping[str, torch.Tensor],
        launch: Launcher | None,
    ) -> Transport:
        # Upstream uses the group to start, and only then.
        group = self._process_group(launch is not None)
        self.group.barrier(f"starting {name}")  # upstream's own start has no deadline
        transport: DeepEpLowLatency | DeepEpNormal
        if name == "deepep":
            transport = DeepEpLowLatency.open(config, views, group)
        else:
            transport = DeepEpNormal.open(config, views, group, launch)
        self._open.callback(self._close_together, transport)
        self.group.barrier(f"{name} started")
        return transport

    def _close_together(self, transport: DeepEpLowLatency | DeepEpNormal) -> None:
        """Upstream ends in a barrier of its own; without the others it would wait there for good,
        so then its memory is left to the end of this process."""
        try:
            self.group.barrier(f"closing {transport.name}", timeout_s=self.deadline_s)
        except RankError:
            return
        transport.close()

    def _rdep(
        self, config: TransportConfig, views: Mapping[str, torch.Tensor], store: Store
    ) -> Transport:
        device = Device(torch.cuda.current_device())
        # All ranks have their code before any of them can wait for another.
        kernels = load_rdep(device, config, store=store)
        layout = peer_layout(config)
        memory = DeviceMemory(self.group, device, layout.device_bytes)
        self._open.callback(memory.close)
        self._watch = DeviceWatch(
            memory,
            deadline_ms=round(self.deadline_s * 1e3),
            step_address=views["step"].data_ptr(),
        )
        self._open.callback(self._watch.close)
        buffers = peer_views(layout, memory.payload, torch.device("cuda", device.ordinal))
        transport = Rdep(config, buffers, kernels, base=memory.base, stride=memory.stride)
        torch.cuda.synchronize()
        self.group.barrier("peer memory")
        return transport

    def check(self) -> None:
        """One read of host memory; raises `BarrierTimeout` naming the ranks that are late."""
        if self._watch is not None:
            self._watch.check()

    def meet(self, what: str) -> None:
        """Wait until every rank's host is here; for starting, never in a step."""
        self.group.barrier(what)

    def close(self) -> None:
        """Leave the group and release what is shared; waits for nobody. Idempotent."""
        self._open.close()
