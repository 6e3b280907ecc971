"""Guesses from what was said before: the rule alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.backends.guesses import LONGEST, SHORTEST, SMALL_BYTES, Guesses, widths

TOKENS = st.lists(st.integers(0, 5), max_size=60)


def test_what_followed_the_last_tokens_before_follows_again() -> None:
    assert Guesses([1, 2, 3, 4, 5, 1, 2]).next(4) == [3, 4, 5, 1]


def test_what_followed_last_counts() -> None:
    assert Guesses([1, 2, 3, 1, 2, 4, 1, 2]).next(1) == [4]


def test_more_tokens_in_common_count_for_more_than_being_later() -> None:
    assert Guesses([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2]).next(1) == [3]


def test_one_token_in_common_is_not_enough_to_begin_with() -> None:
    assert Guesses([1, 2, 3, 4, 1]).next(4) == []


@pytest.mark.parametrize("ids", [[], [1], [1, 1]])
def test_too_little_was_said_to_guess(ids: list[int]) -> None:
    assert Guesses(ids).next(4) == []


@given(TOKENS, TOKENS, st.integers(0, 16))
def test_it_does_not_matter_in_how_many_parts_it_was_said(
    first: list[int], then: list[int], most: int
) -> None:
    whole, parts = Guesses(first + then), Guesses(first)
    parts.grow(then)
    assert parts.next(most) == whole.next(most)


@given(TOKENS, st.integers(0, 16))
def test_each_guess_has_followed_what_stands_before_it(said: list[int], most: int) -> None:
    found = Guesses(said).next(most)
    assert len(found) <= most
    for number, guess in enumerate(found):
        before = said + found[:number]
        pairs = [(before[-1], guess)] if number else [(*before[-SHORTEST:], guess)]
        said_runs = {tuple(said[i : i + len(p)]) for p in pairs for i in range(len(said))}
        assert set(pairs) <= said_runs


@given(st.lists(st.integers(0, 5), min_size=SHORTEST, max_size=20), st.integers(1, 16))
def test_a_text_that_repeats_itself_is_guessed(period: list[int], most: int) -> None:
    """Unless it goes on in two ways after the same tokens."""
    said = period * 3
    ways: dict[tuple[int, ...], set[int]] = {}
    for i in range(LONGEST, len(said)):
        ways.setdefault(tuple(said[i - LONGEST : i]), set()).add(said[i])
    if all(len(each) == 1 for each in ways.values()):
        assert Guesses(said).next(most) == (period * 9)[:most]


def test_a_large_model_has_no_graphs_of_its_own_for_steps() -> None:
    assert widths(SMALL_BYTES, 7) == (1, 8)
    assert widths(SMALL_BYTES + 1, 7) == ()
