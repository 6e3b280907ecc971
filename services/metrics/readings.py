"""What sources tell, before it is decided what of it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, StrEnum
from typing import NamedTuple


class Kind(Enum):
    """LEVEL: what is now. ADDED: what came since the reading before. TOTAL: what came since the start."""

    LEVEL = "level"
    ADDED = "added"
    TOTAL = "total"


class Reading(NamedTuple):
    """Fields of one series at one moment. `start_ns`: since when a TOTAL is counted, 0 if
    that is not known."""

    measurement: str
    labels: Mapping[str, str]
    fields: Mapping[str, float]
    time_ns: int
    kind: Kind = Kind.LEVEL
    start_ns: int = 0


class Refusal(StrEnum):
    """Why a point is not kept."""

    NAME = "name"  # of the measurement: empty, too long, or with control characters
    NUMBER = "number"  # not a number, infinite, or no field at all
    TIME = "time"  # none, too long ago, or in the future
    ORDER = "order"  # not later than the point before of its series: sent again, or by two senders
    SERIES = "series"  # there are too many counters to know what each had before
    MEASUREMENTS = "measurements"  # there are too many measurements, or fields of one
    FULL = "full"  # the queue to the store was full, and the source does not send again
    STORE = "store"  # the store did not take it
