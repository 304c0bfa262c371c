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
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from barriers.config import GroupConfig
from barriers.group import RankGroup
from runtime.config import RuntimeConfig, child_environment

LIMIT_S = 1800.0  # of one process; a cold capture compiles everything
CHILD = (sys.executable, "-m", "runtime.restore_child")


class RunFailed(RuntimeError):
    """A process failed; holds the end of what it said."""


class Runs:
    """Starts processes, on all ranks alike.

    Args:
        ranks: this process among those that torchrun started.
        child: the program; gets options as JSON, nanoseconds of its start, and the GPU to open at
            once or "none".
        limit_s: of one process; it is ended then, which the other ranks hear of.
        own_gpu: a process sees no GPU but its own.
    """

    def __init__(
        self,
        ranks: GroupConfig,
        child: Sequence[str] = CHILD,
        *,
        limit_s: float = LIMIT_S,
        own_gpu: bool = False,
    ) -> None:
        self.ranks, self._child, self._limit_s = ranks, tuple(child), limit_s
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
        self._count += 1
        self._meet("start")
        failure, found = None, dict[str, Any]()
        try:
            found = self._one(options)
        except RunFailed as e:
            failure = e
        if self._group is None:
            if failure is not None:
                raise failure
            return _together([found])
        (self._folder / f"{self._count}-{self.ranks.rank}").write_text(json.dumps(found))
        self._group.agree("run", None if failure is None else str(failure)[-500:], LIMIT_S)
        texts = [
            (self._folder / f"{self._count}-{rank}").read_text() for rank in range(self.ranks.world)
        ]
        self._meet("read")
        return _together([json.loads(text) for text in texts])

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

    def _one(self, options: RuntimeConfig) -> dict[str, Any]:
        chosen = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
        ordinal = 0 if self._own_gpu else options.local_rank
        opening = str(ordinal) if options.bundle else "none"
        env = child_environment(f"restore-bench-{self._count}", own_gpu=self._own_gpu)
        start_ns = time.time_ns()
        try:
            done = subprocess.run(
                [*self._child, json.dumps(chosen), str(start_ns), opening],
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
    first_ns = min(part["start_ns"] for part in parts)
    for part in parts:
        late_ms = (part.pop("start_ns") - first_ns) / 1e6
        part["started_after_ms"] = late_ms
        for name in ("first_step_ms", "all_keys_ms"):
            part[name] += late_ms
    slowest = max(parts, key=lambda part: float(part["first_step_ms"]))
    keys = {k: max(part["key_ms"].get(k, 0.0) for part in parts) for k in slowest["key_ms"]}
    whole = {
        **{k: v for k, v in slowest.items() if k != "started_after_ms"},
        "all_keys_ms": max(part["all_keys_ms"] for part in parts),
        "key_ms": keys,
        "torch": any(part["torch"] for part in parts),
    }
    return whole if len(parts) == 1 else {**whole, "ranks": list(parts)}
