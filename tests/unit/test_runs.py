"""Rows share runs of like length: each once, bounded in tokens and in padding."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.inference.backends.runs import FREE_PADDING, MAX_PADDING, MAX_TOKENS, padding, runs

lengths_of_texts = st.lists(st.integers(1, 8192), max_size=200) | st.lists(st.integers(1, 64), max_size=200)


@given(lengths_of_texts, st.none() | st.integers(1, 64))
def test_every_row_is_in_one_run_and_runs_are_bounded(lengths: list[int], most_rows: int | None) -> None:
    found = runs(lengths, most_rows)
    assert sorted(index for run in found for index in run) == list(range(len(lengths)))
    for run in found:
        area = len(run) * max(lengths[index] for index in run)
        assert area <= MAX_TOKENS or len(run) == 1
        assert padding(lengths, run) <= max(FREE_PADDING, MAX_PADDING * area)
        assert len(run) <= (most_rows or len(run))


def test_rows_of_one_length_are_computed_together() -> None:
    assert runs([16] * 64) == [list(range(64))]
    assert [len(run) for run in runs([256] * 40)] == [16, 16, 8]


def test_a_long_row_is_not_what_short_ones_are_padded_to() -> None:
    assert runs([8, 200, 8, 8]) == [[1], [0, 2, 3]]


def test_short_rows_are_not_worth_a_run_of_their_own() -> None:
    assert runs([4, 12, 9]) == [[1, 2, 0]]
