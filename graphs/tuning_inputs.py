"""Inputs to measure a recorded call with: any number of tokens, the weights that it was met with.

Contents are random, for a chip is faster on zeros; experts get equal shares of the tokens, the
shared one, where it joins them, all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphs.calls import Call
from graphs.candidates import Candidate

Changes = dict[int | str, torch.Tensor | None]
MAX_ROTATED = 16


def with_tokens(
    call: Call,
    count: int,
    device: torch.device,
    *,
    workspace_elems: int,
    world: int = 1,
    shared_joins: bool = False,
) -> Changes:
    """What to replace in `call` so that it works on `count` rows of activations of its own.

    Args:
        workspace_elems: float32 elements for partial sums.
        world: ranks; of the rows that arrive from all of them each rank has its share of experts.
        shared_joins: the last expert gets every token.
    """
    new: Changes = {0: _like_rows(call.args[0], count, device)}
    new["out"] = _like_rows(call.kwargs["out"], count, device)
    if call.op == "router":
        return new
    if call.op in ("linear", "linear_fp8"):
        if call.op == "linear_fp8":
            new[1] = _ones_like_rows(call.args[1], count, device)
        new["workspace"] = torch.empty(max(1, workspace_elems), device=device)
        return new
    experts = call.args[2].shape[0]
    top_k: int = call.kwargs["top_k"]
    pairs = count * (top_k if call.op == "grouped_gate_up" else 1)
    new["out"] = _like_rows(call.kwargs["out"], pairs, device)
    if call.args[1] is not None:
        new[1] = _ones_like_rows(call.args[1], count, device)
    if call.kwargs.get("out_scale") is not None:
        new["out_scale"] = _ones_like_rows(call.kwargs["out_scale"], pairs, device)
    if call.kwargs.get("ready") is not None:
        # Whoever waits for it finds it long counted; what is counted besides does no harm.
        new["ready"] = torch.full((experts,), 1 << 20, dtype=torch.int32, device=device)
    offsets, listed = expert_lists(pairs, pairs // world, experts, top_k, shared_joins)
    new[4], new[5] = offsets.to(device), listed.to(device)
    return new


def expert_lists(
    pairs: int, live: int, experts: int, top_k: int, shared_joins: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 offsets [experts + 1] and pairs [pairs] of `live` pairs in equal shares.

    Args:
        top_k: choices of a token; the last is the shared expert, where that joins.
    """
    ids = torch.arange(pairs)
    routed = experts - 1 if shared_joins and experts > 1 else experts
    expert = ids % routed
    if routed < experts:
        expert[top_k - 1 :: top_k] = routed
    expert, ids = expert[:live], ids[:live]
    offsets = torch.zeros(experts + 1, dtype=torch.int32)
    offsets[1:] = torch.bincount(expert, minlength=experts).cumsum(0)
    listed = torch.zeros(pairs, dtype=torch.int32)
    listed[:live] = ids[expert.argsort(stable=True)].to(torch.int32)
    return offsets, listed


def rotated(calls: Sequence[Call], new: Changes, cache_bytes: int) -> list[Call]:
    """The calls of several layers over the same new inputs, until their weights pass the cache."""
    found: list[Call] = []
    total = 0
    for call in calls[:MAX_ROTATED]:
        found.append(call.replaced(dict(new)))
        total += call.args[1 if call.op in ("linear", "router") else 2].nbytes
        if total > 4 * cache_bytes:
            break
    return found


def on_meta(call: Call) -> Call:
    """The call over tensors without storage, to list its kernels."""
    return call.replaced(
        {
            key: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
            for key, t in call.tensors()
        }
    )


def outcome(call: Call, candidate: Candidate) -> torch.Tensor:
    """A copy of the rows of `out` that the call has written, as bytes."""
    out: torch.Tensor = call.kwargs["out"]
    if call.op in ("grouped_gate_up", "grouped_down"):
        live = call.args[5][: int(call.args[4][-1])].long()
        return out.view(torch.uint8)[live].clone()
    return out.contiguous().view(torch.uint8).clone()


def _like_rows(t: torch.Tensor, count: int, device: torch.device) -> torch.Tensor:
    """Random rows in the format and with the pitch of `t`."""
    if t.ndim == 3 and t.is_contiguous():
        # K splits that the reader adds up, [S, T, N].
        return torch.zeros((t.shape[0], count, t.shape[2]), dtype=t.dtype, device=device)
    shape = (count, *t.shape[1:])
    made = torch.empty_strided(shape, t.stride(), dtype=t.dtype, device=device)
    if device.type != "meta":
        # Seeded: plans that are measured at different times are compared bit for bit.
        generator = torch.Generator(device).manual_seed(count)
        made.copy_(torch.randn(shape, generator=generator, device=device))
    return made


def _ones_like_rows(t: torch.Tensor, count: int, device: torch.device) -> torch.Tensor:
    return torch.ones((count, *t.shape[1:]), dtype=t.dtype, device=device)
