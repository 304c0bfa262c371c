"""The first key's graph and its code, on their way while the arena is mapped."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from capture_cache.bundle import KERNEL, Graph
from capture_cache.bundle_files import BundleFiles
from capture_cache.errors import CorruptBundle, CudaError
from capture_cache.files import REMEDY
from capture_cache.restore_code import Code
from graphs.keys import GraphKey, Ladder
from runtime.opening import NotRestored, Opening


class Preload:
    """The first key's graph and code, read and loaded in a thread while the arena is mapped."""

    def __init__(self, opening: Opening, files: BundleFiles, record: Mapping[str, Any]) -> None:
        self._opening, self._files, self._record = opening, files, record
        self._code: Code | None = None
        self._decoded: dict[GraphKey, Graph] = {}
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="lockstep-code", daemon=True)
        self._thread.start()

    def wait(self) -> tuple[Code, dict[GraphKey, Graph]]:
        """The code, and the graphs that have been read; raises CorruptBundle, CudaError."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        assert self._code is not None
        return self._code, self._decoded

    def close(self) -> None:
        """Unload the code."""
        self._thread.join()
        if self._code is not None:
            self._code.close()

    def _run(self) -> None:
        try:
            driver = self._opening.wait_context()
            self._code = Code(driver, self._files)
            key = Ladder(map(GraphKey.parse, self._record["restore"]["ladder"].split(","))).keys[0]
            graph = self._files.graph_of(key.tokens, key.rows)
            self._code.kernels(graph.nodes["function"][graph.nodes["kind"] == KERNEL])
            self._decoded[key] = graph
        except (CorruptBundle, CudaError, NotRestored) as e:
            self._failure = e
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            self._failure = CorruptBundle(f"what to restore is malformed: {e!r}; {REMEDY}")
