"""A row's token and log-prob, from what its chunks found.

Invariants: a plain greedy row gets the bits of `sample.greedy`; a row with NaN or +inf logits, or
nothing that may be drawn, gets token -1 and log-prob NaN, and no other row notices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.draw import log_of_min_p, log_prob
from kernels.triton.draw_filter import (
    inverse_temperature,
    inverse_temperature_ref,
    is_kept,
)
from kernels.triton.launch import Launcher
from kernels.triton.logits_process import PROCESSED_LOGPROBS
from kernels.triton.overlap import await_inputs, overlap
from kernels.triton.sample import num_chunks

NORM = 4  # words of a row's `draw_norm`


@triton.jit
def _choose(
    logits,  # fp32 [S, V], row pitch logits_pitch
    processed,  # fp32 [S, V]
    active,  # int32 [S]
    sample_tok,  # int32 [S]
    sample_row,  # int32 [S]
    forced,  # int32 [S]
    part_max,  # fp32 [S, C]
    part_arg,  # int32 [S, C]
    part_sum,  # fp32 [S, C]
    proc_max,  # fp32 [S, C]
    draw_score,  # fp32 [S, C]
    draw_arg,  # int32 [S, C]
    draw_mass,  # fp32 [S, C]
    keep_value,  # fp32 [S]
    keep_id,  # int32 [S]
    temperature,  # fp32 [R]
    min_p,  # fp32 [R]
    flags,  # int32 [R]
    draw_norm,  # fp32 [S, 4]
    out_token,  # int32 [S]
    out_logprob,  # fp32 [S]
    logits_pitch,
    V: tl.constexpr,
    C: tl.constexpr,
    C2: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    s = tl.program_id(0).to(tl.int64)
    if tl.load(sample_tok + s) < 0:
        tl.store(out_token + s, -1)
        tl.store(out_logprob + s, 0.0)
        return
    each = tl.arange(0, C2)
    at, mask = s * C + each, each < C
    tops = tl.load(part_max + at, mask=mask, other=float("-inf"))
    args = tl.load(part_arg + at, mask=mask, other=V)
    sums = tl.load(part_sum + at, mask=mask, other=0.0)
    top = tl.max(tops, axis=0)
    token = tl.min(tl.where(tops == top, args, V), axis=0)
    total = tl.sum(sums * tl.exp(tops - top), axis=0)
    # Not total > 0 holds for NaN as well; all -inf makes tops - top NaN.
    good = total > 0.0
    scale = top * 0.0 + 1.0
    from_processed = top * 0.0
    is_active = tl.load(active + s) != 0
    r = tl.load(sample_row + s).to(tl.int64)
    if is_active:
        scores = tl.load(draw_score + at, mask=mask, other=float("-inf"))
        args = tl.load(draw_arg + at, mask=mask, other=V)
        best = tl.max(scores, axis=0)
        token = tl.min(tl.where(scores == best, args, V), axis=0)
        good = good & (best > float("-inf"))
        if (tl.load(flags + r) & PROCESSED_LOGPROBS) != 0:
            from_processed = 1.0
            top = tl.max(tl.load(proc_max + at, mask=mask, other=float("-inf")), axis=0)
            total = tl.sum(tl.load(draw_mass + at, mask=mask, other=0.0), axis=0)
            scale = inverse_temperature(tl.load(temperature + r))
    wanted = tl.load(forced + s)
    token = tl.where(wanted >= 0, wanted, token)
    good = good & (token < V)
    token = tl.where(good, token, 0)
    value = tl.load(logits + s * logits_pitch + token)
    if from_processed != 0.0:
        t = tl.load(temperature + r)
        value = tl.load(processed + s * V + token)
        z = (value - top) * scale
        min_z = log_of_min_p(tl.load(min_p + r), t)
        kept = is_kept(value, token, z, tl.load(keep_value + s), tl.load(keep_id + s), min_z)
        value = tl.where(kept, value, float("-inf"))
    log_total = tl.where(good, tl.log(total), float("nan"))
    tl.store(draw_norm + s * 4, top)
    tl.store(draw_norm + s * 4 + 1, log_total)
    tl.store(draw_norm + s * 4 + 2, scale)
    tl.store(draw_norm + s * 4 + 3, from_processed)
    logprob = log_prob(value, top, log_total, scale)
    tl.store(out_token + s, tl.where(good, token, -1))
    tl.store(out_logprob + s, tl.where(good, logprob, float("nan")))


def choose_tokens(
    launch: Launcher,
    logits: torch.Tensor,
    processed: torch.Tensor,
    active: torch.Tensor,
    sample_tok: torch.Tensor,
    sample_row: torch.Tensor,
    forced: torch.Tensor,
    *,
    part_max: torch.Tensor,
    part_arg: torch.Tensor,
    part_sum: torch.Tensor,
    proc_max: torch.Tensor,
    draw_score: torch.Tensor,
    draw_arg: torch.Tensor,
    draw_mass: torch.Tensor,
    keep_value: torch.Tensor,
    keep_id: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    flags: torch.Tensor,
    draw_norm: torch.Tensor,
    out_token: torch.Tensor,
    out_logprob: torch.Tensor,
) -> None:
    """Merge the chunks of each row; a forced token goes before the drawn one.

    Args:
        logits: fp32 [S, V]; the row pitch may exceed V.
        processed, active, proc_max: of `process_logits`.
        sample_tok: int32 [S]; -1 is padding and gets token -1, log-prob 0.
        sample_row: int32 [S], request row.
        forced: int32 [S], the token to take, or -1.
        part_max, part_arg, part_sum: of `sample.max_and_sum`.
        draw_score, draw_arg, draw_mass: of `draw_tokens`.
        keep_value, keep_id: of `filter_tokens`.
        temperature, min_p: fp32 [max_rows].
        flags: int32 [max_rows]; PROCESSED_LOGPROBS picks the distribution of the log-prob.
        draw_norm: fp32 [S, 4], for `top_tokens`: the largest logit of that distribution, the log
            of its sum (NaN for a bad row), the scale, and 1 where it is the processed one.
        out_token: int32 [S]; -1 for a bad row, which a forced token outside the vocabulary is too.
        out_logprob: fp32 [S]; NaN for a bad row, -inf for a forced token that was not kept.
    Raises:
        ValueError: logits that are not fp32, or scratch of a wrong shape.
    Capture-safe.
    """
    chunks = _check_choose(logits, draw_norm, part_max, part_arg, part_sum, draw_score)
    vocab = logits.shape[1]
    launch(
        _choose,
        (logits.shape[0],),
        *(logits, processed, active, sample_tok, sample_row, forced),
        *(part_max, part_arg, part_sum, proc_max, draw_score, draw_arg, draw_mass),
        *(keep_value, keep_id, temperature, min_p, flags, draw_norm, out_token, out_logprob),
        logits.stride(0),
        V=vocab,
        C=chunks,
        C2=triton.next_power_of_2(chunks),
        num_warps=1,
        **overlap(launch),
    )


def choose_tokens_ref(
    logits: torch.Tensor,
    processed: torch.Tensor,
    active: torch.Tensor,
    sample_tok: torch.Tensor,
    sample_row: torch.Tensor,
    forced: torch.Tensor,
    *,
    part_max: torch.Tensor,
    part_arg: torch.Tensor,
    part_sum: torch.Tensor,
    proc_max: torch.Tensor,
    draw_score: torch.Tensor,
    draw_arg: torch.Tensor,
    draw_mass: torch.Tensor,
    keep_value: torch.Tensor,
    keep_id: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    flags: torch.Tensor,
    draw_norm: torch.Tensor,
    out_token: torch.Tensor,
    out_logprob: torch.Tensor,
) -> None:
    """`choose_tokens` in plain torch; takes the raw sums from the logits, not from `part_*`."""
    _check_choose(logits, draw_norm, part_max, part_arg, part_sum, draw_score)
    vocab = logits.shape[1]
    row = sample_row.clamp(min=0).long()
    top, token = logits.max(dim=1)  # the first of equals; NaN wins
    total = (logits - top[:, None]).exp_().sum(1)
    good = top.isfinite()
    on = active != 0
    score, chunk = draw_score.max(1)
    drawn = draw_arg.gather(1, chunk[:, None])[:, 0]
    token = torch.where(on, drawn, token)
    good &= ~on | (score > -torch.inf)
    from_processed = on & (flags[row] & PROCESSED_LOGPROBS.value != 0)
    top = torch.where(from_processed, proc_max.amax(1), top)
    total = torch.where(from_processed, draw_mass.sum(1), total)
    scale = inverse_temperature_ref(temperature[row]).where(from_processed, torch.tensor(1.0))
    token = torch.where(forced >= 0, forced, token)
    good &= token < vocab
    token = torch.where(good, token, 0).long()[:, None]
    source = torch.where(from_processed[:, None], processed, logits)
    value = source.gather(1, token)[:, 0]
    cut = from_processed & (temperature[row] > 0)
    min_z = torch.where(cut & (min_p[row] > 0), min_p[row].log(), -torch.inf)
    equal = (value == keep_value) & (token[:, 0] <= keep_id)
    kept = ((value > keep_value) | equal) & ((value - top) * scale >= min_z)
    value = torch.where(from_processed & ~kept, -torch.inf, value)
    log_total = total.log().masked_fill(~good, torch.nan)
    draw_norm.copy_(torch.stack([top, log_total, scale, from_processed.float()], 1))
    logprob = -(log_total - (value - top) * scale)
    padded = sample_tok < 0
    out_token.copy_(token[:, 0].masked_fill(~good | padded, -1))
    out_logprob.copy_(logprob.masked_fill(~good, torch.nan).masked_fill(padded, 0.0))


def _check_choose(logits: torch.Tensor, draw_norm: torch.Tensor, *parts: torch.Tensor) -> int:
    rows, vocab = logits.shape
    if logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32, got {logits.dtype}; write the head in fp32")
    want = (rows, num_chunks(vocab))
    for part in parts:
        if tuple(part.shape) != want or not part.is_contiguous():
            raise ValueError(
                f"scratch of the chunks must be {want} and contiguous (num_chunks({vocab}) "
                f"columns), got {tuple(part.shape)}, strides {part.stride()}"
            )
    if tuple(draw_norm.shape) != (rows, NORM):
        raise ValueError(f"draw_norm must be {(rows, NORM)}, got {tuple(draw_norm.shape)}")
    return want[1]
