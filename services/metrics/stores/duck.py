"""The embedded store: one DuckDB file (https://duckdb.org).

Which series there are is known in memory, so filters and groups are resolved before SQL, and the table of
points has nothing but numbers. It is written in the order of time and has no index: DuckDB skips blocks by
their range of times.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from services.core.errors import BackendUnavailable, LingquError
from services.metrics.points import LATEST_NS, Labels, Point, fault, fault_of_values
from services.metrics.queries import Aggregate, Query, Series, check_raw
from services.metrics.store import ROLL_UP_NS, PointsRefused

MEMORY_LIMIT = "256MB"
THREADS = 2
KEPT_BATCHES = 1000  # names of batches that are recognised when they are written again
FORGET_EVERY = 100  # batches

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS series (id INTEGER, measurement VARCHAR, labels VARCHAR)",
    "CREATE TABLE IF NOT EXISTS fields (id INTEGER, name VARCHAR)",
    "CREATE TABLE IF NOT EXISTS points (time BIGINT, series INTEGER, field INTEGER, value DOUBLE)",
    "CREATE TABLE IF NOT EXISTS rollups (time BIGINT, series INTEGER, field INTEGER, "
    "number BIGINT, total DOUBLE, least DOUBLE, most DOUBLE, newest DOUBLE)",
    "CREATE TABLE IF NOT EXISTS batches (number BIGINT, name VARCHAR)",
)
_AGGREGATES = {
    Aggregate.MEAN: "avg(value)",
    Aggregate.SUM: "sum(value)",
    Aggregate.MIN: "min(value)",
    Aggregate.MAX: "max(value)",
    Aggregate.COUNT: "count(value)::DOUBLE",
    Aggregate.LAST: "arg_max(value, (time, value))",
    Aggregate.RATE: "sum(value) / $seconds",
    Aggregate.PERCENTILE: "list(value ORDER BY value)[floor(count(value) * $percentile / 100 + 0.5)::BIGINT]",
}
_OF_ROLLUPS = {
    Aggregate.MEAN: "sum(total) / sum(number)",
    Aggregate.SUM: "sum(total)",
    Aggregate.MIN: "min(least)",
    Aggregate.MAX: "max(most)",
    Aggregate.COUNT: "sum(number)::DOUBLE",
    Aggregate.LAST: "arg_max(newest, (time, newest))",
    Aggregate.RATE: "sum(total) / $seconds",
}
_IN_RANGE = "field = $field AND time >= $start AND time < $end"
# Raw points and roll-ups under the same names.
_WITH_ROLLUPS = f"""(
    SELECT time, series, 1 AS number, value AS total, value AS least, value AS most, value AS newest
    FROM points WHERE {_IN_RANGE}
    UNION ALL SELECT time, series, number, total, least, most, newest FROM rollups WHERE {_IN_RANGE}
)"""  # noqa: S608
_ROLL_UP = f"""
    INSERT INTO rollups SELECT time - time % {ROLL_UP_NS} AS minute, series, field,
        count(value), sum(value), min(value), max(value), arg_max(value, (time, value))
    FROM points WHERE time < $oldest GROUP BY ALL ORDER BY ALL
"""  # noqa: S608


class DuckStore:
    """A Store. One writes at a time, any number read."""

    def __init__(self, path: Path) -> None:
        """Raises LingquError if the file is no store or somebody else has it open."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = duckdb.connect(
                str(path), config={"memory_limit": MEMORY_LIMIT, "threads": THREADS}
            )
            for statement in _SCHEMA:
                self._database.execute(statement)
        except duckdb.Error as err:
            raise LingquError(f"{path} cannot be opened as a store of metrics: {err}") from err
        self._writing = threading.Lock()
        self._series: dict[tuple[str, Labels], int] = {}
        for number, measurement, text in self._rows("SELECT id, measurement, labels FROM series"):
            known = tuple((name, value) for name, value in json.loads(text))
            self._series[measurement, known] = number
        self._fields = {name: number for number, name in self._rows("SELECT id, name FROM fields")}
        batches = self._rows("SELECT number, name FROM batches ORDER BY number")
        self._batches = {name: number for number, name in batches}
        self._rolled_ns = self._rolled()

    def write(self, points: Sequence[Point], batch: str = "") -> None:
        with self._writing:
            if batch and batch in self._batches:
                return
            rows, refused = self._columns(points)
            number = max(self._batches.values(), default=0) + 1
            try:
                self._insert(rows, (number, batch) if batch else None)
            except duckdb.Error as err:
                raise BackendUnavailable(f"the store of metrics cannot be written: {err}") from err
            self._series.update(rows.new_series)
            self._fields.update(rows.new_fields)
            if batch:
                self._batches[batch] = number
                self._batches = {n: i for n, i in self._batches.items() if i > number - KEPT_BATCHES}
        if refused:
            raise PointsRefused(len(refused), refused[0])

    def query(self, query: Query) -> list[Series]:
        field = self._fields.get(query.field)
        groups = self._groups(query)
        if field is None or not groups:
            return []
        names = sorted(set(groups.values()))
        number_of = {name: number for number, name in enumerate(names)}
        window = query.window_ns or max(1, query.end_ns - query.start_ns)
        begins = "time - time % $window" if query.window_ns else "$start"
        given = {
            "ids": list(groups),
            "numbers": [number_of[name] for name in groups.values()],
            "field": field,
            "start": query.start_ns,
            "end": query.end_ns,
            "window": window,
            "seconds": window / 1e9,
            "percentile": query.percentile,
        }
        aggregate, table = _AGGREGATES[query.aggregate], f"(SELECT * FROM points WHERE {_IN_RANGE})"  # noqa: S608
        if query.start_ns < self._rolled_ns:
            check_raw(query, self._rolled_ns)
            aggregate, table = _OF_ROLLUPS[query.aggregate], _WITH_ROLLUPS
        sql = f"""
            WITH members AS (SELECT unnest($ids) AS series, unnest($numbers) AS group_number)
            SELECT group_number, {begins} AS begins, {aggregate} AS result
            FROM {table} JOIN members USING (series)
            GROUP BY ALL HAVING result IS NOT NULL ORDER BY ALL
        """  # noqa: S608 - made of the constants above
        used = {name: value for name, value in given.items() if f"${name}" in sql}
        found: dict[int, list[tuple[int, float]]] = {}
        for number, begin, value in self._rows(sql, used):
            found.setdefault(number, []).append((begin, value))
        return [Series(names[number], tuple(values)) for number, values in sorted(found.items())]

    def series(self, measurement: str = "", limit: int = 1000) -> list[tuple[str, Labels]]:
        return sorted(key for key in self._series if measurement in ("", key[0]))[:limit]

    def retain(self, seconds: int, rolled_up: int = 0) -> None:
        """Rolls up or forgets now what is older, and forgets series that have nothing any more."""
        now = time.time_ns()
        oldest = (now - seconds * 1_000_000_000) // ROLL_UP_NS * ROLL_UP_NS
        oldest_rolled = now - max(seconds, rolled_up) * 1_000_000_000
        with self._writing:
            cursor = self._database.cursor()
            try:
                cursor.begin()
                if rolled_up:
                    cursor.execute(_ROLL_UP, {"oldest": oldest})
                cursor.execute("DELETE FROM points WHERE time < $oldest", {"oldest": oldest})
                cursor.execute("DELETE FROM rollups WHERE time < $oldest", {"oldest": oldest_rolled})
                cursor.execute(
                    "DELETE FROM series WHERE id NOT IN "
                    "(SELECT DISTINCT series FROM points UNION SELECT DISTINCT series FROM rollups)"
                )
                cursor.commit()
                cursor.execute("CHECKPOINT")
            except duckdb.Error as err:
                raise BackendUnavailable(f"the store of metrics cannot forget: {err}") from err
            finally:
                cursor.close()
            left = {number for (number,) in self._rows("SELECT id FROM series")}
            self._series = {key: number for key, number in self._series.items() if number in left}
            self._rolled_ns = self._rolled()

    def close(self) -> None:
        with self._writing:
            self._database.close()

    def _rolled(self) -> int:
        """Until when there are roll-ups; 0 if there are none."""
        return int(
            self._rows("SELECT coalesce(max(time) + $minute, 0) FROM rollups", {"minute": ROLL_UP_NS})[0][0]
        )

    def _groups(self, query: Query) -> dict[int, Labels]:
        """The series asked for, with the labels of the group that each is in."""
        wanted = {label: set(values) for label, values in query.filters.items()}
        found = {}
        for (measurement, known), number in list(self._series.items()):
            if measurement != query.measurement:
                continue
            values = dict(known)
            if all(values.get(label, "") in among for label, among in wanted.items()):
                found[number] = tuple((label, values.get(label, "")) for label in sorted(query.group_by))
        return found

    def _columns(self, points: Sequence[Point]) -> tuple[_Rows, list[str]]:
        """Also why some are not kept. Numbers are looked at all at once; point by point only if one is
        wrong."""
        rows = _Rows(self._series, self._fields)
        refused = [why for point in points if (why := rows.add(point))]
        if rows.sound():
            return rows, refused
        faults = [fault(point) for point in points]
        rows = _Rows(self._series, self._fields)
        for point, why in zip(points, faults, strict=True):
            if not why:
                rows.add(point)
        rows.sound()
        return rows, [why for why in faults if why]

    def _insert(self, rows: _Rows, batch: tuple[int, str] | None) -> None:
        cursor = self._database.cursor()
        cursor.begin()
        try:
            if rows:
                cursor.register("added", rows.arrays)
                cursor.execute("INSERT INTO points SELECT time, series, field, value FROM added")
                cursor.unregister("added")
            new = [(n, m, json.dumps(known)) for (m, known), n in rows.new_series.items()]
            _insert_all(cursor, "INSERT INTO series SELECT unnest($1), unnest($2), unnest($3)", new)
            added = [(number, name) for name, number in rows.new_fields.items()]
            _insert_all(cursor, "INSERT INTO fields SELECT unnest($1), unnest($2)", added)
            if batch:
                cursor.execute("INSERT INTO batches VALUES ($1, $2)", batch)
                if batch[0] % FORGET_EVERY == 0:
                    cursor.execute("DELETE FROM batches WHERE number <= $1", (batch[0] - KEPT_BATCHES,))
            cursor.commit()
        except BaseException:
            cursor.rollback()
            raise

    def _rows(self, sql: str, given: Mapping[str, object] | None = None) -> list[Any]:
        try:
            return self._database.cursor().execute(sql, given or {}).fetchall()
        except duckdb.Error as err:
            raise BackendUnavailable(f"the store of metrics cannot be read: {err}") from err


def _insert_all(cursor: Any, sql: str, rows: Iterable[Sequence[object]]) -> None:
    """By columns: a statement for each row takes a hundred times as long."""
    if columns := list(map(list, zip(*rows, strict=True))):
        cursor.execute(sql, columns)


class _Rows:
    """Points as columns, with numbers for series and fields that are not known yet. What a point repeats for
    each of its fields is repeated by numpy, for all points at once."""

    def __init__(self, series: Mapping[tuple[str, Labels], int], fields: Mapping[str, int]) -> None:
        self._series, self._fields = series, fields
        self._next = max(series.values(), default=-1) + 1
        self.new_series: dict[tuple[str, Labels], int] = {}
        self.new_fields: dict[str, int] = {}
        self.arrays: dict[str, Any] = {}
        self._ids: dict[int, tuple[str, int]] = {}
        self._kinds_of: dict[tuple[str, ...], tuple[int, ...]] = {}
        # Of each point; then of each of its fields.
        self._times: list[int] = []
        self._numbers: list[int] = []
        self._counts: list[int] = []
        self._kinds: list[int] = []
        self._values: list[float] = []

    def __bool__(self) -> bool:
        return bool(self._values)

    def add(self, point: Point) -> str:
        """Why it is not kept; empty if it is, as far as `sound` has nothing against it."""
        measurement, labels, fields, time_ns = point
        known = self._ids.get(id(labels))  # of one that the caller holds all the time
        if known is not None and known[0] == measurement:
            number = known[1]
        else:
            key = measurement, labels
            found = self._series.get(key)
            if found is None:
                if why := fault(point):
                    return why
                found = self.new_series.setdefault(key, self._next + len(self.new_series))
            self._ids[id(labels)] = measurement, (number := found)
        if not fields:
            return fault(point)
        kinds = self._kinds_of.get(names := tuple(fields))
        if kinds is None:
            kinds = self._kinds_of[names] = tuple(self._kind(name) for name in names)
        self._times.append(time_ns)
        self._numbers.append(number)
        self._counts.append(len(kinds))
        self._kinds += kinds
        self._values += fields.values()
        return ""

    def _kind(self, name: str) -> int:
        kind = self._fields.get(name)
        if kind is None:
            kind = self.new_fields.setdefault(name, len(self._fields) + len(self.new_fields))
        return kind

    def sound(self) -> bool:
        """Whether all that was added can be kept. Then `arrays` has it."""
        if any(fault_of_values(Point("m", (), {name: 0.0}, 0)) for name in self.new_fields):
            return False
        counts = np.array(self._counts, dtype="int64")
        try:
            times = np.array(self._times, dtype="int64")
            values = np.array(self._values, dtype="float64")
        except OverflowError:
            return False
        self.arrays = {
            "time": times.repeat(counts),
            "series": np.array(self._numbers, dtype="int32").repeat(counts),
            "field": np.array(self._kinds, dtype="int32"),
            "value": values,
        }
        return not times.size or bool(
            times.min() >= 0 and times.max() <= LATEST_NS and np.isfinite(values).all()
        )
