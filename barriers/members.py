"""The processes behind the ranks, and what others can see of them: running, stopped, ended."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

GONE = ("has ended", "is stopped")  # states in which a process comes to no meeting


@dataclass(frozen=True)
class Member:
    """A rank's process: enough to tell later whether it still runs."""

    rank: int
    pid: int
    started: int  # clock ticks since boot; tells a reused pid apart
    pid_namespace: str

    @classmethod
    def current(cls, rank: int) -> Member:
        pid = os.getpid()
        stat = _process_stat(pid)
        return cls(rank, pid, stat[1] if stat else 0, _pid_namespace())

    def state(self) -> str:
        """ "runs", "is stopped", "has ended", or "" if it cannot be seen from here."""
        if self.pid_namespace != _pid_namespace() or not self.started:
            return ""
        stat = _process_stat(self.pid)
        if stat is None or stat[1] != self.started or stat[0] in "ZX":
            return "has ended"
        return "is stopped" if stat[0] in "Tt" else "runs"


def _process_stat(pid: int) -> tuple[str, int] | None:
    """(state letter, start time in ticks) of a process, or None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    rest = text[text.rindex(")") + 2 :].split()  # the name before may hold anything
    return rest[0], int(rest[19])


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
