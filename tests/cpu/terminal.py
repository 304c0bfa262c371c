"""A terminal for tests of commands: it runs them as a shell would, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import runtime
from runtime.cli import run

ROOT = Path(runtime.__file__).parent.parent
Main = Callable[[list[str] | None], int]


class Terminal:
    """Runs commands as a shell would, in this process: code, what they print, JSON at its end."""

    def __init__(self, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.store, self._capsys = store, capsys
        self.out = self.err = ""

    def run(self, main: Main, *argv: str) -> int:
        with pytest.raises(SystemExit) as end:
            run(main, [*argv, "--store", str(self.store)])
        self.out, self.err = self._capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code

    @property
    def error(self) -> str:
        """The last line of stderr; above it may be lines of progress."""
        return self.err.splitlines()[-1]

    @property
    def report(self) -> dict[str, Any]:
        assert self.out.endswith("}\n"), "JSON is not the last line"
        report = json.loads(self.out.splitlines()[-1])
        assert isinstance(report, dict)
        return report


def small(checkpoint: Path, *more: str) -> list[str]:
    """Two rows of at most 64 tokens."""
    return [
        *("--model", str(checkpoint), "--device", "cpu", "--bs", "2", "--ladder", "1,2,2+14"),
        *("--max-seq-len", "64", "--page-size", "16", *more),
    ]
