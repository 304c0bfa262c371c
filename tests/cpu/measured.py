"""What tests of the choice of kernels share: calls of a step, and of one product."""

from __future__ import annotations

import functools
from typing import Any

import torch

from graphs.calls import Call
from graphs.devices import bind_views
from graphs.weights import add_part_views
from runtime.config import RuntimeConfig
from runtime.selection import choose
from runtime.tuning import record_calls

OPTIONS: dict[str, Any] = {
    "model": "deepseek-v3",
    "layers": 5,
    "overrides": ("n_routed_experts=32",),
    "bs": 32,
    "ladder": "1,8,32,8+64",
    "device": "cpu",
    "num_pages": 3,
}


@functools.cache
def recorded_calls() -> dict[tuple[str, int], list[Call]]:
    """Calls of one step by (site, tokens), over tensors without storage."""
    selection = choose(RuntimeConfig.of(**OPTIONS), compile_only=True)
    views = bind_views(None, selection.layout, torch.device("meta"))
    add_part_views(views)
    return {key: list(calls) for key, calls in record_calls(selection, views).items()}


def linear_call(tokens: int, dtype: torch.dtype = torch.bfloat16) -> Call:
    x, w = torch.zeros(tokens, 256, dtype=dtype), torch.zeros(96, 256, dtype=dtype)
    return Call("linear", (x, w), {"out": torch.zeros(tokens, 96, dtype=dtype), "workspace": None})
