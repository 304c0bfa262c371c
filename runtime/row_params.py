"""From `SamplingParams` to the words that the device keeps for a row, and a ring entry back.

Everything here runs once per request or once per step over whole arrays; nothing loops over rows
that did not ask for something.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture_cache.dataclass import dataclass
from kernels.triton.state import (
    ADMIT_BIASES,
    ADMIT_HEADER,
    ADMIT_LIMIT,
    ADMIT_ROW,
    ADMIT_SEED,
    ADMIT_SEQUENCES,
    ADMIT_STOPS,
    ADMIT_WORDS,
    F_PROCESSED,
    INT_PARAMS,
    MAX_STOP_LENGTH,
    P_FORCED_LEN,
    P_LOGITS,
    P_PROMPT_TOP,
    P_SEQUENCES,
    P_TOP,
    PARAMS,
    REAL_PARAMS,
    mask_words,
)
from runtime.mailbox import Int32, RingEntry
from runtime.sampling import (
    FINISH_REASONS,
    PromptLogprobs,
    SamplingParams,
    StepOutput,
    TopLogprobs,
)


@dataclass(frozen=True)
class Admission:
    """What the device is told when a request takes a row; the same each time it does.

    Attributes:
        limit: total tokens at which the row ends.
        record: int32 words of an admit record (`kernels.triton.state`), the row left open.
        known: int32, the tokens at positions 0, 1, …, where they are forced or to be scored.
        seed: of the request's random numbers.
        until: `time.monotonic` of its deadline, or None.
    """

    limit: int
    record: Int32
    known: Int32 | None
    seed: int
    until: float | None

    @property
    def life_ms(self) -> int:
        """What is left to the deadline, at least 1; 0 without one."""
        if self.until is None:
            return 0
        return max(1, int((self.until - time.monotonic()) * 1e3))


def resolve_seed(params: SamplingParams) -> int:
    """The request's seed, or one from the operating system; in [0, 2**63)."""
    return int.from_bytes(os.urandom(8), "little") >> 1 if params.seed is None else params.seed


def check_for_model(params: SamplingParams, vocab: int) -> None:
    """Refuse what this vocabulary cannot honour.

    Raises:
        ValueError: a token id outside the vocabulary; names the setting.
    """
    named: dict[str, Any] = {
        "stop token id": params.stop_token_ids,
        "logit_bias token": params.logit_bias,
        "forced token": params.forced_tokens or (),
        "stop sequence token": [t for s in params.stop_sequences for t in s],
    }
    for name, ids in named.items():
        for token in ids:
            if not 0 <= token < vocab:
                raise ValueError(f"{name} {token} is outside the vocabulary [0, {vocab})")
    most = max(params.logprobs or 0, params.prompt_logprobs or 0)
    if most > vocab:
        raise ValueError(f"{most} alternatives are wanted of a vocabulary of {vocab} tokens")


def admission(
    params: SamplingParams, prompt: Int32, stops: tuple[int, ...], seed: int
) -> Admission:
    """Encode a request; its deadline runs from now.

    Args:
        prompt: int32 [n], as the user gave it: a request that comes back after a preemption is
            admitted with the same words, its output fed behind its prompt.
        stops: stop ids, the model's own included.
    """
    length, scored = len(prompt), params.prompt_logprobs is not None
    limit = length + params.max_tokens
    known = None
    if params.forced_tokens is not None:
        known = np.concatenate([prompt, np.array(params.forced_tokens, np.int32)])
    elif scored:
        known = prompt
    words = np.zeros(PARAMS, np.int32)
    reals = words.view(np.float32)
    ints = {
        "flags": F_PROCESSED * (params.logprobs_mode == "processed"),
        "top_k": params.top_k,
        "top_n": max(params.logprobs or 0, params.prompt_logprobs or 0),
        "bias_count": len(params.logit_bias),
        "min_len": length + params.min_tokens if params.min_tokens else 0,
        "prompt_len": length,
        "fresh": 1,
    }
    for name, value in ints.items():
        words[INT_PARAMS[name]] = value
    wanted = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repetition": params.repetition_penalty,
        "presence": params.presence_penalty,
        "frequency": params.frequency_penalty,
    }
    for name, real in wanted.items():
        reals[REAL_PARAMS[name]] = real
    words[P_FORCED_LEN] = 0 if known is None else len(known)
    words[P_SEQUENCES], words[P_LOGITS] = len(params.stop_sequences), params.return_logits
    words[P_TOP], words[P_PROMPT_TOP] = params.logprobs or 0, params.prompt_logprobs or 0
    header = np.zeros(ADMIT_HEADER, np.int32)
    header[ADMIT_LIMIT] = limit
    header[ADMIT_STOPS], header[ADMIT_BIASES] = len(stops), len(params.logit_bias)
    header[ADMIT_SEQUENCES] = len(params.stop_sequences)
    header[ADMIT_SEED : ADMIT_SEED + 2] = np.array([seed], np.int64).view(np.int32)
    lists = [np.array(stops, np.int32), np.array(list(params.logit_bias), np.int32)]
    lists.append(np.array(list(params.logit_bias.values()), np.float32).view(np.int32))
    for sequence in params.stop_sequences:
        lists.append(np.full(MAX_STOP_LENGTH - len(sequence), -1, np.int32))
        lists.append(np.array(sequence, np.int32))
    record = np.concatenate([header, words, *lists])
    record[ADMIT_WORDS], record[ADMIT_ROW] = len(record), -1
    until = None
    if params.deadline_ms is not None:
        until = time.monotonic() + params.deadline_ms / 1e3
    return Admission(limit, record, known, seed, until)


def as_token_mask(words: object, vocab: int) -> Int32:
    """A token mask as int32 [mask_words(vocab)], a copy.

    Raises:
        TypeError, ValueError: not one word of 32 bits per 32 tokens.
    """
    want = mask_words(vocab)
    remedy = f"xgrammar's allocate_token_bitmask(1, {vocab}) makes one, None ends it"
    try:
        mask = np.asarray(words)
    except (ValueError, TypeError) as error:  # ragged, or an array that is not on the host
        raise TypeError(
            f"a token mask is one array of {want} int32 words on the host, got "
            f"{type(words).__name__}; {remedy}"
        ) from error
    if mask.dtype not in (np.int32, np.uint32):
        raise TypeError(f"a token mask has int32 (or uint32) words, got {mask.dtype}; {remedy}")
    if mask.size != want or mask.ndim not in (1, 2):
        raise ValueError(
            f"a token mask of {vocab} tokens has {want} words of 32 bits, got shape {mask.shape}; "
            f"{remedy}"
        )
    return np.array(mask.reshape(-1).view(np.int32))


# ------------------------------------------------------------------ from the ring


REASONS = np.array(FINISH_REASONS)
TEXT, BOOL = REASONS.dtype, np.dtype(bool)


def plain_output(step: int, entry: RingEntry, requests: NDArray[np.int64]) -> StepOutput:
    """`step_output` where `entry.is_plain` and every entry is of a request that is still here.

    Args:
        requests: int64 [entries], of each entry; becomes the output's.
    """
    n = len(requests)
    return StepOutput(
        step,
        entry.rows,
        requests,
        entry.tokens,
        entry.logprobs,
        np.zeros(n, BOOL),
        np.zeros(n, TEXT),
    )


def step_output(
    step: int, entry: RingEntry, ours: NDArray[np.bool_], requests: NDArray[np.int64]
) -> StepOutput:
    """What the user sees of a step.

    Args:
        ours: bool [entries], False for entries whose request is gone.
        requests: int64 [entries], whose each is; -1 where that is gone. May become the output's.
    """
    if entry.asks_nothing and np.count_nonzero(ours) == len(ours):
        if entry.is_plain:
            return plain_output(step, entry, requests)
        return StepOutput(
            step=step,
            rows=entry.rows,
            requests=requests,
            tokens=entry.tokens,
            logprobs=entry.logprobs,
            finished=entry.reasons != 0,
            finish_reasons=REASONS[entry.reasons],
        )
    scored = entry.is_prompt
    new = ours & ~scored
    reasons = entry.reasons[new]
    rows = entry.rows[new]
    wants = np.flatnonzero(new & (entry.logit_lines > 0))
    logits: Mapping[int, NDArray[np.float32]] = {
        int(entry.rows[i]): entry.logits[int(entry.logit_lines[i]) - 1] for i in wants
    }
    prompt = None
    which = scored & ours
    if which.any():
        prompt = PromptLogprobs(
            entry.rows[which],
            requests[which],
            entry.positions[which],
            entry.tokens[which],
            entry.logprobs[which],
            _top(entry, which),
        )
    return StepOutput(
        step=step,
        rows=rows,
        requests=requests[new],
        tokens=entry.tokens[new],
        logprobs=entry.logprobs[new],
        finished=reasons != 0,
        finish_reasons=REASONS[reasons],
        top=_top(entry, new),
        logits=logits,
        prompt=prompt,
    )


def _top(entry: RingEntry, which: NDArray[np.bool_]) -> TopLogprobs | None:
    counts = entry.top_counts[which]
    if not counts.any():
        return None
    most = int(counts.max())
    ids, logprobs = entry.top_ids[which, :most], entry.top_logprobs[which, :most]
    beyond = np.arange(most) >= counts[:, None]
    return TopLogprobs(
        counts, np.where(beyond, np.int32(-1), ids), np.where(beyond, np.float32(-np.inf), logprobs)
    )
