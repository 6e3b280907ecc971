"""What every store of metrics promises, whichever it is, against a reference in plain Python."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.errors import InvalidInput
from services.metrics.points import LATEST_NS, Labels, Point, labels
from services.metrics.queries import Aggregate, Query, Series, nearest_rank
from services.metrics.store import PointsRefused, Store
from services.metrics.stores import influxql
from services.metrics.stores.duck import DuckStore
from services.metrics.stores.influx import InfluxStore
from tests.influxes import Influx, influx

SECOND = 1_000_000_000
MINUTE, HOUR = 60 * SECOND, 3600 * SECOND
START = 1_760_000_000 * SECOND
MODELS, CLIENTS = ("a", "b", 'with "quotes", \\ and = , spaces'), ("x", "ÿ 漢字")


@pytest.fixture(scope="module")
def running_influx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Influx]:
    with influx(tmp_path_factory.mktemp("influx")) as made:
        yield made


@pytest.fixture(params=["duckdb", "influxdb"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Opens the same store again each time; only one at a time of DuckDB."""
    if request.param == "duckdb":
        yield lambda: DuckStore(tmp_path / "metrics.duckdb")
    else:
        server = request.getfixturevalue("running_influx").server()
        yield lambda: InfluxStore(server)


@pytest.fixture
def store(opened: Callable[[], Store]) -> Iterator[Store]:
    made = opened()
    yield made
    made.close()


def expected(points: Sequence[Point], query: Query) -> list[Series]:
    """The definition of a query, word for word."""
    kept: dict[Labels, dict[int, list[tuple[int, float]]]] = {}
    for point in points:
        known = dict(point.labels)
        fits = all(known.get(name, "") in values for name, values in query.filters.items())
        in_range = query.start_ns <= point.time_ns < query.end_ns
        if (
            point.measurement != query.measurement
            or query.field not in point.fields
            or not fits
            or not in_range
        ):
            continue
        group = tuple((name, known.get(name, "")) for name in sorted(query.group_by))
        window = query.window_ns
        begin = point.time_ns - point.time_ns % window if window else query.start_ns
        kept.setdefault(group, {}).setdefault(begin, []).append((point.time_ns, point.fields[query.field]))
    made = []
    for group, windows in sorted(kept.items()):
        values = [(begin, value(query, found)) for begin, found in sorted(windows.items())]
        if some := tuple((begin, found) for begin, found in values if found is not None):
            made.append(Series(group, some))
    return made


def value(query: Query, found: list[tuple[int, float]]) -> float | None:
    numbers = sorted(number for _, number in found)
    seconds = (query.window_ns or query.end_ns - query.start_ns) / SECOND
    return {
        Aggregate.MEAN: lambda: math.fsum(numbers) / len(numbers),
        Aggregate.SUM: lambda: math.fsum(numbers),
        Aggregate.MIN: lambda: numbers[0],
        Aggregate.MAX: lambda: numbers[-1],
        Aggregate.COUNT: lambda: float(len(numbers)),
        Aggregate.LAST: lambda: max(found)[1],
        Aggregate.RATE: lambda: math.fsum(numbers) / seconds,
        Aggregate.PERCENTILE: lambda: nearest_rank(numbers, query.percentile),
    }[query.aggregate]()


def check_close(found: list[Series], wanted: list[Series]) -> None:
    assert [s.labels for s in found] == [s.labels for s in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert [begin for begin, _ in one.values] == [begin for begin, _ in other.values]
        assert [v for _, v in one.values] == pytest.approx([v for _, v in other.values], rel=1e-9, abs=1e-9)


numbers = st.floats(-1e9, 1e9, allow_nan=False).map(lambda x: round(x, 6))


@st.composite
def batches(draw: st.DrawFn) -> list[Point]:
    """Points of few series, no two of a series at one time."""
    keys = st.tuples(st.sampled_from(MODELS), st.sampled_from(CLIENTS), st.integers(0, 300))
    made = []
    for model, client, tick in draw(st.sets(keys, max_size=40)):
        known = labels({"model": model} if client == "x" else {"model": model, "client": client})
        fields = draw(st.dictionaries(st.sampled_from(["value", "other"]), numbers, min_size=1))
        made.append(Point("m", known, fields, START + tick * SECOND // 3))
    return sorted(made, key=lambda p: p.time_ns)


@st.composite
def queries(draw: st.DrawFn) -> Query:
    filters = draw(
        st.dictionaries(
            st.sampled_from(["model", "client", "none"]),
            st.lists(st.sampled_from([*MODELS, *CLIENTS, ""]), min_size=1, max_size=3),
            max_size=2,
        )
    )
    return Query(
        "m",
        draw(st.sampled_from(["value", "other"])),
        START + draw(st.integers(0, 50)) * SECOND,
        START + draw(st.integers(51, 120)) * SECOND,
        draw(st.sampled_from(list(Aggregate))),
        draw(st.sampled_from([0.1, 50.0, 95.0, 100.0])),
        draw(st.sampled_from([0, 1, 7, 60])) * SECOND,
        filters,
        tuple(draw(st.sets(st.sampled_from(["model", "client", "none"])))),
    )


def test_answers_are_as_the_definition_says(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example has a measurement of its own, so that one store does for all. Ranges of eight windows and
    more are asked for in slices of InfluxDB, as those of hours are."""
    monkeypatch.setattr(influxql, "MIN_SLICED_NS", 0)
    measurements = (f"m {n}," for n in itertools.count())

    @settings(max_examples=30)
    @given(batches(), st.lists(queries(), min_size=1, max_size=8))
    def check(points: list[Point], asked: list[Query]) -> None:
        name = next(measurements)
        points = [point._replace(measurement=name) for point in points]
        store.write(points)
        for query in (replace(query, measurement=name) for query in asked):
            check_close(store.query(query), expected(points, query))

    check()


def test_a_named_batch_is_kept_once(store: Store) -> None:
    points = [Point("m", labels({"k": "v"}), {"value": 1.0}, START + n) for n in range(5)]
    for _ in range(3):
        store.write(points, "batch 1")
    counted = store.query(Query("m", "value", START, START + SECOND, Aggregate.COUNT))
    assert counted == [Series((), ((START, 5.0),))]


def test_what_is_unknown_has_no_series(store: Store) -> None:
    store.write([Point("m", labels({"k": "v"}), {"value": 1.0}, START)])
    for query in (
        Query("other", "value", START, START + 1, Aggregate.SUM),
        Query("m", "other", START, START + 1, Aggregate.SUM),
        Query("m", "value", START, START + 1, Aggregate.SUM, filters={"k": ["w"]}),
        Query("m", "value", START + 1, START + 2, Aggregate.SUM),
    ):
        assert store.query(query) == []


def test_series_are_listed_in_order(store: Store) -> None:
    known = [labels({"model": model}) for model in MODELS]
    store.write([Point(name, k, {"value": 1.0}, START) for name in ("n", "m") for k in known])
    assert store.series() == sorted((name, k) for name in ("m", "n") for k in known)
    assert store.series("n", limit=2) == sorted(("n", k) for k in known)[:2]


def test_what_is_old_is_forgotten(store: Store) -> None:
    store.write([Point("old", labels({"k": "v"}), {"value": 1.0}, START)])
    store.retain(3600)
    assert store.query(Query("old", "value", START, START + 1, Aggregate.SUM)) == []


def test_what_is_older_than_raw_points_is_rolled_up(opened: Callable[[], Store]) -> None:
    """Sums, counts and extremes are what they were; windows from a minute on, too. No percentiles."""
    now = time.time_ns() // MINUTE * MINUTE
    first = now - 3 * HOUR
    points = [
        Point("m", labels({"k": k}), {"value": float(n % 17), "other": 1.0}, first + n * 20 * SECOND + 1)
        for n in range(3 * 180)
        for k in "ab"
    ]
    store = opened()
    store.write(points, "batch")
    store.retain(3600 * 2 - 60, 30 * 86_400)
    asked = [
        Query("m", "value", first, now, aggregate, window_ns=window, group_by=group)
        for aggregate in Aggregate
        if aggregate is not Aggregate.PERCENTILE
        for window, group in ((0, ()), (MINUTE, ("k",)), (7 * MINUTE, ()))
    ]
    for number in range(2):
        for query in asked:
            check_close(store.query(query), expected(points, query))
        with pytest.raises(InvalidInput, match="raw points"):
            store.query(replace(asked[0], aggregate=Aggregate.PERCENTILE, percentile=50.0))
        fresh = replace(asked[0], aggregate=Aggregate.PERCENTILE, percentile=50.0, start_ns=now - HOUR)
        check_close(store.query(fresh), expected(points, fresh))
        store.retain(3600 * 2 - 60, 30 * 86_400)
        assert store.series() == [("m", labels({"k": k})) for k in "ab"]
        if number == 0:
            store.close()
            store = opened()
    store.retain(3600, 3600 + 1800)
    kept = store.query(Query("m", "other", first, now, Aggregate.COUNT))[0].values[0][1]
    assert 2 * 270 - 12 <= kept <= 2 * 270 + 12
    store.close()


TEXTS = st.text(min_size=1, max_size=12) | st.sampled_from(
    [
        "time",
        "_field",
        "#",
        "␛",
        "␛.",
        "\\",
        "a\\",
        "\\=",
        "a\\,b",
        "x\ny",
        '"',
        "' OR '1'='1",
        "::tag",
        "$1",
        "value",
    ]
)


def test_any_text_is_a_name_and_a_value(store: Store) -> None:
    """Nothing in a name or a label ends a line, a statement or a quotation."""

    @settings(max_examples=60)
    @given(TEXTS, st.dictionaries(TEXTS, TEXTS, min_size=1, max_size=3), TEXTS)
    def check(measurement: str, known: dict[str, str], field: str) -> None:
        store.write([Point(measurement, labels(known), {field: 1.5}, START)])
        label, value = next(iter(known.items()))
        query = Query(measurement, field, START, START + 1, Aggregate.MAX, filters={label: [value]})
        query = replace(query, group_by=tuple(known))
        assert Series(labels(known), ((START, 1.5),)) in store.query(query)
        assert store.query(replace(query, filters={label: [value + "'"]})) == []
        assert (measurement, labels(known)) in store.series(measurement)

    check()


def test_what_no_store_can_keep_is_refused_and_the_rest_is_kept(store: Store) -> None:
    good = [Point("m", labels({"k": "v"}), {"value": 1.0}, START + n) for n in range(3)]
    bad = [
        good[0]._replace(measurement=""),
        good[0]._replace(labels=(("", "v"),)),
        good[0]._replace(labels=(("k", "\ud800"),)),
        good[0]._replace(fields={}),
        good[0]._replace(time_ns=-1),
        good[0]._replace(time_ns=1 << 63),
        *(good[0]._replace(fields={"value": value}) for value in (math.nan, math.inf, -math.inf)),
    ]
    with pytest.raises(PointsRefused) as caught:
        store.write([*bad, *good])
    assert caught.value.number == len(bad)
    assert store.query(Query("m", "value", 0, LATEST_NS, Aggregate.COUNT)) == [Series((), ((0, 3.0),))]


def test_the_ends_of_time(store: Store) -> None:
    for moment in (0, 1, LATEST_NS - 1):
        store.write([Point("m", labels({"k": str(moment)}), {"value": 1.0}, moment)])
    found = store.query(Query("m", "value", 0, LATEST_NS, Aggregate.SUM, group_by=("k",)))
    assert len(found) == 3


def test_duckdb_finds_what_was_kept_before(tmp_path: Path) -> None:
    file = tmp_path / "metrics.duckdb"
    points = [Point("m", labels({"k": "v"}), {"value": 2.0}, START)]
    first = DuckStore(file)
    first.write(points, "batch 1")
    first.close()
    again = DuckStore(file)
    again.write(points, "batch 1")
    again.write([Point("m", labels({"k": "w"}), {"value": 3.0}, START)], "batch 2")
    query = Query("m", "value", START, START + 1, Aggregate.SUM, group_by=("k",))
    assert again.query(query) == [
        Series((("k", "v"),), ((START, 2.0),)),
        Series((("k", "w"),), ((START, 3.0),)),
    ]
    again.close()
