"""What the driver holds: captured graphs over a filled arena, and the host's views of them."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import torch
from numpy.typing import NDArray

from capture_cache.fingerprint import Fingerprint
from graphs.aot import AotLauncher
from graphs.capture import GraphSet
from graphs.choices import KernelChoices
from graphs.fingerprint import fingerprint
from graphs.keys import GraphKey
from graphs.ledger import Ledger
from graphs.prove import Proof
from kernels.triton.state import DECODE, HEADER, MailboxLayout
from runtime.config import RuntimeConfig
from runtime.ranks import Ranks
from runtime.selection import Selection


class Engine:
    """Captured graphs that are ready to replay; `runtime.build` makes it.

    Args:
        resources: what `close` releases, last acquired first.

    Attributes:
        mailbox: int32 [2, words]; ring: int32 [slots, words]; ring_step: int64 [slots].
        stages: seconds of each stage of the build.
        proofs: one per key, empty if not verified.
        choices: kernels that the graphs were captured with.
    """

    ring_header = HEADER

    def __init__(
        self,
        selection: Selection,
        options: RuntimeConfig,
        ranks: Ranks,
        graphs: GraphSet,
        launcher: AotLauncher | None,
        resources: ExitStack,
    ) -> None:
        self.selection, self.options, self.ranks = selection, options, ranks
        self.model_config, self.config = selection.model, selection.step
        self.ladder = selection.ladder
        self.deadline_s = options.deadline_s
        self.graphs, self.launcher = graphs, launcher
        self._resources = resources
        buffers = graphs.step.buffers
        self.mailbox_layout: MailboxLayout = buffers.mailbox_layout
        self.mailbox: NDArray[np.int32] = buffers["mailbox"].numpy()
        self.ring: NDArray[np.int32] = buffers["ring"].numpy()
        self.ring_step: NDArray[np.int64] = buffers["ring_step"].numpy()
        self.stages: dict[str, float] = {}
        self.proofs: dict[GraphKey, Proof] = {}
        self.ledger: Ledger | None = None
        self.choices = KernelChoices()
        self.replay = graphs.replay

    def check_ranks(self) -> None:
        """One read of host memory, after every step.

        Raises:
            BarrierTimeout, StepMismatch: a wait of this device ended without its peers.
        """
        self.ranks.check()

    def check_alive(self) -> None:
        """Cheap enough for a poll.

        Raises:
            BarrierTimeout: a peer is late; names it.
            RuntimeError: the device failed.
        """
        self.ranks.check()
        self.graphs.backend.check_alive()

    @property
    def device_name(self) -> str:
        if not self.selection.on_device:
            return "CPU twin"
        return torch.cuda.get_device_name()

    def fingerprint(self) -> Fingerprint:
        return fingerprint(
            self.selection.source,
            self.model_config,
            self.config,
            self.ladder,
            self.selection.layout,
            on_device=self.selection.on_device,
            kernels=self.options.kernels_asked,
        )

    def adopt(self, rows: list[int], length: int, limit: int, pages: list[list[int]]) -> None:
        """Put rows into the decode phase with `length` tokens in their pages; waits."""
        b, backend = self.graphs.step.buffers, self.graphs.backend
        index = torch.tensor(rows)
        with backend.on_stream():
            for name, value in (("phase", DECODE), ("seq_len", length), ("limit", limit)):
                b[name][index] = value
            b["stop_ids"][index] = -1
            for row, held in zip(rows, pages, strict=True):
                b["page_table"][row, : len(held)] = torch.tensor(held, dtype=torch.int32)
            backend.synchronize()

    def fill_kv(self, *, seed: int) -> None:
        """Random values in the whole KV cache, the null page left as it is; waits."""
        b, backend = self.graphs.step.buffers, self.graphs.backend
        with backend.on_stream():
            gen = torch.Generator(b["x"].device).manual_seed(seed)
            for layer in range(self.model_config.num_layers):
                b[f"kv.{layer}"][self.config.page_size :].normal_(generator=gen)
            backend.synchronize()

    def read_stamps(self, count: int) -> NDArray[np.int64]:
        """The first `count` timestamps of the last stamped step, ns; waits."""
        with self.graphs.backend.on_stream():
            stamps: NDArray[np.int64] = self.graphs.step.buffers["stamps"][:count].cpu().numpy()
        return stamps.copy()

    def close(self) -> None:
        """Release graphs, peer memory and arena. Idempotent."""
        self._resources.close()
