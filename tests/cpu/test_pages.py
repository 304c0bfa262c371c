"""Who owns which page."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.pages import OutOfPages, OutOfRows, PagePool

ROWS = 5


def test_the_null_page_is_never_given_out() -> None:
    pool = PagePool(4, 16)
    pool.grow(0, 3 * 16)
    assert sorted(pool.held(0)) == [1, 2, 3]
    assert (pool.num_free, pool.capacity) == (0, 3)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert PagePool(9, 16).pages_for(tokens) == pages


def test_growing_keeps_the_pages_that_a_row_has_in_order() -> None:
    pool = PagePool(9, 16)
    pool.grow(3, 20)
    first = list(pool.held(3))
    pool.grow(4, 16)
    pool.grow(3, 60)
    assert pool.held(3)[:2] == first
    assert len(pool.held(3)) == 4
    pool.grow(3, 1)
    assert len(pool.held(3)) == 4, "a row never shrinks"


def test_what_was_grown_in_vain_goes_back() -> None:
    pool = PagePool(9, 16)
    pool.grow(3, 20)
    first, free = list(pool.held(3)), pool.num_free
    pool.grow(3, 60)
    pool.shrink(3, 2)
    assert (pool.held(3), pool.num_free) == (first, free)
    pool.shrink(3, 5)
    assert pool.held(3) == first, "it gives nothing"


def test_too_little_changes_nothing_and_says_what_would_do() -> None:
    pool = PagePool(4, 16)
    pool.grow(0, 17)
    before = list(pool.held(0))
    with pytest.raises(OutOfPages) as refusal:
        pool.grow(1, 33)
    assert str(refusal.value) == (
        "row 1 needs 3 more pages of 16 tokens and 1 of 3 are free; wait for a row to finish, "
        "cancel one, or raise --num-pages"
    )
    assert (pool.held(0), pool.held(1), pool.num_free) == (before, [], 1)


def test_releasing_twice_or_what_was_never_held_is_nothing() -> None:
    pool = PagePool(4, 16)
    pool.grow(0, 17)
    for row in (0, 0, 3):
        pool.release(row)
    assert (pool.num_free, pool.held(0)) == (3, [])


def test_out_of_rows_is_an_out_of_pages() -> None:
    assert issubclass(OutOfRows, OutOfPages)


class Pool(RuleBasedStateMachine):
    """Any order of calls: every page is free or held once, and a refusal changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12, 16)
        self.lengths = dict.fromkeys(range(ROWS), 0)

    @rule(row=st.integers(0, ROWS - 1), tokens=st.integers(0, 100))
    def grow(self, row: int, tokens: int) -> None:
        most = max(self.lengths[row], -(-tokens // 16))
        others = sum(n for r, n in self.lengths.items() if r != row)
        if most + others > self.pool.capacity:
            with pytest.raises(OutOfPages):
                self.pool.grow(row, tokens)
            return
        self.pool.grow(row, tokens)
        self.lengths[row] = most

    @rule(row=st.integers(0, ROWS - 1))
    def release(self, row: int) -> None:
        self.pool.release(row)
        self.lengths[row] = 0

    @invariant()
    def every_page_has_one_place(self) -> None:
        held = [page for row in range(ROWS) for page in self.pool.held(row)]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(1, 12))
        assert len(held) + self.pool.num_free == self.pool.capacity
        assert {r: len(self.pool.held(r)) for r in range(ROWS)} == self.lengths


TestPool = Pool.TestCase
TestPool.settings = settings(deadline=None)
