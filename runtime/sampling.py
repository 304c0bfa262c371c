"""What a request may ask for, and what a step gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FINISH_REASONS = ("", "stop", "length", "cancelled", "error")


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded.

    Attributes:
        max_tokens: new tokens at most.
        temperature: 0.0 is greedy.
        top_k, top_p, min_p: 0, 1.0 and 0.0 switch them off.
        seed: of the request's own random numbers.
        stop_token_ids: the request ends with reason `stop` after one of these (it is returned too).
        logprobs: number of alternatives to return beside the token's own log-probability.
        forced_tokens: tokens to append instead of sampled ones (teacher forcing).
        ignore_eos: do not end at the model's own end-of-sequence tokens.
    Raises:
        ValueError: a value outside its range, or one that this version cannot honour.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int = 0
    forced_tokens: tuple[int, ...] | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name in ("max_tokens", "top_k", "logprobs", "seed"):
            value = getattr(self, name)
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            _check(name, value, whole or (name == "seed" and value is None), "a whole number")
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        _check("temperature", self.temperature, self.temperature >= 0.0, "0.0 or more")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "in (0, 1]")
        _check("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "in [0, 1]")
        _check("logprobs", self.logprobs, 0 <= self.logprobs <= 20, "in [0, 20]")
        # Greedy ignores the filters; anything that would change its tokens is refused, never
        # dropped.
        for name, asked, spelling in (
            ("temperature", self.temperature > 0.0, "0.0 (greedy)"),
            ("logprobs", self.logprobs > 0, "0 (the token's own log-prob is always returned)"),
            ("forced_tokens", self.forced_tokens is not None, "None"),
        ):
            if asked:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not supported by this version; use "
                    f"{spelling}"
                )


def _check(name: str, value: Any, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


@dataclass(frozen=True)
class StepOutput:
    """What one step produced: parallel arrays, one entry per new token.

    Attributes:
        step: number of the step, from 0.
        rows: int32 [n], the request's row.
        requests: int64 [n], the request's id.
        tokens: int32 [n].
        logprobs: float32 [n], natural log of the token's probability under the whole distribution.
        finished: bool [n], whether the request ended with this token.
        finish_reasons: str [n]: "" while running, else `stop`, `length` or `error`. An `error`
            entry (logits not finite) has token -1 and log-prob NaN. A cancelled row has no entry.
    """

    step: int
    rows: NDArray[np.int32]
    requests: NDArray[np.int64]
    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finished: NDArray[np.bool_]
    finish_reasons: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.rows)


def as_token_ids(prompt: Sequence[int] | NDArray[np.integer[Any]], vocab: int) -> NDArray[np.int32]:
    """A prompt as int32 [n].

    Raises:
        ValueError: empty, not whole numbers, or an id outside [0, vocab).
    """
    ids = np.asarray(prompt)
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(f"a prompt is a non-empty list of token ids, got shape {ids.shape}")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token ids must be whole numbers, got {ids.dtype}")
    bad = np.flatnonzero((ids < 0) | (ids >= vocab))
    if bad.size:
        raise ValueError(
            f"token id {int(ids[bad[0]])} at position {int(bad[0])} is outside the vocabulary "
            f"[0, {vocab}); tokenise with the model's own tokenizer"
        )
    return ids.astype(np.int32)
