"""The player's engine: restored graphs over a filled arena; knows neither torch nor triton.

A key that is wanted before the building thread has come to it is built at once, by who wants it;
no other key takes its place.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from capture_cache.arena import DeviceArena
from capture_cache.bundle import Golden, Graph
from capture_cache.restore import Code, Files, Parts, build_graph
from capture_cache.restore_driver import Driver
from graphs.keys import GraphKey, Ladder, NotCaptured
from graphs.model_config import ModelConfig
from graphs.step_config import StepConfig, mailbox_layout
from kernels.triton.state import HEADER
from runtime.config import RuntimeConfig
from runtime.player_rows import adopt_rows
from runtime.row_params import Admission
from runtime.state import RESET

if TYPE_CHECKING:
    from runtime.player_ranks import PlayerRanks
    from runtime.replayer import NewWeights

# Before the thread builds further keys: a step that follows the load at once is not disturbed.
PAUSE_S = 0.03


class Keys:
    """The graphs of a ladder, each rebuilt when it is wanted or when the thread comes to it.

    Args:
        prepared: graphs that have been read already.

    Attributes:
        seconds: spent on building each key; parts: on what, all keys together.
    """

    def __init__(
        self,
        driver: Driver,
        code: Code,
        files: Files,
        symbols: NDArray[np.uint64],
        stream: int,
        ladder: Ladder,
        prepared: Mapping[GraphKey, Graph],
    ) -> None:
        self._driver, self._code, self._files = driver, code, files
        self._symbols, self._stream, self._ladder = symbols, stream, ladder
        self._graphs: dict[GraphKey, int] = {}
        self._prepared = dict(prepared)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self.seconds: dict[GraphKey, float] = {}
        self.parts = Parts()

    def exec_of(self, key: GraphKey) -> int:
        """The key's CUgraphExec; waits for it where it is not built yet.

        Raises:
            NotCaptured: no such key.
            CorruptBundle, CudaError: it cannot be built.
        """
        graph = self._graphs.get(key)
        return self._build(key) if graph is None else graph

    def golden(self, key: GraphKey) -> Golden:
        """The key's golden step; raises CorruptBundle."""
        return self._files.golden_of(key.tokens, key.rows)

    def build_rest(self) -> None:
        """Build what is missing in a thread."""
        self._thread = threading.Thread(target=self._run, name="lockstep-restore", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until every key is built; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Raises what went wrong in the thread."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Stop building and drop all graphs. Idempotent."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        while self._graphs:
            self._driver.drop_exec(self._graphs.popitem()[1])

    def _run(self) -> None:
        try:
            self._stop.wait(PAUSE_S)
            self._driver.make_current()
            for key in self._ladder.keys:
                if self._stop.is_set():
                    return
                self.exec_of(key)
        except Exception as e:  # told by `check`, and again by the step that wants the key
            self._failure = e

    def _build(self, key: GraphKey) -> int:
        if key not in self._ladder.keys:
            raise NotCaptured(
                f"key {key} was not captured (ladder {self._ladder}); add it with --ladder"
            )
        with self._lock:
            graph = self._graphs.get(key)
            if graph is not None:  # the other thread was quicker
                return graph
            start = time.perf_counter()
            stored = self._prepared.pop(key, None)
            if stored is None:
                self.parts.start()
                stored = self._files.graph_of(key.tokens, key.rows)
                self.parts.end("decode")
            shown = f"the graph of key {key}"
            graph = build_graph(self._driver, self._code, stored, self._symbols, shown, self.parts)
            self._driver.upload_graph(graph, self._stream)
            self.parts.end("upload")
            self.seconds[key] = time.perf_counter() - start
            self._graphs[key] = graph
            return graph


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
