"""Questions to a store, and their answers; what a store understands, whichever it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from services.core.errors import InvalidInput
from services.metrics.points import Labels


class Aggregate(StrEnum):
    """What becomes of the values in a window. RATE is their sum a second; PERCENTILE is by nearest rank, as
    InfluxDB has it: of n values in order the one with the number floor(n · p / 100 + 0.5), from 1."""

    MEAN = "mean"
    SUM = "sum"
    MIN = "min"
    MAX = "max"
    COUNT = "count"
    LAST = "last"
    RATE = "rate"
    PERCENTILE = "percentile"


@dataclass(frozen=True, slots=True)
class Query:
    """Values of one field in [start_ns, end_ns), window by window.

    `filters`: a label has one of these values. `window_ns` 0: one window, the whole range; otherwise windows
    begin at multiples of it since 1970, and those without a value are left out. `group_by`: a series for each
    combination of these labels' values (a series without the label has ""); none: all in one."""

    measurement: str
    field: str
    start_ns: int
    end_ns: int
    aggregate: Aggregate
    percentile: float = 0.0
    window_ns: int = 0
    filters: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    group_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Series:
    """(start of the window in ns, value), in order."""

    labels: Labels
    values: tuple[tuple[int, float], ...]


def check_raw(query: Query, since_ns: int) -> None:
    """Raises InvalidInput if it asks for what roll-ups cannot tell; raw points are kept since `since_ns`."""
    if query.aggregate is Aggregate.PERCENTILE and query.start_ns < since_ns:
        since = datetime.fromtimestamp(since_ns // 1_000_000_000, UTC).isoformat()
        raise InvalidInput(
            "start_time",
            f"percentiles need raw points, which are kept since {since}; older ones are rolled up",
        )


def nearest_rank(ordered: Sequence[float], percentile: float) -> float | None:
    """The reference for PERCENTILE; None where the rank is 0."""
    rank = math.floor(len(ordered) * percentile / 100 + 0.5)
    return ordered[rank - 1] if 1 <= rank <= len(ordered) else None
