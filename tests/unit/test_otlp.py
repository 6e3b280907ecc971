"""OpenTelemetry's data points as readings, and what is added of counters."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.metrics.v1 import metrics_pb2

from services.core.errors import InvalidInput
from services.metrics import otlp
from services.metrics.otlp import Decoder
from services.metrics.readings import Kind, Reading
from services.metrics.totals import Totals
from services.metrics.wire import MetricsData

CUMULATIVE = metrics_pb2.AGGREGATION_TEMPORALITY_CUMULATIVE
DELTA = metrics_pb2.AGGREGATION_TEMPORALITY_DELTA
BEGAN = 1_000


def exported(metric: dict[str, Any], **resource: str) -> Any:
    found = metrics_pb2.ResourceMetrics()
    for key, value in resource.items():
        found.resource.attributes.add(key=key.replace("_", ".")).value.string_value = value
    found.scope_metrics.add().metrics.append(metrics_pb2.Metric(**metric))
    return found


def readings(metric: dict[str, Any], **resource: str) -> list[Reading]:
    return decoded(Decoder(), metrics_pb2.MetricsData(resource_metrics=[exported(metric, **resource)]))


def decoded(decoder: Decoder, sent: Any) -> list[Reading]:
    return decoder.readings(MetricsData.FromString(sent.SerializeToString()).resource_metrics)


def number(value: float = 1.0, **fields: Any) -> metrics_pb2.NumberDataPoint:
    return metrics_pb2.NumberDataPoint(as_double=value, time_unix_nano=5, start_time_unix_nano=2, **fields)


def test_a_gauge_is_a_level_with_the_services_name() -> None:
    point = number(2.5)
    for key, value in (("string_value", "a"), ("int_value", 7), ("double_value", 0.5), ("bool_value", True)):
        setattr(point.attributes.add(key=key).value, key, value)
    point.attributes.add(key="list").value.array_value.values.add(string_value="x")
    found = readings(
        {"name": "g", "gauge": metrics_pb2.Gauge(data_points=[point])},
        service_name="s", service_instance_id="i", host_name="h",
    )  # fmt: skip
    labels = {"string_value": "a", "int_value": "7", "double_value": "0.5", "bool_value": "true"}
    assert found == [
        Reading(
            "g", {**labels, "list": "", "service": "s", "instance": "i"}, {"value": 2.5}, 5, Kind.LEVEL, 2
        )
    ]


@pytest.mark.parametrize(
    ("temporality", "monotonic", "kind"),
    [
        (CUMULATIVE, True, Kind.TOTAL),
        (CUMULATIVE, False, Kind.LEVEL),
        (DELTA, True, Kind.ADDED),
        (DELTA, False, Kind.ADDED),
    ],
)
def test_a_sum_is_what_its_temporality_says(temporality: Any, monotonic: bool, kind: Kind) -> None:
    data = metrics_pb2.Sum(
        data_points=[number()], aggregation_temporality=temporality, is_monotonic=monotonic
    )
    assert [r.kind for r in readings({"name": "n", "sum": data})] == [kind]


def histogram(temporality: Any, **fields: Any) -> list[Reading]:
    point = metrics_pb2.HistogramDataPoint(count=6, sum=9.5, min=0.1, max=7, time_unix_nano=5, **fields)
    data = metrics_pb2.Histogram(data_points=[point], aggregation_temporality=temporality)
    return readings({"name": "h", "histogram": data})


def test_a_histogram_has_count_sum_and_buckets_from_below() -> None:
    buckets = {"explicit_bounds": [0.5, 1, 2.5], "bucket_counts": [1, 2, 0, 3]}
    expected = {"count": 6, "sum": 9.5, "le_0.5": 1, "le_1": 3, "le_2.5": 3}
    assert histogram(CUMULATIVE, **buckets)[0].fields == expected
    assert histogram(DELTA, **buckets)[0].fields == expected | {"min": pytest.approx(0.1), "max": 7}


def test_a_histogram_with_odd_or_too_many_buckets_has_none() -> None:
    for bounds, counts in (([1.0], [1]), (range(100), [1] * 101)):
        found = histogram(CUMULATIVE, explicit_bounds=bounds, bucket_counts=counts)
        assert found[0].fields == {"count": 6, "sum": 9.5}


def test_exponential_histograms_and_summaries_have_count_and_sum() -> None:
    point = metrics_pb2.ExponentialHistogramDataPoint(count=2, sum=3, max=2, time_unix_nano=1)
    data = metrics_pb2.ExponentialHistogram(data_points=[point], aggregation_temporality=DELTA)
    assert readings({"name": "e", "exponential_histogram": data})[0].fields == {
        "count": 2,
        "sum": 3,
        "max": 2,
    }
    summary = metrics_pb2.Summary(data_points=[metrics_pb2.SummaryDataPoint(count=2, sum=3)])
    assert readings({"name": "s", "summary": summary})[0].fields == {"count": 2, "sum": 3}


def test_points_without_a_value_are_left_out_or_have_no_field() -> None:
    absent = number(flags=metrics_pb2.DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK)
    empty = metrics_pb2.NumberDataPoint(time_unix_nano=5)
    found = readings({"name": "g", "gauge": metrics_pb2.Gauge(data_points=[absent, empty])})
    assert [r.fields for r in found] == [{}]
    assert readings({"name": "nothing"}) == []


def total(value: float, at: int, start: int = 0, **labels: str) -> Reading:
    return Reading("m", labels, {"value": value}, at, Kind.TOTAL, start)


def test_the_first_total_counts_only_if_the_series_began_after_us() -> None:
    totals = Totals(BEGAN)
    assert totals.added(total(5, 2000, start=BEGAN)) == {"value": 5}
    assert totals.added(total(5, 2000, start=BEGAN - 1)) == {}
    assert totals.added(total(7, 2000, k="without a start")) == {}
    assert totals.added(total(9, 2001, k="without a start")) == {"value": 2}


def test_a_total_that_fell_began_anew() -> None:
    totals = Totals(BEGAN)
    assert totals.added(total(100, 2000)) == {}
    assert totals.added(total(3, 2001)) == {"value": 3}


def test_what_was_told_before_adds_nothing() -> None:
    totals = Totals(BEGAN)
    for reading in (total(5, 2000, BEGAN), Reading("d", {}, {"value": 4.0}, 2000, Kind.ADDED, 1500)):
        assert totals.added(reading) == reading.fields
        assert totals.added(reading) is None
    assert totals.added(total(5, 1999, BEGAN)) is None


def test_senders_with_the_same_labels_are_told_apart_by_their_start() -> None:
    totals = Totals(BEGAN)
    added = 0.0
    for at in range(10):
        for sender, start in enumerate((BEGAN + 1, BEGAN + 2)):
            fields = totals.added(total(at * (sender + 1), 2000 + at, start))
            added += (fields or {}).get("value", 0)
    assert added == 9 + 18


def test_memory_is_bounded_and_what_was_forgotten_is_not_counted_twice() -> None:
    totals = Totals(BEGAN, most=10)
    for number in range(100):
        totals.added(total(5, 2000 + number, BEGAN, series=str(number)))
        totals.added(Reading("d", {"n": str(number)}, {"value": 1.0}, 2000, Kind.ADDED, 1500))
    assert len(totals) == 20
    assert totals.added(total(6, 3000, BEGAN, series="0")) == {}
    assert totals.added(total(9, 3001, BEGAN, series="0")) == {"value": 3}


steps = st.lists(st.tuples(st.booleans(), st.floats(0, 1e6)), max_size=30)


@given(steps)
def test_additions_are_what_was_counted_whatever_restarts(taken: list[tuple[bool, float]]) -> None:
    """A counter that grows, and sometimes begins anew with another start."""
    totals, start, value, counted, added = Totals(BEGAN), BEGAN, 0.0, 0.0, 0.0
    for number, (restarts, more) in enumerate(taken):
        at = BEGAN + 10 * (number + 1)
        if restarts:
            start, value = at - 5, 0.0
        value += more
        counted += more
        added += (totals.added(total(value, at, start)) or {})["value"]
    assert math.isclose(added, counted, rel_tol=1e-9, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("name", "measurement", "field"),
    [
        ("lingqu.training.loss", "training", "loss"),
        ("lingqu.training.layers.p99", "training.layers", "p99"),
        ("lingqu.training.layers.", "training", "layers."),
        ("lingqu.training.", "lingqu.training.", "value"),
        ("training.loss", "training.loss", "value"),
    ],
)
def test_numbers_of_a_family_are_fields_of_one_measurement(name: str, measurement: str, field: str) -> None:
    (found,) = readings({"name": name, "gauge": metrics_pb2.Gauge(data_points=[number(2.5)])})
    assert (found.measurement, found.fields) == (measurement, {field: 2.5})


def test_labels_are_remembered_by_their_bytes_and_never_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of another resource are other labels; what is long or one too many is read anew."""
    monkeypatch.setattr(otlp, "MAX_KNOWN", 3)
    decoder = Decoder()
    for value in ("a", "b", "a", "c", "d", "x" * 5_000, "a"):
        for service in ("s", "t", ""):
            point = number()
            point.attributes.add(key="k").value.string_value = value
            metric = {"name": "g", "gauge": metrics_pb2.Gauge(data_points=[point, point])}
            resource = {"service_name": service} if service else {}
            sent = metrics_pb2.MetricsData(resource_metrics=[exported(metric, **resource)])
            expected = {"k": value} | ({"service": service} if service else {})
            assert [dict(r.labels) for r in decoded(decoder, sent)] == [expected] * 2
            assert sum(map(len, decoder._known.values())) <= 3


def test_what_is_no_attribute_is_told() -> None:
    sent = MetricsData()
    metric = sent.resource_metrics.add().scope_metrics.add().metrics.add(name="g")
    metric.gauge.data_points.add(as_double=1.0, attributes=[b"\xff\xff"])
    with pytest.raises(InvalidInput, match="attributes"):
        Decoder().readings(sent.resource_metrics)
