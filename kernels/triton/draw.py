"""From processed logits to a token and its log-prob: Gumbel-max over the kept tokens.

Every kept token's score is (y - top) / temperature plus Gumbel noise that is a hash of (seed,
position, token); the highest score, the lowest id among equals, is drawn, which draws tokens in
proportion to their probabilities. Without a temperature the score is the logit. Invariants: chunks
never depend on the number of rows, sums have one order; a forced token takes the place of the drawn
one and nothing else changes, so a forced run has the sampled run's bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.draw_filter import (
    inverse_temperature,
    inverse_temperature_ref,
    is_kept,
    is_kept_ref,
)
from kernels.triton.draw_random import exponential, exponential_ref
from kernels.triton.launch import Launcher
from kernels.triton.overlap import await_inputs, overlap
from kernels.triton.sample import CHUNK, num_chunks


@triton.jit
def log_of_min_p(min_p, temperature):
    """The least (y - top) / temperature that min-p keeps; greedy rows are not filtered."""
    return tl.where((temperature > 0.0) & (min_p > 0.0), tl.log(min_p), float("-inf"))


@triton.jit
def log_prob(value, top, log_total, scale):
    """Log-prob of a logit; `log_total` is the log of sum(exp((logits - top) * scale))."""
    # One rounding, wherever it is inlined; the top token gets exactly -log_total.
    return -tl.fma(top - value, scale, log_total)


@triton.jit
def _draw(
    processed,  # fp32 [S, V]
    active,  # int32 [S]
    sample_tok,  # int32 [S]
    sample_row,  # int32 [S]
    tok_pos,  # int32 [T]
    proc_max,  # fp32 [S, C]
    keep_value,  # fp32 [S]
    keep_id,  # int32 [S]
    temperature,  # fp32 [R]
    min_p,  # fp32 [R]
    seed,  # int32 [R, 2]
    draw_score,  # fp32 [S, C]
    draw_arg,  # int32 [S, C]
    draw_mass,  # fp32 [S, C]
    V: tl.constexpr,
    C: tl.constexpr,
    C2: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    s = tl.program_id(1).to(tl.int64)
    if tl.load(active + s) == 0:
        return
    r = tl.load(sample_row + s).to(tl.int64)
    t = tl.load(temperature + r)
    scale = inverse_temperature(t)
    min_z = log_of_min_p(tl.load(min_p + r), t)
    each = tl.arange(0, C2)
    tops = tl.load(proc_max + s * C + each, mask=each < C, other=float("-inf"))
    top = tl.max(tops, axis=0)
    c = tl.program_id(0)
    col = c * CHUNK + tl.arange(0, CHUNK)
    y = tl.load(processed + s * V + col, mask=col < V, other=float("-inf"))
    z = (y - top) * scale
    kept = is_kept(y, col, z, tl.load(keep_value + s), tl.load(keep_id + s), min_z)
    score = y
    if t > 0.0:
        low, high = tl.load(seed + r * 2), tl.load(seed + r * 2 + 1)
        position = tl.load(tok_pos + tl.load(sample_tok + s)) + 1
        score = z - tl.log(exponential(low, high, position, col))
    score = tl.where(kept, score, float("-inf"))
    best = tl.max(score, axis=0)
    at = s * C + c
    tl.store(draw_score + at, best)
    tl.store(draw_arg + at, tl.min(tl.where(score == best, col, V), axis=0))
    tl.store(draw_mass + at, tl.sum(tl.where(kept, tl.exp(z), 0.0), axis=0))


def draw_tokens(
    launch: Launcher,
    processed: torch.Tensor,
    active: torch.Tensor,
    sample_tok: torch.Tensor,
    sample_row: torch.Tensor,
    tok_pos: torch.Tensor,
    *,
    proc_max: torch.Tensor,
    keep_value: torch.Tensor,
    keep_id: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    draw_score: torch.Tensor,
    draw_arg: torch.Tensor,
    draw_mass: torch.Tensor,
) -> None:
    """The best score of each chunk of each active row, and what its kept tokens weigh.

    Args:
        processed, active, proc_max: of `process_logits`.
        sample_tok: int32 [S]; the token is drawn for position tok_pos[sample_tok] + 1.
        sample_row: int32 [S], request row.
        tok_pos: int32 [T], position of each token of the step.
        keep_value, keep_id: of `filter_tokens`.
        temperature: fp32 [max_rows]; 0 is greedy.
        min_p: fp32 [max_rows]; 0 is off. Ignored by greedy rows.
        seed: int32 [max_rows, 2], low and high word.
        draw_score: fp32 [S, C]; -inf where a chunk has no kept token.
        draw_arg: int32 [S, C], its token.
        draw_mass: fp32 [S, C], sum of exp((y - top) / temperature) over kept tokens.
    Raises:
        ValueError: scratch of a wrong shape.
    Capture-safe.
    """
    rows, vocab = processed.shape
    chunks = _check_parts(rows, vocab, (proc_max, draw_score, draw_arg, draw_mass))
    launch(
        _draw,
        (chunks, rows),
        *(processed, active, sample_tok, sample_row, tok_pos, proc_max, keep_value, keep_id),
        *(temperature, min_p, seed, draw_score, draw_arg, draw_mass),
        V=vocab,
        C=chunks,
        C2=triton.next_power_of_2(chunks),
        CHUNK=CHUNK,
        num_warps=4,
        **overlap(launch),
    )


def draw_tokens_ref(
    processed: torch.Tensor,
    active: torch.Tensor,
    sample_tok: torch.Tensor,
    sample_row: torch.Tensor,
    tok_pos: torch.Tensor,
    *,
    proc_max: torch.Tensor,
    keep_value: torch.Tensor,
    keep_id: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    draw_score: torch.Tensor,
    draw_arg: torch.Tensor,
    draw_mass: torch.Tensor,
) -> None:
    """`draw_tokens` in plain torch; a row's first chunk gets what all of them hold."""
    vocab = processed.shape[1]
    _check_parts(len(processed), vocab, (proc_max, draw_score, draw_arg, draw_mass))
    at = (active != 0).nonzero()[:, 0]
    if not len(at):
        return
    row = sample_row[at].long()
    y, t = processed[at], temperature[row]
    z = (y - y.amax(1, keepdim=True)) * inverse_temperature_ref(t)[:, None]
    min_z = torch.where((t > 0) & (min_p[row] > 0), min_p[row].log(), -torch.inf)
    kept = is_kept_ref(y, z, keep_value[at], keep_id[at], min_z)
    score, hot = y.clone(), (t > 0).nonzero()[:, 0]
    if len(hot):
        position = tok_pos[sample_tok[at[hot]].long()] + 1
        tokens = torch.arange(vocab, dtype=torch.int32)
        score[hot] = z[hot] - exponential_ref(seed[row[hot]], position, tokens).log()
    score.masked_fill_(~kept, -torch.inf)
    draw_score[at], draw_arg[at], draw_mass[at] = -torch.inf, vocab, 0.0
    draw_score[at, 0], token = score.max(1)
    draw_arg[at, 0] = token.int()
    draw_mass[at, 0] = z.exp().masked_fill_(~kept, 0.0).sum(1)


def _check_parts(rows: int, vocab: int, parts: tuple[torch.Tensor, ...]) -> int:
    want = (rows, num_chunks(vocab))
    for part in parts:
        if tuple(part.shape) != want or not part.is_contiguous():
            raise ValueError(
                f"scratch of the chunks must be {want} and contiguous (num_chunks({vocab}) "
                f"columns), got {tuple(part.shape)}, strides {part.stride()}"
            )
    return want[1]
