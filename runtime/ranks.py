"""What a rank holds beside its arena: the group, peer memory, the watch over waits, the transport.

One process a GPU, started by `torchrun`; a process without its variables is a world of one. Ranks
meet at start, compare what they were started with, and from then on share nothing but the number of
steps.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Mapping
from contextlib import ExitStack

import torch
import torch.distributed as dist

from barriers.allgather import AllGather
from barriers.config import GroupConfig
from barriers.deepep import AFTER_LATE, DeepEpLowLatency, DeepEpNormal
from barriers.device_watch import DeviceWatch
from barriers.errors import RankError
from barriers.group import RankGroup
from barriers.host_meeting import HostMeeting
from barriers.rdep import Rdep, RdepTuning, load_rdep, peer_layout, peer_views
from barriers.step_board import StepBoard
from barriers.symmetric_device import DeviceMemory
from barriers.transport import DEEPEP, Local, Transport, TransportConfig
from barriers.vocabulary import Vocabulary, VocabularyConfig
from barriers.vocabulary_allgather import VocabularyAllGather
from barriers.vocabulary_peers import VocabularyPeers, load_head
from barriers.watch import CLOSE
from capture_cache.driver import Device
from capture_cache.store import Store
from kernels.triton.launch import Launcher

CONNECT_S = 60.0  # for a process group to come up; hosts are busy then


class Ranks:
    """This rank's side of a run.

    Args:
        config: rank, world and meeting point.
        fields: what every rank must have been started with; a difference names both values.
        deadline_s: of every wait for a peer.

    Attributes:
        vocabulary: where the ranks share the head, once the transport is made.
        board: where the transport's own waits name nobody.
    """

    def __init__(
        self, config: GroupConfig, fields: Mapping[str, str], *, deadline_s: float
    ) -> None:
        self.rank, self.world, self.deadline_s = config.rank, config.world, deadline_s
        self._open = ExitStack()
        self._watch: DeviceWatch | None = None
        self.vocabulary: Vocabulary | None = None
        self.board: StepBoard | None = None
        self._aborting: threading.Thread | None = None
        self.group = self._open.enter_context(RankGroup(config, fields))

    def transport(
        self,
        name: str,
        config: TransportConfig,
        views: Mapping[str, torch.Tensor],
        launch: Launcher | None,
        store: Store,
        tuning: RdepTuning | None = None,
        shared: VocabularyConfig | None = None,
    ) -> Transport:
        """Make the transport `name`; every rank calls this alike.

        Args:
            views: of the arena; the transport's own buffers are among them where it has some there.
            launch: None on the CPU twin.
            tuning: of rdep.
            shared: of a head that ranks share: `vocabulary` is then made, too.
        Raises:
            RankError: a rank failed, or did not come; raised on all of them.
        """
        if name == "local":
            return Local(config, launch)
        if name == "allgather":
            return self._allgather(config, views, launch, shared)
        if name in DEEPEP:
            return self._deepep(name, config, views, launch)
        return self._rdep(config, views, store, tuning, shared)

    def _allgather(
        self,
        config: TransportConfig,
        views: Mapping[str, torch.Tensor],
        launch: Launcher | None,
        shared: VocabularyConfig | None,
    ) -> Transport:
        self._connect("gloo" if launch is None else "nccl")
        meeting = None
        if launch is None:
            step = views["step"]
            deadline_ms = round(self.deadline_s * 1e3)
            meeting = HostMeeting(self.group, deadline_ms=deadline_ms, step=lambda: int(step[0]))
            self._open.callback(meeting.close)
        else:
            self._post("allgather")
        if shared is not None:
            self.vocabulary = VocabularyAllGather(shared, views, dist.group.WORLD, meeting)
        return AllGather(config, views, dist.group.WORLD, launch, meeting)

    def _connect(self, backend: str) -> None:
        """Make torch's process group if there is none, over a store of its own: an earlier runtime
        of this process may have left entries in the one that `MASTER_PORT` names."""
        if dist.is_initialized():
            return
        timeout = datetime.timedelta(seconds=max(self.deadline_s, CONNECT_S))
        mine = None
        if self.rank == 0:
            mine = dist.TCPStore(  # type: ignore[attr-defined]
                "127.0.0.1", 0, None, True, timeout, wait_for_workers=False
            )
        port = self.group.allgather("torch store", mine.port if mine else 0)[0].value
        store = mine or dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", port, None, False, timeout
        )
        dist.init_process_group(
            backend,
            store=store,
            rank=self.rank,
            world_size=self.world,
            timeout=timeout,
            device_id=_current_gpu() if backend == "nccl" else None,
        )
        self._open.callback(self._disconnect)
        # torch has one time-out for connecting and for every collective after it.
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=self.deadline_s))

    def _deepep(
        self,
        name: str,
        config: TransportConfig,
        views: Mapping[str, torch.Tensor],
        launch: Launcher | None,
    ) -> Transport:
        self._connect("gloo" if launch is None else "nccl")  # upstream's start goes through it
        if launch is not None:
            self._post(name, first=AFTER_LATE)
        self.group.barrier(f"starting {name}")  # which has no deadline of its own
        transport: DeepEpLowLatency | DeepEpNormal
        if name == "deepep":
            transport = DeepEpLowLatency.open(config, views, dist.group.WORLD)
        else:
            transport = DeepEpNormal.open(config, views, dist.group.WORLD, launch)
        self._open.callback(self._close_together, transport)
        self.group.barrier(f"{name} started")
        return transport

    def _post(self, name: str, first: str = CLOSE) -> None:
        """Have every rank's host tell which step it launches."""
        self.board = StepBoard(self.group, deadline_s=self.deadline_s, operation=name, first=first)
        self._open.callback(self.board.close)

    def _close_together(self, transport: DeepEpLowLatency | DeepEpNormal) -> None:
        """Upstream ends in a barrier of its own; without the others it would wait there for good,
        so then its memory is left to the end of this process."""
        try:
            self.group.barrier(f"closing {transport.name}", timeout_s=self.deadline_s)
        except RankError:
            return
        transport.close()

    def _rdep(
        self,
        config: TransportConfig,
        views: Mapping[str, torch.Tensor],
        store: Store,
        tuning: RdepTuning | None,
        shared: VocabularyConfig | None,
    ) -> Transport:
        device = Device(torch.cuda.current_device())
        # All ranks have their code before any of them can wait for another.
        kernels = load_rdep(device, config, tuning, store=store)
        head = None if shared is None else load_head(device, shared, store=store)
        layout = peer_layout(config, () if shared is None else VocabularyPeers.buffers(shared))
        memory = DeviceMemory(self.group, device, layout.device_bytes)
        self._open.callback(memory.close)
        self._watch = DeviceWatch(
            memory,
            deadline_ms=round(self.deadline_s * 1e3),
            step_address=views["step"].data_ptr(),
        )
        self._open.callback(self._watch.close)
        buffers = peer_views(layout, memory.payload, torch.device("cuda", device.ordinal))
        transport = Rdep(
            config, buffers, kernels, base=memory.base, stride=memory.stride, tuning=tuning
        )
        if shared is not None and head is not None:
            # On rdep's stream, between two of its layers: they take turns on one set of signals.
            self.vocabulary = VocabularyPeers(
                shared, buffers, head, base=memory.base, stride=memory.stride
            )
        torch.cuda.synchronize()
        self.group.barrier("peer memory")
        return transport

    def abandon(self) -> None:
        """Ranks are missing for good: end what NCCL's kernels wait for, or closing would wait, too.

        DeepEP has no such end (`barriers.deepep`).
        """
        if self._aborting is None and dist.is_initialized() and dist.get_backend() == "nccl":
            # The kernels end at once, but the call only when no captured graph is left that uses
            # the communicator; and graphs are given up later, when we close.
            abort = dist.distributed_c10d._abort_process_group
            self._aborting = threading.Thread(target=abort, name="abort NCCL", daemon=True)
            self._aborting.start()

    def _disconnect(self) -> None:
        if self._aborting is None:
            dist.destroy_process_group()
        else:
            self._aborting.join(self.deadline_s)

    def check(self) -> None:
        """One read of host memory; raises `BarrierTimeout` naming the ranks that are late."""
        if self._watch is not None:
            self._watch.check()

    def meet(self, what: str) -> None:
        """Wait until every rank's host is here; for starting, never in a step."""
        self.group.barrier(what)

    def close(self) -> None:
        """Leave the group and release what is shared. Idempotent; waits for nobody, but for up
        to the deadline where DeepEP ends in a meeting or NCCL is being given up."""
        self._open.close()


def _current_gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
