"""A stop string ends the text wherever tokens split it, and no part of it gets out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.inference.stops import StopFilter

letters = st.text("ab", max_size=30)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def run(pieces: list[str], stop: list[str]) -> str:
    found = StopFilter(stop)
    shown = "".join(found.push(piece) for piece in pieces)
    return shown + found.finish()


@given(pieces=st.lists(letters), stop=stops)
def test_the_text_ends_where_the_first_stop_string_that_completes_begins(
    pieces: list[str], stop: list[str]
) -> None:
    text = "".join(pieces)
    shown = run(pieces, stop)
    assert text.startswith(shown)
    if any(s in text for s in stop):
        # Nothing that is shown holds a stop string, and a stop string follows or overlaps what is shown.
        assert not any(s in shown for s in stop)
        assert any(text.startswith(s, len(shown)) for s in stop)
    else:
        assert shown == text


@given(pieces=st.lists(letters), stop=stops)
def test_nothing_is_taken_back(pieces: list[str], stop: list[str]) -> None:
    found = StopFilter(stop)
    shown = ""
    for piece in pieces:
        shown += found.push(piece)
        assert not any(s in shown for s in stop)


def test_a_stop_string_over_three_pieces() -> None:
    assert run(["one E", "N", "D two"], ["END"]) == "one "


def test_without_stop_strings_nothing_is_held() -> None:
    found = StopFilter(())
    assert found.push("abc") == "abc"
    assert found.finish() == ""
