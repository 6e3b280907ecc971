"""The two clocks that limits need, read together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

# How far clocks of control planes may be apart: what one wrote down counts so much later for the next.
SKEW_MS = 500


@dataclass(frozen=True, slots=True)
class Moment:
    """Milliseconds, rounded down. `steady` never jumps, goes on while the machine sleeps, and means nothing
    elsewhere. `wall` is the time of day, which other machines know to SKEW_MS."""

    steady: int
    wall: int


Clock: TypeAlias = Callable[[], Moment]


def clock() -> Moment:
    return Moment(time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000, time.time_ns() // 1_000_000)
