"""Requests with every setting of the row contract, and all that came of each. Any device."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import Runtime, SamplingParams, StepOutput
from runtime.sampling import PROFILES, TopLogprobs


@dataclass(frozen=True)
class Ask:
    """One request; `mask` is set before its first step."""

    prompt: tuple[int, ...]
    params: SamplingParams
    mask: NDArray[np.int32] | None = None


@dataclass
class Got:
    """All that came of one request, as bits where it is a number.

    Attributes:
        tops: of each token, its alternatives (ids, log-prob bits).
        prompt: position → (token, log-prob bits, alternatives).
        logits: of each token, or nothing.
    """

    row: int
    seed: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[list[int], list[float]]] = field(default_factory=list)
    prompt: dict[int, tuple[int, float, tuple[list[int], list[float]]]] = field(
        default_factory=dict
    )
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    reason: str = ""

    @property
    def bits(self) -> tuple[Any, ...]:
        """Everything but row and seed, comparable bit for bit."""
        return (
            self.tokens,
            np.array(self.logprobs, np.float32).tobytes(),
            repr(self.tops),
            repr(sorted(self.prompt.items())),
            [line.tobytes() for line in self.logits],
            self.reason,
        )


def collect(out: StepOutput, answers: dict[int, Got]) -> None:
    """Sort one step's output by request; ended requests leave `answers`."""
    if out.prompt is not None:
        p = out.prompt
        for i, (row, pos) in enumerate(zip(p.rows.tolist(), p.positions.tolist(), strict=True)):
            assert pos not in answers[row].prompt, "a prompt token was scored twice"
            line = (int(p.tokens[i]), float(p.logprobs[i]), _top(p.top, i))
            answers[row].prompt[pos] = line
    assert len({*out.logits} - {*out.rows.tolist()}) == 0
    for i, row in enumerate(out.rows.tolist()):
        got = answers[row]
        got.tokens.append(int(out.tokens[i]))
        got.logprobs.append(float(out.logprobs[i]))
        got.tops.append(_top(out.top, i))
        if row in out.logits:
            got.logits.append(out.logits[row])
        got.reason = str(out.finish_reasons[i])
        assert bool(out.finished[i]) == bool(got.reason)
        if out.finished[i]:
            del answers[row]


def _top(top: TopLogprobs | None, i: int) -> tuple[list[int], list[float]]:
    if top is None:
        return [], []
    n = int(top.counts[i])
    assert (top.ids[i, n:] == -1).all()
    assert (top.logprobs[i, n:] == -np.inf).all()
    return top.ids[i, :n].tolist(), top.logprobs[i, :n].tolist()


def add(runtime: Runtime, ask: Ask) -> int:
    row = runtime.add(ask.prompt, ask.params)
    if ask.mask is not None:
        runtime.set_token_mask(row, ask.mask)
    return row


def ask_all(
    runtime: Runtime, asks: Sequence[Ask], *, ahead: int = 1, most: int | None = None
) -> list[Got]:
    """Answer all requests in order, each joining as soon as a row is free.

    Args:
        ahead: steps in flight.
        most: rows in use at most; by default all of them.
    """
    results: list[Got] = []
    answers: dict[int, Got] = {}
    waiting = deque(asks)
    most = runtime.config.max_rows if most is None else most
    while waiting or runtime.num_running or runtime.num_in_flight:
        while waiting and runtime.num_running < most:
            row = add(runtime, waiting.popleft())
            results.append(Got(row, runtime.seed_of(row)))
            answers[row] = results[-1]
        while runtime.num_in_flight < ahead and runtime.num_running:
            runtime.launch()
        collect(runtime.collect(), answers)
    return results


def first_end(tokens: list[int], sequence: list[int]) -> int:
    """Tokens up to and with the first occurrence of `sequence`."""
    for end in range(len(sequence), len(tokens) + 1):
        if tokens[end - len(sequence) : end] == sequence:
            return end
    raise AssertionError


def mask_of(allowed: Sequence[int], vocab: int) -> NDArray[np.int32]:
    """A token mask that allows these tokens."""
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


EVERYTHING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.9, "seed": 1},
    "top_k": {"temperature": 1.5, "top_k": 5, "seed": 2, "logprobs": 7},
    "top_p": {"temperature": 1.2, "top_p": 0.6, "seed": 3, "logprobs_mode": "processed"},
    "min_p": {"temperature": 2.0, "min_p": 0.2, "seed": 4, "logprobs": 20},
    "penalties": {
        "temperature": 0.7,
        "seed": 5,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logprobs": 3,
        "logprobs_mode": "processed",
    },
    "bias": {"logit_bias": {3: 4.0, 9: float("-inf"), 40: -2.5}, "logprobs": 4},
    "stops": {"min_tokens": 5, "stop_token_ids": (1, 2, 3, 4), "seed": 6, "temperature": 1.0},
    "sequences": {"stop_sequences": [[5], [6, 7]], "temperature": 1.0, "seed": 7},
    "scored prompt": {"prompt_logprobs": 2, "logprobs": 1},
    "logits": {"return_logits": True, "temperature": 1.0, "seed": 8},
    "patient": {"deadline_ms": 80_000_000},
    **{name: {"seed": 9 + i} for i, name in enumerate(PROFILES)},
}


def random_prompt(n: int, seed: int, vocab: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, vocab, n).tolist())


def everything(vocab: int, longest: int = 40) -> list[Ask]:
    """One request for each setting and profile, of all lengths up to `longest`."""
    asks = []
    for i, (name, settings) in enumerate(EVERYTHING.items()):
        make = SamplingParams.profile if name in PROFILES else SamplingParams
        chosen = {"max_tokens": 8 + i % 5, "ignore_eos": True} | settings
        args = (name,) if name in PROFILES else ()
        length = 1 + 7 * i % longest
        asks.append(Ask(random_prompt(length, i, vocab), make(*args, **chosen)))
    more: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
    masked = SamplingParams(**more, temperature=1.0, seed=30)
    mask = mask_of(range(0, vocab, 3), vocab)
    asks.append(Ask(random_prompt(9, 50, vocab), masked, mask))
    forced = SamplingParams(**more, forced_tokens=(1, 2, 3), logprobs=2)
    asks.append(Ask(random_prompt(9, 51, vocab), forced))
    return asks


def random_calls(runtime: Runtime, asks: Sequence[Ask], want: Sequence[Got], seed: int) -> int:
    """Random arrivals, steps and cancels; whatever comes has the bits that `want` has.

    Args:
        want: what each of `asks` gives alone.
    Returns:
        Requests that ran to their end.
    """
    rng = np.random.default_rng(seed)
    answers: dict[int, Got] = {}
    asked: dict[int, int] = {}
    ended = 0

    def check(out: StepOutput) -> int:
        running = dict(answers)
        collect(out, answers)
        for row in {*out.rows.tolist()}:
            got, whole = running[row], want[asked[row]]
            n = len(got.tokens)
            assert got.tokens == whole.tokens[:n], asks[asked[row]].params
            assert repr((got.logprobs, got.tops)) == repr((whole.logprobs[:n], whole.tops[:n]))
            assert row in answers or got.bits == whole.bits
        return len(running) - len(answers)

    for _ in range(400):
        call = rng.choice(["add", "launch", "collect", "cancel"], p=[0.25, 0.4, 0.3, 0.05])
        if call == "add" and runtime.num_running < runtime.config.max_rows:
            i = int(rng.integers(len(asks)))
            row = add(runtime, asks[i])
            answers[row], asked[row] = Got(row), i
        elif call == "launch" and runtime.num_in_flight < 2:
            runtime.launch()
        elif call == "collect" and runtime.num_in_flight:
            ended += check(runtime.collect())
        elif call == "cancel" and answers:
            row = int(rng.choice(list(answers)))
            runtime.cancel(row)
            del answers[row]
    while answers or runtime.num_in_flight:
        if not runtime.num_in_flight:
            runtime.launch()
        ended += check(runtime.collect())
    return ended
