"""The tokens of a step and the rows that sample: decoding rows, chunks of prompts, padding.

A device function of `kernels.triton.intake`, and the same in plain torch; both move the rows'
lengths on. Layouts and constants: `kernels.triton.state`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.rows import RowState
from kernels.triton.state import (
    DECODE,
    MAX_STOP_LENGTH,
    P_FORCED_LEN,
    P_PROMPT_LEN,
    MailboxLayout,
)


@triton.jit
def _list_decoding(
    phase,
    seq_len,
    last_token,
    known_len,  # int32 [R], line P_FORCED_LEN
    forced_tokens,
    tok_row,
    tok_pos,
    tok_id,
    sample_tok,
    sample_row,
    sample_pos,
    forced,
    S,
    max_seq_len,
    R: tl.constexpr,
    R2: tl.constexpr,
):
    """Decoding rows bring one token each, in row order; returns how many there are."""
    r = tl.arange(0, R2)
    # All rows' lengths and tokens at once, not those of decoding rows later: one trip to memory.
    is_row = r < R
    decoding = (tl.load(phase + r, mask=is_row, other=0) == 2).to(tl.int32)
    pos = tl.load(seq_len + r, mask=is_row, other=0)
    last = tl.load(last_token + r, mask=is_row, other=0)
    known = pos + 1 < tl.load(known_len + r, mask=is_row, other=0)
    index = tl.cumsum(decoding, 0) - decoding
    m = (decoding == 1) & (index < S)
    known = known & m
    tl.store(tok_row + index, r, mask=m)
    tl.store(tok_pos + index, pos, mask=m)
    tl.store(tok_id + index, last, mask=m)
    tl.store(sample_tok + index, index, mask=m)
    tl.store(sample_row + index, r, mask=m)
    tl.store(sample_pos + index, pos + 1, mask=m)
    target = tl.load(forced_tokens + r.to(tl.int64) * max_seq_len + pos + 1, mask=known, other=-1)
    tl.store(forced + index, target, mask=m)
    tl.store(seq_len + r, pos + 1, mask=m)
    return tl.sum(decoding, 0)


@triton.jit
def _pad(
    out,
    start,
    stop,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for i in range(start, stop, BLOCK):
        at = i + tl.arange(0, BLOCK)
        tl.store(out + at, VALUE, mask=at < stop)


@triton.jit
def list_tokens(
    box,  # int32 [WORDS]
    lane,  # int32 [BLOCK], 0 …
    num_chunks,
    phase,
    seq_len,
    last_token,
    row_params,
    forced_tokens,
    tail,
    tok_row,
    tok_pos,
    tok_id,
    sample_tok,
    sample_row,
    sample_pos,
    forced,
    T,
    S,
    max_seq_len,
    R: tl.constexpr,
    R2: tl.constexpr,
    PITCH: tl.constexpr,
    CHUNKS: tl.constexpr,
    IDS: tl.constexpr,
    LEN: tl.constexpr,
    PROMPT_LEN: tl.constexpr,
    FORCED_LEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """List decoding rows, then chunks, then padding; returns 1 if not all fit.

    Shapes as in `_intake`.
    """
    count = _list_decoding(
        phase,
        seq_len,
        last_token,
        row_params + FORCED_LEN * PITCH,
        forced_tokens,
        tok_row,
        tok_pos,
        tok_id,
        sample_tok,
        sample_row,
        sample_pos,
        forced,
        S,
        max_seq_len,
        R,
        R2,
    )
    bad = (count > S).to(tl.int32)
    tokens = tl.minimum(count, S)
    samples = tokens

    taken = 0
    for c in range(0, num_chunks):
        chunk = box + CHUNKS + c * 4
        row = tl.load(chunk)
        start = tl.load(chunk + 1)
        n = tl.load(chunk + 2)
        heads = tl.load(chunk + 3)
        fits = (tokens + n <= T) & (samples + heads <= S)
        bad = tl.where(fits, bad, 1)
        n_fit = tl.where(fits, n, 0)
        for i in range(0, n_fit, BLOCK):
            mc = i + lane < n_fit
            tl.store(tok_row + tokens + i + lane, row + lane * 0, mask=mc)
            tl.store(tok_pos + tokens + i + lane, start + i + lane, mask=mc)
            ids = tl.load(box + IDS + taken + i + lane, mask=mc, other=0)
            tl.store(tok_id + tokens + i + lane, ids, mask=mc)
        tokens += n_fit
        end = start + n
        # Output fed again after a preemption is the row's tail; a prompt is not.
        back = tl.arange(0, LEN)
        p = end - LEN + back
        mine = fits & (p >= start) & (p >= tl.load(row_params + PROMPT_LEN * PITCH + row))
        ids = tl.load(box + IDS + taken + n - LEN + back, mask=mine, other=-1)
        tl.store(tail + row * LEN + p % LEN, ids, mask=mine)
        taken += n
        heads_fit = tl.where(fits, heads, 0)
        forced_len = tl.load(row_params + FORCED_LEN * PITCH + row)
        for i in range(0, heads_fit, BLOCK):
            mh = i + lane < heads_fit
            at_pos = end - heads + i + lane + 1
            tl.store(sample_tok + samples + i + lane, tokens - heads + i + lane, mask=mh)
            tl.store(sample_row + samples + i + lane, row + lane * 0, mask=mh)
            tl.store(sample_pos + samples + i + lane, at_pos, mask=mh)
            place = forced_tokens + row.to(tl.int64) * max_seq_len + at_pos
            given = tl.load(place, mask=mh & (at_pos < forced_len), other=-1)
            tl.store(forced + samples + i + lane, given, mask=mh)
        samples += heads_fit
        tl.store(seq_len + row, end, mask=fits)

    if tokens < T:
        _pad(tok_row, tokens, T, -1, BLOCK)
        _pad(tok_pos, tokens, T, 0, BLOCK)
        _pad(tok_id, tokens, T, -1, BLOCK)
    if samples < S:
        _pad(sample_tok, samples, S, -1, BLOCK)
        _pad(sample_row, samples, S, -1, BLOCK)
        _pad(sample_pos, samples, S, 0, BLOCK)
        _pad(forced, samples, S, -1, BLOCK)
    return bad


def list_tokens_ref(
    box: torch.Tensor,
    chunks: int,
    forced_tokens: torch.Tensor,
    rows: RowState,
    *,
    layout: MailboxLayout,
    tok_row: torch.Tensor,
    tok_pos: torch.Tensor,
    tok_id: torch.Tensor,
    sample_tok: torch.Tensor,
    sample_row: torch.Tensor,
    sample_pos: torch.Tensor,
    forced: torch.Tensor,
) -> bool:
    """`list_tokens` in plain torch; shapes as in `intake`.

    Args:
        box: int32 [layout.words], this step's.
        chunks: how many it holds.
    Returns:
        Whether rows or chunks do not fit; what does is listed.
    """
    for out, padding in ((tok_row, -1), (tok_pos, 0), (tok_id, -1), (sample_tok, -1)):
        out.fill_(padding)
    for out, padding in ((sample_row, -1), (sample_pos, 0), (forced, -1)):
        out.fill_(padding)
    live = (rows.phase == DECODE).nonzero().flatten()
    bad = len(live) > len(sample_tok)
    live = live[: len(sample_tok)]
    tokens = samples = len(live)
    tok_row[:tokens] = live.int()
    tok_pos[:tokens] = rows.seq_len[live]
    tok_id[:tokens] = rows.last_token[live]
    rows.seq_len[live] += 1
    sample_tok[:samples] = torch.arange(samples, dtype=torch.int32)
    sample_row[:samples] = live.int()
    sample_pos[:samples] = rows.seq_len[live]
    taken = 0
    for row, start, n, heads in box[layout.chunks :][: 4 * chunks].view(-1, 4).tolist():
        ids = box[layout.ids + taken :][:n]
        taken += n
        if tokens + n > len(tok_row) or samples + heads > len(sample_tok):
            bad = True
            continue
        tok_row[tokens : tokens + n] = row
        tok_pos[tokens : tokens + n] = torch.arange(start, start + n, dtype=torch.int32)
        tok_id[tokens : tokens + n] = ids
        tokens += n
        for p in range(max(start, start + n - MAX_STOP_LENGTH, 0), start + n):
            if p >= int(rows.param(P_PROMPT_LEN)[row]):
                rows.tail[row, p % MAX_STOP_LENGTH] = ids[p - start]
        end = start + n
        lines = slice(samples, samples + heads)
        sample_tok[lines] = torch.arange(tokens - heads, tokens, dtype=torch.int32)
        sample_row[lines] = row
        sample_pos[lines] = torch.arange(end - heads + 1, end + 1, dtype=torch.int32)
        samples += heads
        rows.seq_len[row] = end
    row, pos = sample_row[:samples].long(), sample_pos[:samples].long()
    known = pos < rows.param(P_FORCED_LEN)[row]
    forced[:samples][known] = forced_tokens[row[known], pos[known]]
    return bad
