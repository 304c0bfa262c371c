"""Disks that fail and processes that die in the midst of a write, for tests of what they leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from capture_cache.files import Files


class Killed(BaseException):
    """The process is gone; nothing after it may run."""


class FailingFiles(Files):
    """Performs `left` operations, the half of the next one, and then calls `end` in its place.

    Args:
        end: ends the process, or raises.
        once: whatever follows is performed again; else every operation calls `end` from then on.
        removes: a removal is an operation, too.
    """

    def __init__(
        self, left: int, end: Callable[[], None], *, once: bool = False, removes: bool = True
    ) -> None:
        self.left, self.end = left, end
        self._once, self._removes = once, removes

    def _step(self, half: Callable[[], object] = lambda: None) -> None:
        if self.left == 0:
            half()
        self.left -= 1
        if self.left == -1 or (self.left < 0 and not self._once):
            self.end()

    def make_dir(self, path: Path) -> None:
        self._step()
        super().make_dir(path)

    def write(self, path: Path, data: bytes) -> None:
        self._step(lambda: path.write_bytes(data[: len(data) // 2]))
        super().write(path, data)

    def allocate(self, path: Path, nbytes: int) -> None:
        self._step(lambda: Files.allocate(self, path, nbytes // 2))
        super().allocate(path, nbytes)

    def sync_file(self, path: Path) -> None:
        self._step()
        super().sync_file(path)

    def sync_dir(self, path: Path) -> None:
        self._step()
        super().sync_dir(path)

    def rename(self, old: Path, new: Path) -> None:
        self._step()
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        if self._removes:
            self._step()
        super().remove(path)


def dying(left: int) -> FailingFiles:
    """Nothing is done after `left` operations and a half."""

    def die() -> None:
        raise Killed

    return FailingFiles(left, die)
