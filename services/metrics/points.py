"""What is measured: points in time, of a measurement, with labels and fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

Labels = tuple[tuple[str, str], ...]
"""Names and values, ordered by name."""


def labels(values: Mapping[str, str]) -> Labels:
    return tuple(sorted(values.items()))


class Point(NamedTuple):
    """Fields of one series at one moment. `time_ns` counts from 1970, UTC. (A tuple, since it is made in a
    third of the time that a frozen dataclass takes.)

    A counter's field holds what was added since the point before, so that a rate is a sum over time and a
    restart of the counter is no drop. A gauge's field holds its value."""

    measurement: str
    labels: Labels
    fields: Mapping[str, float] = MappingProxyType({})
    time_ns: int = 0


LATEST_NS = (1 << 63) - 2  # of every store


def fault(point: Point) -> str:
    """Why no store can keep the point; empty if there is no reason."""
    return fault_of_series(point.measurement, point.labels) or fault_of_values(point)


def fault_of_series(measurement: str, labels: Labels) -> str:
    if not measurement:
        return "a measurement has no name"
    if not all(name for name, _ in labels):
        return f'a label of measurement "{measurement[:80]}" has no name'
    for text in (measurement, *(text for pair in labels for text in pair)):
        if not text.isascii() and not _is_unicode(text):
            return "a name or label is not Unicode"
    return ""


def fault_of_values(point: Point) -> str:
    if not point.fields:
        return f'a point of measurement "{point.measurement[:80]}" has no fields'
    for name, value in point.fields.items():
        if not math.isfinite(value):
            return f'field "{name[:80]}" of measurement "{point.measurement[:80]}" is {value}'
        if not name or (not name.isascii() and not _is_unicode(name)):
            return f'a field of measurement "{point.measurement[:80]}" has no name'
    if not 0 <= point.time_ns <= LATEST_NS:
        return f"{point.time_ns} is no time between 1970 and 2262"
    return ""


def _is_unicode(text: str) -> bool:
    """No half of a pair of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
