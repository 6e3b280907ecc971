"""InfluxDB 1.x, 2.x and 3.x as the store of metrics: `/write`, and InfluxQL at `/query`; all have them.

Only 1.6.7 was run. What differs: 1.x and 2.x keep raw points under the retention policy "raw" of our database
(2.x: in the bucket "lingqu/raw"), 3.x in a database. Roll-ups are made in 1.x only, since InfluxQL of the
others has no SELECT INTO; they keep raw points for the whole time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from services.core.errors import BackendUnavailable
from services.metrics.points import Labels, Point
from services.metrics.queries import Query, Series, check_raw
from services.metrics.store import PointsRefused
from services.metrics.stores import influxadmin, influxql
from services.metrics.stores.influxadmin import Database
from services.metrics.stores.influxhttp import Answer, Http, Server
from services.metrics.stores.influxql import Part, quoted
from services.metrics.stores.influxwrites import refused_of
from services.metrics.stores.lineprotocol import Encoder, read, read_series_key, spelt_name

BATCH = 5_000  # lines of one request
MAX_TRIES = 200  # requests to find the bad lines of one write, where the server does not tell them
THREADS = 2 * influxql.SLICES
SECOND_NS = 1_000_000_000
MINUTE_NS = 60 * SECOND_NS


class InfluxStore:
    """A Store. The server need not be there yet; it is asked for its version, and the database made, by the
    first call that needs it."""

    def __init__(self, server: Server, read_s: float = 30.0) -> None:
        self._server = server
        self._http = Http(server, read_s)
        self._encoder = Encoder()
        self._encoding = threading.Lock()
        self._preparing = threading.Lock()
        self._database: Database | None = None
        self._oldest_ns = 0  # what is older is forgotten, even if the server still has it
        self._oldest_rolled_ns = 0
        self._threads = ThreadPoolExecutor(THREADS, "influxdb-query")

    def write(self, points: Sequence[Point], batch: str = "") -> None:
        """Whatever its name: a point written twice is one point to InfluxDB."""
        lines, refused, why = self._lines(points)
        tries = MAX_TRIES
        waiting = [lines[n : n + BATCH] for n in range(0, len(lines), BATCH)][::-1]
        while waiting:
            some = waiting.pop()
            answer = self._post(some)
            if answer.status < 300:
                continue
            number = refused_of(answer)
            if number is None and len(some) > 1 and tries > 0:
                tries -= 1
                half = len(some) // 2
                waiting += [some[half:], some[:half]]
                continue
            refused += len(some) if number is None else min(number, len(some))
            why = why or answer.error[:300]
        if refused:
            raise PointsRefused(refused, why)

    def query(self, query: Query) -> list[Series]:
        if not all(query.filters.values()):
            return []
        database = self._prepared()
        parts = []
        start, end = max(query.start_ns, self._oldest_rolled_ns), min(query.end_ns, database.rolled_ns)
        if start < end:
            check_raw(query, database.rolled_ns)
            parts.append(Part(database.rolled, start, end))
        start = max(query.start_ns, database.rolled_ns, self._oldest_ns)
        if start < query.end_ns:
            parts.append(Part(database.raw, start, query.end_ns))
        slices = [piece for part in parts for piece in influxql.sliced(query, part)]
        asked = [influxql.select(query, piece, alone=len(parts) == 1) for piece in slices]
        answers = self._threads.map(self._ask, asked) if len(asked) > 1 else map(self._ask, asked)
        return influxql.joined(query, [influxql.answered(query, rows) for (rows,) in answers])

    def series(self, measurement: str = "", limit: int = 1000) -> list[tuple[str, Labels]]:
        database = self._prepared()
        if database.version >= 3:
            return sorted(self._series_by_query(database, measurement))[:limit]
        source = f" FROM {quoted(spelt_name(measurement))}" if measurement else ""
        keys = [
            value[0] for rows in self._ask(f"SHOW SERIES{source}") for row in rows for value in row["values"]
        ]
        found = {read_series_key(key) for key in keys}
        return sorted(key for key in found if key[0] != influxadmin.PROGRESS)[:limit]

    def retain(self, seconds: int, rolled_up: int = 0) -> None:
        """The server drops what is older by whole shards, some days later; queries do not see it any more."""
        database = self._prepared()
        now = time.time_ns()
        oldest = (now - seconds * SECOND_NS) // MINUTE_NS * MINUTE_NS
        rolls_up = rolled_up > 0 and database.version == 1
        with self._preparing:
            influxadmin.retain(self._http, self._server, database, seconds, rolled_up)
            if rolls_up:
                self._database = influxadmin.roll_up(self._http, database, oldest)
                self._oldest_rolled_ns = now - rolled_up * SECOND_NS
            else:
                self._oldest_ns = self._oldest_rolled_ns = now - max(seconds, rolled_up) * SECOND_NS

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def _lines(self, points: Sequence[Point]) -> tuple[list[str], int, str]:
        """Also how many have no line, and why."""
        lines, refused, why = [], 0, ""
        oldest = max(self._oldest_ns, self._database.rolled_ns if self._database else 0)
        with self._encoding:
            line = self._encoder.line
            for point in points:
                if point.time_ns < oldest:
                    refused, why = refused + 1, "a point is older than points are kept"
                    continue
                try:
                    lines.append(line(point))
                except ValueError as err:
                    refused, why = refused + 1, str(err)
        return lines, refused, why

    def _post(self, lines: Sequence[str]) -> Answer:
        body = "\n".join(lines).encode()
        for again in (True, False):
            database = self._prepared()
            where = {"db": database.raw.database, "precision": "ns"}
            if database.raw.policy:
                where["rp"] = database.raw.policy
            answer = self._http.call("POST", "/write", where, body=body)
            if answer.status != 404 and answer.status < 500:
                return answer
            self._forget(again, answer.error)
        raise AssertionError

    def _ask(self, text: str) -> list[list[dict[str, Any]]]:
        """Rows of every statement."""
        for again in (True, False):
            database = self._prepared()
            try:
                return influxadmin.ask(self._http, text, database.raw.database)
            except influxadmin.Gone as err:
                self._forget(again, str(err))
        raise AssertionError

    def _prepared(self) -> Database:
        with self._preparing:
            if self._database is None:
                self._database = influxadmin.prepared(self._http, self._server)
            return self._database

    def _forget(self, again: bool, why: str) -> None:
        """The database is gone: it is made again by the next call."""
        with self._preparing:
            self._database = None
        if not again:
            raise BackendUnavailable(f"InfluxDB at {self._server.url} has lost our database: {why}")

    def _series_by_query(self, database: Database, measurement: str) -> set[tuple[str, Labels]]:
        """A point of each; 3.x has no SHOW SERIES."""
        names = [measurement]
        if not measurement:
            rows = [row for found in self._ask("SHOW MEASUREMENTS") for row in found]
            names = [read(value[0]) for row in rows for value in row["values"]]
        found = set()
        for name in names:
            for rows in self._ask(influxql.one_of_each(database.raw.of(name))):
                for row in rows:
                    known = {
                        read(label): read(value) for label, value in (row.get("tags") or {}).items() if value
                    }
                    found.add((name, tuple(sorted(known.items()))))
        return found
