"""KeyboardInterrupts at chosen points of Python code, at each where CPython may deliver a signal.

Signals are looked at where a function begins, a loop begins again or a call of C code has ended: at
no other instruction. Before 3.12 a call with `*args` looks there whatever it called. So a point is
counted there alone, and an interrupt at the n-th is one that a Ctrl-C could have been.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_CALLS = {n for name, n in dis.opmap.items() if name in ("CALL", "CALL_KW", "CALL_FUNCTION_EX")}
_STARRED = {dis.opmap["CALL_FUNCTION_EX"]} if sys.version_info < (3, 12) else set[int]()
_LOOPS = {n for name, n in dis.opmap.items() if "JUMP_BACKWARD" in name}


class Interrupt:
    """Counts points in the code of some folders, and raises at one of them.

    Args:
        at: the point to raise at, from 1; 0: none.

    Attributes:
        points: counted so far; where: function and line of the interrupt.
    """

    def __init__(self, at: int, *folders: Path) -> None:
        self._at, self._folders = at, tuple(str(folder) for folder in folders)
        self.points, self.where = 0, ""
        self._last: dict[FrameType, int] = {}  # opcode that a frame has just done
        self._calls = 0  # of Python functions so far
        self._before: dict[FrameType, int] = {}  # and as many at that opcode

    @contextmanager
    def armed(self) -> Iterator[None]:
        old = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(old)

    def _enter(self, frame: FrameType, event: str, _: Any) -> Any:
        self._calls += 1
        if not frame.f_code.co_filename.startswith(self._folders):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self._point(frame)
        return self._inside

    def _inside(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "return":
            self._last.pop(frame, None)
        elif event == "opcode":
            last = self._last.get(frame)
            was_c = self._before.get(frame) == self._calls
            self._last[frame] = frame.f_code.co_code[frame.f_lasti]
            self._before[frame] = self._calls
            if last in _LOOPS or last in _STARRED or (last in _CALLS and was_c):
                self._point(frame)
        return self._inside

    def _point(self, frame: FrameType) -> None:
        self.points += 1
        if self.points == self._at:
            self.where = f"{frame.f_code.co_qualname} line {frame.f_lineno}"
            raise KeyboardInterrupt
