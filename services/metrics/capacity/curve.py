"""The batch curve: tokens a second that a replica makes with so many sequences in progress.

Measured points are smoothed to a curve that does not fall (pool adjacent violators: M. Ayer et al.: An
empirical distribution function for sampling with incomplete information, Annals of Mathematical Statistics
26, 1955), each weighted by the time that was spent there. Between points it is straight. Beyond them nothing
is made up: above the highest it stays as it is, and below the lowest a sequence goes as fast as there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
LEAST_SECONDS = 0.5  # at a level; with less it tells nothing


@dataclass(frozen=True, slots=True)
class Point:
    """`seconds` with `slots` sequences in progress on average, in which `work` tokens were made."""

    slots: float
    seconds: float
    work: float

    @property
    def rate(self) -> float:
        return self.work / self.seconds


@dataclass(frozen=True, slots=True)
class Curve:
    """Points by rising slots with rates that do not fall; at least one."""

    slots: tuple[float, ...]
    rates: tuple[float, ...]

    @property
    def highest(self) -> float:
        """The most sequences at once that were seen."""
        return self.slots[-1]

    @property
    def most(self) -> float:
        """Tokens a second at most, as far as was seen."""
        return self.rates[-1]

    def at(self, slots: Floats) -> Floats:
        """Tokens a second of a replica with so many sequences in progress, each number ≥ 1."""
        found = np.interp(slots, self.slots, self.rates)
        below = slots < self.slots[0]
        found[below] = self.rates[0] * slots[below] / self.slots[0]
        return found


def fitted(points: Iterable[Point]) -> Curve | None:
    """None if no point tells anything. Points that are no finite numbers tell nothing."""
    known = sorted(
        (
            p
            for p in points
            if math.isfinite(p.slots + p.seconds + p.work)
            and p.slots >= 1
            and p.seconds >= LEAST_SECONDS
            and p.work > 0
        ),
        key=lambda p: p.slots,
    )
    pools: list[tuple[float, float, list[float]]] = []  # work, seconds, slots of the points in it
    for point in known:
        work, seconds, slots = point.work, point.seconds, [point.slots]
        while pools and pools[-1][0] / pools[-1][1] > work / seconds:
            before = pools.pop()
            work, seconds, slots = work + before[0], seconds + before[1], before[2] + slots
        pools.append((work, seconds, slots))
    if not pools:
        return None
    places = tuple(slots for _, _, pool in pools for slots in pool)
    rates = tuple(work / seconds for work, seconds, pool in pools for _ in pool)
    return Curve(places, rates)
