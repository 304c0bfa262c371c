"""What a runtime has done and holds, in numbers that add up."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, field
from typing import TYPE_CHECKING, Any

from capture_cache.dataclass import dataclass
from runtime.sampling import FINISH_REASONS

if TYPE_CHECKING:
    from graphs.keys import GraphKey


@dataclass
class Counters:
    """Running sums; `RuntimeStats` explains them."""

    submitted: int = 0
    finished: dict[str, int] = field(
        default_factory=lambda: {reason: 0 for reason in FINISH_REASONS if reason}
    )
    preemptions: int = 0
    tokens_prefilled: int = 0
    tokens_decoded: int = 0
    prefix_hits: int = 0
    prefix_misses: int = 0
    longest_wait_steps: int = 0
    host_ns: int = 0
    steps_by_key: Counter[GraphKey] = field(default_factory=Counter)

    def count_lookup(self, found: int, asked: int) -> None:
        """A prompt of `asked` full pages found the first `found` of them in the prefix cache."""
        self.prefix_hits += found
        self.prefix_misses += asked - found


@dataclass(frozen=True)
class RuntimeStats:
    """One look at a runtime.

    submitted == waiting + running + the sum of `finished`, and pages_used + pages_cached +
    pages_free == pages_total.

    Attributes:
        submitted: requests taken, by `add` and by `submit`.
        waiting: of these, in the queue (preempted ones among them); running: in a row.
        finished: ended, by reason.
        in_flight: steps launched and not collected.
        pages_used: KV pages that rows hold; pages_cached: held by nobody and kept for later prompts
            that begin alike; pages_free: neither.
        prefix_hits, prefix_misses: full prompt pages that were found in the prefix cache, and that
            were not, counted when a row's first chunk is launched.
        prefix_evictions: pages that the cache gave up for new ones.
        preemptions: rows whose pages were taken; they were, or will be, computed again.
        tokens_prefilled: prompt tokens computed, recomputation after a preemption included.
        tokens_decoded: tokens returned by `collect`.
        longest_wait_steps: most steps between a request's `submit` and its row.
        steps: launched; steps_by_key: the same by graph key.
        host_us_per_step: mean of what `launch` and `collect` take, waiting for the device left out.
    """

    submitted: int
    waiting: int
    running: int
    finished: dict[str, int]
    in_flight: int
    pages_total: int
    pages_used: int
    pages_cached: int
    pages_free: int
    prefix_hits: int
    prefix_misses: int
    prefix_evictions: int
    preemptions: int
    tokens_prefilled: int
    tokens_decoded: int
    longest_wait_steps: int
    steps: int
    steps_by_key: dict[str, int]
    host_us_per_step: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
