"""The files of a loaded bundle as what they hold."""

from __future__ import annotations

from collections.abc import Mapping

from capture_cache.bundle import (
    PROGRAM_FILE,
    Golden,
    Graph,
    Program,
    golden_file,
    graph_file,
)
from capture_cache.bundle_golden import decode_golden
from capture_cache.bundle_graph import decode_graph
from capture_cache.bundle_program import decode_program
from capture_cache.errors import CorruptBundle
from capture_cache.files import REMEDY


class BundleFiles:
    """Reads a bundle's files, each when it is wanted.

    Args:
        contents: by name; every hash has been checked.
        shown: the bundle's directory, for messages.
    Raises:
        CorruptBundle: no program, or not one.
    """

    def __init__(self, contents: Mapping[str, bytes], shown: str) -> None:
        self._contents, self._shown = contents, shown
        self.program: Program = decode_program(self.read(PROGRAM_FILE), f"{shown}/{PROGRAM_FILE}")

    def read(self, name: str) -> bytes:
        """Raises CorruptBundle: there is no such file."""
        data = self._contents.get(name)
        if data is None:
            raise CorruptBundle(
                f"{self._shown}: expected a file {name}, got only "
                f"{', '.join(sorted(self._contents)) or 'none'}; {REMEDY}"
            )
        return data

    def has(self, name: str) -> bool:
        return name in self._contents

    def graph(self, name: str) -> Graph:
        return decode_graph(self.read(name), self.program, f"{self._shown}/{name}")

    def graph_of(self, tokens: int, rows: int) -> Graph:
        """One key's graph; raises CorruptBundle, also where it is another key's."""
        name = graph_file(tokens, rows)
        graph = self.graph(name)
        self._expect_key(name, (tokens, rows), (graph.tokens, graph.rows))
        return graph

    def golden_of(self, tokens: int, rows: int) -> Golden:
        """One key's golden step; raises CorruptBundle, also where it is another key's."""
        name = golden_file(tokens, rows)
        golden = decode_golden(self.read(name), f"{self._shown}/{name}")
        self._expect_key(name, (tokens, rows), (golden.tokens, golden.rows))
        return golden

    def code(self, index: int) -> bytes:
        """A module's device code."""
        module = self.program.modules[index]
        data = self.read(module.file)
        if len(data) != module.nbytes:
            raise CorruptBundle(
                f"{self._shown}/{module.file}: expected {module.nbytes} bytes, got {len(data)}; "
                f"{REMEDY}"
            )
        return data

    def _expect_key(self, name: str, expected: tuple[int, int], got: tuple[int, int]) -> None:
        if expected != got:
            raise CorruptBundle(
                f"{self._shown}/{name}: expected (tokens, rows) {expected}, got {got}; {REMEDY}"
            )
