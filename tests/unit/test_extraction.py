"""Answers from logits, against the definition spelled out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.extraction import Span, Window, best, whole


def window(
    starts: list[float], ends: list[float], first: int = 0, null: tuple[float, float] = (-99.0, -99.0)
) -> Window:
    """Tokens of two characters with a space between."""
    at = (first + np.arange(len(starts))) * 3
    return Window(
        first,
        np.stack([at, at + 2], axis=1),
        np.array(starts, np.float32),
        np.array(ends, np.float32),
        null,
    )


logits = st.floats(-8, 8, width=32)
pairs = st.lists(st.tuples(logits, logits), min_size=1, max_size=14)


def softmax(values: np.ndarray) -> np.ndarray:
    shifted = np.exp(values - values.max())
    return shifted / shifted.sum()


@given(pairs, st.integers(1, 5), st.integers(1, 20))
def test_each_answer_is_the_best_that_is_left(tokens: list[tuple[float, float]], top: int, most: int) -> None:
    starts, ends = (np.array(column, np.float64) for column in zip(*tokens, strict=True))
    scores = softmax(starts)[:, None] * softmax(ends)[None, :]
    allowed = [(s, e) for s in range(len(starts)) for e in range(s, min(s + most, len(starts)))]
    found = best([window(list(starts), list(ends))], top, most, no_answer=False)
    for span in found:
        assert span.score == pytest.approx(max(scores[at] for at in allowed), abs=1e-6)
        first, last = span.start // 3, span.end // 3
        assert (first, last) in allowed
        allowed = [(s, e) for s, e in allowed if e < first or last < s]
    assert len(found) == top or not allowed


@given(pairs, st.integers(2, 6), st.integers(1, 4))
def test_windows_of_the_same_logits_change_nothing(
    tokens: list[tuple[float, float]], size: int, most: int
) -> None:
    """Cut into windows that overlap by the longest answer, the context gives the answers it gives in one."""
    starts, ends = (list(column) for column in zip(*tokens, strict=True))
    size = max(size, most + 1)
    cut = [
        window(starts[at : at + size], ends[at : at + size], at)
        for at in range(0, max(1, len(starts) - most + 1), size - most)
    ]
    together = best([window(starts, ends)], 3, most, no_answer=False)
    apart = best(cut, 3, most, no_answer=False)
    assert np.allclose([s.score for s in together], [s.score for s in apart], atol=1e-6)


def test_no_answer_wins_only_where_it_may_and_every_window_says_so() -> None:
    sure = window([1, 5], [1, 5], null=(6, 6))
    assert best([sure], 1, 4, no_answer=True) == []
    assert [(s.start, s.end) for s in best([sure], 1, 4, no_answer=False)] == [(3, 5)]
    doubtful = window([0, 0], [0, 0], first=2, null=(1, 1))
    (answer,) = best([sure, doubtful], 1, 4, no_answer=True)
    assert (answer.start, answer.end) == (3, 5)
    assert 0 < answer.score < 1


def test_an_answer_is_as_long_as_allowed_and_not_longer() -> None:
    tokens = window([9, 0, 0, 0], [0, 0, 0, 9])
    assert [(s.start, s.end) for s in best([tokens], 1, 4, no_answer=False)] == [(0, 11)]
    (short,) = best([tokens], 1, 3, no_answer=False)
    assert short.end - short.start <= 8


def test_logits_that_would_overflow_do_not() -> None:
    (answer,) = best([window([3e4, 0], [3e4, 0])], 1, 4, no_answer=False)
    assert answer.score == pytest.approx(1)


def test_nothing_to_read_is_no_answer() -> None:
    assert best([window([], [])], 3, 4, no_answer=False) == []
    assert best([], 3, 4, no_answer=True) == []


def test_an_accent_stays_with_its_letter() -> None:
    context = "un cafe\u0301 noir"
    found = whole(context, Span(3, 7, 0.5))
    assert context[found.start : found.end] == "cafe\u0301"
    assert whole("cafe", Span(0, 4, 0.5)).end == 4
