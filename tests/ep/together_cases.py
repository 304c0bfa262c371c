"""What all ranks do together: drain, pause, new weights. Each function is one rank of one case.

Run by `barriers.spawn.run_ranks`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from barriers.config import GroupConfig
from barriers.errors import RankError
from runtime import OutOfPages, Runtime, SamplingParams, StepOutput

DEADLINE_S = 4.0
VOCAB = 64
Texts = dict[int, list[int]]


def load(config: GroupConfig, model: str, **options: Any) -> Runtime:
    """This rank's runtime of two rows, over torchrun's environment."""
    names = {"RANK": config.rank, "LOCAL_RANK": config.rank, "WORLD_SIZE": config.world}
    names |= {"LOCAL_WORLD_SIZE": config.world, "MASTER_PORT": config.name}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    if options.get("device", "cpu") == "cpu":
        import torch

        torch.set_num_threads(1)
    defaults: dict[str, Any] = {
        "bs": 2 * config.world,
        "max_seq_len": 96,
        "page_size": 16,
        "ladder": "2+10",  # one key: the twin's bits hold within a key
        "store": str(Path(model) / "store"),
        "verify": False,
        "device": "cpu",
        "deadline_s": DEADLINE_S,
    }
    return Runtime.load(model, **(defaults | options))


def one_by_one(config: GroupConfig, wanted: list[tuple[str, tuple[Any, ...]]]) -> list[Any]:
    """Several cases in one process, each with a runtime of its own: a process takes long to start.

    Args:
        wanted: names of functions here, and their arguments.
    """
    return [globals()[name](config, *args) for name, args in wanted]


def prompt(seed: int, n: int = 12) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, n).tolist()


def params(most: int) -> SamplingParams:
    return SamplingParams(max_tokens=most, ignore_eos=True)


def take(outputs: list[StepOutput], texts: Texts) -> None:
    for out in outputs:
        for request, token in zip(out.requests.tolist(), out.tokens.tolist(), strict=True):
            texts[request].append(token)


def digest(runtime: Runtime) -> str:
    """Of all weights of this rank."""
    import torch

    whole = hashlib.sha256()
    for _, tensor in sorted(runtime.engine.graphs.step.weights.items()):
        whole.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return whole.hexdigest()


def drained(config: GroupConfig, model: str, in_flight: int, waiting: bool) -> dict[str, Any]:
    """Ranks with much, little and nothing to do drain, and serve on."""
    texts: Texts = defaultdict(list)
    with load(config, model) as rt:
        lengths = ([30, 3, 5], [2], [])[config.rank % 3]  # three on two rows: one waits
        for i, most in enumerate(lengths):
            rt.submit(prompt(10 * config.rank + i), params(most))
        take([rt.step(), rt.step()], texts)
        for _ in range(in_flight):
            rt.launch()
        take(rt.drain(waiting=waiting), texts)
        left, steps = rt.num_running, rt.stats().steps
        rt.submit(prompt(99), params(4))
        take(rt.drain(waiting=True), texts)
        ended = rt.stats().steps
        take(rt.drain(), texts)  # nothing to do anywhere
        assert rt.stats().steps == ended
        assert (rt.num_running, rt.num_in_flight) == (0, 0)
    return {"texts": dict(texts), "left": left, "steps": steps, "ended": ended}


def out_of_pages(config: GroupConfig, model: str) -> dict[str, Any]:
    """A rank whose rows cannot all go on makes room and drains on; the other hears nothing."""
    texts: Texts = defaultdict(list)
    refused = 0
    with load(config, model, reservation="lazy", num_pages=6) as rt:
        if config.rank == 1:
            rows = [rt.add(prompt(1), params(40)), rt.add(prompt(2), params(40))]
        while True:
            try:
                take(rt.drain(), texts)
                break
            except OutOfPages:
                refused += 1
                rt.cancel(rows[0])
        return {"texts": dict(texts), "refused": refused, "steps": rt.stats().steps}


def paused(config: GroupConfig, model: str) -> dict[str, Any]:
    """A rank that comes back from a pause late is waited for longer than a step would be."""
    texts: Texts = defaultdict(list)
    with load(config, model, deadline_s=1.5) as rt:
        rt.submit(prompt(config.rank), params(6))
        take([rt.step()], texts)
        rt.pause()
        rt.pause()
        try:
            rt.drain()
        except RuntimeError as e:
            refusal = str(e)
        time.sleep(2.5 * config.rank)
        rt.resume()
        take(rt.drain(), texts)
    return {"texts": dict(texts), "refusal": refusal}


def apart(config: GroupConfig, model: str, call: str) -> dict[str, Any]:
    """The ranks make the call a step apart."""
    with load(config, model) as rt:
        rt.step()
        began = time.monotonic()
        try:
            if config.rank == 1:
                rt.launch()
            getattr(rt, call)()
        except RankError as e:
            took = time.monotonic() - began
            return {"error": str(e), "type": type(e).__name__, "ranks": e.ranks, "s": took}
    return {"error": "", "type": "", "ranks": (), "s": 0.0}


def updated(
    config: GroupConfig, old: str, new: str, spoil: str, running: str = "refuse"
) -> dict[str, Any]:
    """New weights, with something wrong on rank 1 alone; then the right ones, then a request."""
    from tests.cpu.checkpoints import read_tensors

    texts: Texts = defaultdict(list)
    error = kind = ""
    with load(config, old) as rt:
        before = digest(rt)
        tensors = read_tensors(Path(new))
        bad = dict(tensors)
        options = {"running": running}
        if config.rank == 1:
            _spoil(spoil, bad, rt, options)
        try:
            rt.update_weights(new if spoil == "directory" else bad.items(), **options)
        except RankError as e:
            error, kind = str(e), type(e).__name__
        changed = digest(rt) != before
        if error:
            rt.drain(waiting=True)
            rt.update_weights(_mine(tensors, config))
        rt.submit(prompt(7), params(8))
        take(rt.drain(waiting=True), texts)
        after = digest(rt)
    answer = list(texts.values())
    return {"error": error, "kind": kind, "changed": changed, "after": after, "texts": answer}


def _mine(tensors: dict[str, Any], config: GroupConfig) -> list[tuple[str, Any]]:
    """Without the experts of other ranks: a trainer's shard."""
    experts = [f".experts.{e}." for e in range(4) if e % 4 // 2 != config.rank]
    return [(n, t) for n, t in tensors.items() if not any(e in n for e in experts)]


def _spoil(how: str, tensors: dict[str, Any], rt: Runtime, options: dict[str, str]) -> None:
    name = "model.norm.weight"
    if how == "value":
        tensors[name] = tensors[name].clone()
        tensors[name][3] = float("nan")
    elif how == "shape":
        tensors[name] = tensors[name][1:]
    elif how == "other":
        tensors[name] = tensors[name] * 2
    elif how == "expert":  # one that only this rank holds
        last = next(n for n in tensors if ".experts.3." in n)
        tensors[last] = tensors[last] * float("inf")
    elif how == "running":
        rt.add(prompt(3), params(5))
    elif how == "argument":
        options["running"] = "restart"
    elif how == "none":
        tensors.clear()
    else:
        assert how in ("nothing", "directory"), how


def fresh(config: GroupConfig, model: str) -> dict[str, Any]:
    """What a runtime that was loaded with the new weights gives."""
    texts: Texts = defaultdict(list)
    with load(config, model) as rt:
        rt.submit(prompt(7), params(8))
        take(rt.drain(waiting=True), texts)
        return {"after": digest(rt), "texts": list(texts.values())}
