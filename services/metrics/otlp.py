"""OpenTelemetry's metrics as readings (https://opentelemetry.io/docs/specs/otel/metrics/data-model/).

Gauges, and sums that may fall, are levels. Sums that only rise, and histograms, are totals or what was added,
by their temporality. A histogram has the fields count, sum, min, max, and `le_<bound>` for each bucket: how
many values were at most that. Exponential histograms have no buckets here, summaries no quantiles.

A number is the field "value" of a measurement that has the metric's name, except for families of numbers that
belong together (FAMILIES): those are fields of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from google.protobuf.message import DecodeError
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.metrics.v1 import metrics_pb2

from services.core.errors import InvalidInput
from services.metrics.readings import Kind, Reading

VALUE = "value"
MAX_BUCKETS = 64  # a histogram with more keeps count, sum, min and max

FAMILIES = (("lingqu.training.layers.", "training.layers"), ("lingqu.training.", "training"))
"""Beginnings of names, and the measurement of all that begin so; the first that fits."""

MAX_KNOWN = 20_000
MAX_KNOWN_BYTES = 2_048
"""Of the attributes of a series that is remembered."""

_NONE: Mapping[tuple[bytes, ...], Mapping[str, str]] = MappingProxyType({})
_OF_RESOURCE = {"service.name": "service", "service.instance.id": "instance"}
_NO_VALUE = metrics_pb2.DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK
_CUMULATIVE = metrics_pb2.AGGREGATION_TEMPORALITY_CUMULATIVE


class Decoder:
    """Exports as readings. Series come again and again: the labels of those that came are remembered, by the
    bytes that their attributes have on the wire."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[str, str], ...], dict[tuple[bytes, ...], Mapping[str, str]]] = {}
        self._room = MAX_KNOWN

    def readings(self, resource_metrics: Iterable[Any]) -> list[Reading]:
        """All data points of an export (of `wire.MetricsData`), in order; points that say they have no value
        are left out. Raises InvalidInput for attributes that are none."""
        found: list[Reading] = []
        for resource in resource_metrics:
            attributes = resource.resource.attributes
            common = tuple((_OF_RESOURCE[a.key], _text(a.value)) for a in attributes if a.key in _OF_RESOURCE)
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    self._of_metric(metric, common, found)
        return found

    def _of_metric(self, metric: Any, common: tuple[tuple[str, str], ...], found: list[Reading]) -> None:
        shape = metric.WhichOneof("data")
        if shape is None:
            return
        name, field = _named(metric.name)
        data = getattr(metric, shape)
        kind = _kind(shape, data)
        fields = _FIELDS[shape]
        known = self._known.get(common, _NONE)
        for point in data.data_points:
            if point.flags & _NO_VALUE:
                continue
            attributes = tuple(point.attributes)
            labels = known.get(attributes)
            if labels is None:
                labels = self._labels(common, attributes)
                known = self._known.get(common, _NONE)
            values = fields(point, kind)
            if field is not VALUE and VALUE in values:
                values = {field: values[VALUE]}
            found.append(
                Reading(name, labels, values, point.time_unix_nano, kind, point.start_time_unix_nano)
            )

    def _labels(
        self, common: tuple[tuple[str, str], ...], attributes: tuple[bytes, ...]
    ) -> Mapping[str, str]:
        try:
            decoded = [KeyValue.FromString(attribute) for attribute in attributes]
        except DecodeError as err:
            raise InvalidInput("attributes", "are no list of opentelemetry.proto.common.v1.KeyValue") from err
        labels = {a.key: _text(a.value) for a in decoded} | dict(common)
        size = sum(map(len, attributes)) + sum(len(value) for _, value in common)
        if size <= MAX_KNOWN_BYTES:
            if not self._room:
                self._known, self._room = {}, MAX_KNOWN
            self._known.setdefault(common, {})[attributes] = labels
            self._room -= 1
        return labels


def _kind(shape: str, data: Any) -> Kind:
    if shape == "gauge":
        return Kind.LEVEL
    if shape == "summary":
        return Kind.TOTAL
    if data.aggregation_temporality == _CUMULATIVE:
        return Kind.LEVEL if shape == "sum" and not data.is_monotonic else Kind.TOTAL
    return Kind.ADDED


def _named(name: str) -> tuple[str, str]:
    """The measurement and the field of a number."""
    for beginning, measurement in FAMILIES:
        if name.startswith(beginning) and len(name) > len(beginning):
            return measurement, name[len(beginning) :]
    return name, VALUE


def _number(point: Any, _: Kind) -> dict[str, float]:
    if value := point.as_double:
        return {VALUE: value}
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
