"""Which part of which long prompt comes next: order, pauses, what is known already."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.inference.backends.slices import BUSY_TOKENS, LONG_TOKENS, Slices


def computed(slices: Slices, *, idle: bool, now: float = 0.0) -> list[tuple[int, int | None]]:
    """All slices in their order, as (number, tokens of the beginning); None: the rest, all of it."""
    found: list[tuple[int, int | None]] = []
    while (due := slices.due(now, idle=idle)) is not None:
        number, prefix = due
        found.append((number, None if prefix is None else len(prefix)))
        if prefix is not None:
            slices.spent(1.0)
            slices.computed(now)
            now += 1.0
    return found


@given(length=st.integers(LONG_TOKENS + 1, 5000), idle=st.booleans())
def test_every_slice_begins_where_the_last_one_ended_and_the_rest_is_short(length: int, idle: bool) -> None:
    slices = Slices()
    slices.push(1, range(length))
    found = computed(slices, idle=idle)
    ends = [upto for _, upto in found[:-1]]
    assert found[-1] == (1, None)
    assert all(upto is not None and upto % BUSY_TOKENS == 0 and upto < length for upto in ends)
    assert all(b - a in (BUSY_TOKENS, 2 * BUSY_TOKENS) for a, b in zip([0, *ends], ends, strict=False))
    assert 0 < length - ([0, *ends][-1]) <= LONG_TOKENS
    assert computed(slices, idle=idle) == []


def test_prompts_take_turns() -> None:
    slices = Slices()
    slices.push(1, range(5000))
    slices.push(2, range(10_000, 10_400))
    order = [number for number, _ in computed(slices, idle=False)]
    assert order[:6] == [1, 2, 1, 2, 1, 2]
    assert order.count(2) == 4  # three slices and the rest: done while the long one has hardly begun


def test_streams_get_as_long_as_a_slice_took() -> None:
    slices = Slices()
    slices.push(1, range(5000))
    assert slices.due(10.0, idle=False) is not None
    slices.spent(0.3)
    slices.spent(0.2)
    slices.computed(10.5)
    assert slices.due(10.9, idle=False) is None
    assert slices.due(10.9, idle=True) is not None, "nobody to wait for"


def test_what_was_computed_for_another_is_not_computed_again() -> None:
    slices = Slices()
    slices.push(1, range(1000))
    first = len(computed(slices, idle=False))
    slices.push(2, [*range(900), *range(5000, 5400)])
    second = computed(slices, idle=False, now=100.0)
    assert first == 8
    assert second[0] == (2, 896 + BUSY_TOKENS)


def test_a_dropped_prompt_is_forgotten_even_while_its_slice_is_computed() -> None:
    slices = Slices()
    slices.push(1, range(1000))
    assert slices.due(0.0, idle=True) is not None
    slices.drop(1)
    slices.drop(1)
    slices.computed(0.0)
    assert slices.due(0.0, idle=True) is None


def test_short_prompts_are_left_alone() -> None:
    assert not Slices().wants(range(LONG_TOKENS))
    assert Slices().wants(range(LONG_TOKENS + 1))
