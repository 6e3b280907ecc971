"""What follows from what was measured of a model: utilisation, headroom, latencies, how many replicas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from services.core.errors import NotReady
from services.metrics.capacity import queueing
from services.metrics.capacity.curve import Point, fitted
from services.metrics.capacity.queueing import State, Stay

MIN_REQUESTS = 100
MIN_BUSY_S = 5.0
MAX_REPLICAS = 1000
HIGH = 0.85  # a utilisation from which on small errors of the rate are large ones of the latency
ALONE = 1e-6  # of what a replica can do: requests that never meet
BISECTIONS = 12


class NotEnoughMeasured(NotReady):
    """Anything said now would be made up."""

    reason = "NOT_ENOUGH_MEASURED"


class Limit(Enum):
    """What keeps the model from more, or from its objectives."""

    NONE = "none"
    THROUGHPUT = "throughput"
    LATENCY = "latency"
    SERVICE_TIME = "service_time"
    KV_CACHE = "kv_cache"


@dataclass(frozen=True, slots=True)
class Measured:
    """One version of a model. Rates are requests a second over all replicas, times seconds.

    `requests` were begun in the window; `tokens` is the mean of what each made, `variation` its squared
    coefficient of variation; `prompt_tokens` is the mean of what each was given. `points` are of one replica.
    `slots` and `kv_tokens` are those of a replica, 0 if not known. `replicas` tell of themselves now; `age_s`
    is that of the newest figure. `took`: percentiles of the latency that clients had lately."""

    model: str
    version: int
    requests: float
    tokens: float
    variation: float
    points: tuple[Point, ...]
    slots: int
    arrivals: float
    peak: float
    replicas: int
    age_s: float
    queue: int = 512  # services/inference: InferenceSettings.queue
    prompt_tokens: float = 0.0
    kv_tokens: int = 0
    took: Mapping[float, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """`rate` None: as measured lately. `replicas` 0: as there are. `within`: seconds by percentile (50, 95 or
    99) that requests may take."""

    rate: float | None = None
    replicas: int = 0
    within: Mapping[float, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Advice:
    """For `rate` requests a second on `replicas`. `most` is what they can do at all, `most_within` with the
    objectives met. `stay` is None where the queue only grows. `needed` replicas meet the objectives; 0: none
    do. `alone` is the latency of a request that meets no other. `expected` is what the model says of the load
    that was measured, for comparison with `took`."""

    rate: float
    replicas: int
    utilization: float
    most: float
    most_within: float
    stay: Stay | None
    state: State | None
    needed: int
    alone: Stay
    limit: Limit
    expected: Stay | None
    seen: float
    notes: tuple[str, ...]


def replica(measured: Measured) -> tuple[queueing.Replica, bool]:
    """One of the model's, and whether its KV cache leaves it fewer sequences than it has slots. Raises
    NotEnoughMeasured."""
    if measured.requests < MIN_REQUESTS:
        raise NotEnoughMeasured(
            f'not enough requests of "{measured.model}": {measured.requests:.0f} of {MIN_REQUESTS} that a '
            "prediction needs; send some more, or look at a longer window"
        )
    curve = fitted(measured.points)
    busy = sum(point.seconds for point in measured.points if point.seconds > 0)
    if curve is None or not measured.tokens > 0 or busy < MIN_BUSY_S:
        raise NotEnoughMeasured(
            f'not enough is known of "{measured.model}": it computed for {busy:.1f} s of the '
            f"{MIN_BUSY_S:.0f} s that a prediction needs; let it work longer, or look at a longer window"
        )
    slots = measured.slots or max(1, round(curve.highest))
    fit = int(measured.kv_tokens // max(1.0, measured.tokens + measured.prompt_tokens))
    bound = measured.kv_tokens > 0 and fit < slots
    slots = max(1, min(slots, fit) if bound else slots)
    rates = curve.at(np.arange(1.0, slots + 1)) / measured.tokens
    return queueing.Replica(rates, measured.variation, measured.queue), bound


def advise(measured: Measured, asked: Asked) -> Advice:
    """Raises NotEnoughMeasured."""
    one, bound = replica(measured)
    notes = list(measured.notes)
    there = asked.replicas or measured.replicas
    if not there:
        there = 1
        notes.append("no replica tells of itself now: one is assumed")
    rate = measured.arrivals if asked.rate is None else asked.rate
    stay = queueing.stay(one, rate / there)
    alone = queueing.stay(one, one.most * ALONE)
    if alone is None:
        raise NotEnoughMeasured(f'the sizes of requests of "{measured.model}" differ too much to predict')
    within = asked.within
    reachable = _meets(alone, within)
    needed = _needed(one, rate, within) if reachable else 0
    used = queueing.utilization(one, rate / there)
    most = one.most * there
    state = queueing.state(one, rate / there) if used < 1 else None
    seen = max(point.slots for point in measured.points)
    notes += _notes(measured, one, used, seen, state)
    expected = None
    if measured.replicas and measured.arrivals > 0:
        expected = queueing.stay(one, measured.arrivals / measured.replicas)
    return Advice(
        rate,
        there,
        used,
        most,
        _most_within(one, within) * there if reachable else 0.0,
        stay,
        state,
        needed,
        alone,
        _limit(reachable, used, bound, stay, within),
        expected,
        seen,
        tuple(notes),
    )


def _limit(
    reachable: bool, used: float, bound: bool, stay: Stay | None, within: Mapping[float, float]
) -> Limit:
    if not reachable:
        return Limit.SERVICE_TIME
    if used >= 1:
        return Limit.KV_CACHE if bound else Limit.THROUGHPUT
    if not _meets(stay, within):
        return Limit.KV_CACHE if bound else Limit.LATENCY
    return Limit.NONE


def _notes(
    measured: Measured, one: queueing.Replica, used: float, seen: float, state: State | None
) -> list[str]:
    notes = []
    off = (max(measured.variation, 0.0) / measured.requests) ** 0.5
    if off > 0.05:
        notes.append(
            f"sizes differ much: their mean is known to ±{2 * off:.0%} ({measured.requests:.0f} requests)"
        )
    if used >= 1:
        notes.append(f"overload: {used:.2f} times what the replicas can do; the queue only grows")
    elif used > HIGH:
        notes.append(f"at a utilisation of {used:.0%} small errors of the rate are large ones of latencies")
    if min(one.slots, state.busiest if state else one.slots) > seen * 1.5:
        notes.append(
            f"no more than {seen:.0f} requests at once were seen on a replica: beyond, its rate is taken to "
            "stay as it is, which is cautious"
        )
    return notes


def _meets(stay: Stay | None, within: Mapping[float, float]) -> bool:
    return stay is not None and all(stay.of(percentile) <= limit for percentile, limit in within.items())


def _needed(one: queueing.Replica, rate: float, within: Mapping[float, float]) -> int:
    """The fewest replicas, requests spread over them at random; 0: more than MAX_REPLICAS."""

    def enough(number: int) -> bool:
        return _meets(queueing.stay(one, rate / number), within)

    low = int(rate / one.most)  # so few are overloaded
    high = low + 1
    while not enough(high):
        if high >= MAX_REPLICAS:
            return 0
        low, high = high, min(2 * high, MAX_REPLICAS)
    return _first(low, high, enough)


def _first(low: int, high: int, enough: Callable[[int], bool]) -> int:
    """The first number above `low` that is enough; `high` is."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _most_within(one: queueing.Replica, within: Mapping[float, float]) -> float:
    """Requests a second that a replica can do with the objectives met."""
    if not within:
        return one.most
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        met = _meets(queueing.stay(one, middle * one.most), within)
        low, high = (middle, high) if met else (low, middle)
    return low * one.most
