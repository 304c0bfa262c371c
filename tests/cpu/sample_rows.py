"""Buffers of a sampling step, and what must come of a row by plain numpy: for tests of sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kernels.triton.draw_pipeline import row_tensors, sample_step, sample_step_ref, scratch_tensors
from kernels.triton.launch import JitLauncher
from kernels.triton.sample import num_chunks

LAUNCH = JitLauncher()
STOPS = 4
NAN = float("nan")
Buffers = dict[str, torch.Tensor]
Step = Callable[[Buffers], None]


def run_kernels(buffers: Buffers) -> None:
    with np.errstate(all="ignore"):  # a device does not warn of infinities
        sample_step(LAUNCH, buffers)


STEPS: tuple[Step, ...] = (run_kernels, sample_step_ref)


@dataclass(frozen=True)
class Row:
    """What one request asks for, as `kernels` name it."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)
    allowed: Sequence[int] | None = None
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    min_len: int = 0
    stops: Sequence[int] = ()
    top_n: int = 0
    processed_logprobs: bool = False
    prompt_len: int = 0
    forced: int = -1
    position: int = 10

    def __str__(self) -> str:
        """What is asked for beyond nothing: names the case of a test."""
        plain = vars(Row())
        return " ".join(f"{k}={v}" for k, v in vars(self).items() if v != plain[k])


def step_buffers(
    logits: torch.Tensor, rows: Sequence[Row], *, order: Sequence[int] | None = None
) -> Buffers:
    """One step in which sampling row s is request row order[s] (-1: padding) with logits[s].

    Scratch holds rubbish, as it may on a device.
    """
    samples, vocab = logits.shape
    order = range(len(rows)) if order is None else order
    b = {name: _rubbish(*spec) for name, spec in scratch_tensors(samples, vocab).items()}
    for name, (shape, dtype) in row_tensors(len(rows), vocab).items():
        b[name] = torch.zeros(shape, dtype=getattr(torch, dtype))
    chunks = num_chunks(vocab)
    for name in ("part_max", "part_sum"):
        b[name] = _rubbish((samples, chunks), "float32")
    b["part_arg"] = _rubbish((samples, chunks), "int32")
    b["out_token"], b["out_logprob"] = (_rubbish((samples,), d) for d in ("int32", "float32"))
    b["stop_ids"] = torch.full((len(rows), STOPS), -1, dtype=torch.int32)
    b["token_mask"] = torch.full((len(rows), -(-vocab // 32)), 0x5A5A5A5A, dtype=torch.int32)
    b["logits"] = logits
    b["sample_row"] = torch.tensor(list(order), dtype=torch.int32)
    # Sampling row s stands at token s + 2 of the step.
    b["sample_tok"] = torch.where(b["sample_row"] >= 0, torch.arange(samples) + 2, -1).int()
    b["tok_pos"] = torch.zeros(samples + 2, dtype=torch.int32)
    for r, row in enumerate(rows):
        _write(b, r, row, vocab)
    asked = [rows[r] if r >= 0 else Row() for r in order]
    b["forced"] = torch.tensor([row.forced for row in asked], dtype=torch.int32)
    b["tok_pos"][2:] = torch.tensor([row.position - 1 for row in asked], dtype=torch.int32)
    return b


def _rubbish(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    value: float = NAN if dtype == "float32" else (1 << 30)
    return torch.full(shape, value, dtype=getattr(torch, dtype))


def _write(b: Buffers, r: int, row: Row, vocab: int) -> None:
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition", "presence", "frequency"):
        b[name][r] = getattr(row, name)
    for name in ("top_n", "min_len", "prompt_len"):
        b[name][r] = getattr(row, name)
    b["seed"][r] = torch.from_numpy(np.array([row.seed], np.uint64).view(np.int32))
    b["flags"][r] = (row.allowed is not None) + 2 * row.processed_logprobs
    b["bias_count"][r] = len(row.bias)
    for i, (token, value) in enumerate(row.bias.items()):
        b["bias_ids"][r, i], b["bias_values"][r, i] = token, value
    for i, token in enumerate(row.stops):
        b["stop_ids"][r, i] = token
    for token in row.output:
        b["counts"][r, token] += 1
    b["counts"][r, list(row.prompt)] |= -(2**31)
    if row.allowed is not None:
        bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
        bits[list(row.allowed)] = 1
        words = np.packbits(bits, bitorder="little").view(np.int32)
        b["token_mask"][r] = torch.from_numpy(words)


# -- the oracle: one row at a time, nothing shared with the kernels or their refs ---------------


def processed_logits(x: torch.Tensor, row: Row) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits of one row after bias, penalties and masks, in fp32."""
    y = x.numpy().astype(np.float32).copy()
    for token, value in row.bias.items():
        y[token] += np.float32(value)
    for token in {*row.prompt, *row.output}:
        rep = np.float32(row.repetition)
        y[token] = y[token] / rep if y[token] > 0 else y[token] * rep
    for token in set(row.output):
        y[token] -= np.float32(row.frequency) * np.float32(list(row.output).count(token))
        y[token] -= np.float32(row.presence)
    if row.position < row.min_len:
        y[[s for s in row.stops if s < len(y)]] = -np.inf
    if row.allowed is not None:
        kept = np.full_like(y, -np.inf)
        kept[list(row.allowed)] = y[list(row.allowed)]
        y = kept
    return y


def probabilities(y: np.ndarray[Any, Any], row: Row) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What a row with a temperature is drawn from, by the definitions, in fp64."""
    z = y.astype(np.float64) / row.temperature
    p = np.exp(z - z.max())
    order = sorted(range(len(y)), key=lambda i: (-y[i], i))
    if row.top_k:
        order = order[: row.top_k]
    total, kept, running = sum(p[i] for i in order), [], 0.0
    for i in order:
        if row.top_p < 1 and running >= np.float32(row.top_p) * total:
            break
        running += p[i]
        kept.append(i)
    out = np.zeros_like(p)
    for i in kept:
        if p[i] >= row.min_p:
            out[i] = p[i]
    return out / out.sum()


# -- what is drawn how often: logits with equals, and rows of every setting ------------------------

LOGITS = torch.tensor([2.0, 1.0, 0.5, 3.0, 3.0, -1.0, 0.0, 2.5, -9.0, 1.0, 1.0, -0.5])
EVEN = tuple(range(0, 12, 2))
DRAWN = [
    Row(temperature=1.0),
    Row(temperature=0.5),
    Row(temperature=5.0),
    Row(temperature=1.0, top_k=3),  # cuts between the equals 3 and 4, and the next
    Row(temperature=1.0, top_k=6),  # cuts through equals
    Row(temperature=1.0, top_p=0.6),
    Row(temperature=1.0, top_p=0.95, top_k=8),
    Row(temperature=1.0, min_p=0.2),
    Row(temperature=2.0, min_p=0.1, top_p=0.9, top_k=9),
    Row(temperature=1.0, allowed=EVEN),
    Row(temperature=1.0, allowed=EVEN, top_p=0.9),
    Row(temperature=1.0, bias={3: float("-inf"), 8: 10.0}),
    Row(temperature=1.0, presence=1.0, frequency=0.5, output=(3, 3, 7), prompt=(0,)),
    Row(temperature=1.5, repetition=2.0, output=(3, 5), prompt=(4,), bias={8: 9.0}),
]
# Rows that leave one token, and which: of the equals 3 and 4 the lower id, but for equal scores,
# which are drawn.
ONE_IS_LEFT = [
    (Row(temperature=1.0, top_k=1), {3}),
    (Row(temperature=1.0, top_p=1e-9), {3}),
    (Row(temperature=1.0, min_p=1.0, bias={3: 0.01}), {3}),
    (Row(temperature=1.0, allowed=(7,)), {7}),
    (Row(temperature=1e-5), {3, 4}),
    (Row(temperature=0.0, seed=5), {3}),
]


def check_frequencies(drawn: np.ndarray[Any, Any], row: Row) -> None:
    """Chi-square of tokens drawn with `LOGITS`; nothing outside what the row keeps."""
    p = probabilities(processed_logits(LOGITS, row), row)
    seen = np.bincount(drawn, minlength=len(p))
    assert not seen[p == 0].any()
    often = p * len(drawn) >= 5
    expected = p[often] * len(drawn)
    chi_square = ((seen[often] - expected) ** 2 / expected).sum()
    assert chi_square < chi_square_limit(int(often.sum()) - 1), (seen, expected)


def chi_square_limit(freedom: int) -> float:
    """What chi-square exceeds once in a thousand (Wilson and Hilferty's approximation)."""
    part = 2 / (9 * freedom)
    return float(freedom * (1 - part + 3.09 * part**0.5) ** 3)
