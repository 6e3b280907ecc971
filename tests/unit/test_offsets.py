"""Workers of the tests take no ports of each other."""

from __future__ import annotations

from itertools import combinations

from tests.conftest import ALL_PORTS, HUNDREDS, LAST_DIGITS


def test_no_port_of_a_worker_is_one_of_another() -> None:
    taken = [{(base + digits) % 100 for base in ALL_PORTS} for digits in LAST_DIGITS]
    assert all(one.isdisjoint(other) for one, other in combinations(taken, 2))
    assert max(ALL_PORTS) + 100 * HUNDREDS[-1] + max(LAST_DIGITS) < 32_768
