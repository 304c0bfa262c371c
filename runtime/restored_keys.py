"""The graphs of a restored ladder: the first at once, the others in two threads.

    builder                    instantiate, upload ──────► instantiate, upload ──────► …
    maker     the first key    the next: read, add its nodes and edges; drop the graph before

Instantiation is the driver's own time and lets Python's lock go: the maker's work falls into it,
one key at a time, so that the builder hardly waits for that lock. Where the maker is behind, the
builder waits for the key that is being made: making it once more would take both longer. A key that
is wanted before the builder has come to it is built at once, by who wants it; no other key takes
its place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from capture_cache.bundle import Golden, Graph
from capture_cache.bundle_files import BundleFiles
from capture_cache.errors import CorruptBundle, CudaError
from capture_cache.restore import Parts, add_graph, prepare_graph
from capture_cache.restore_code import Code
from capture_cache.restore_driver import Driver
from graphs.keys import GraphKey, Ladder, NotCaptured

# Before the builder begins: a step that follows the load at once is not disturbed.
PAUSE_S = 0.03
MAKER_PAUSE = 2 / 3  # of it, before the maker does, whose first key is ready then


class Keys:
    """The graphs of a ladder, each rebuilt when it is wanted or when the thread comes to it.

    Args:
        decoded: graphs that have been read already.

    Attributes:
        seconds: from where a key is taken up to where it can be launched.
        parts: what `seconds` went into, all keys together.
        ahead: the same of what the maker did meanwhile.
    """

    def __init__(
        self,
        driver: Driver,
        code: Code,
        files: BundleFiles,
        symbols: NDArray[np.uint64],
        stream: int,
        ladder: Ladder,
        decoded: Mapping[GraphKey, Graph],
    ) -> None:
        self._driver, self._code, self._files = driver, code, files
        self._symbols, self._stream, self._ladder = symbols, stream, ladder
        self._graphs: dict[GraphKey, int] = {}
        self._decoded = dict(decoded)
        self._made: dict[GraphKey, int] = {}  # CUgraphs, by the maker, for the builder
        self._used: list[int] = []  # CUgraphs that have been instantiated
        self._lock = threading.Lock()  # one graph is instantiated at a time
        self._next = threading.Lock()  # held by who waits for that one: the builder, too, queues
        self._dropping = threading.Lock()
        self._begun: dict[GraphKey, threading.Event] = {}  # by whoever was first; set when made
        self._stop = threading.Event()
        self._turns = threading.Semaphore(0)  # keys that the maker may make
        self._threads: list[threading.Thread] = []
        self._failure: Exception | None = None
        self.seconds: dict[GraphKey, float] = {}
        self.parts, self.ahead = Parts(), Parts()

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

    def build_rest(self, pause_s: float = PAUSE_S) -> None:
        """Build what is missing in threads, which pause first, the builder for `pause_s` s."""
        missing = [key for key in self._ladder.keys if key not in self._graphs]
        # One for the first key. Those that earlier keys gave are void: the maker would run ahead.
        self._turns = threading.Semaphore(1)
        for run, wait_s in ((self._run, pause_s), (self._make_ahead, pause_s * MAKER_PAUSE)):
            thread = threading.Thread(target=run, args=(missing, wait_s), daemon=True)
            self._threads.append(thread)
            thread.start()

    def wait(self) -> None:
        """Wait until every key is built; raises what went wrong."""
        for thread in self._threads:
            thread.join()
        self._drop_graphs()
        self.check()

    def check(self) -> None:
        """Raises what went wrong in the thread."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Stop building and drop all graphs. Idempotent."""
        self._stop.set()
        self._turns.release()
        for thread in self._threads:
            thread.join()
        self._drop_graphs()
        while self._graphs:
            self._driver.drop_exec(self._graphs.popitem()[1])

    def _run(self, keys: Sequence[GraphKey], pause_s: float) -> None:
        try:
            self._stop.wait(pause_s)
            self._driver.make_current()
            for key in keys:
                if self._stop.is_set():
                    return
                self.exec_of(key)
            with self._lock:
                self._drop_used(keep=0)
        except Exception as e:  # told by `check`, and again by the step that wants the key
            self._failure = e
            self._stop.set()
        finally:
            self._turns.release()  # the maker must not wait for a builder that has ended

    def _make_ahead(self, keys: Sequence[GraphKey], pause_s: float = 0.0) -> None:
        try:
            self._stop.wait(pause_s)
            self._driver.make_current()
            for key in keys:
                self._turns.acquire()
                if self._stop.is_set():
                    return
                begun = threading.Event()
                if self._begun.setdefault(key, begun) is begun:
                    try:
                        self._made[key] = self._make(key, self.ahead)
                    finally:
                        begun.set()
                self._drop_used(keep=1)  # the last one may just be instantiated
                self.ahead.end("drop")
        except (CorruptBundle, CudaError):
            return  # who builds that key makes it again, and tells

    def _take(self, key: GraphKey) -> int:
        """The key's CUgraph: the maker's, if it has begun it and can; else made here."""
        begun = threading.Event()
        try:  # from here on: an interrupt must leave no event that nobody sets
            other = self._begun.setdefault(key, begun)
            if other is not begun:
                other.wait()
                self.parts.end("wait for the maker")
            made = self._made.pop(key, None)
            return self._make(key, self.parts) if made is None else made
        finally:
            begun.set()

    def _make(self, key: GraphKey, parts: Parts) -> int:
        """The key's CUgraph."""
        parts.start()
        graph = self._decoded.pop(key, None)
        if graph is None:
            graph = self._files.graph_of(key.tokens, key.rows)
            parts.end("decode")
        prepared = prepare_graph(self._driver, self._code, graph, self._symbols)
        parts.end("lay out")
        return add_graph(self._driver, self._code, prepared, _shown(key), parts)

    def _build(self, key: GraphKey) -> int:
        if key not in self._ladder.keys:
            raise NotCaptured(
                f"key {key} was not captured (ladder {self._ladder}); add it with --ladder"
            )
        with self._turn():
            graph = self._graphs.get(key)
            if graph is not None:  # the other thread was quicker
                return graph
            start = time.perf_counter()
            self.parts.start()
            made = self._take(key)
            self._used.append(made)
            self.parts.start()
            self._turns.release()  # only the driver has work now, and Python's lock is about to go
            graph = self._driver.instantiate(made, f"instantiating {_shown(key)}")
            self.parts.end("instantiate")
            try:
                self._driver.upload_graph(graph, self._stream)
            except CudaError:
                self._driver.drop_exec(graph)
                raise
            self.parts.end("upload")
            self.seconds[key] = time.perf_counter() - start
            self._graphs[key] = graph
            return graph

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """In order of arrival: who has just let a lock go would else be the first to take it."""
        with self._next:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _drop_used(self, keep: int) -> None:
        """Drop graphs that have been instantiated, but the last few."""
        with self._dropping:
            while len(self._used) > keep:
                self._driver.drop_graph(self._used.pop(0))

    def _drop_graphs(self) -> None:
        """Drop every graph that is left. Idempotent; both threads have ended."""
        while self._made:
            self._used.append(self._made.popitem()[1])
        self._drop_used(keep=0)


def _shown(key: GraphKey) -> str:
    return f"the graph of key {key}"
