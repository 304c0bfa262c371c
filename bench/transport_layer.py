"""One layer of one mode at one size: checked, captured part by part, ready to replay."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from barriers.rdep_ref import quantize_ref, relative_error
from barriers.transport import TransportConfig
from bench.transport_cases import (
    Tokens,
    make_gains,
    make_tokens,
    oracle,
    reference,
    run_experts,
    wire_bytes,
)
from bench.transport_modes import Calls, Subject
from bench.transport_timing import Aligner, Spread, TimedGraph


@dataclass(frozen=True)
class Plan:
    """What is sent, and how often.

    Attributes:
        inner: calls in a graph, an even number.
        replays: of each graph, in `rounds` rounds.
        prequantized: dispatch e4m3 tokens, as the decode step does.
        routing, routing_file: as in `bench.routing`.
    """

    inner: int
    replays: int
    rounds: int
    prequantized: bool
    routing: str
    routing_file: Path | None

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= self.replays or self.inner < 2 or self.inner % 2:
            raise ValueError(
                "expected at least one replay a round and an even number of calls in a graph, got "
                f"--rounds {self.rounds}, --replays {self.replays}, --inner {self.inner}"
            )

    @property
    def share(self) -> int:
        """Replays of a round."""
        return -(-self.replays // self.rounds)

    def tokens(
        self, config: TransportConfig, rank: int, count: int, device: torch.device
    ) -> Tokens:
        """Of `rank`, the same whoever makes them."""
        return make_tokens(
            config, rank, count, device, routing=self.routing, path=self.routing_file
        )


class TimedLayer:
    """Checks a layer and captures its parts.

    Args:
        count: rows on every rank.
    """

    def __init__(self, subject: Subject, plan: Plan, count: int, aligner: Aligner) -> None:
        self.subject = subject
        config = subject.transport.config
        every = [plan.tokens(config, r, count, aligner.device) for r in range(config.world)]
        own, gains = every[config.rank], make_gains(config, aligner.device)
        self.layer = Layer(subject, own, gains, prequantized=plan.prequantized)
        outs = [self.layer.whole().clone() for _ in range(3)]
        self._first = outs[0]
        self._facts: dict[str, Any] = {
            "rows": count,
            "rel_error": relative_error(outs[0], reference(config, own, gains)),
            "repeats": all(torch.equal(outs[0], o) for o in outs[1:]),
            "oracle_bits": torch.equal(outs[0], oracle(config, every, gains)[config.rank]),
            "bytes": wire_bytes(config, own.ids),
        }
        self._graphs: dict[str, tuple[TimedGraph, int]] = {}
        # A graph knows addresses only: what its calls read must live as long as it is replayed.
        self._parts = self.layer.parts()
        for part, calls in self._parts.items():
            calls.run()
            subject.finish()
            # A pool each: what a library's call leaves for its next one lies in its own graph.
            pool = aligner.new_pool()
            graph = aligner.capture(calls.run, plan.inner // calls.count, pool)
            self._graphs[part] = (graph, calls.count)
        self._finish = aligner.finish

    @property
    def graphs(self) -> list[TimedGraph]:
        """Of all parts."""
        return [graph for graph, _ in self._graphs.values()]

    def replay(self, replays: int) -> None:
        """Some replays of each part."""

        def finish() -> None:
            self.subject.finish()
            self._finish()

        for graph in self.graphs:
            graph.replay(replays, finish)

    def case(self, taken_off: float) -> dict[str, Any]:
        """What was found; the result once more, after all the replays."""
        again = self.layer.whole()
        us = {
            part: asdict(Spread.of([t / count for t in graph.times], taken_off / count))
            for part, (graph, count) in self._graphs.items()
        }
        repeats = self._facts["repeats"] and torch.equal(again, self._first)
        return {**self._facts, "repeats": repeats, "us": us}

    def close(self) -> None:
        """Give the graphs' memory back."""
        for graph in self.graphs:
            graph.close()


class Layer:
    """One layer's calls on one rank's tokens."""

    def __init__(
        self, subject: Subject, tokens: Tokens, gains: torch.Tensor, *, prequantized: bool
    ) -> None:
        self.subject, self.tokens, self.gains = subject, tokens, gains
        self.sent: tuple[torch.Tensor, torch.Tensor | None] = (tokens.x, None)
        if prequantized and not subject.transport.takes_act:
            self.sent = quantize_ref(tokens.x)
        self.out = torch.empty_like(tokens.x)
        self.received = self.dispatch()
        self.y = tokens.x.new_empty(self.received.ids.numel(), tokens.x.shape[1])
        self.whole_after_dispatch()

    def dispatch(self) -> Any:
        """As the step calls it."""
        t = self.tokens
        self.received = self.subject.transport.dispatch(*self.sent, t.ids, t.weights)
        return self.received

    def combine(self) -> None:
        """As the step calls it."""
        t = self.tokens
        self.subject.transport.combine(self.out, self.y, self.received, t.ids, t.shared)

    def both(self) -> None:
        """Without the experts."""
        self.dispatch()
        self.combine()

    def whole_after_dispatch(self) -> torch.Tensor:
        """Experts and combine; waits."""
        run_experts(self.subject.transport.config, self.received, self.gains, self.y)
        self.combine()
        self.subject.finish()
        return self.out

    def whole(self) -> torch.Tensor:
        """With its experts, for checking."""
        self.dispatch()
        return self.whole_after_dispatch()

    def parts(self) -> dict[str, Calls]:
        """What is timed."""
        if self.subject.upstream is not None:
            alone = self.subject.upstream(self.tokens, self.y)
            return {**alone, "step": Calls(self.both)}
        found = {"both": Calls(self.both)}
        if self.subject.separable:
            found |= {"dispatch": Calls(self.dispatch), "combine": Calls(self.combine)}
        if self.subject.sum_alone is not None:
            sum_alone = self.subject.sum_alone
            found["sum"] = Calls(lambda: sum_alone(self.y, self.received))
        return found
