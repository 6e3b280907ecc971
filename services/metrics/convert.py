"""Between `lingqu.metrics.v1` and questions to the store; every mistake names its field."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from lingqu.metrics.v1 import metrics_pb2 as pb
from services.core.errors import InvalidInput
from services.metrics.points import Labels, Point
from services.metrics.queries import Aggregate, Query, Series

MAX_FILTERS = 10
MAX_FILTER_VALUES = 100
MAX_GROUP_LABELS = 10
MAX_WINDOWS = 11_000
MAX_SERIES = 1_000
MAX_NAME_LENGTH = 200
MIN_WINDOW_NS = 1_000_000_000
DEFAULT_RANGE_NS = 3600 * 1_000_000_000
MAX_NS = 2**63 - 1

_AGGREGATES = {
    number: Aggregate(name.removeprefix("AGGREGATE_").lower())
    for name, number in pb.Aggregate.items()
    if number != pb.AGGREGATE_UNSPECIFIED
}


def to_query(request: pb.QueryRequest, now_ns: int) -> Query:
    """Raises InvalidInput."""
    end = _time(request, "end_time", now_ns)
    start = _time(request, "start_time", end - DEFAULT_RANGE_NS)
    if start >= end:
        raise InvalidInput("start_time", "has to be before end_time")
    aggregate = _AGGREGATES.get(request.aggregate)
    if aggregate is None:
        raise InvalidInput("aggregate", "is required" if not request.aggregate else "is unknown")
    _check_percentile(request.percentile, aggregate)
    group_by = tuple(_name(label, f"group_by[{n}]") for n, label in enumerate(request.group_by))
    if len(group_by) > MAX_GROUP_LABELS:
        raise InvalidInput("group_by", f"has at most {MAX_GROUP_LABELS} labels")
    if len(set(group_by)) < len(group_by):
        raise InvalidInput("group_by", "names a label twice")
    return Query(
        _name(request.measurement, "measurement"),
        _name(request.field or "value", "field"),
        start,
        end,
        aggregate,
        request.percentile,
        _window(request, end - start),
        filters(request.filters),
        group_by,
    )


def filters(asked: Iterable[pb.Filter]) -> Mapping[str, tuple[str, ...]]:
    """Raises InvalidInput."""
    found: dict[str, tuple[str, ...]] = {}
    for number, one in enumerate(asked):
        path = f"filters[{number}]"
        if number >= MAX_FILTERS:
            raise InvalidInput("filters", f"has at most {MAX_FILTERS}")
        label = _name(one.label, f"{path}.label")
        if label in found:
            raise InvalidInput(f"{path}.label", f'"{label}" has a filter already')
        if not 1 <= len(one.values) <= MAX_FILTER_VALUES:
            raise InvalidInput(f"{path}.values", f"has 1 to {MAX_FILTER_VALUES} values")
        found[label] = tuple(one.values)
    return found


def wanted(request: pb.TailRequest) -> Callable[[Point], bool]:
    """Which points are followed. Raises InvalidInput."""
    measurement = _name(request.measurement, "measurement") if request.measurement else ""
    among = {label: frozenset(values) for label, values in filters(request.filters).items()}

    def fits(point: Point) -> bool:
        if measurement and point.measurement != measurement:
            return False
        labels = dict(point.labels)
        return all(labels.get(label, "") in values for label, values in among.items())

    return fits


def to_limit(request: pb.ListSeriesRequest) -> int:
    if request.page_size > MAX_SERIES:
        raise InvalidInput("page_size", f"is at most {MAX_SERIES}")
    return int(request.page_size or MAX_SERIES)


def to_measurement(request: pb.ListSeriesRequest) -> str:
    return _name(request.measurement, "measurement") if request.measurement else ""


def to_query_response(found: list[Series]) -> pb.QueryResponse:
    return pb.QueryResponse(
        series=[
            pb.Series(
                labels=dict(series.labels),
                samples=[pb.Sample(time=_timestamp(at), value=value) for at, value in series.values],
            )
            for series in found[:MAX_SERIES]
        ],
        truncated=len(found) > MAX_SERIES,
    )


def to_list_response(found: list[tuple[str, Labels]], limit: int) -> pb.ListSeriesResponse:
    keys = [pb.SeriesKey(measurement=name, labels=dict(labels)) for name, labels in found[:limit]]
    return pb.ListSeriesResponse(series=keys, truncated=len(found) > limit)


def to_tail_response(point: Point) -> pb.TailResponse:
    return pb.TailResponse(
        measurement=point.measurement,
        labels=dict(point.labels),
        fields=dict(point.fields),
        time=_timestamp(point.time_ns),
    )


def _name(text: str, field: str) -> str:
    if not text:
        raise InvalidInput(field, "is required")
    if len(text) > MAX_NAME_LENGTH or not text.isprintable():
        raise InvalidInput(field, f"has at most {MAX_NAME_LENGTH} printable characters")
    return text


def _check_percentile(percentile: float, aggregate: Aggregate) -> None:
    if aggregate is not Aggregate.PERCENTILE:
        if percentile:
            raise InvalidInput("percentile", "is for AGGREGATE_PERCENTILE only")
    elif not (math.isfinite(percentile) and 0 < percentile <= 100):
        raise InvalidInput("percentile", "has to be above 0 and at most 100")


def _window(request: pb.QueryRequest, length_ns: int) -> int:
    if not request.HasField("window"):
        return 0
    window = _nanoseconds(request.window, "window")
    if window < MIN_WINDOW_NS:
        raise InvalidInput("window", "is at least 1 s")
    if length_ns / window > MAX_WINDOWS:
        raise InvalidInput("window", f"makes more than {MAX_WINDOWS:,} windows of the range")
    return window


def _time(request: pb.QueryRequest, field: str, default: int) -> int:
    message: Any = request
    return _nanoseconds(getattr(request, field), field) if message.HasField(field) else default


def _nanoseconds(value: Any, field: str) -> int:
    """Of a Timestamp or a Duration."""
    if not 0 <= value.nanos < 1_000_000_000:
        raise InvalidInput(f"{field}.nanos", "is 0 to 999,999,999")
    found = int(value.seconds) * 1_000_000_000 + int(value.nanos)
    if not 0 <= found <= MAX_NS:
        raise InvalidInput(field, "is out of range: from 1970 to 2262")
    return found


def _timestamp(ns: int) -> Timestamp:
    return Timestamp(seconds=ns // 1_000_000_000, nanos=ns % 1_000_000_000)
