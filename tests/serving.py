"""Drives a runtime the way tests need it: requests in, whole answers out. Any device."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime import Runtime, SamplingParams, StepOutput


@dataclass(frozen=True)
class Request:
    """One prompt and what is wanted of it; the model's own stop ids are ignored."""

    prompt: tuple[int, ...]
    max_tokens: int = 16
    stops: tuple[int, ...] = ()

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(self.max_tokens, stop_token_ids=self.stops, ignore_eos=True)


@dataclass
class Answer:
    """All that came of one request."""

    row: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[np.float32] = field(default_factory=list)
    reason: str = ""

    @property
    def bits(self) -> str:
        """Digest of tokens and log-probs, bit for bit."""
        tokens, logprobs = np.array(self.tokens, np.int32), np.array(self.logprobs, np.float32)
        return hashlib.sha256(tokens.tobytes() + logprobs.tobytes()).hexdigest()[:16]


def make_requests(
    rng: np.random.Generator, lengths: Iterable[int], vocab: int, max_tokens: Sequence[int]
) -> list[Request]:
    """Random prompts of these lengths; `max_tokens` is dealt out in turn."""
    return [
        Request(tuple(rng.integers(0, vocab, n).tolist()), max_tokens[i % len(max_tokens)])
        for i, n in enumerate(lengths)
    ]


class Book:
    """Sorts a runtime's outputs by request."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self._of_row: dict[int, Answer] = {}

    def opened(self, row: int) -> Answer:
        assert row not in self._of_row, f"row {row} was given out twice"
        answer = Answer(row)
        self.answers.append(answer)
        self._of_row[row] = answer
        return answer

    def dropped(self, row: int) -> None:
        del self._of_row[row]

    def add(self, out: StepOutput) -> None:
        fields = (out.rows, out.tokens, out.logprobs, out.finished, out.finish_reasons)
        for row, token, logprob, finished, reason in zip(*fields, strict=True):
            answer = self._of_row[int(row)]
            answer.tokens.append(int(token))
            answer.logprobs.append(logprob)
            answer.reason = str(reason)
            assert bool(finished) == bool(reason)
            if finished:
                self.dropped(int(row))


def serve(
    runtime: Runtime, requests: Sequence[Request], *, ahead: int = 1, most: int | None = None
) -> list[Answer]:
    """Answer all requests in order, each joining as soon as a row is free.

    Args:
        ahead: steps in flight.
        most: rows in use at most; by default all of them.
    """
    book, waiting = Book(), deque(requests)
    most = runtime.config.max_rows if most is None else most
    while waiting or runtime.num_running or runtime.num_in_flight:
        while waiting and runtime.num_running < most:
            request = waiting.popleft()
            book.opened(runtime.add(request.prompt, request.params))
        while runtime.num_in_flight < ahead and runtime.num_running:
            runtime.launch()
        book.add(runtime.collect())
    return book.answers


def alone(runtime: Runtime, requests: Sequence[Request]) -> list[Answer]:
    """Answer each request with nothing else running."""
    return [serve(runtime, [request])[0] for request in requests]
