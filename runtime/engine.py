"""What the driver holds: captured graphs over a filled arena, and the host's views of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from barriers.errors import BarrierTimeout
from capture_cache.fingerprint import Fingerprint
from graphs.aot import AotLauncher
from graphs.capture import GraphBackend, GraphSet
from graphs.choices import KernelChoices
from graphs.keys import GraphKey
from graphs.ledger import Ledger
from graphs.prove import Proof
from graphs.weight_update import WeightUpdate, prepare_update
from kernels.triton.intake_rows import admit
from kernels.triton.rows import RowState
from kernels.triton.state import DECODE, HEADER, MailboxLayout
from runtime.config import RuntimeConfig
from runtime.fingerprint import fingerprint
from runtime.ranks import Ranks
from runtime.row_params import Admission
from runtime.selection import Selection
from runtime.state import RESET


class _Views(Protocol):
    def __getitem__(self, name: str, /) -> torch.Tensor: ...


class EngineUpdate:
    """Checked weights, to be written on the stream of the steps."""

    def __init__(self, update: WeightUpdate, backend: GraphBackend) -> None:
        self._update, self._backend = update, backend
        self.shared_digest = update.shared_digest

    def apply(self) -> None:
        """Write all of it where the old weights are; waits."""
        with self._backend.on_stream():
            self._update.apply()
            self._backend.synchronize()

    def discard(self) -> None:
        """Write nothing, and let go of the source."""
        self._update.discard()


class Engine:
    """Captured graphs that are ready to replay; `runtime.build` makes it.

    Args:
        resources: what `close` releases, last acquired first.

    Attributes:
        mailbox: int32 [2, words]; ring: int32 [slots, words]; ring_step: int64 [slots].
        forced_tokens, masks, ring_top, ring_logits: beside them, see `kernels.triton.state`.
        stages: seconds of each stage of the build.
        weights_note: where the weights came from, for people.
        proofs: one per key, empty if not verified.
        choices: kernels that the graphs were captured with.
        loaded_from, load_reason: "capture", and why no bundle was used where one was looked for.
        bundle_note: what became of the bundle: stored, or why there is none.
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
        self.ring_top: NDArray[np.int32] = buffers["ring_top"].numpy()
        self.ring_logits: NDArray[np.float32] = buffers["ring_logits"].numpy()
        self.forced_tokens: NDArray[np.int32] = buffers["forced_tokens"].numpy()
        self.masks: NDArray[np.int32] = buffers["masks"].numpy()
        self.stages: dict[str, float] = {}
        self.weights_note = ""
        self.bundle_note = ""
        self.proofs: dict[GraphKey, Proof] = {}
        self.ledger: Ledger | None = None
        self.choices = KernelChoices()
        self.replay: Callable[[GraphKey], None] = graphs.replay
        if ranks.board is not None:
            self.replay = self._replay_told
        self.loaded_from = "capture"
        self.load_reason = ""

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
        if self.ranks.board is not None:
            try:
                self.ranks.board.check(int(self.ring_step.max()))  # as many as have ended
            except BarrierTimeout:
                self.ranks.abandon()
                raise

    def _replay_told(self, key: GraphKey) -> None:
        """Replay, and let the other ranks know."""
        assert self.ranks.board is not None
        self.ranks.board.launch()
        self.graphs.replay(key)

    @property
    def device_name(self) -> str:
        if not self.selection.on_device:
            return "CPU twin"
        return torch.cuda.get_device_name()

    def fingerprint(self) -> Fingerprint:
        return fingerprint(self.options, on_device=self.selection.on_device)

    def reset_state(self) -> None:
        """Every row free, step 0, nothing published; waits. The null page keeps its contents."""
        with self.graphs.backend.on_stream():
            reset_state(self.graphs.step.buffers)
            self.graphs.backend.synchronize()
        if self.ranks.board is not None:
            self.ranks.board.restart()

    def adopt(self, length: int, rows: Mapping[int, tuple[Admission, list[int]]]) -> None:
        """Put rows into the decode phase with `length` tokens in their pages; waits.

        Args:
            rows: what each was admitted with, its deadline not heeded, and its pages.
        """
        b, backend = self.graphs.step.buffers, self.graphs.backend
        state = RowState.of({name: b[name] for name in RowState.names()})
        with backend.on_stream():
            for row, (admitted, held) in rows.items():
                admit(state, row, torch.from_numpy(admitted.record))
                if admitted.known is not None:
                    self.forced_tokens[row, : len(admitted.known)] = admitted.known
                state.phase[row], state.seq_len[row], state.last_token[row] = DECODE, length, 0
                state.page_table[row, : len(held)] = torch.tensor(held, dtype=torch.int32)
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

    def gather(self, what: str, value: Any, timeout_s: float) -> list[Any]:
        """Every rank's value, by rank; all ranks call this alike.

        Raises:
            RankError: a rank did not come in time, or is at another call.
        """
        parts = self.ranks.group.allgather(what, value, timeout_s=timeout_s)
        return [part.value for part in parts]

    def prepare_weights(self, source: str | Path | Iterable[tuple[str, Any]]) -> EngineUpdate:
        """Check new weights, this rank's part of them; nothing is written yet.

        Raises:
            ValueError, TypeError: not this model's tensors, or not finite.
        """
        step = self.config
        ranks = {"ep_rank": step.ep_rank, "ep_size": step.ep_size}
        with self.graphs.backend.on_stream():
            update = prepare_update(source, self.model_config, self.graphs.step.weights, **ranks)
        return EngineUpdate(update, self.graphs.backend)

    def close(self) -> None:
        """Release graphs, peer memory and arena. Idempotent."""
        self._resources.close()


def reset_state(views: _Views) -> None:
    """Fill the buffers of `RESET` on the current stream."""
    for name, byte in RESET.items():
        views[name].view(torch.uint8).fill_(byte)
