"""What commands read out of short texts."""

from __future__ import annotations

import enum
import re

from google.protobuf.duration_pb2 import Duration


class Aggregate(enum.StrEnum):
    """What becomes of the values in a window."""

    MEAN = "mean"
    SUM = "sum"
    MIN = "min"
    MAX = "max"
    COUNT = "count"
    LAST = "last"
    RATE = "rate"


UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def bounded(text: str) -> tuple[str, float | None, float | None] | None:
    """ "accuracy>=0.9" as (name, at least, at most); None if it is not like that."""
    found = re.fullmatch(r"\s*([^<>=]+?)\s*(>=|<=)\s*(\S+)\s*", text)
    try:
        value = float(found[3]) if found else None
    except ValueError:
        return None
    if found is None or value is None:
        return None
    return (found[1], value, None) if found[2] == ">=" else (found[1], None, value)


def duration(text: str) -> Duration | None:
    """90, 90s, 5m, 2h, 1d; None if it is not like that."""
    found = re.fullmatch(r"(\d+)([smhd]?)", text)
    return Duration(seconds=int(found[1]) * UNITS[found[2] or "s"]) if found else None
