"""What is measured: points in time, of a measurement, with labels and fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

Labels = tuple[tuple[str, str], ...]
"""Names and values, ordered by name."""


def labels(values: Mapping[str, str]) -> Labels:
    return tuple(sorted(values.items()))


@dataclass(frozen=True, slots=True)
class Point:
    """Fields of one series at one moment. `time_ns` counts from 1970, UTC.

    A counter's field holds what was added since the point before, so that a rate is a sum over time and a
    restart of the counter is no drop. A gauge's field holds its value."""

    measurement: str
    labels: Labels
    fields: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    time_ns: int = 0
