"""Exact sliding windows, by the rule they are to keep, for arrivals of any kind."""

from __future__ import annotations

from bisect import bisect_left

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.limits.window import STALE, Window

# Microseconds between arrivals: in bursts, steadily, and after pauses.
gaps = st.lists(
    st.one_of(st.just(0), st.integers(0, 3_000), st.integers(0, 2_000_000)), min_size=1, max_size=300
)


def times(gaps_us: list[int]) -> list[int]:
    at, found = 5_000_000, []
    for gap in gaps_us:
        at += gap
        found.append(at)
    return found


def admitted(arrivals_us: list[int], limit: int, length_ms: int, step_ms: int = 1) -> list[int]:
    window, found = Window(length_ms, step_ms), []
    for at in arrivals_us:
        if window.used(at // 1000) < limit:
            window.add(at // 1000, 1)
            found.append(at)
    return found


@given(gaps, st.integers(1, 20), st.sampled_from([(50, 1), (1_000, 1), (1_000, 100)]))
def test_no_window_ever_has_more_than_the_limit(
    gaps_us: list[int], limit: int, lengths: tuple[int, int]
) -> None:
    length_ms, step_ms = lengths
    passed = admitted(times(gaps_us), limit, length_ms, step_ms)
    for index, first in enumerate(passed):
        assert bisect_left(passed, first + length_ms * 1000) - index <= limit


@given(gaps, st.integers(1, 20))
def test_nobody_is_refused_while_there_is_room(gaps_us: list[int], limit: int) -> None:
    """Of the clock's grain, two milliseconds, apart."""
    arrivals = times(gaps_us)
    passed = admitted(arrivals, limit, 1_000)
    for at in arrivals:
        if at not in passed:
            since = bisect_left(passed, at - 1_002_000)
            assert bisect_left(passed, at) - since >= limit


@given(gaps, st.integers(1, 20), st.integers(1, 5))
def test_the_wait_is_as_long_as_it_has_to_be(gaps_us: list[int], limit: int, amount: int) -> None:
    window = Window(1_000)
    for at in times(gaps_us):
        now = at // 1000
        if wait := window.wait(now, limit, amount):
            if amount <= limit:
                assert window.used(now) + amount > limit
                assert _copy(window).used(now + wait) + amount <= limit
                assert _copy(window).used(now + wait - 1) + amount > limit
        else:
            window.add(now, amount)


@given(gaps, st.data())
def test_what_is_taken_back_does_not_count_and_nothing_else_changes(
    gaps_us: list[int], data: st.DataObject
) -> None:
    arrivals = [at // 1000 for at in times(gaps_us)]
    gone = set(data.draw(st.lists(st.integers(0, len(arrivals) - 1), max_size=5, unique=True)))
    window, expected = Window(1_000), Window(1_000)
    for at in arrivals:
        window.add(at, 1)
    for index in gone:
        window.remove(arrivals[index], 1)
    for index, at in enumerate(arrivals):
        expected.add(at, index not in gone)
    for later in range(0, 1_500, 7):
        assert window.used(arrivals[-1] + later) == expected.used(arrivals[-1] + later)


def test_memory_is_bounded_by_the_length_and_not_by_the_traffic() -> None:
    window = Window(100)
    for at in range(100_000):
        window.add(at // 4, 1)
        window.used(at // 4)
    assert len(window._times) <= 2 * max(STALE, 101) + 2


def _copy(window: Window) -> Window:
    made = Window(window._length, window._step)
    made._times, made._sums = window._times[:], window._sums[:]
    made._first, made._gone = window._first, window._gone
    return made
