"""The first key's graph: read, its code loaded, and built, in a thread beside the arena's mapping.

    this thread   read ─► load code ─► wait for addresses ─► lay out, add nodes, instantiate
    the caller    pin, reserve: addresses ─────┴─► map memory, meet the other ranks ─► wait here

A kernel node takes its addresses as numbers, so it may be made before there is memory behind them;
a graph that copies or fills waits for that, because the driver looks at such addresses.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from capture_cache.bundle import KERNEL, Graph, Table
from capture_cache.bundle_files import BundleFiles
from capture_cache.restore_code import Code
from graphs.keys import GraphKey, Ladder
from runtime.opening import Opening
from runtime.restored_keys import Keys


class Preload:
    """The first key, built in a thread.

    Args:
        contents: of the bundle.
        shown: its directory, for messages.

    Raises nothing: what goes wrong is told by `files` and `wait`.
    """

    def __init__(
        self, opening: Opening, contents: Mapping[str, bytes], ladder: Ladder, shown: str
    ) -> None:
        self._opening, self._contents = opening, contents
        self._ladder, self._shown = ladder, shown
        self._files: BundleFiles | None = None
        self._code: Code | None = None
        self._keys: Keys | None = None
        self._place: tuple[Table, int] | None = None
        self._read, self._placed, self._mapped = (threading.Event() for _ in range(3))
        self._given_up = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="lockstep-code", daemon=True)
        self._thread.start()

    @property
    def files(self) -> BundleFiles:
        """The bundle's files, as what they hold; waits for them. Raises CorruptBundle."""
        self._read.wait()
        if self._files is None:
            assert self._failure is not None
            raise self._failure
        return self._files

    def place(self, symbols: Table, stream: int) -> None:
        """Addresses are known (`symbols`, as `symbol_table` gives them); the thread goes on."""
        self._place = (symbols, stream)
        self._placed.set()

    def mapped(self) -> None:
        """There is memory behind the addresses."""
        self._mapped.set()

    def wait(self) -> tuple[Code, Keys]:
        """The code, and the ladder's keys with the first one built.

        Raises:
            CorruptBundle, CudaError, NotRestored: it cannot be built.
        """
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        assert self._code is not None
        assert self._keys is not None
        return self._code, self._keys

    def close(self) -> None:
        """Stop, drop the graphs and unload the code. Idempotent."""
        self._given_up = True
        self._placed.set()
        self._mapped.set()
        self._thread.join()
        if self._keys is not None:
            self._keys.close()
        if self._code is not None:
            self._code.close()

    def _run(self) -> None:
        try:
            self._files = BundleFiles(self._contents, self._shown)
            self._read.set()
            key = self._ladder.keys[0]
            graph = self._files.graph_of(key.tokens, key.rows)
            driver = self._opening.wait_context()
            self._code = Code(driver, self._files)
            kernel = graph.nodes["kind"] == KERNEL
            self._code.kernels(graph.nodes["function"][kernel])
            self._placed.wait()
            if not kernel.all():
                self._mapped.wait()
            if not self._given_up:
                self._build({key: graph})
        except Exception as e:  # told by `files` or `wait`
            self._failure = e
        finally:
            self._read.set()

    def _build(self, decoded: Mapping[GraphKey, Graph]) -> None:
        assert self._files is not None
        assert self._code is not None
        assert self._place is not None
        symbols, stream = self._place
        driver = self._opening.wait_context()
        self._keys = Keys(driver, self._code, self._files, symbols, stream, self._ladder, decoded)
        self._keys.exec_of(self._ladder.keys[0])
