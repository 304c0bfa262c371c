"""What a choice of attention is timed by: attention and W_UV, launched as a step does.

Where a token's splits are merged, and whether a kernel of its own does it, depends on how many
there are; so a cut is not the fastest because its attention is. Every call has its own KV and its
own W_UV, and no cache holds them together: in a step a layer reads both for the first time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from graphs.attention import ATTENTION, attend
from graphs.attention_choice import AttentionCut
from graphs.buffers import attention_scratch
from graphs.calls import Call
from graphs.model_config import ModelConfig
from graphs.ops import Ops
from graphs.step_config import StepConfig
from graphs.timing import Timer

TIMED = ("attention", "W_UV")  # of a layer; records of measurements name it


class LayerTimes:
    """Times choices of attention: (choice, rows, context) → microseconds of a layer.

    Args:
        ops: launch, or list what is launched.
        step: its backend and cut are replaced by those of a choice.
        timer: gets the same work over different KV and weights.
        cache_bytes: of the device's last cache.
    """

    def __init__(
        self,
        ops: Ops,
        model: ModelConfig,
        step: StepConfig,
        timer: Timer,
        *,
        device: torch.device,
        cache_bytes: int,
    ) -> None:
        self._ops, self._model, self._step, self._timer = ops, model, step, timer
        self._device, self._cache_bytes = device, cache_bytes

    def __call__(self, choice: AttentionCut, rows: int, context: int) -> float:
        model, step = self._model, self._step
        copies = copies_for(model, rows, context, self._cache_bytes)
        calls = example(model, step, rows, context, self._device, copies)
        return self._timer(bind_layers(choice, self._ops, model, step, calls)).us


def bind_layers(
    choice: AttentionCut, ops: Ops, model: ModelConfig, step: StepConfig, calls: Sequence[Call]
) -> list[Callable[[], None]]:
    """A layer's `attend` by this choice for each call of `example`, with a W_UV of its own.

    Plans are made here. Scratch is the same for all, as it is for the layers of a step.
    """
    step = dataclasses.replace(step, attention=choice.backend, cut=choice.cut)
    attention = ATTENTION[choice.backend](model, step, ops)
    q = calls[0].args[0]
    scratch = {
        e.name: torch.empty(e.shape, dtype=getattr(torch, e.dtype), device=q.device)
        for e in attention_scratch(model, step, q.shape[0])
    }
    layers: list[Callable[[], None]] = []
    for call in calls:
        _, cache, page_table, tok_row, kv_len = call.args
        b = {**scratch, "q_latent": q, "page_table": page_table}
        b |= {"tok_row": tok_row, "kv_len": kv_len}
        if "mla_plan" in b:
            b["mla_plan"] = torch.empty_like(b["mla_plan"])
        attention.plan(b)
        w_uv = torch.empty(_w_uv_shape(model), dtype=q.dtype, device=q.device).normal_()
        layers.append(partial(attend, attention, ops, b, cache, w_uv))
    return layers


def example(
    model: ModelConfig, step: StepConfig, rows: int, context: int, device: torch.device, copies: int
) -> list[Call]:
    """Recorded-like calls of `mla_decode`: so many times other pages of one random cache."""
    dtype = getattr(torch, model.act_dtype)
    heads, dc, width = model.num_heads, model.kv_lora_rank, model.latent_dim
    used = -(-context // step.page_size)
    num_pages = rows * copies * used + 1
    cache = torch.empty((num_pages * step.page_size, width), dtype=dtype, device=device)
    q = torch.empty((rows, heads, width), dtype=dtype, device=device)
    table = torch.zeros((rows * copies, step.max_pages), dtype=torch.int32, device=device)
    if device.type != "meta":
        cache.normal_()
        q.normal_()
        pages = torch.arange(1, num_pages, dtype=torch.int32, device=device)
        table[:, :used] = pages.view(rows * copies, used)
    calls = []
    for i in range(copies):
        row = torch.arange(i * rows, (i + 1) * rows, dtype=torch.int32, device=device)
        args = (q, cache, table, row, torch.full_like(row, context))
        kwargs = {
            "page_size": step.page_size,
            "softmax_scale": model.softmax_scale,
            "cut": step.cut,
            "out": torch.empty((rows, heads, dc), dtype=dtype, device=device),
            "part_o": None,
            "part_lse": None,
        }
        calls.append(Call("mla_decode", args, kwargs))
    return calls


def copies_for(model: ModelConfig, rows: int, context: int, cache_bytes: int) -> int:
    """Copies of KV and W_UV that no cache holds together."""
    itemsize = torch.empty((), dtype=getattr(torch, model.act_dtype)).element_size()
    elements = rows * context * model.latent_dim + math.prod(_w_uv_shape(model))
    return max(1, min(32, math.ceil(2 * cache_bytes / (elements * itemsize))))


def _w_uv_shape(model: ModelConfig) -> tuple[int, int, int]:
    return model.num_heads, model.v_head_dim, model.kv_lora_rank
