"""What a request may ask for, and what a step gives back.

Invariant: whatever a `SamplingParams` holds can be honoured; a value outside its range, of a wrong
type or at odds with another is refused when it is made, and what depends on the model is refused by
`Runtime.add`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture_cache.dataclass import dataclass
from kernels.triton.state import MAX_BIASES, MAX_STOP_LENGTH, MAX_STOP_SEQUENCES, MAX_TOP
from runtime.other_engines import unknown_setting

FINISH_REASONS = ("", "stop", "length", "cancelled", "error", "deadline")
LOGPROBS_MODES = ("raw", "processed")
MAX_SEED = 2**63 - 1
MAX_DEADLINE_MS = 86_400_000  # a day

# Bundles of settings; whatever is given beside the name replaces its part.
PROFILES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "production_generate": {"temperature": 1.0, "top_p": 0.95},
        "rl_sample": {"temperature": 1.0, "logprobs_mode": "processed"},
        "eval_exact": {"temperature": 0.0, "return_logits": True},
        "online_distill": {"temperature": 1.0, "logprobs": 10},
        "offline_distill": {"temperature": 0.0, "logprobs": MAX_TOP, "return_logits": True},
    }
)


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. Whatever is on, the request's bits depend on it alone.

    Attributes:
        max_tokens: new tokens at most.
        temperature: 0.0 is greedy, which then ignores top_k, top_p, min_p and seed.
        top_k, top_p, min_p: 0 (or -1), 1.0 and 0.0 switch them off. `min_p` is relative to the best
            token's probability.
        seed: of the request's own random numbers; None takes one from the operating system, which
            `Runtime.seed_of` reports.
        stop_token_ids: the request ends with reason `stop` after one of these (it is returned too).
        logprobs: number of most probable tokens to return beside the token's own log-probability;
            None is 0.
        forced_tokens: tokens to append instead of sampled ones (teacher forcing); what they would
            have ended ends the request too. Once they are used up, sampling goes on.
        ignore_eos: do not end at the model's own end-of-sequence tokens.
        min_tokens: no stop id, stop sequence or end-of-sequence token ends the request before so
            many tokens; stop ids cannot be sampled until then.
        repetition_penalty: above 1.0 makes tokens of prompt and output less likely; 1.0 is off.
        presence_penalty, frequency_penalty: taken from the logits of tokens of the output, once and
            once per occurrence.
        logit_bias: token id → what is added to its logit; -inf forbids it.
        stop_sequences: the request ends with reason `stop` once its own output ends with one.
        prompt_logprobs: None: none. Else the log-probability of every prompt token but the first,
            with this many most probable tokens beside it (True is 0).
        return_logits: return the model's logits of every new token, before any setting.
        logprobs_mode: "raw" is the model's own distribution; "processed" the one that is sampled,
            after penalties, bias, mask, temperature and filters. Nothing samples a prompt: its
            log-probs are raw.
        deadline_ms: the request ends with reason `deadline` after the first token that comes later
            than this after `Runtime.add`; the device's clock decides.
    Raises:
        TypeError: a value of a wrong type, or a setting that there is not.
        ValueError: a value outside its range, or at odds with another.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = 0
    forced_tokens: tuple[int, ...] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    prompt_logprobs: int | None = None
    return_logits: bool = False
    logprobs_mode: str = "raw"
    deadline_ms: int | None = None

    def __new__(cls, *_: Any, **settings: Any) -> SamplingParams:  # noqa: PYI034
        # Before the generated __init__, which would only say that it does not know the name.
        for name in settings:
            if name not in cls.__dataclass_fields__:
                raise TypeError(unknown_setting(name, [f.name for f in fields(cls)]))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_switches()
        self._check_lists()

    def _check_numbers(self) -> None:
        _whole(self, "max_tokens", 1)
        _whole(self, "min_tokens", 0, self.max_tokens, "0 to max_tokens")
        if self.logprobs is None:  # other engines' spellings of "none" and "all"
            object.__setattr__(self, "logprobs", 0)
        if type(self.top_k) is int and self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _whole(self, "top_k", 0, what="0 (off) or more")
        _whole(self, "logprobs", 0, MAX_TOP)
        _whole(self, "seed", 0, MAX_SEED, "None or in [0, 2**63)", optional=True)
        _whole(self, "deadline_ms", 1, MAX_DEADLINE_MS, optional=True)
        if isinstance(self.prompt_logprobs, bool):
            object.__setattr__(self, "prompt_logprobs", 0 if self.prompt_logprobs else None)
        _whole(self, "prompt_logprobs", 0, MAX_TOP, optional=True)
        _real(
            self, "temperature", lambda v: v == 0.0 or 1e-5 <= v <= 100.0, "0.0 or in [1e-5, 100]"
        )
        _real(self, "top_p", lambda v: 0.0 < v <= 1.0, "in (0, 1]")
        _real(self, "min_p", lambda v: 0.0 <= v <= 1.0, "in [0, 1]")
        _real(self, "repetition_penalty", lambda v: 0.01 <= v <= 100.0, "in [0.01, 100]")
        for name in ("presence_penalty", "frequency_penalty"):
            _real(self, name, lambda v: -2.0 <= v <= 2.0, "in [-2, 2]")

    def _check_switches(self) -> None:
        for name in ("ignore_eos", "return_logits"):
            value = getattr(self, name)
            if not isinstance(value, bool | np.bool_):
                raise TypeError(f"{name} must be True or False, got {value!r}")
            object.__setattr__(self, name, bool(value))
        if self.logprobs_mode not in LOGPROBS_MODES:
            raise ValueError(
                f"logprobs_mode must be one of {', '.join(LOGPROBS_MODES)}, got "
                f"{self.logprobs_mode!r}"
            )

    def _check_lists(self) -> None:
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        if self.forced_tokens is not None:
            forced = _ids("forced_tokens", self.forced_tokens)
            if not 1 <= len(forced) <= self.max_tokens:
                raise ValueError(
                    f"forced_tokens must hold 1 to max_tokens ({self.max_tokens}) tokens, got "
                    f"{len(forced)}; set max_tokens={max(1, len(forced))} or leave them out"
                )
            object.__setattr__(self, "forced_tokens", forced)
        object.__setattr__(self, "stop_sequences", _sequences(self.stop_sequences))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @classmethod
    def profile(cls, name: str, **settings: Any) -> SamplingParams:
        """The settings of a named bundle (`PROFILES`), `settings` replacing their part of it.

        Raises:
            ValueError: no such profile; and as the constructor.
        """
        if not isinstance(name, str) or name not in PROFILES:
            raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {name!r}")
        return cls(**{**PROFILES[name], **settings})


def _whole(
    params: SamplingParams,
    name: str,
    low: int,
    high: int = 2**31 - 1,
    what: str = "",
    *,
    optional: bool = False,
) -> None:
    value = getattr(params, name)
    if value is None and optional:
        return
    if not what:
        what = f"at least {low}" if high == 2**31 - 1 else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        kind = TypeError if not isinstance(value, float) else ValueError
        raise kind(f"{name} must be a whole number, {what}; got {value!r}")
    if not low <= value <= high:
        most = f" and at most {high}" if value > high == 2**31 - 1 else ""
        raise ValueError(f"{name} must be {what}{most}, got {value!r}")
    object.__setattr__(params, name, int(value))


def _real(params: SamplingParams, name: str, ok: Any, what: str) -> None:
    value = getattr(params, name)
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be a number, {what}; got {value!r}")
    if isinstance(value, int) and abs(value) > 2**63:
        raise ValueError(f"{name} must be {what}, got a number beyond 2**63")
    if not ok(float(value)):  # NaN is in no range
        raise ValueError(f"{name} must be {what}, got {value!r}")
    object.__setattr__(params, name, float(value))


def _ids(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of token ids, got {value!r}")
    ids = tuple(value)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise TypeError(f"{name} must hold whole numbers, got {token!r}")
        if not 0 <= token < 2**31:
            raise ValueError(f"{name} must hold token ids of 0 or more, below 2**31, got {token!r}")
    return tuple(int(token) for token in ids)


def _sequences(value: object) -> tuple[tuple[int, ...], ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"stop_sequences must be a list of lists of token ids, got {value!r}")
    sequences = tuple(_ids("a stop sequence", sequence) for sequence in value)
    if len(sequences) > MAX_STOP_SEQUENCES:
        raise ValueError(
            f"stop_sequences must hold at most {MAX_STOP_SEQUENCES} sequences, got {len(sequences)}"
        )
    for sequence in sequences:
        if not 1 <= len(sequence) <= MAX_STOP_LENGTH:
            raise ValueError(
                f"a stop sequence must hold 1 to {MAX_STOP_LENGTH} tokens, got {len(sequence)}"
            )
    return sequences


def _biases(value: object) -> Mapping[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias must map token ids to numbers, got {value!r}")
    if len(value) > MAX_BIASES:
        raise ValueError(f"logit_bias must hold at most {MAX_BIASES} tokens, got {len(value)}")
    tokens = _ids("logit_bias", value)
    for token, bias in value.items():
        if isinstance(bias, bool) or not isinstance(bias, int | float | np.integer | np.floating):
            raise TypeError(f"logit_bias[{token}] must be a number, got {bias!r}")
        if not (bias == -math.inf or -1e6 <= bias <= 1e6):
            raise ValueError(f"logit_bias[{token}] must be -inf or in [-1e6, 1e6], got {bias!r}")
    return {t: float(b) for t, b in zip(tokens, value.values(), strict=True)}


@dataclass(frozen=True)
class TopLogprobs:
    """The most probable tokens beside each entry of an output, best first.

    Attributes:
        counts: int32 [n], how many each entry asked for; what lies beyond is -1 and -inf.
        ids: int32 [n, k], k the largest count; equal log-probs have the lower id first.
        logprobs: float32 [n, k].
    """

    counts: NDArray[np.int32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probs of prompt tokens, delivered by the step that computed them; parallel arrays.

    Attributes:
        rows, positions, tokens: int32 [n]; position of the token in its prompt, never 0.
        requests: int64 [n], the request's id.
        logprobs: float32 [n], of the token given all before it.
        top: None unless a row of this step asked for alternatives.
    """

    rows: NDArray[np.int32]
    requests: NDArray[np.int64]
    positions: NDArray[np.int32]
    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    top: TopLogprobs | None = None


@dataclass(slots=True)  # not frozen: one is made each step, and freezing triples what that takes
class StepOutput:
    """What one step produced: parallel arrays, one entry per new token.

    Attributes:
        step: number of the step, from 0.
        rows: int32 [n], the request's row.
        requests: int64 [n], the request's id.
        tokens: int32 [n].
        logprobs: float32 [n], natural log of the token's probability; of which distribution says
            the request's `logprobs_mode`.
        finished: bool [n], whether the request ended with this token.
        finish_reasons: str [n]: "" while running, else `stop`, `length`, `deadline` or `error`. An
            `error` entry (logits not finite, or a mask that allows nothing) has token -1 and
            log-prob NaN. A cancelled row has no entry.
        top: None unless a row asked for alternatives.
        logits: float32 [vocab] by row, for the rows that asked for them.
        prompt: None unless a prompt asked for its log-probs in this step.
    """

    step: int
    rows: NDArray[np.int32]
    requests: NDArray[np.int64]
    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finished: NDArray[np.bool_]
    finish_reasons: NDArray[np.str_]
    top: TopLogprobs | None = None
    logits: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    prompt: PromptLogprobs | None = None

    def __len__(self) -> int:
        return len(self.rows)


_ONE_PROMPT = "give several prompts one by one, each a flat list on the host"


def _shown(value: object) -> str:
    """What was given, for a message, in a line."""
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 80 else f"{text[:76]} ..."


def as_token_ids(prompt: Sequence[int] | NDArray[np.integer[Any]], vocab: int) -> NDArray[np.int32]:
    """A prompt as int32 [n].

    Raises:
        ValueError: empty, not whole numbers, or an id outside [0, vocab).
    """
    form = "a prompt is a non-empty list of token ids"
    if isinstance(prompt, str | bytes):
        raise ValueError(f"{form}, got text; tokenise it with the model's own tokenizer")
    try:
        ids = np.asarray(prompt)
    except (ValueError, TypeError) as error:  # ragged, or an array that is not on the host
        raise ValueError(f"{form}, got {_shown(prompt)}; {_ONE_PROMPT}") from error
    if ids.ndim > 1:
        raise ValueError(f"{form}, got shape {ids.shape}; {_ONE_PROMPT}")
    if ids.ndim == 0 or ids.size == 0:
        raise ValueError(f"{form}, got {_shown(prompt)}; give at least one token, in a list")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"token ids must be whole numbers below {vocab}, got {_shown(prompt)}; convert them "
            "with int()"
        )
    bad = np.flatnonzero((ids < 0) | (ids >= vocab))
    if bad.size:
        raise ValueError(
            f"token id {int(ids[bad[0]])} at position {int(bad[0])} is outside the vocabulary "
            f"[0, {vocab}); tokenise with the model's own tokenizer"
        )
    return ids.astype(np.int32)
