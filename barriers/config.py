"""Where a rank stands, and what all ranks of a run must have been started with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from barriers.errors import RankMismatch

MAX_RANKS = 32  # one lane of a warp each


@dataclass(frozen=True)
class GroupConfig:
    """Where this rank stands and where the ranks meet.

    Attributes:
        rank: of this process, 0 <= rank < world.
        world: processes, all on this node.
        name: of the meeting point; the same on all ranks of a run, and no other run's on this host.
        timeout_s: of every meeting.
    """

    rank: int
    world: int
    name: str
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not 1 <= self.world <= MAX_RANKS or not 0 <= self.rank < self.world:
            raise ValueError(
                f"expected 1 to {MAX_RANKS} ranks of one node and a rank among them, got rank "
                f"{self.rank} of {self.world}; start one process a GPU"
            )
        if not self.name or self.timeout_s <= 0:
            raise ValueError(
                f"expected a name and a positive time-out, got {self.name!r} and {self.timeout_s} s"
            )

    @classmethod
    def from_env(cls, env: Mapping[str, str], timeout_s: float = 60.0) -> GroupConfig:
        """What `torchrun` tells each process it starts; no variables at all mean one rank.

        Raises:
            ValueError: some of the variables are missing or no numbers.
            RankMismatch: the world spans more than one node.
        """
        if "RANK" not in env and "WORLD_SIZE" not in env:
            return cls(0, 1, f"single-{os.getpid()}", timeout_s)
        missing = [n for n in ("RANK", "WORLD_SIZE", "MASTER_PORT") if n not in env]
        if missing:
            raise ValueError(
                f"expected the environment of torchrun, got none of {', '.join(missing)}; "
                "start with torchrun --nproc-per-node N -m …"
            )
        try:
            rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
            local = int(env.get("LOCAL_WORLD_SIZE", world))
        except ValueError as e:
            raise ValueError(f"RANK, WORLD_SIZE and LOCAL_WORLD_SIZE must be numbers: {e}") from e
        if local != world:
            raise RankMismatch(
                f"expected all ranks on one node, got WORLD_SIZE {world} but LOCAL_WORLD_SIZE "
                f"{local}; start one world a node (torchrun --standalone --nproc-per-node N)"
            )
        parts = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        return cls(rank, world, "/".join(env.get(p, "") for p in parts), timeout_s)


def all_fields(fields: Mapping[str, str] | None) -> dict[str, str]:
    """The caller's fields and those that every world must agree on."""
    import socket  # a run of one rank does not need it

    boot = Path("/proc/sys/kernel/random/boot_id")
    host = (
        f"{socket.gethostname()} (boot {boot.read_text().strip() if boot.exists() else 'unknown'})"
    )
    return {"host": host, **(fields or {})}


def compare_fields(fields: Sequence[Mapping[str, str]]) -> None:
    """Raises RankMismatch naming the first field in which a rank differs from rank 0."""
    for rank, theirs in enumerate(fields):
        for name in (*fields[0], *theirs):
            here, there = fields[0].get(name, "nothing"), theirs.get(name, "nothing")
            if here != there:
                remedy = (
                    "start all ranks on one node" if name == "host" else "start all ranks alike"
                )
                raise RankMismatch(
                    f"ranks disagree on {name}: rank 0 has {here}, rank {rank} has {there}; "
                    f"{remedy}",
                    (rank,),
                )
