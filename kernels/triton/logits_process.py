"""What a request does to its logits before anything is drawn: bias, penalties, masks.

Order: logit bias, repetition penalty, frequency penalty, presence penalty, stop ids while the
output is too short, the token mask (grammars). The temperature scales differences to the largest
of these and belongs to the filters and the draw. Invariant: elementwise, so a row's bits depend on
the row alone; rows that ask for nothing are not even read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launcher
from kernels.triton.logits_counts import OUTPUT_COUNT, is_penalized
from kernels.triton.overlap import await_inputs, overlap
from kernels.triton.sample import CHUNK, num_chunks

# Bits of a row's `flags`.
MASKED = tl.constexpr(1)  # the row's `token_mask` counts
PROCESSED_LOGPROBS = tl.constexpr(2)  # report log-probs of what is drawn from, not of the model
MAX_BIAS = 320  # entries of a row's logit bias


@triton.jit
def _process(
    logits,  # fp32 [S, V], row pitch logits_pitch
    sample_tok,  # int32 [S]
    sample_row,  # int32 [S]
    tok_pos,  # int32 [T]
    temperature,  # fp32 [R]
    flags,  # int32 [R]
    repetition,  # fp32 [R]
    presence,  # fp32 [R]
    frequency,  # fp32 [R]
    counts,  # int32 [R, V]
    bias_count,  # int32 [R]
    bias_ids,  # int32 [R, BIAS]
    bias_values,  # fp32 [R, BIAS]
    min_len,  # int32 [R]
    prompt_len,  # int32 [R]
    stop_ids,  # int32 [R, STOPS]
    token_mask,  # int32 [R, WORDS], device or pinned host memory
    active,  # int32 [S]
    processed,  # fp32 [S, V]
    proc_max,  # fp32 [S, C]
    logits_pitch,
    V: tl.constexpr,
    C: tl.constexpr,
    WORDS: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS2: tl.constexpr,
    STOPS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    s = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0)
    tok, r = tl.load(sample_tok + s), tl.load(sample_row + s).to(tl.int64)
    if tok < 0:
        if c == 0:
            tl.store(active + s, 0)
        return
    rep, pres, freq = tl.load(repetition + r), tl.load(presence + r), tl.load(frequency + r)
    flag, num_bias = tl.load(flags + r), tl.load(bias_count + r)
    position = tl.load(tok_pos + tok) + 1
    too_short = position < tl.load(min_len + r)
    penalized = is_penalized(rep, pres, freq)
    # Either flag makes a row active, and so does any temperature.
    needed = (tl.load(temperature + r) > 0.0) | (flag != 0) | (num_bias > 0)
    needed = (needed | penalized | too_short) & (position >= tl.load(prompt_len + r))
    if c == 0:
        tl.store(active + s, needed.to(tl.int32))
    if not needed:
        return

    word = tl.arange(0, CHUNK // 32)
    bit = tl.arange(0, 32)[None, :]
    col = c * CHUNK + word[:, None] * 32 + bit
    x = tl.load(logits + s * logits_pitch + col, mask=col < V, other=float("-inf"))
    out = processed + s * V
    if num_bias > 0:
        # Scattered through memory: only this CTA writes this chunk.
        tl.store(out + col, x, mask=col < V)
        tl.debug_barrier()
        b = tl.arange(0, BIAS2)
        token = tl.load(bias_ids + r * BIAS + b, mask=b < num_bias, other=-1)
        here = (token >= c * CHUNK) & (token < tl.minimum(c * CHUNK + CHUNK, V))
        value = tl.load(bias_values + r * BIAS + b, mask=here, other=0.0)
        value += tl.load(out + token, mask=here, other=0.0)
        tl.store(out + token, value, mask=here)
        tl.debug_barrier()
        x = tl.load(out + col, mask=col < V, other=float("-inf"))
    if penalized:
        seen = tl.load(counts + r * V + col, mask=col < V, other=0)
        count = seen & OUTPUT_COUNT
        x = tl.where(seen != 0, tl.where(x > 0.0, tl.div_rn(x, rep), x * rep), x)
        x -= freq * count.to(tl.float32)
        x -= tl.where(count > 0, pres, 0.0)
    if too_short:
        for i in range(0, STOPS):
            x = tl.where(col == tl.load(stop_ids + r * STOPS + i), float("-inf"), x)
    if (flag & MASKED) != 0:
        at = c * (CHUNK // 32) + word
        allowed = tl.load(token_mask + r * WORDS + at, mask=at < WORDS, other=0)
        x = tl.where(((allowed[:, None] >> bit) & 1) != 0, x, float("-inf"))
    tl.store(out + col, x, mask=col < V)
    tl.store(proc_max + s * C + c, tl.max(tl.max(x, axis=1), axis=0))


def process_logits(
    launch: Launcher,
    logits: torch.Tensor,
    sample_tok: torch.Tensor,
    sample_row: torch.Tensor,
    tok_pos: torch.Tensor,
    *,
    temperature: torch.Tensor,
    flags: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    counts: torch.Tensor,
    bias_count: torch.Tensor,
    bias_ids: torch.Tensor,
    bias_values: torch.Tensor,
    min_len: torch.Tensor,
    prompt_len: torch.Tensor,
    stop_ids: torch.Tensor,
    token_mask: torch.Tensor,
    active: torch.Tensor,
    processed: torch.Tensor,
    proc_max: torch.Tensor,
) -> None:
    """Bias, penalise and mask the logits of the rows that ask for more than plain greedy.

    Row tensors are [max_rows] by request row, `sample_*` and `active` [S] by sampling row.

    Args:
        logits: fp32 [S, V]; the row pitch may exceed V. Left alone.
        sample_tok: int32 [S], index into the step's tokens; -1 is padding.
        sample_row: int32 [S], request row.
        tok_pos: int32 [T], position of each token of the step.
        temperature: fp32; above 0 makes a row active, and does nothing else here.
        flags: int32, of MASKED and PROCESSED_LOGPROBS.
        repetition: fp32, 1 is off; divides positive logits of seen tokens, multiplies the others.
        presence, frequency: fp32, 0 is off; subtracted once, and once per occurrence in the output.
        counts: int32 [max_rows, V], as `logits_counts` keeps them.
        bias_count: int32; entries of bias_ids (int32 [max_rows, B], distinct) and bias_values
            (fp32 [max_rows, B]) in use.
        min_len: int32; stop ids are masked for tokens at earlier positions.
        prompt_len: int32; tokens at earlier positions are the prompt's own, and plain greedy.
        stop_ids: int32 [max_rows, stops]; -1 in unused places.
        token_mask: int32 [max_rows, ceil(V / 32)], device or pinned host memory: bit i of word j
            allows token 32 j + i. Read for rows with MASKED.
        active: int32 [S], 1 where the row's processed logits were written, else 0.
        processed: fp32 [S, V]; rows that are not active are left alone.
        proc_max: fp32 [S, num_chunks(V)], the largest of each chunk; likewise.
    Raises:
        ValueError: a buffer of a wrong shape or dtype.
    Capture-safe.
    Source: penalties as in OpenAI's API reference and, for repetition, arXiv:1909.05858 section
    4.1; the mask layout is xgrammar's.
    """
    rows, vocab = logits.shape
    _check_processing(logits, counts, bias_ids, bias_values, token_mask, processed, proc_max)
    launch(
        _process,
        (num_chunks(vocab), rows),
        *(logits, sample_tok, sample_row, tok_pos, temperature, flags),
        *(repetition, presence, frequency, counts, bias_count, bias_ids, bias_values),
        *(min_len, prompt_len, stop_ids, token_mask, active, processed, proc_max),
        logits.stride(0),
        V=vocab,
        C=num_chunks(vocab),
        WORDS=token_mask.shape[1],
        BIAS=bias_ids.shape[1],
        BIAS2=triton.next_power_of_2(bias_ids.shape[1]),
        STOPS=stop_ids.shape[1],
        CHUNK=CHUNK,
        num_warps=4,
        **overlap(launch),
    )


def process_logits_ref(
    logits: torch.Tensor,
    sample_tok: torch.Tensor,
    sample_row: torch.Tensor,
    tok_pos: torch.Tensor,
    *,
    temperature: torch.Tensor,
    flags: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    counts: torch.Tensor,
    bias_count: torch.Tensor,
    bias_ids: torch.Tensor,
    bias_values: torch.Tensor,
    min_len: torch.Tensor,
    prompt_len: torch.Tensor,
    stop_ids: torch.Tensor,
    token_mask: torch.Tensor,
    active: torch.Tensor,
    processed: torch.Tensor,
    proc_max: torch.Tensor,
) -> None:
    """`process_logits` in plain torch."""
    _check_processing(logits, counts, bias_ids, bias_values, token_mask, processed, proc_max)
    vocab = logits.shape[1]
    row = sample_row.clamp(min=0).long()
    position = tok_pos[sample_tok.clamp(min=0).long()] + 1
    too_short = position < min_len[row]
    penalized = (repetition != 1) | (presence != 0) | (frequency != 0)
    asks = (temperature > 0) | (flags != 0) | (bias_count > 0) | penalized
    needed = (sample_tok >= 0) & (asks[row] | too_short) & (position >= prompt_len[row])
    active.copy_(needed)
    at = needed.nonzero()[:, 0]
    if not len(at):
        return
    row, too_short = row[at], too_short[at]
    x = logits[at]
    if (bias_count[row] > 0).any():
        used = torch.arange(bias_ids.shape[1]) < bias_count[row, None]
        i, j = used.nonzero(as_tuple=True)
        x.index_put_((i, bias_ids[row[i], j].long()), bias_values[row[i], j], accumulate=True)
    if penalized[row].any():
        seen = counts[row]
        count = seen & OUTPUT_COUNT.value
        rep = repetition[row, None]
        x = torch.where(seen != 0, torch.where(x > 0, x / rep, x * rep), x)
        x = x - frequency[row, None] * count - torch.where(count > 0, presence[row, None], 0.0)
    if too_short.any():
        stops = torch.where(too_short[:, None], stop_ids[row], -1).long()
        i, j = ((stops >= 0) & (stops < vocab)).nonzero(as_tuple=True)
        x[i, stops[i, j]] = -torch.inf
    if (flags[row] & MASKED.value).any():
        token = torch.arange(vocab)
        allowed = (token_mask[row][:, token // 32] >> (token % 32).int()) & 1 != 0
        x[~allowed & (flags[row, None] & MASKED.value != 0)] = -torch.inf
    processed[at] = x
    proc_max[at] = chunk_max(x)


def chunk_max(x: torch.Tensor) -> torch.Tensor:
    """The largest of each chunk of fp32 [n, V], as fp32 [n, num_chunks(V)]."""
    starts = range(0, x.shape[1], CHUNK)
    return torch.stack([x[:, i : i + CHUNK].amax(1) for i in starts], 1)


def _check_processing(
    logits: torch.Tensor,
    counts: torch.Tensor,
    bias_ids: torch.Tensor,
    bias_values: torch.Tensor,
    token_mask: torch.Tensor,
    processed: torch.Tensor,
    proc_max: torch.Tensor,
) -> None:
    rows, vocab = logits.shape
    max_rows, bias = bias_ids.shape
    for name, t, shape, dtype in (
        ("logits", logits, (rows, vocab), torch.float32),
        ("counts", counts, (max_rows, vocab), torch.int32),
        ("bias_values", bias_values, (max_rows, bias), torch.float32),
        ("token_mask", token_mask, (max_rows, -(-vocab // 32)), torch.int32),
        ("processed", processed, (rows, vocab), torch.float32),
        ("proc_max", proc_max, (rows, num_chunks(vocab)), torch.float32),
    ):
        pitched = t is not logits and not t.is_contiguous()
        if tuple(t.shape) != shape or t.dtype != dtype or pitched:
            raise ValueError(
                f"{name} must be {dtype} {shape}, contiguous, got {t.dtype} {tuple(t.shape)}, "
                f"strides {t.stride()}"
            )
