"""What is predicted of a model, against a simulation of it, and where nothing may be predicted."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.occupancy import LEVELS, Occupancy, level_of
from services.metrics.capacity import queueing
from services.metrics.capacity.advice import Advice, Asked, Limit, Measured, NotEnoughMeasured, advise
from services.metrics.capacity.curve import Point, fitted
from services.metrics.capacity.queueing import Floats, Replica
from services.metrics.cardinality import Cardinality

Size = Callable[[random.Random], float]
TOLERANCE = 0.20  # of the median, the p95 and the mean


def simulated(rates: Floats, arrivals: float, size: Size, jobs: int = 20_000) -> Floats:
    """p50, p95 and mean of the times in a replica, event by event: up to len(rates) are in progress and
    share, others wait in order."""
    dice, slots = random.Random(7), len(rates)
    now = shared = 0.0  # `shared`: what each in progress has been given so far
    ends: list[tuple[float, float]] = []  # when `shared` is so much it is done; when it came
    waiting: deque[float] = deque()
    took: list[float] = []
    coming = dice.expovariate(arrivals)
    while len(took) < jobs:
        pace = rates[len(ends) - 1] / len(ends) if ends else 0.0
        end = now + (ends[0][0] - shared) / pace if ends else math.inf
        if coming < end:
            shared, now = shared + (coming - now) * pace, coming
            coming += dice.expovariate(arrivals)
            waiting.append(now)
        else:
            (shared, came), now = heapq.heappop(ends), end
            took.append(now - came)
        if waiting and len(ends) < slots:
            heapq.heappush(ends, (shared + size(dice), waiting.popleft()))
    late = took[jobs // 10 :]
    return np.array([*np.percentile(late, [50, 95]), np.mean(late)])


SIZES: dict[float, Size] = {
    0.0: lambda dice: 1.0,
    0.25: lambda dice: dice.gammavariate(4, 0.25),
    1.0: lambda dice: dice.expovariate(1.0),
}


@pytest.mark.parametrize("slots", [1, 4, 32])
@pytest.mark.parametrize("variation", SIZES)
@pytest.mark.parametrize("used", [0.3, 0.7])
def test_predictions_are_those_of_a_simulation(slots: int, variation: float, used: float) -> None:
    numbers = np.arange(1, slots + 1)
    rates = 10 * (1 - np.exp(-2 * numbers / slots))  # a batch that saturates
    found = queueing.stay(Replica(rates, variation, 512), used * rates[-1])
    assert found is not None
    truth = simulated(rates, used * float(rates[-1]), SIZES[variation])
    assert np.array([found.p50, found.p95, found.mean]) == pytest.approx(truth, rel=TOLERANCE)


def test_known_queues_have_their_textbook_times() -> None:
    one = queueing.stay(Replica(np.array([10.0]), 1.0, 5_000), 7.0)  # M/M/1: 1 / (mu - lambda)
    assert one is not None
    assert one.mean == pytest.approx(1 / 3, rel=0.01)
    assert one.p95 == pytest.approx(-math.log(0.05) / 3, rel=0.01)
    constant = queueing.stay(Replica(np.array([10.0]), 0.0, 5_000), 7.0)  # M/D/1, by Pollaczek and Khinchine
    assert constant is not None
    assert constant.mean == pytest.approx(0.1 + 0.7 * 0.1 / (2 * 0.3), rel=0.02)


@settings(max_examples=50)
@given(
    st.lists(st.floats(0.5, 50), min_size=1, max_size=24),
    st.floats(0, 4),
    st.floats(0.05, 0.9),
    st.floats(0.01, 0.09),
)
def test_more_load_is_never_faster(growth: list[float], variation: float, used: float, more: float) -> None:
    replica = Replica(np.cumsum(growth), variation, 64)
    less, after = (queueing.stay(replica, share * replica.most) for share in (used, used + more))
    if less is not None and after is not None:
        per_slot = replica.rates / np.arange(1, replica.slots + 1)
        if np.all(np.diff(per_slot) <= 1e-9):  # or a fuller batch is faster, and nobody would mind
            assert after.mean >= less.mean * 0.999
        assert 0 < less.p50 <= less.p95 <= less.p99 < math.inf


def text(**changes: object) -> Measured:
    """A text model with a curve like the bundled one's: 70 tokens a second alone, 640 at most."""
    points = tuple(
        Point(float(n), 20.0, 20.0 * 640 * (1 - math.exp(-n / 8.6))) for n in (1, 2, 4, 8, 16, 32, 64)
    )
    usual = Measured("m", 1, 500, 64.0, 0.1, points, 64, 3.0, 5.0, 1, 2.0, took={50.0: 1.0})
    return replace(usual, **changes)  # type: ignore[arg-type]


def asked(rate: float, p95: float | None = None, replicas: int = 0) -> Advice:
    return advise(text(), Asked(rate, replicas, {} if p95 is None else {95.0: p95}))


def test_a_load_that_fits() -> None:
    found = asked(3.0, 5.0)
    assert found.limit is Limit.NONE
    assert found.needed == found.replicas == 1
    assert 0.25 < found.utilization < 0.35
    assert found.stay is not None
    assert found.alone.p50 < found.stay.p50 < found.stay.p95 < 5.0
    assert found.rate < found.most_within < found.most


def test_overload_is_said_and_so_are_the_replicas_that_help() -> None:
    found = asked(50.0, 3.0)
    assert found.utilization > 1
    assert found.stay is None
    assert found.limit is Limit.THROUGHPUT
    assert any("overload" in note for note in found.notes)
    with_them, with_less = asked(50.0, 3.0, found.needed), asked(50.0, 3.0, found.needed - 1)
    assert with_them.limit is Limit.NONE
    assert with_less.limit is not Limit.NONE
    assert found.needed > 50.0 / (found.most / found.replicas)


def test_more_replicas_where_sharing_is_too_slow() -> None:
    found = asked(8.0, 1.5)
    assert found.limit is Limit.LATENCY
    assert found.utilization < 1 < found.needed


def test_an_objective_below_the_bare_service_time_is_unreachable() -> None:
    found = asked(0.1, 0.2)
    assert found.limit is Limit.SERVICE_TIME
    assert found.needed == 0
    assert found.most_within == 0
    assert found.alone.p95 > 0.2


def test_a_small_kv_cache_limits() -> None:
    found = advise(text(kv_tokens=400, prompt_tokens=36.0), Asked(6.0))
    assert found.limit is Limit.KV_CACHE
    assert found.most < advise(text(), Asked(6.0)).most


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"requests": 0.0}, "0 of 100"),
        ({"requests": 1.0}, "1 of 100"),
        ({"tokens": 0.0}, "not enough is known"),
        ({"tokens": math.nan}, "not enough is known"),
        ({"points": ()}, "not enough is known"),
        ({"points": (Point(1.0, 1.0, 70.0),)}, "1.0 s of the 5 s"),
        ({"points": (Point(math.nan, 20.0, 70.0),)}, "not enough is known"),
        ({"points": (Point(1.0, 20.0, math.inf), Point(2.0, 9.0, 0.0))}, "not enough is known"),
    ],
)
def test_nothing_is_made_up(changes: dict[str, object], said: str) -> None:
    with pytest.raises(NotEnoughMeasured, match=said):
        advise(text(**changes), Asked(1.0))


def test_what_was_not_seen_is_cautious_and_said() -> None:
    found = advise(text(points=(Point(2.0, 60.0, 60 * 130.0),)), Asked(2.0))
    assert found.most == pytest.approx(130 / 64)
    assert any("no more than 2 requests at once" in note for note in found.notes)


def test_a_curve_that_falls_by_chance_is_smoothed() -> None:
    curve = fitted([Point(1, 10, 700), Point(2, 10, 600), Point(4, 10, 2000)])
    assert curve is not None
    assert curve.rates == (65.0, 65.0, 200.0)
    assert curve.at(np.array([3.0, 9.0])) == pytest.approx([132.5, 200.0])
    assert fitted([]) is None


class Told:
    """In place of Figures: sums by name and level."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str], float] = {}

    def add(self, name: str, key: object, value: float = 1, **labels: str) -> None:
        short = name.rpartition(".")[2], labels["level"]
        self.sums[short] = self.sums.get(short, 0.0) + value


def test_time_and_tokens_are_told_by_the_slots_held() -> None:
    told, now = Told(), [0.0]
    occupancy = Occupancy(told, None, lambda: now[0])  # type: ignore[arg-type]
    for at, slots, tokens in (
        (0.0, 1, 0),
        (2.0, 3, 100),
        (5.0, 5, 300),
        (6.0, 4, 90),
        (8.0, 0, 200),
        (50.0, 1, 0),
    ):
        now[0] = at
        occupancy.work(tokens)
        occupancy.hold(slots)
    seconds = {level: value for (name, level), value in told.sums.items() if name == "seconds"}
    assert seconds == {"1": 2.0, "3": 3.0, "4": 3.0}  # nothing while nobody was there
    assert told.sums["slots", "4"] == 5 * 1.0 + 4 * 2.0
    assert {level: v for (name, level), v in told.sums.items() if name == "work"} == {
        "1": 100,
        "3": 300,
        "4": 290,
    }


def test_the_collector_keeps_levels_apart() -> None:
    labels = {"service": "s", "instance": "a", "model": "m", "version": "1", "level": "8"}
    admitted = Cardinality().admit("lingqu.inference.level.seconds", labels)
    assert admitted is not None
    assert dict(admitted.labels) == labels


@given(st.integers(0, 5000))
def test_every_number_of_slots_has_one_level(slots: int) -> None:
    level = level_of(slots)
    assert (level == 0) == (slots == 0)
    assert level <= slots
    assert not any(level < other <= slots for other in LEVELS)
