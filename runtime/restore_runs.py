"""Fresh processes of `runtime.restore_bench`, one a rank, each timed from its own start.

Every rank's benchmark process starts one child for each run. The children are a world of their own:
they meet under another name than the processes that start them, and never wait for those.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from barriers.config import GroupConfig
from barriers.group import RankGroup
from runtime import bare_driver
from runtime.config import RuntimeConfig, child_environment
from runtime.opening import CONNECTIONS, CONNECTIONS_VARIABLE

LIMIT_S = 1800.0  # of one process; a cold capture compiles everything
CHILD = (sys.executable, "-m", "runtime.restore_child")
BARE = (sys.executable, "-P", bare_driver.__file__)  # a script: it imports nothing of ours


class RunFailed(RuntimeError):
    """A process failed; holds the end of what it said."""


class Runs:
    """Starts processes, on all ranks alike.

    Args:
        ranks: this process among those that torchrun started.
        child: the program; gets options as JSON, nanoseconds of its start, and the GPU to open at
            once or "none".
        bare: the program that only opens the driver; gets nanoseconds of its start, and the GPU.
        limit_s: of one process; it is ended then, which the other ranks hear of.
        own_gpu: a process sees no GPU but its own.
    """

    def __init__(
        self,
        ranks: GroupConfig,
        child: Sequence[str] = CHILD,
        *,
        bare: Sequence[str] = BARE,
        limit_s: float = LIMIT_S,
        own_gpu: bool = False,
    ) -> None:
        self.ranks, self._limit_s = ranks, limit_s
        self._child, self._bare = tuple(child), tuple(bare)
        self._own_gpu = own_gpu
        self._open = ExitStack()
        self._group: RankGroup | None = None
        self._count = 0
        folder = ""
        if ranks.rank == 0:
            made = tempfile.TemporaryDirectory(prefix="lockstep-runs-")
            folder = self._open.enter_context(made)
        if ranks.world > 1:
            self._group = self._open.enter_context(RankGroup(ranks, {"run": "restore_bench"}))
            folder = self._group.allgather("results", folder)[0].value
        self._folder = Path(folder)

    def process(self, options: RuntimeConfig) -> dict[str, Any]:
        """One process a rank that loads with `options` and makes a step; of all ranks together.

        Times run from the start of the first process to where the last rank is done; stages are
        those of the slowest rank, and "ranks" has every rank's own.

        Raises:
            RunFailed: it failed on this rank.
            RankError: it failed on another rank, which is named.
        """
        chosen = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
        opening = str(self._ordinal(options)) if options.bundle else "none"

        def command(start_ns: int) -> list[str]:
            return [*self._child, json.dumps(chosen), str(start_ns), opening]

        return _together(self._all_ranks(command))

    def bare_driver(self, options: RuntimeConfig) -> dict[str, Any]:
        """What the driver alone takes, of all ranks together: the floor under `process`.

        With the GPUs visible and the connections that a restoring process has. Spans are those of
        the rank that was done last. Raises as `process`.
        """
        ordinal = str(self._ordinal(options))

        def command(start_ns: int) -> list[str]:
            return [*self._bare, str(start_ns), ordinal]

        parts = self._all_ranks(command, {CONNECTIONS_VARIABLE: str(CONNECTIONS)})
        _from_the_first(parts, ("ready_ms",))
        slowest = max(parts, key=lambda part: float(part["ready_ms"]))
        whole = {k: v for k, v in slowest.items() if k != "started_after_ms"}
        return whole if len(parts) == 1 else {**whole, "ranks": parts}

    def empty_store(self) -> Path:
        """A directory that all ranks agree on, with nothing in it."""
        self._count += 1
        path = self._folder / f"store-{self._count}"
        path.mkdir(mode=0o755, exist_ok=True)
        self._meet("empty store")
        return path

    def close(self) -> None:
        """Leave the ranks and remove what was written. Idempotent."""
        self._open.close()

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *failure: object) -> None:
        try:
            if failure[0] is None:
                self._meet("done")  # nobody still uses what rank 0 removes
        finally:
            self.close()

    def _meet(self, what: str) -> None:
        if self._group is not None:
            self._group.barrier(what, timeout_s=LIMIT_S)

    def _ordinal(self, options: RuntimeConfig) -> int:
        return 0 if self._own_gpu else options.local_rank

    def _all_ranks(
        self, command: Callable[[int], list[str]], defaults: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """What every rank's process reported, by rank.

        Args:
            command: of a process, from nanoseconds of its start.
            defaults: of its environment.
        """
        self._count += 1
        self._meet("start")
        failure, found = None, dict[str, Any]()
        try:
            found = self._one(command, defaults or {})
        except RunFailed as e:
            failure = e
        if self._group is None:
            if failure is not None:
                raise failure
            return [found]
        (self._folder / f"{self._count}-{self.ranks.rank}").write_text(json.dumps(found))
        self._group.agree("run", None if failure is None else str(failure)[-500:], LIMIT_S)
        texts = [
            (self._folder / f"{self._count}-{rank}").read_text() for rank in range(self.ranks.world)
        ]
        self._meet("read")
        return [json.loads(text) for text in texts]

    def _one(
        self, command: Callable[[int], list[str]], defaults: Mapping[str, str]
    ) -> dict[str, Any]:
        run = f"restore-bench-{self._count}"
        env = {**defaults, **child_environment(run, own_gpu=self._own_gpu)}
        start_ns = time.time_ns()
        try:
            done = subprocess.run(
                command(start_ns),
                capture_output=True,
                text=True,
                timeout=self._limit_s,
                check=False,
                env=env,
            )
        except subprocess.TimeoutExpired as e:
            said = (e.stderr or b"").decode(errors="replace")[-2000:]
            raise RunFailed(f"a process took more than {self._limit_s:g} s: {said}") from e
        for line in done.stdout.splitlines():
            if line.startswith("RESULT ") and done.returncode == 0:
                result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                return result | {"start_ns": start_ns}
        raise RunFailed(f"a process ended with {done.returncode}: {done.stderr[-2000:]}")


def _together(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One run from what each rank reported."""
    _from_the_first(parts, ("first_step_ms", "all_keys_ms"))
    slowest = max(parts, key=lambda part: float(part["first_step_ms"]))
    keys = {k: max(part["key_ms"].get(k, 0.0) for part in parts) for k in slowest["key_ms"]}
    whole = {
        **{k: v for k, v in slowest.items() if k != "started_after_ms"},
        "all_keys_ms": max(part["all_keys_ms"] for part in parts),
        "key_ms": keys,
        "torch": any(part["torch"] for part in parts),
    }
    return whole if len(parts) == 1 else {**whole, "ranks": list(parts)}


def _from_the_first(parts: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Have these times run from the start of the first process."""
    first_ns = min(part["start_ns"] for part in parts)
    for part in parts:
        late_ms = (part.pop("start_ns") - first_ns) / 1e6
        part["started_after_ms"] = late_ms
        for name in names:
            part[name] += late_ms
