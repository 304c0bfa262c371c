"""A long day of a runtime: arrivals, cancels in every state, too few pages, preemption, pauses.

`Soak` drives any runtime through `add`, `submit`, `launch`, `collect` and the rest, at random, and
checks every token against what its request must get, and every count against every other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from runtime import OutOfPages, Runtime, SamplingParams, StepOutput
from runtime.requests import DECODING, ENDING, PREFILLING, QUEUED, WAITING

STATES = {
    QUEUED: "queued",
    WAITING: "waiting",
    PREFILLING: "prefilling",
    DECODING: "decoding",
    ENDING: "ending",
}
Answers = Callable[[tuple[int, ...], int], tuple[list[int], list[np.float32]]]


@dataclass
class Owed:
    """A request that has not ended, and what it must still get."""

    tokens: list[int]
    logprobs: list[np.float32]
    reason: str
    came: int
    row: int
    given: int = 0


@dataclass
class Soak:
    """One runtime under a random day.

    Args:
        answers: tokens and log-probs of a prompt, alone.
        prefixes: beginnings that prompts share.
        tolerance: of log-probs; 0 demands the same bits.
        arrivals: requests that come per call of launch or collect, on average, as long as fewer
            than `most_waiting` wait.
        added: the share of them that comes by `add`, past the queue.
        num_prompts: different prompts at most; None: each request has its own.
    """

    runtime: Runtime
    answers: Answers
    seed: int
    arrivals: float
    tolerance: float = 0.0
    max_prompt: int = 60
    max_new: int = 24
    most_waiting: int = 24
    check_every: int = 50
    added: float = 0.25
    num_prompts: int | None = None
    owed: dict[int, Owed] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    longest_life: int = 0
    given: int = 0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        vocab, size = self.runtime.model_config.vocab_size, self.runtime.config.page_size
        lengths = (size, 2 * size, 2 * size + 5, 1)
        self.prefixes = [tuple(self.rng.integers(0, vocab, n).tolist()) for n in lengths]
        self.scheduler = self.runtime._scheduler

    def run(self, steps: int) -> None:
        """So many steps with arrivals, then whatever is left to its end."""
        while self.runtime._next_step < steps:
            dice = self.rng.random()
            if dice < self.arrivals and self.runtime.num_waiting < self.most_waiting:
                self.arrive()
            else:
                self.advance()
            if dice > 0.99:
                self.disturb()
            if self.runtime._next_step % self.check_every == 0:
                self.check()
        while self.runtime.num_running or self.runtime.num_in_flight:
            self.advance()
        self.runtime.step()  # carries the last cancels to the device
        self.check()
        stats = self.runtime.stats()
        assert not self.owed, f"never answered: {list(self.owed)}"
        assert stats.submitted == sum(stats.finished.values())
        assert stats.pages_used == 0
        horizon = stats.steps + self.runtime.config.max_seq_len
        for buckets in (self.scheduler._crossings, self.scheduler._endings):
            assert all(stats.steps <= step < horizon for step in buckets), "a bucket was missed"

    # -------------------------------------------------------------- calls

    def arrive(self) -> None:
        rng, prompt = self.rng, self.prompt()
        most = int(rng.integers(1, self.max_new + 1))
        tokens, logprobs = self.answers(prompt, most)
        reason, stops = "length", ()
        if rng.integers(3) == 0:
            stops = (tokens[rng.integers(most)],)
            cut = tokens.index(stops[0]) + 1
            tokens, logprobs, reason = tokens[:cut], logprobs[:cut], "stop"
        params = SamplingParams(max_tokens=most, stop_token_ids=stops, ignore_eos=True)
        if rng.random() < self.added:
            try:
                row = self.runtime.add(prompt, params)
            except OutOfPages as refusal:
                self.seen[type(refusal).__name__] += 1
                self.seen["add refused for the queue's sake"] += "in the queue" in str(refusal)
                return
            request = self.runtime.request_id(row)
        else:
            row, priority = -1, int(rng.choice([0, 0, 0, 1, -1, 5]))
            request = self.runtime.submit(prompt, params, priority)
        assert request not in self.owed, "an id was given twice"
        self.owed[request] = Owed(tokens, logprobs, reason, self.runtime._next_step, row)

    def prompt(self) -> tuple[int, ...]:
        """A random prompt, now and then one that has been seen before."""
        rng = self.rng
        if self.num_prompts is not None and len(self.prompts) == self.num_prompts:
            return self.prompts[rng.integers(self.num_prompts)]
        prefix = self.prefixes[rng.integers(len(self.prefixes))] if rng.integers(3) else ()
        more = int(rng.integers(1, max(2, self.max_prompt - len(prefix))))
        vocab = self.runtime.model_config.vocab_size
        prompt = (*prefix, *rng.integers(0, vocab, more).tolist())
        if self.num_prompts is not None:
            self.prompts.append(prompt)
        return prompt

    def advance(self) -> None:
        ahead = self.runtime.num_in_flight
        if ahead == 2 or (ahead and self.rng.integers(3) == 0):
            self.take(self.runtime.collect())
            return
        try:
            self.runtime.launch()
        except OutOfPages:  # only rows of `add` are left, and they cannot all go on
            self.seen["step out of pages"] += 1
            self.cancel_one()
        self.seen["ahead"] += self.runtime.num_in_flight == 2

    def take(self, out: StepOutput) -> None:
        assert len(set(out.requests.tolist())) == len(out)
        columns = (out.requests, out.rows, out.tokens, out.logprobs, out.finish_reasons)
        for request, row, token, logprob, reason in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            owed = self.owed[request]
            assert owed.row in (-1, row)
            assert token == owed.tokens[owed.given], f"request {request}, token {owed.given}"
            assert abs(logprob - float(owed.logprobs[owed.given])) <= self.tolerance
            owed.given += 1
            self.given += 1
            assert bool(reason) == (owed.given == len(owed.tokens))
            if reason:
                assert reason == owed.reason
                self.ended(request)

    def ended(self, request: int) -> None:
        owed = self.owed.pop(request)
        self.reasons[owed.reason] += 1
        self.longest_life = max(self.longest_life, self.runtime._next_step - owed.came)

    def drain(self) -> None:
        """Drain, making room for rows of `add` that cannot all go on."""
        gone: dict[int, Owed] = {}
        while True:
            try:
                outputs = self.runtime.drain()
                break
            except OutOfPages:
                self.seen["drain out of pages"] += 1
                before = dict(self.owed)
                self.cancel_one()
                gone |= {r: owed for r, owed in before.items() if r not in self.owed}
        self.owed |= gone  # what they had got before is returned, too
        for out in outputs:
            self.take(out)
        for request in gone:
            del self.owed[request]

    def cancel_one(self) -> None:
        if not self.owed:
            return
        by_phase: dict[int, list[int]] = {}
        for request, record in self.scheduler.by_id.items():
            by_phase.setdefault(record.phase, []).append(request)
        # Rare states as often as common ones.
        request = int(self.rng.choice(by_phase[int(self.rng.choice(list(by_phase)))]))
        record = self.scheduler.by_id[request]
        ahead = self.runtime.num_in_flight
        self.seen[f"cancelled {STATES[record.phase]}, {ahead} in flight"] += 1
        self.seen["cancelled after a preemption"] += record.preemptions > 0
        if self.owed[request].row >= 0:
            self.runtime.cancel(self.owed[request].row)
        else:
            self.runtime.cancel_request(request)
        self.runtime.cancel_request(request)  # twice is nothing
        self.reasons["cancelled"] += 1
        del self.owed[request]

    def disturb(self) -> None:
        """What happens now and then."""
        what = self.rng.integers(40)
        if what == 0:
            self.seen["drained"] += 1
            self.drain()
        elif what == 1:
            self.seen["paused"] += 1
            self.runtime.pause()
            self.cancel_one()
            self.runtime.resume()
        else:
            self.cancel_one()

    # -------------------------------------------------------------- invariants

    def check(self) -> None:
        """Every count against every other, and every page's owner."""
        stats, pool = self.runtime.stats(), self.runtime.pages
        assert stats.submitted == stats.waiting + stats.running + sum(stats.finished.values())
        assert stats.waiting + stats.running == len(self.owed) == self.runtime.num_running
        assert stats.pages_used + stats.pages_cached + stats.pages_free == stats.pages_total
        assert stats.tokens_decoded == self.given
        assert Counter(stats.finished) == self.reasons
        assert sum(stats.steps_by_key.values()) == stats.steps == self.runtime._next_step
        assert stats.in_flight == self.runtime.num_in_flight
        rows = range(self.runtime.config.max_rows)
        refs = Counter(page for row in rows for page in pool.held(row))
        idle, free = pool.cache.idle, pool._free
        assert len(refs) == stats.pages_used
        assert sorted([*refs, *idle, *free]) == list(range(1, pool.num_pages)), "a page was leaked"
        assert all(pool.refs(page) == refs[page] for page in range(pool.num_pages))
        assert all(page in pool.cache for page, n in refs.items() if n > 1)
        assert all(page in pool.cache for page in idle)
        taken = [request.row for request in self.scheduler.running()]
        assert sorted([*taken, *self.scheduler.free_rows]) == list(rows), "a row was leaked"
        assert [row for row in rows if pool.held(row)] == sorted(taken)
        assert set(self.scheduler.by_id) == set(self.owed)
        decoding = sum(q.phase == DECODING for q in self.scheduler.running())
        assert decoding == self.scheduler._num_decoding


def happenings(*, lazy: bool) -> list[str]:
    """What a long day must have met, or it shows nothing."""
    states = {"queued": 3, "waiting": 2, "prefilling": 3, "decoding": 3}
    names = [f"cancelled {s}, {n} in flight" for s, most in states.items() for n in range(most)]
    names += [f"cancelled ending, {n} in flight" for n in (1, 2)]  # by then its last is in flight
    names += ["ahead", "drained", "paused", "OutOfPages"]
    return names + ["cancelled after a preemption", "step out of pages"] * lazy
