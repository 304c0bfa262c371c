"""Sampling as a whole: the operations of one step in order, and the buffers they need.

Names of arguments are names of buffers, so each operation picks its own from one mapping. The raw
pass always runs; every other kernel returns at once for the rows that do not need it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch

from kernels.triton import draw, draw_choose, draw_filter, logits_process, sample, topn
from kernels.triton.launch import Launcher
from kernels.triton.logits_process import MAX_BIAS
from kernels.triton.sample import num_chunks
from kernels.triton.topn import MAX_TOP

Table = dict[str, tuple[tuple[int, ...], str]]


def row_tensors(max_rows: int, vocab: int) -> Table:
    """Shape and dtype of what a request brings, by request row, in device memory.

    Not here: `stop_ids` (the row state's own) and `token_mask`, int32 [max_rows, ceil(V / 32)],
    which may also lie in pinned host memory. `fresh`, `prompt_len` and `counts` are for
    `logits_counts.count_tokens`.
    """
    floats = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
    ints = ("top_k", "flags", "top_n", "bias_count", "min_len")
    counting = ("fresh", "prompt_len")
    return {
        **{name: ((max_rows,), "float32") for name in floats},
        **{name: ((max_rows,), "int32") for name in (*ints, *counting)},
        "seed": ((max_rows, 2), "int32"),
        "bias_ids": ((max_rows, MAX_BIAS), "int32"),
        "bias_values": ((max_rows, MAX_BIAS), "float32"),
        "counts": ((max_rows, vocab), "int32"),
    }


def scratch_tensors(rows: int, vocab: int) -> Table:
    """Shape and dtype of what sampling `rows` rows needs besides the buffers of plain greedy."""
    chunks = num_chunks(vocab)
    return {
        "forced": ((rows,), "int32"),
        "active": ((rows,), "int32"),
        "processed": ((rows, vocab), "float32"),
        "proc_max": ((rows, chunks), "float32"),
        "keep_value": ((rows,), "float32"),
        "keep_id": ((rows,), "int32"),
        "draw_score": ((rows, chunks), "float32"),
        "draw_arg": ((rows, chunks), "int32"),
        "draw_mass": ((rows, chunks), "float32"),
        "draw_norm": ((rows, draw_choose.NORM), "float32"),
        "top_part": ((rows, chunks, MAX_TOP), "int64"),
        "top_ids": ((rows, MAX_TOP), "int32"),
        "top_logprobs": ((rows, MAX_TOP), "float32"),
    }


def sample_step(launch: Launcher, buffers: Mapping[str, torch.Tensor]) -> None:
    """From the logits of a step's sampling rows to tokens, log-probs and top-n.

    Args:
        buffers: `logits`, `sample_tok`, `sample_row`, `tok_pos`, `stop_ids`, `token_mask`,
            `part_max`, `part_arg`, `part_sum`, `out_token`, `out_logprob`, all of `row_tensors` but
            `fresh`, all of `scratch_tensors`.
    Raises:
        KeyError: a buffer is missing.
        ValueError: a buffer of a wrong shape or dtype.
    Capture-safe.
    """
    operations: list[Callable[..., None]] = [
        sample.max_and_sum,
        logits_process.process_logits,
        draw_filter.filter_tokens,
        draw.draw_tokens,
        draw_choose.choose_tokens,
        topn.top_tokens,
    ]
    for operation in operations:
        partial(operation, launch)(**_pick(operation, buffers))


def sample_step_ref(buffers: Mapping[str, torch.Tensor]) -> None:
    """`sample_step` in plain torch."""
    operations: list[Callable[..., None]] = [
        logits_process.process_logits_ref,
        draw_filter.filter_tokens_ref,
        draw.draw_tokens_ref,
        draw_choose.choose_tokens_ref,
        topn.top_tokens_ref,
    ]
    for operation in operations:
        operation(**_pick(operation, buffers))


def _pick(
    operation: Callable[..., None], buffers: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    return {name: buffers[name] for name in _names(operation)}


@cache
def _names(operation: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(operation).parameters if name != "launch")
