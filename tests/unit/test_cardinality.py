"""How many series there may be, whatever is sent."""

from __future__ import annotations

import uuid

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.metrics.cardinality import (
    LABELS,
    MAX_LABELS,
    MAX_VALUE_LENGTH,
    OVERFLOW,
    Cardinality,
    allowed,
    good_name,
)

texts = st.text(max_size=300)
sets = st.dictionaries(st.one_of(texts, st.from_regex(r"[a-z]{1,3}", fullmatch=True)), texts, max_size=20)
measurements = st.sampled_from(["requests", "host", "lingqu.inference.requests", "jobs", "latency"])


@given(measurements, sets)
def test_labels_are_few_short_ordered_and_printable(measurement: str, labels: dict[str, str]) -> None:
    kept = allowed(measurement, labels)
    assert len(kept) <= MAX_LABELS
    assert list(kept) == sorted(kept)
    assert len(dict(kept)) == len(kept)
    for name, value in kept:
        assert name in labels
        assert 0 < len(value) <= MAX_VALUE_LENGTH
        assert not any(ord(c) < 32 for c in value)
        assert good_name(name)
    assert allowed(measurement, dict(kept)) == kept


@given(
    st.lists(st.tuples(measurements, sets, st.booleans()), max_size=60), st.integers(1, 5), st.integers(1, 9)
)
def test_there_are_never_more_series_than_may_be(
    sent: list[tuple[str, dict[str, str], bool]], series: int, overall: int
) -> None:
    cardinality = Cardinality(series, overall, measurements=3)
    alive: dict[str, set[object]] = {}
    for measurement, labels, rotate in sent:
        if rotate:
            cardinality.rotate()
            alive.clear()
        first = cardinality.admit(measurement, labels)
        assert cardinality.admit(measurement, labels) == first
        if first is not None:
            assert first.overflow == (first.labels == OVERFLOW)
            if not first.overflow:
                alive.setdefault(measurement, set()).add(first.labels)
        assert len(alive) <= 3
        assert all(len(found) <= series for found in alive.values())
        assert len(cardinality) <= overall


@pytest.mark.parametrize("measurement", sorted(LABELS))
def test_our_measurements_have_their_labels_only(measurement: str) -> None:
    labels = dict.fromkeys(LABELS[measurement], "x")
    assert dict(allowed(measurement, {**labels, "other": "x", "request_id": "x"})) == labels


def test_a_request_is_no_series() -> None:
    names = (
        "request_id",
        "x-request-id",
        "requestId",
        "trace_id",
        "span.id",
        "http.request.id",
        "id",
        "uuid",
    )
    sent = {
        **dict.fromkeys(names, "a"),
        "model": "m",
        "job": str(uuid.uuid4()),
        "trace": "ab" * 16,
        "n": "1" * 12,
    }
    assert allowed("jobs", sent) == (("model", "m"),)


def test_what_comes_again_stays_and_what_does_not_makes_room() -> None:
    cardinality = Cardinality(series=2)
    for name in ("a", "b"):
        assert not cardinality.admit("m", {"k": name}).overflow  # type: ignore[union-attr]
    assert cardinality.admit("m", {"k": "c"}) == (OVERFLOW, True, True)
    cardinality.rotate()
    assert not cardinality.admit("m", {"k": "a"}).overflow  # type: ignore[union-attr]
    assert cardinality.admit("m", {"k": "c"}).overflow  # type: ignore[union-attr]
    cardinality.rotate()
    assert not cardinality.admit("m", {"k": "c"}).overflow  # type: ignore[union-attr]
    assert not cardinality.admit("m", {"k": "a"}).overflow  # type: ignore[union-attr]


def test_measurements_and_fields_are_bounded() -> None:
    cardinality = Cardinality(measurements=2, fields=3)
    assert [cardinality.admit(name, {}) is not None for name in "abca"] == [True, True, False, True]
    assert cardinality.admits_fields("a", {"x": 1, "y": 1})
    assert cardinality.admits_fields("a", {"z": 1})
    assert not cardinality.admits_fields("a", {"w": 1})
    assert cardinality.admits_fields("a", {"x": 1})


@pytest.mark.parametrize("number", [200_000, pytest.param(1_000_000, marks=pytest.mark.soak)])
def test_label_values_without_end_take_no_memory(number: int) -> None:
    cardinality = Cardinality()
    for n in range(10_000):  # fills whatever is filled
        cardinality.admit("m", {"user": f"warm-{n}-{'x' * 200}"})
    process = psutil.Process()
    before = process.memory_info().rss
    for n in range(number):
        cardinality.admit("m" if n % 2 else f"m{n}", {"user": f"u{n}"})
    assert len(cardinality) <= 20_000
    assert process.memory_info().rss - before < 4 << 20
