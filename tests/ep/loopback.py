"""One rank's kernels among peers that are plain memory of its GPU: what it tells them, exactly.

Every slot of the peer memory lies in one tensor, so each byte that the kernels write to a peer, and
each signal, can be counted on the device. Peers never answer; all their signals are given in
advance (`arm`), so no wait waits. Needs one GPU, whatever the world.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from barriers.device_watch import STATE_AT, State
from barriers.rdep import TAG, Rdep, RdepTuning, load_rdep, peer_layout, peer_views
from barriers.symmetric import CONTROL_BYTES
from barriers.transport import TransportConfig
from barriers.vocabulary import VocabularyConfig
from barriers.vocabulary_peers import HeadTuning, VocabularyPeers, load_head
from barriers.watch import Record
from capture_cache.driver import Device
from capture_cache.layout import ArenaLayout, Entry, Section

IN_ADVANCE = 1000  # barriers that `arm` lets pass
_ALIGN = 4096


class PeerSlots:
    """Peer memory of all ranks, on this rank's GPU.

    Attributes:
        slots: uint8 [world, stride]; slot k is that of rank (rank + k) mod world.
        views: by slot, the buffers of the layout.
        base: address of slot 0.
    """

    def __init__(self, world: int, layout: ArenaLayout, cuda: torch.device) -> None:
        self.world = world
        self.stride = -(-(CONTROL_BYTES + layout.device_bytes) // _ALIGN) * _ALIGN
        self.slots = torch.zeros(world, self.stride, dtype=torch.uint8, device=cuda)
        self.base = self.slots.data_ptr()
        at = [self.base + k * self.stride for k in range(world)]
        self.views = [peer_views(layout, address + CONTROL_BYTES, cuda) for address in at]
        self._record = torch.zeros(ctypes.sizeof(Record), dtype=torch.uint8).pin_memory()
        state = State(
            step=self.base + STATE_AT + State.own_step.offset,
            record=self._record.data_ptr(),
            deadline_ns=1_000_000_000,
        )
        words = torch.from_numpy(np.frombuffer(bytes(state), np.uint8).copy())
        self.slots[0, STATE_AT : STATE_AT + len(words)].copy_(words)

    def arm(self) -> None:
        """Zero all signals, and let the next barriers pass."""
        self.slots[:, : 4 * self.world].zero_()
        self._tags(0)[1 : self.world] = -IN_ADVANCE * TAG

    def signals(self) -> tuple[list[int], list[int]]:
        """Barriers entered since `arm`, as this rank has it for each peer, and as each peer has it.

        Raises:
            AssertionError: part of a signal, or a wait that gave up.
        """
        torch.cuda.synchronize()
        assert int(Record.from_buffer_copy(self._record.numpy().tobytes()).stop) == 0
        own = [int(w) + IN_ADVANCE * TAG for w in self._tags(0)[1 : self.world]]
        theirs = [-int(self._tags(slot)[self.world - slot]) for slot in range(1, self.world)]
        assert all(w % TAG == 0 for w in own + theirs), (own, theirs)
        return [w // TAG for w in own], [w // TAG for w in theirs]

    def _tags(self, slot: int) -> torch.Tensor:
        """int32; word k is what the rank of slot k owes there."""
        return self.slots[slot, :CONTROL_BYTES].view(torch.int32)

    def payload(self, slot: int) -> torch.Tensor:
        """uint8, a copy."""
        return self.slots[slot, CONTROL_BYTES:].clone()


class Loopback(PeerSlots):
    """`rdep` over it.

    Attributes:
        transport: this rank's.
    """

    def __init__(self, config: TransportConfig, device: Device, tuning: RdepTuning) -> None:
        self.config = config
        super().__init__(config.world, peer_layout(config), torch.device("cuda", device.ordinal))
        self.transport = Rdep(
            config,
            self.views[0],
            load_rdep(device, config, tuning),
            base=self.base,
            stride=self.stride,
            tuning=tuning,
        )
        self.views[0]["ep_recv_ids"].fill_(-1)

    def poison(self, byte: int) -> None:
        """Every payload but what the transport itself keeps from call to call."""
        self.slots[1:, CONTROL_BYTES:].fill_(byte)
        for name in ("ep_recv_x", "ep_recv_scale", "ep_recv_weights", "ep_partial"):
            if name in self.views[0]:
                self.views[0][name].view(torch.uint8).fill_(byte)


class HeadLoopback(PeerSlots):
    """A head cut by vocabulary over it.

    Attributes:
        exchange: this rank's.
    """

    def __init__(self, config: VocabularyConfig, device: Device, tuning: HeadTuning) -> None:
        self.config = config
        layout = ArenaLayout.build(
            [Entry(*spec) for spec in VocabularyPeers.buffers(config)], [Section("peers")]
        )
        super().__init__(config.world, layout, torch.device("cuda", device.ordinal))
        self.exchange = VocabularyPeers(
            config,
            self.views[0],
            load_head(device, config, tuning),
            base=self.base,
            stride=self.stride,
            tuning=tuning,
        )

    def poison(self, byte: int) -> None:
        """Every payload but the words that the exchange keeps from call to call."""
        self.slots[1:, CONTROL_BYTES:].fill_(byte)
        for name in ("head_rows", "head_part"):
            self.views[0][name].view(torch.uint8).fill_(byte)
