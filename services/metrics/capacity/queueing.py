"""One replica as a queue whose rate depends on how many are in it: limited processor sharing.

Requests come at random (Poisson). Up to `slots` of them are in progress and share the rate evenly, as
sequences of a continuous batch do; others wait in order. With one slot it is M/G/1, with a rate that grows in
proportion M/G/c.

- How many are there: the birth-death chain with those rates. For processor sharing it holds whatever the
  sizes are (J. W. Cohen: The multiple phase service network with generalized processor sharing, Acta
  Informatica 12, 1979); with a limit it is an approximation (J. Zhang, B. Zwart: Steady state approximations
  of limited processor sharing queues in heavy traffic, Queueing Systems 60, 2008).
- How long one stays: the request is followed through that chain until it is done, its size being of phases
  with the measured mean and variation (Erlang, or two exponentials with balanced means; H. C. Tijms:
  Stochastic Models, 1994), those of others exponential. Steps are counted by uniformisation (A. Jensen:
  Markoff chains as an aid in the study of Markoff processes, Skandinavisk Aktuarietidskrift 36, 1953).
- Waiting for a slot is scaled by (1 + variation) / 2 (A. O. Allen: Probability, Statistics, and Queueing
  Theory, 1990: the Allen-Cunneen approximation, arrivals at random).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
MAX_PHASES = 100
MOST_PHASES_VARIATION = 64.0
MAX_STEPS = 60_000
UNLIKELY = 1e-7  # states that are less likely are left out
LEFT = 1e-3  # followed until so few are not done


@dataclass(frozen=True, slots=True)
class Replica:
    """`rates[n - 1]`: requests a second that are finished with n in progress, 1 to `slots`. `variation`: the
    squared coefficient of variation of their sizes. `queue`: how many may wait."""

    rates: Floats
    variation: float
    queue: int

    @property
    def slots(self) -> int:
        return len(self.rates)

    @property
    def most(self) -> float:
        return float(self.rates[-1])


@dataclass(frozen=True, slots=True)
class Stay:
    """Times a request takes from its arrival to its end, seconds."""

    p50: float
    p95: float
    p99: float
    mean: float

    def of(self, percentile: float) -> float:
        return {50.0: self.p50, 95.0: self.p95, 99.0: self.p99}[percentile]


@dataclass(frozen=True, slots=True)
class State:
    """In the long run: `waits`, the share of requests that wait for a slot; `refused`, of those that find
    the queue full; `in_progress` and `waiting` on average; `busiest`: no more are in progress for 99 % of the
    time."""

    waits: float
    refused: float
    in_progress: float
    waiting: float
    busiest: int


def utilization(replica: Replica, arrivals: float) -> float:
    """Of the most it can do; from 1 on the queue only grows."""
    return arrivals / replica.most


def state(replica: Replica, arrivals: float) -> State:
    numbers, slots = _numbers(replica, arrivals), replica.slots
    held = np.minimum(np.arange(len(numbers)), slots)
    total = np.cumsum(np.bincount(held, numbers, slots + 1))
    return State(
        waits=float(numbers[slots:].sum()),
        refused=float(numbers[-1]) if len(numbers) > slots + replica.queue else 0.0,
        in_progress=float(numbers @ held),
        waiting=float(numbers @ (np.arange(len(numbers)) - held)),
        busiest=int(np.searchsorted(total, 0.99)),
    )


def stay(replica: Replica, arrivals: float) -> Stay | None:
    """None from a utilisation of 1 on, where there is no long run, or where it would take MAX_STEPS."""
    if utilization(replica, arrivals) >= 1:
        return None
    numbers = _numbers(replica, arrivals)
    left = _left(replica, arrivals, numbers)
    if left is None:
        return None
    steps, pace = left
    p50, p95, p99 = (_quantile(steps, pace, share) for share in (0.50, 0.95, 0.99))
    return Stay(p50, p95, p99, float(steps.sum()) / pace)


def _numbers(replica: Replica, arrivals: float) -> Floats:
    """How likely it is that 0, 1, … are there; without the far tail."""
    most = replica.slots + replica.queue
    rates = np.concatenate([replica.rates, np.full(most - replica.slots, replica.most)])
    logs = np.concatenate([[0.0], np.cumsum(np.log(max(arrivals, 1e-12)) - np.log(rates))])
    found = np.exp(logs - logs.max())
    found /= found.sum()
    last = int(np.flatnonzero(found > UNLIKELY)[-1])
    found = found[: max(last, 1) + 1]
    return np.asarray(found / found.sum(), np.float64)


def _phases(variation: float) -> tuple[Floats, Floats, bool]:
    """Of a size of mean 1: how likely it begins in each, their rates, and whether one follows the other."""
    if variation < 1 / 1.5:
        number = min(MAX_PHASES, round(1 / max(variation, 1 / MAX_PHASES)))
        return np.eye(1, number, dtype=np.float64)[0], np.full(number, float(number)), True
    if variation <= 1.05:
        return np.ones(1), np.ones(1), True
    spread = math.sqrt((variation - 1) / (variation + 1))
    share: Floats = np.array([(1 + spread) / 2, (1 - spread) / 2])
    rates: Floats = 2 * share
    return share, rates, False


def _left(replica: Replica, arrivals: float, numbers: Floats) -> tuple[Floats, float] | None:
    """How likely it is not done after 0, 1, … steps, and how many steps there are a second."""
    slots = replica.slots
    begin, phases, in_order = _phases(min(replica.variation, MOST_PHASES_VARIATION))
    there = np.arange(1, len(numbers) + 1)  # with the request itself
    held = np.minimum(there, slots)
    rates = replica.rates[held - 1]
    done = (rates / held)[:, None] * phases[None, :]
    others = rates * (held - 1) / held
    more = np.where(there < len(numbers), arrivals, 0.0)
    # Who finds all slots taken waits for as many ends as there are before it, then is one of a full batch.
    waits = max(0, len(numbers) - slots)
    ends = replica.most * 2 / (1 + min(replica.variation, MOST_PHASES_VARIATION)) if waits else 0.0
    full = numbers[slots - 1 :] if waits else np.zeros(0)
    pace = float(max((more + others + done.max(axis=1)).max(), ends))
    served = np.zeros((len(numbers), len(phases)))
    served[: min(slots, len(numbers))] = numbers[:slots, None] * begin[None, :]
    waiting = np.asarray(numbers[slots:], np.float64)
    entered = np.zeros_like(served)
    if waits:
        entered[slots - 1 :] = (full / full.sum())[:, None] * begin[None, :]
    done, others, more, ends = done / pace, others[:, None] / pace, more[:, None] / pace, ends / pace
    stays = 1 - done - others - more
    steps = [1.0]
    while steps[-1] > LEFT:
        if len(steps) > MAX_STEPS:
            return None
        after = served * stays
        after[:-1] += (served * others)[1:]
        after[1:] += (served * more)[:-1]
        if in_order:
            after[:, 1:] += (served * done)[:, :-1]
        if waits:
            after += waiting[0] * ends * entered
            moved = waiting * ends
            waiting = waiting - moved
            waiting[:-1] += moved[1:]
        served = after
        steps.append(float(served.sum() + waiting.sum()))
    return np.array(steps), pace


def _quantile(steps: Floats, pace: float, share: float) -> float:
    """The time by which `share` are done: steps come at random, `pace` a second."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, len(steps))))])
    numbers = np.arange(len(steps))

    def left(mean: float) -> float:
        weights = np.exp(numbers * math.log(mean) - mean - logs)
        return float(weights @ steps)  # beyond the last step hardly anything is left

    low, high = 1e-9, float(len(steps))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) > 1 - share else (low, middle)
    return high / pace
