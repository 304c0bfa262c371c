"""Which graph a step takes: keys, ladders and the choice among them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.keys import GraphKey, Ladder, NotCaptured

keys = st.builds(
    lambda rows, more: GraphKey(rows + more, rows), st.integers(1, 64), st.integers(0, 600)
)


@pytest.mark.parametrize(("text", "tokens", "rows"), [("32", 32, 32), (" 8+64 ", 72, 8)])
def test_a_key_is_written_as_rows_plus_prompt_tokens(text: str, tokens: int, rows: int) -> None:
    key = GraphKey.parse(text)
    assert (key.tokens, key.rows) == (tokens, rows)
    assert str(key) == text.strip()


@pytest.mark.parametrize("text", ["", "+", "8+", "+8", "8+64+1", "8x", "-8", "8.0", "8 + -1"])
def test_a_malformed_key_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="neither ROWS nor ROWS\\+PROMPT_TOKENS"):
        GraphKey.parse(text)


@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (4, 5), (4, 0), (4, -1)])
def test_a_key_has_at_least_one_row_and_a_token_for_each(tokens: int, rows: int) -> None:
    with pytest.raises(ValueError, match=f"rows {rows}, tokens {tokens}"):
        GraphKey(tokens, rows)


@settings(deadline=None)
@given(keys)
def test_text_and_back(key: GraphKey) -> None:
    assert GraphKey.parse(str(key)) == key


@settings(deadline=None)
@given(st.lists(keys, min_size=1, max_size=8), st.integers(0, 700), st.integers(0, 70))
def test_select_takes_the_smallest_key_that_covers(
    captured: list[GraphKey], tokens: int, rows: int
) -> None:
    ladder = Ladder(captured)
    covering = [k for k in captured if k.tokens >= tokens and k.rows >= rows]
    if covering:
        assert ladder.select(tokens, rows) == min(covering, key=lambda k: (k.tokens, k.rows))
        return
    with pytest.raises(NotCaptured):
        ladder.select(tokens, rows)


def test_not_captured_names_bucket_ladder_and_the_flag_that_adds_it() -> None:
    with pytest.raises(NotCaptured) as refusal:
        Ladder.parse("1,2,8+64", 8).select(73, 5)
    assert str(refusal.value) == (
        "bucket 5+68 (73 step tokens, 5 sampling rows) was not captured (ladder 1,2,8+64); "
        "add it with --ladder 1,2,8+64,5+68"
    )


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 800))
def test_the_default_ladder_covers_all_that_its_rows_can_ask_for(
    most: int, rows: int, prompt: int
) -> None:
    ladder = Ladder.default(most)
    rows, prompt = min(rows, most), min(prompt, 512)
    assert ladder.max_rows == most
    assert ladder.select(rows + prompt, rows).rows >= rows
    assert {1, most} <= {k.rows for k in ladder.keys if k.tokens == k.rows}


def test_the_default_ladder_of_the_contract() -> None:
    pure = [k.rows for k in Ladder.default(416).keys if k.tokens == k.rows]
    small = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256]
    assert pure == [*small, 320, 384, 416]
    assert [k.rows for k in Ladder.default(256).keys if k.tokens == k.rows] == small
    prompts = {k.tokens - k.rows for k in Ladder.default(256).keys}
    assert prompts == {0, 64, 512}


def test_a_ladder_is_sorted_without_repeats_and_readable() -> None:
    ladder = Ladder.parse("8+64, 1,2,8,2,", 8)
    assert str(ladder) == "1,2,8,8+64"
    assert Ladder.parse(str(ladder), 8).keys == ladder.keys


@pytest.mark.parametrize("text", ["1,2,4", "1,16", "16+64"])
def test_a_ladder_must_end_at_the_rows_of_the_rank(text: str) -> None:
    with pytest.raises(ValueError, match=r"the largest entry must be 8 \(--bs divided by"):
        Ladder.parse(text, 8)


@pytest.mark.parametrize("text", ["", ",", " , "])
def test_an_empty_ladder_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="the ladder is empty"):
        Ladder.parse(text, 8)


def test_what_select_remembers_is_what_it_chose() -> None:
    ladder = Ladder.parse("1,2,8,8+64", 8)
    for _ in range(2):
        assert [str(ladder.select(n, n)) for n in (0, 1, 2, 3, 8)] == ["1", "1", "2", "8", "8"]
        assert str(ladder.select(9, 2)) == "8+64"
        with pytest.raises(NotCaptured):
            ladder.select(9, 9)


@given(st.integers(1, 40), st.integers(0, 45))
def test_most_tokens_is_the_largest_key_with_so_many_rows(most: int, rows: int) -> None:
    ladder = Ladder.default(most)
    want = max((k.tokens for k in ladder.keys if k.rows >= rows), default=0)
    assert ladder.most_tokens(rows) == want
