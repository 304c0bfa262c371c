"""The player's engine: restored graphs over a filled arena; knows neither torch nor triton."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from capture_cache.arena import DeviceArena
from capture_cache.restore_driver import Driver
from graphs.keys import GraphKey, Ladder
from graphs.model_config import ModelConfig
from graphs.step_config import StepConfig, mailbox_layout
from kernels.triton.state import HEADER
from runtime.config import RuntimeConfig
from runtime.player_rows import adopt_rows
from runtime.restored_keys import Keys
from runtime.row_params import Admission
from runtime.state import RESET

if TYPE_CHECKING:
    from runtime.player_ranks import PlayerRanks
    from runtime.replayer import NewWeights


class Player:
    """Restored graphs, as `runtime.replayer.Replayer`.

    Args:
        resources: what `close` releases, last acquired first.
        ranks: the other ranks; None for one alone.

    Attributes:
        stages: seconds of each stage of the restore.
        loaded_from, load_reason: "bundle", and which.
    """

    ring_header = HEADER

    def __init__(
        self,
        options: RuntimeConfig,
        driver: Driver,
        arena: DeviceArena,
        stream: int,
        keys: Keys,
        config: StepConfig,
        model: ModelConfig,
        ladder: Ladder,
        resources: ExitStack,
        ranks: PlayerRanks | None = None,
    ) -> None:
        self.options, self.config, self.model_config, self.ladder = options, config, model, ladder
        self.deadline_s = options.deadline_s
        self.keys = keys
        self._driver, self._arena, self._stream = driver, arena, stream
        self._resources, self._ranks = resources, ranks
        self._thread = threading.get_ident()
        self.mailbox_layout = mailbox_layout(config, ladder)
        self.mailbox: NDArray[np.int32] = self._host_view("mailbox")
        self.ring: NDArray[np.int32] = self._host_view("ring")
        self.ring_step: NDArray[np.int64] = self._host_view("ring_step")
        self.ring_top: NDArray[np.int32] = self._host_view("ring_top")
        self.ring_logits: NDArray[np.float32] = self._host_view("ring_logits")
        self.forced_tokens: NDArray[np.int32] = self._host_view("forced_tokens")
        self.masks: NDArray[np.int32] = self._host_view("masks")
        self.stages: dict[str, float] = {}
        self.loaded_from, self.load_reason = "bundle", ""
        self.replay: Callable[[GraphKey], None] = self._replay

    @property
    def device_name(self) -> str:
        return self._driver.device_name(self._driver.ordinal)

    def check_ranks(self) -> None:
        """One read of host memory; raises BarrierTimeout naming the ranks that are late."""
        if self._ranks is not None:
            self._ranks.check()

    def check_alive(self) -> None:
        """Raises CudaError if the device has failed, and as `check_ranks`."""
        self.check_ranks()
        self._enter()
        self._driver.check_stream(self._stream, "replaying a step")
        self.keys.check()

    def reset_state(self) -> None:
        """Every row free, step 0, nothing published; waits. The null page keeps its contents."""
        self._enter()
        self._driver.wait(self._stream, "finishing steps")
        places = self._arena.layout.by_name
        for name, byte in RESET.items():
            spec = self._arena.view_spec(name)
            if places[name].host:
                ctypes.memset(spec.ptr, byte, spec.nbytes)
            else:
                self._driver.fill(spec.ptr, byte, spec.nbytes, self._stream)
        self._driver.wait(self._stream, "freeing all rows")

    def adopt(self, length: int, rows: Mapping[int, tuple[Admission, list[int]]]) -> None:
        """Put rows into the decode phase with `length` tokens in their pages; waits.

        Args:
            rows: what each was admitted with, its deadline not heeded, and its pages.
        """
        self._enter()
        self._driver.wait(self._stream, "finishing steps")
        for row, (admitted, _) in rows.items():
            if admitted.known is not None:
                self.forced_tokens[row, : len(admitted.known)] = admitted.known
        adopt_rows(partial(_Edited, self._driver, self._arena), length, rows)

    def gather(self, what: str, value: Any, timeout_s: float) -> list[Any]:
        """Every rank's value, by rank; all ranks call this alike. Raises RankError."""
        if self._ranks is None:
            return [value]
        parts = self._ranks.group.allgather(what, value, timeout_s=timeout_s)
        return [part.value for part in parts]

    def prepare_weights(self, source: str | Path | Iterable[tuple[str, Any]]) -> NewWeights:
        """Check new weights, this rank's part of them; nothing is written yet. Imports torch.

        Raises:
            ValueError, TypeError: not this model's tensors, or not finite; or there is no torch.
        """
        from runtime.player_weights import PlayerUpdate  # torch, which a player does without

        self._enter()
        self._driver.wait(self._stream, "finishing steps")
        ordinal = self._driver.ordinal
        return PlayerUpdate(source, self._arena, self.model_config, self.config, ordinal)

    def read(self, name: str) -> NDArray[np.uint8]:
        """A copy of an arena entry's bytes, after all work; for tests."""
        self._enter()
        self._driver.wait(self._stream, "finishing steps")
        spec = self._arena.view_spec(name)
        data = np.empty(spec.nbytes, np.uint8)
        self._driver.download(data, spec.ptr)
        return data

    def close(self) -> None:
        """Release graphs, arena and context. Idempotent."""
        self._enter()
        self._resources.close()

    def _replay(self, key: GraphKey) -> None:
        """Launch the graph of `key`; raises as `Keys.exec_of`."""
        self._enter()
        self._driver.launch(self.keys.exec_of(key), self._stream, "launching a step")

    def _enter(self) -> None:
        """A context is current in one thread at a time; the caller may have changed."""
        if self._thread != threading.get_ident():
            self._driver.make_current()
            self._thread = threading.get_ident()

    def _host_view(self, name: str) -> NDArray[Any]:
        spec = self._arena.view_spec(name)
        memory = (ctypes.c_uint8 * spec.nbytes).from_address(spec.ptr)
        words: NDArray[Any] = np.frombuffer(
            memoryview(memory), spec.dtype
        )  # numpy knows all of the host's
        return words.reshape(spec.shape)


class _Edited:
    """An arena entry to change on the host: read, changed, written back."""

    def __init__(self, driver: Driver, arena: DeviceArena, name: str) -> None:
        self._driver, self._spec = driver, arena.view_spec(name)
        self._data: NDArray[Any] = np.empty(self._spec.shape, self._spec.dtype)

    def __enter__(self) -> NDArray[Any]:
        self._driver.download(self._data, self._spec.ptr)
        return self._data

    def __exit__(self, *failure: object) -> None:
        if failure[0] is None:
            self._driver.upload(self._spec.ptr, self._data)
