"""Ranks as processes that we start ourselves, for one node without `torchrun`."""

from __future__ import annotations

import contextlib
import multiprocessing
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from barriers.config import GroupConfig

_EXIT_S = 10.0  # from a rank's last word to the end of its process


@dataclass(frozen=True)
class Outcome:
    """How one rank ended: with a value, with an exception, or (both None) without a word.

    Attributes:
        seconds: from the start of all ranks to its word, or to its end.
        exit_code: of its process; negative for a signal; None if it had to be killed here.
    """

    value: Any
    error: Exception | None
    exit_code: int | None
    seconds: float


def run_ranks(
    world: int,
    target: Callable[..., Any],
    *args: Any,
    timeout_s: float = 60.0,
    linger_s: float = 15.0,
    name: str | None = None,
) -> list[Outcome]:
    """Run `target(config, *args)` on every rank and wait for all of them.

    Args:
        target: a module-level function; its first argument is the rank's `GroupConfig`.
        timeout_s: for everything; ranks that are not done by then are killed.
        linger_s: once a rank has failed, how long the others may go on: more than their deadlines.
        name: of their meeting point; by default one that no other run has.

    Returns:
        One outcome a rank, by rank. No process outlives this call.
    """
    # A fresh interpreter each: a forked one would share a CUDA context that it cannot use.
    context = multiprocessing.get_context("spawn")
    where = name or secrets.token_hex(8)
    began = time.monotonic()
    processes: list[SpawnProcess] = []
    ends: list[Connection] = []
    try:
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            config = GroupConfig(rank, world, where, timeout_s)
            process = context.Process(
                target=_child, args=(theirs, config, target, args), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(ours)
        words, seconds = _listen(ends, began, timeout_s, linger_s)
        for rank in seconds:  # those that said something are about to end
            processes[rank].join(_EXIT_S)
        codes = [p.exitcode for p in processes]
        return [
            Outcome(*words.get(rank, (None, None)), codes[rank], seconds.get(rank, timeout_s))
            for rank in range(world)
        ]
    finally:
        for process in processes:
            process.kill()  # also one that is stopped
            process.join()
        for end in ends:
            end.close()


def _child(
    end: Connection, config: GroupConfig, target: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    try:
        word: tuple[Any, Exception | None] = (target(config, *args), None)
    except Exception as e:  # told to the parent, which knows what to do with it
        word = (None, e)
    end.send(word)
    end.close()


def _listen(
    ends: list[Connection], began: float, timeout_s: float, linger_s: float
) -> tuple[dict[int, tuple[Any, Exception | None]], dict[int, float]]:
    """Take every rank's word, or notice that it ended without one."""
    words: dict[int, tuple[Any, Exception | None]] = {}
    seconds: dict[int, float] = {}
    open_ends = {end: rank for rank, end in enumerate(ends)}
    deadline = began + timeout_s
    while open_ends:
        ready = wait(list(open_ends), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for end in ready:
            assert isinstance(end, Connection)
            rank = open_ends.pop(end)
            seconds[rank] = time.monotonic() - began
            with contextlib.suppress(EOFError):  # it ended without a word, or with half of one
                words[rank] = end.recv()
            if rank not in words or words[rank][1] is not None:
                deadline = min(deadline, time.monotonic() + linger_s)
    return words, seconds
