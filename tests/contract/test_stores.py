"""What every store of metrics promises, whichever it is, against a reference in plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.metrics.points import Labels, Point, labels
from services.metrics.queries import Aggregate, Query, Series, nearest_rank
from services.metrics.store import Store
from services.metrics.stores.duck import DuckStore

SECOND = 1_000_000_000
START = 1_760_000_000 * SECOND
MODELS, CLIENTS = ("a", "b", 'with "quotes", \\ and = , spaces'), ("x", "ÿ 漢字")


@pytest.fixture(params=["duckdb"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made = DuckStore(tmp_path / "metrics.duckdb")
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


def close(found: list[Series], wanted: list[Series]) -> None:
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


@given(batches(), st.lists(queries(), min_size=1, max_size=8))
def test_duckdb_answers_as_the_definition_says(points: list[Point], asked: list[Query]) -> None:
    made = DuckStore(Path(":memory:"))
    try:
        made.write(points)
        for query in asked:
            close(made.query(query), expected(points, query))
    finally:
        made.close()


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
