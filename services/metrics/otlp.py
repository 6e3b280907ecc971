"""OpenTelemetry's metrics as readings (https://opentelemetry.io/docs/specs/otel/metrics/data-model/).

Gauges, and sums that may fall, are levels. Sums that only rise, and histograms, are totals or what was added,
by their temporality. A histogram has the fields count, sum, min, max, and `le_<bound>` for each bucket: how
many values were at most that. Exponential histograms have no buckets here, summaries no quantiles.

A number is the field "value" of a measurement that has the metric's name, except for families of numbers that
belong together (FAMILIES): those are fields of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from opentelemetry.proto.metrics.v1 import metrics_pb2

from services.metrics.readings import Kind, Reading

VALUE = "value"
MAX_BUCKETS = 64  # a histogram with more keeps count, sum, min and max

FAMILIES = (("lingqu.training.layers.", "training.layers"), ("lingqu.training.", "training"))
"""Beginnings of names, and the measurement of all that begin so; the first that fits."""

_OF_RESOURCE = {"service.name": "service", "service.instance.id": "instance"}
_NO_VALUE = metrics_pb2.DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK
_CUMULATIVE = metrics_pb2.AGGREGATION_TEMPORALITY_CUMULATIVE


def readings(resource_metrics: Iterable[Any]) -> Iterator[Reading]:
    """All data points of an export, in order; points that say they have no value are left out."""
    for resource in resource_metrics:
        common = {
            _OF_RESOURCE[a.key]: _text(a.value) for a in resource.resource.attributes if a.key in _OF_RESOURCE
        }
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                yield from _of_metric(metric, common)


def count(resource_metrics: Iterable[Any]) -> int:
    """How many data points an export has."""
    return sum(
        len(getattr(metric, shape).data_points)
        for resource in resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if (shape := metric.WhichOneof("data")) is not None
    )


def _of_metric(metric: Any, common: dict[str, str]) -> Iterator[Reading]:
    shape = metric.WhichOneof("data")
    if shape is None:
        return
    name, field = _named(metric.name)
    data = getattr(metric, shape)
    if shape == "gauge":
        kind = Kind.LEVEL
    elif shape == "summary":
        kind = Kind.TOTAL
    elif data.aggregation_temporality == _CUMULATIVE:
        kind = Kind.LEVEL if shape == "sum" and not data.is_monotonic else Kind.TOTAL
    else:
        kind = Kind.ADDED
    fields = _FIELDS[shape]
    for point in data.data_points:
        if not point.flags & _NO_VALUE:
            labels = {a.key: _text(a.value) for a in point.attributes}
            found = fields(point, kind)
            if field != VALUE and VALUE in found:
                found = {field: found[VALUE]}
            yield Reading(
                name,
                labels | common if common else labels,
                found,
                point.time_unix_nano,
                kind,
                point.start_time_unix_nano,
            )


def _named(name: str) -> tuple[str, str]:
    """The measurement and the field of a number."""
    for beginning, measurement in FAMILIES:
        if name.startswith(beginning) and len(name) > len(beginning):
            return measurement, name[len(beginning) :]
    return name, VALUE


def _number(point: Any, _: Kind) -> dict[str, float]:
    which = point.WhichOneof("value")
    return {VALUE: float(getattr(point, which))} if which else {}


def _summary(point: Any, _: Kind) -> dict[str, float]:
    return {"count": float(point.count), "sum": point.sum}


def _distribution(point: Any, kind: Kind) -> dict[str, float]:
    fields = {"count": float(point.count)}
    if point.HasField("sum"):
        fields["sum"] = point.sum
    # Of a total they are those since the start, which say nothing of what was added.
    if kind is Kind.ADDED and point.count:
        fields |= {name: getattr(point, name) for name in ("min", "max") if point.HasField(name)}
    return fields


def _histogram(point: Any, kind: Kind) -> dict[str, float]:
    fields = _distribution(point, kind)
    bounds, counts = point.explicit_bounds, point.bucket_counts
    if len(counts) == len(bounds) + 1 <= MAX_BUCKETS + 1:
        below = 0
        for bound, number in zip(bounds, counts, strict=False):
            below += number
            if math.isfinite(bound):
                fields[f"le_{bound:g}"] = float(below)
    return fields


_FIELDS = {
    "gauge": _number,
    "sum": _number,
    "histogram": _histogram,
    "exponential_histogram": _distribution,
    "summary": _summary,
}


def _text(value: Any) -> str:
    """An attribute's value; "" for what is no scalar, which drops the label."""
    which = value.WhichOneof("value")
    if which == "string_value":
        return str(value.string_value)
    if which == "bool_value":
        return "true" if value.bool_value else "false"
    if which in ("int_value", "double_value"):
        return format(getattr(value, which), "d" if which == "int_value" else "g")
    return ""
