"""Pages that later prompts find: the same bits as without, never the wrong page, no leak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime import Runtime, SamplingParams
from runtime.pages import OutOfPages, PagePool
from runtime.prefix_cache import DigestChain, PrefixCache
from runtime.scheduler import SchedulerConfig
from tests.cpu.twins import PAGE, VOCAB, load_micro
from tests.fake_device import FakeConfig, FakeDevice, FakeModel, answer
from tests.serving import Request, alone, serve

# ------------------------------------------------------------------ names


def names(tokens: list[int], salt: bytes = b"", size: int = 4) -> list[bytes]:
    return DigestChain(salt).upto(len(tokens) // size, np.array(tokens, np.int32), size)


def test_a_name_depends_on_every_token_before_and_on_the_salt() -> None:
    whole = names([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert len(whole) == 2
    assert names([1, 2, 3, 4, 5, 6, 7, 8]) == whole, "not on what follows"
    assert names([1, 2, 3, 4, 5, 6, 7, 9])[:1] == whole[:1]
    others = [names([0, 2, 3, 4, 5, 6, 7, 8]), names([1, 2, 3, 4, 5, 6, 7, 8], b"adapter")]
    assert not {*others[0], *others[1]} & {*whole}
    assert names([5, 6, 7, 8])[0] != whole[1]


def test_a_chain_is_extended_not_made_anew() -> None:
    chain = DigestChain(b"")
    first = list(chain.upto(1, np.arange(4, dtype=np.int32), 4))
    assert chain.upto(2, np.arange(8, dtype=np.int32), 4) == names(list(range(8)))
    assert chain.upto(1, np.arange(8, dtype=np.int32), 4) == first


# ------------------------------------------------------------------ the pool, in any order

ROWS, PAGES, SIZE = 4, 10, 4


class Pool(RuleBasedStateMachine):
    """Rows come with prompts of few kinds, name their full pages, and go.

    The model remembers what each page was written with: a page found must hold what it is asked
    for, and one that is given out is nobody else's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES, SIZE, PrefixCache())
        self.rows: dict[int, list[int]] = {}  # tokens by row
        self.written: dict[int, tuple[int, ...]] = {}  # page -> every token up to its last

    @precondition(lambda self: len(self.rows) < ROWS)
    @rule(kinds=st.lists(st.integers(0, 1), min_size=1, max_size=4), more=st.integers(1, SIZE - 1))
    def admit(self, kinds: list[int], more: int) -> None:
        row = next(row for row in range(ROWS) if row not in self.rows)
        tokens = [kind for kind in kinds for _ in range(SIZE)] + [7] * more
        shared = self.pool.cache.find(names(tokens))
        for index, page in enumerate(shared):
            assert self.written[page] == tuple(tokens[: (index + 1) * SIZE]), "the wrong page"
        room = self.pool.has_room(self.pool.pages_for(len(tokens)), shared)
        self.pool.share(row, shared)
        before = {page for r in self.rows for page in self.pool.held(r)} | set(shared)
        try:
            self.pool.grow(row, len(tokens))
        except OutOfPages:
            assert not room
            self.pool.release(row)
            return
        assert room
        self.rows[row] = tokens
        for index, page in enumerate(self.pool.held(row)):
            if index >= len(shared):
                assert page not in before, "somebody else's page"
                self.written[page] = tuple(tokens[: (index + 1) * SIZE])

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def name(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.rows)))
        for index, digest in enumerate(names(self.rows[row])):
            self.pool.name(row, index, digest)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def take_over(self, data: st.DataObject) -> None:
        """A row that has not begun swaps its own pages for those found since."""
        row = data.draw(st.sampled_from(sorted(self.rows)))
        for index, page in enumerate(self.pool.cache.find(names(self.rows[row]))):
            assert self.written[page] == self.written[self.pool.held(row)[index]]
            if page != self.pool.held(row)[index]:
                self.pool.swap(row, index, page)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), forget=st.booleans())
    def leave(self, data: st.DataObject, forget: bool) -> None:
        row = data.draw(st.sampled_from(sorted(self.rows)))
        if forget:
            self.pool.forget(row)
        self.pool.release(row)
        del self.rows[row]

    @rule()
    def forget_all(self) -> None:
        self.pool.forget_all()
        assert len(self.pool.cache) == self.pool.num_cached == 0

    @invariant()
    def every_page_is_free_idle_or_held(self) -> None:
        pool = self.pool
        held = [page for row in self.rows for page in pool.held(row)]
        everywhere = [*set(held), *pool.cache.idle, *pool._free]
        assert sorted(everywhere) == list(range(1, PAGES))
        assert all(pool.refs(page) == held.count(page) for page in range(PAGES))
        for row, tokens in self.rows.items():
            for index, page in enumerate(pool.held(row)):
                assert self.written[page] == tuple(tokens[: (index + 1) * SIZE]), "overwritten"
        assert pool.num_free == pool.capacity - len(set(held))
        assert [row for row in range(ROWS) if pool.held(row)] == sorted(self.rows)


TestPool = Pool.TestCase
TestPool.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


def test_the_page_used_longest_ago_goes_first_and_ends_before_beginnings() -> None:
    pool = PagePool(7, SIZE, PrefixCache())
    for row, kind in enumerate((0, 1)):
        pool.grow(row, 2 * SIZE)
        for index, digest in enumerate(names([kind] * 2 * SIZE)):
            pool.name(row, index, digest)
    first, second = list(pool.held(0)), list(pool.held(1))
    pool.release(0)
    pool.release(1)
    pool.grow(2, 4 * SIZE)  # two free ones, then two of the first prefix
    assert pool.held(2)[2:] == first[::-1]
    pool.grow(3, SIZE)
    assert pool.held(3) == second[1:]
    assert pool.cache.evictions == 3
    assert pool.cache.find(names([1] * 2 * SIZE)) == second[:1]


# ------------------------------------------------------------------ requests


def make(*, pages: int = 33, ladder: str = "1,2,8,8+16", **config: Any) -> Runtime:
    device = FakeDevice(FakeConfig(num_pages=pages), ladder)
    return Runtime(device, SchedulerConfig(**config))  # type: ignore[arg-type]


def params(most: int) -> SamplingParams:
    return SamplingParams(max_tokens=most, ignore_eos=True)


def tokens_of(runtime: Runtime, ids: list[int], most: int, **more: Any) -> list[int]:
    request = runtime.submit(ids, params(most), **more)
    got: list[int] = []
    while runtime.num_running:
        if runtime.num_in_flight < 2:  # steps of an earlier request may be under way
            runtime.launch()
        out = runtime.collect()
        got += out.tokens[out.requests == request].tolist()
    return got


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 60])
def test_a_prompt_seen_before_computes_its_last_page_only(length: int) -> None:
    runtime = make()
    ids = np.random.default_rng(length).integers(0, FakeModel.vocab_size, length).tolist()
    want = answer(ids, 3, FakeModel.vocab_size)[0]
    assert tokens_of(runtime, ids, 3) == want
    cold = runtime.stats()
    assert (cold.prefix_hits, cold.tokens_prefilled) == (0, length)
    assert tokens_of(runtime, ids, 3) == want
    hits = (length - 1) // 16  # the last token is computed always: it gives the first new one
    warm = runtime.stats()
    assert warm.prefix_hits == hits
    assert warm.prefix_misses == hits
    assert warm.tokens_prefilled == 2 * length - 16 * hits


def test_what_was_generated_is_found_too() -> None:
    """The next turn of a conversation: prompt, answer, and a new question."""
    runtime = make()
    ids = list(range(20))
    ids += tokens_of(runtime, ids, 30)
    before = runtime.stats().tokens_prefilled
    ids += [1, 2, 3]
    assert tokens_of(runtime, ids, 4) == answer(ids, 4, FakeModel.vocab_size)[0]
    # 49 tokens have KV, the last one given does not: three full pages.
    assert runtime.stats().tokens_prefilled - before == 53 - 48


def test_off_finds_nothing_and_keeps_nothing() -> None:
    runtime = make(prefix_cache=False)
    for _ in range(2):
        tokens_of(runtime, [5] * 50, 3)
    stats = runtime.stats()
    assert (stats.prefix_hits, stats.prefix_misses, stats.pages_cached) == (0, 0, 0)
    assert stats.tokens_prefilled == 100


def test_another_salt_shares_nothing() -> None:
    runtime = make()
    for salt in ("", "adapter 1", "adapter 2"):
        tokens_of(runtime, [5] * 50, 3, cache_salt=salt)
    assert runtime.stats().prefix_hits == 0
    tokens_of(runtime, [5] * 50, 3, cache_salt="adapter 1")
    assert runtime.stats().prefix_hits == 3


def test_rows_that_run_together_share_their_beginning() -> None:
    runtime = make(pages=12)
    system = [3] * 48
    prompts = [[*system, i, i + 1] for i in range(6)]
    first = runtime.submit(prompts[0], params(30))
    for _ in range(4):
        runtime.step()
    others = [runtime.submit(ids, params(8)) for ids in prompts[1:]]
    runtime.step()
    # Five pages of the first, and one more for each other: eleven pages in all hold six rows.
    assert runtime.stats().pages_used == 5 + 5
    got: dict[int, list[int]] = {}
    while runtime.num_running:
        out = runtime.step()
        for request, token in zip(out.requests.tolist(), out.tokens.tolist(), strict=True):
            got.setdefault(request, []).append(token)
    for request, ids in zip(others, prompts[1:], strict=True):
        assert got[request] == answer(ids, 8, FakeModel.vocab_size)[0][-len(got[request]) :]
    assert first in got


def test_a_row_that_waited_takes_over_what_was_computed_meanwhile() -> None:
    """All are given rows at once; who is fed later finds the first one's pages."""
    runtime = make(prefill_budget=16)
    ids = [4] * 80
    for _ in range(3):
        runtime.submit(ids, params(2))
    for _ in range(30):
        runtime.step()
    assert runtime.num_running == 0
    assert runtime.stats().prefix_hits >= 1


def test_more_cached_pages_than_a_mailbox_takes() -> None:
    """Fifteen pages and room for four a step: the table is sent first, the prompt after it."""
    device = FakeDevice(FakeConfig(max_rows=2, max_seq_len=256, num_pages=40), "2,2+2")
    runtime = Runtime(device)  # type: ignore[arg-type]
    ids = list(range(90)) + list(range(90)) + list(range(65))
    want = answer(ids, 5, FakeModel.vocab_size)[0]
    assert tokens_of(runtime, ids, 5) == want
    steps = runtime.stats().steps
    assert tokens_of(runtime, ids, 5) == want
    stats = runtime.stats()
    assert stats.prefix_hits == 15
    assert stats.steps - steps <= 4 + 2 + 5


@pytest.mark.parametrize("in_flight", [0, 1, 2])
@pytest.mark.parametrize("after", [1, 2, 3, 20])
def test_a_cancelled_row_leaves_only_what_is_computed(in_flight: int, after: int) -> None:
    runtime = make()
    ids = list(range(60))
    request = runtime.submit(ids, params(36))
    for _ in range(after):
        runtime.step()
    for _ in range(in_flight):
        runtime.launch()
    runtime.cancel_request(request)
    more = [*ids, *answer(ids, 30, FakeModel.vocab_size)[0]]
    for n in (61, 90):  # as long as what was cancelled may have computed, and longer
        assert tokens_of(runtime, more[:n], 3) == answer(more[:n], 3, FakeModel.vocab_size)[0]
    assert runtime.stats().prefix_hits


def test_what_made_a_row_fail_is_not_kept() -> None:
    device = FakeDevice(FakeConfig(), "1,2,8,8+16")
    runtime = Runtime(device)  # type: ignore[arg-type]
    settle = device._settle

    def failing(row: Any, token: Any, logprob: Any) -> None:
        settle(row, token, logprob)
        slot = device.ring[(device.step - 1) % len(device.ring)]
        for field, value in ((1, -1), (3, 4)):  # token -1, reason `error`
            slot[8 + field * 8 : 8 + field * 8 + len(row)] = value
        device.phase[row] = 0

    device._settle = failing  # type: ignore[method-assign]
    runtime.submit([6] * 16, params(5))
    out = runtime.step()
    assert out.finish_reasons.tolist() == ["error"]
    assert runtime.stats().pages_cached == 0
    assert runtime.stats().finished["error"] == 1


def test_occupied_rows_are_neither_found_nor_find() -> None:
    runtime = make()
    tokens_of(runtime, [0] * 40, 2)
    runtime.occupy(2, 40, 3)
    while runtime.num_running:
        runtime.step()
    stats = runtime.stats()
    assert stats.prefix_hits == 0
    assert stats.pages_cached == 2, "the two of the first request alone"


# ------------------------------------------------------------------ bits, on the twin


def test_a_cached_prefix_gives_the_same_bits(checkpoint: Path) -> None:
    """One key for every step, as the twin's bits hold only within a key."""
    rng = np.random.default_rng(4)
    system = tuple(rng.integers(0, VOCAB, 2 * PAGE + 3).tolist())
    requests = [
        Request((*system, *rng.integers(0, VOCAB, n).tolist()), 12) for n in (1, 5, 12, 13, 14, 30)
    ]
    with load_micro(checkpoint, ladder="6+10", prefix_cache=False) as runtime:
        want = alone(runtime, requests)
        assert runtime.stats().prefix_hits == 0
    with load_micro(checkpoint, ladder="6+10") as runtime:
        first = alone(runtime, requests)
        hits = runtime.stats().prefix_hits
        assert hits >= 2 * (len(requests) - 1)
        again = serve(runtime, requests, ahead=2)
        assert runtime.stats().prefix_hits > hits
    assert [a.bits for a in first] == [a.bits for a in want]
    assert [a.bits for a in again] == [a.bits for a in want]


def test_a_preempted_request_gives_the_same_bits(checkpoint: Path) -> None:
    rng = np.random.default_rng(5)
    requests = [Request(tuple(rng.integers(0, VOCAB, 14 + i).tolist()), 40) for i in range(4)]
    with load_micro(checkpoint, ladder="6+10", prefix_cache=False) as runtime:
        want = alone(runtime, requests)
    for prefix_cache in (False, True):
        options: dict[str, Any] = {"num_pages": 10, "reservation": "lazy"}
        with load_micro(checkpoint, ladder="6+10", prefix_cache=prefix_cache, **options) as runtime:
            ids = [runtime.submit(r.prompt, r.params) for r in requests]
            got: dict[int, tuple[list[int], list[np.float32]]] = {i: ([], []) for i in ids}
            while runtime.num_running:
                out = runtime.step()
                columns = (out.requests.tolist(), out.tokens.tolist(), out.logprobs)
                for request, token, logprob in zip(*columns, strict=True):
                    got[request][0].append(token)
                    got[request][1].append(logprob)
            assert runtime.stats().preemptions
        for i, answer_ in zip(ids, want, strict=True):
            assert got[i] == (answer_.tokens, answer_.logprobs)
