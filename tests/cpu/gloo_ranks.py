"""Ranks of a torch process group on the CPU, as processes that need not import torch each."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

# What the ranks' own modules import and takes seconds; nothing of it starts a thread.
PRELOADED = ["torch.distributed", "graphs.ops", "barriers.allgather"]


def run_gloo_ranks(world: int, target: Callable[..., None], *args: Any) -> None:
    """Run `target(rank, *args)` in a process each; raises what the first of them raised.

    Args:
        target: a module-level function.
    """
    # Forked from a process that has done no more than import: as clean as a fresh interpreter.
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(
        target, args, nprocs=world, join=True, start_method="forkserver"
    )
