"""Stores of metrics when things go wrong: a real InfluxDB and real files of DuckDB."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.core.errors import BackendUnavailable, LingquError
from services.metrics.points import LATEST_NS, Point, labels
from services.metrics.queries import Aggregate, Query
from services.metrics.spooled import Spooled
from services.metrics.store import PointsRefused, Store, StoreRefusesAccess
from services.metrics.stores.duck import DuckStore
from services.metrics.stores.influx import InfluxStore
from services.metrics.stores.influxhttp import Server
from tests.influxes import Influx, influx
from tests.waiting import until

SECOND = 1_000_000_000
NOW = time.time_ns() // SECOND * SECOND
ALL = Query("m", "value", 0, LATEST_NS, Aggregate.COUNT)


def batch(number: int, count: int = 100) -> list[Point]:
    """Points that no other batch has."""
    start = NOW - 1_000 * SECOND + number * 1_000_000
    return [Point("m", labels({"k": str(n % 7)}), {"value": 1.0}, start + n) for n in range(count)]


def counted(store: Store, query: Query = ALL) -> float:
    found = store.query(query)
    return found[0].values[0][1] if found else 0.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Influx]:
    with influx(tmp_path_factory.mktemp("influx")) as made:
        yield made


async def test_influxdb_killed_during_load_loses_nothing_acknowledged(tmp_path: Path) -> None:
    with influx(tmp_path / "influx") as server:
        store = InfluxStore(server.server())
        acknowledged, done = 0, threading.Event()

        def load() -> None:
            nonlocal acknowledged
            while not done.is_set():
                spooled.write(batch(acknowledged), f"b{acknowledged}")
                acknowledged += 1

        with Spooled(store, tmp_path / "spool") as spooled:
            thread = threading.Thread(target=load)
            thread.start()
            try:
                for _ in range(2):
                    before = acknowledged
                    await until(lambda: acknowledged > before + 30, "points are taken")  # noqa: B023
                    server.kill()
                    before = acknowledged
                    await until(lambda: acknowledged > before + 30, "points wait on disk")  # noqa: B023
                    assert spooled.waiting.points
                    server.start()
            finally:
                done.set()
                thread.join()
            await until(lambda: not spooled.waiting.points, "the spool is drained", 30)
        assert counted(store) == 100 * acknowledged
        assert not list((tmp_path / "spool").iterdir())


async def test_a_database_that_is_lost_is_made_again(server: Influx) -> None:
    """By what comes first, a write or a query; the server may still be busy with dropping it."""
    store = InfluxStore(server.server("lost"))

    def again() -> bool:
        try:
            store.write(batch(1))
            return counted(store) == 100
        except BackendUnavailable:
            return False

    def empty() -> bool:
        try:
            return counted(store) == 0
        except BackendUnavailable:
            return False

    for statement in ("DROP DATABASE lost", 'DROP RETENTION POLICY "raw" ON "lost"'):
        assert await until(again, "points are kept")
        _statement(server.url, statement)
        assert await until(again, "points are kept again")
        _statement(server.url, statement)
        assert await until(empty, "queries work again")


async def test_influxdb_with_a_full_disk_gets_what_waits_when_there_is_room(tmp_path: Path) -> None:
    """No file of its may grow beyond a limit, as its log of writes would on a full disk."""
    chance = random.Random(1)

    def large(number: int) -> list[Point]:
        start = NOW + number * 1_000_000
        fields = [{"value": chance.random(), "other": chance.random()} for _ in range(10_000)]
        return [Point("m", (), found, start + n) for n, found in enumerate(fields)]

    number, folder = 0, tmp_path / "influx"
    with influx(folder, prefix=("prlimit", f"--fsize={(4 << 20) + 300_000}")) as server:
        mine = server.server()
        with Spooled(InfluxStore(mine), tmp_path / "spool") as spooled:
            while not spooled.waiting.points and number < 100:
                spooled.write(large(number), f"b{number}")
                number += 1
            assert spooled.waiting.points == 10_000
    with influx(folder) as server:
        store = InfluxStore(server.server(mine.database))
        with Spooled(store, tmp_path / "spool") as spooled:
            await until(lambda: not spooled.waiting.points, "the spool is drained")
        assert counted(store) == 10_000 * number


DUCK_ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from services.core.errors import BackendUnavailable
from services.metrics.points import Point
from services.metrics.stores.duck import DuckStore
store = DuckStore(Path(sys.argv[1]))
kept = 0
def write(number):
    store.write([Point("m", (), {"value": 1.0}, number * 10_000 + n) for n in range(10_000)], f"b{number}")
for number in range(5):
    write(number)
    kept += 1
limit = sum(p.stat().st_size for p in Path(sys.argv[1]).parent.iterdir()) + 300_000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    for number in range(5, 500):
        write(number)
        kept += 1
except BackendUnavailable as err:
    print(kept, err, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
try:
    write(kept)
    kept += 1
except BackendUnavailable as err:
    print("still", err, flush=True)
print(kept, flush=True)
"""


def test_duckdb_with_a_full_disk_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    """A process of its own, in which no file may grow beyond a limit."""
    file = tmp_path / "metrics.duckdb"
    argv = [sys.executable, "-c", DUCK_ON_A_FULL_DISK, str(file)]
    child = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    lines = child.stdout.splitlines()
    assert child.returncode == 0, child.stderr
    assert "cannot be written" in lines[0], lines
    store = DuckStore(file)
    assert counted(store) == 10_000 * int(lines[-1].split()[0])
    store.close()


def test_points_beyond_what_is_retained_are_refused_and_the_rest_kept(server: Influx) -> None:
    store = InfluxStore(server.server())
    store.retain(3600)
    old = [Point("m", (), {"value": 1.0}, NOW - 10 * 86_400 * SECOND + n) for n in range(3)]
    far = [Point("m", (), {"value": 1.0}, NOW + 10 * 365 * 86_400 * SECOND)]
    with pytest.raises(PointsRefused, match="older than points are kept") as caught:
        store.write([*old, *batch(1), *far])
    assert caught.value.number == 3
    assert counted(store) == 101
    unaware = InfluxStore(store._server)  # of another collector that has not retained yet
    with pytest.raises(PointsRefused, match="retention policy") as caught:
        unaware.write([*old, *batch(2)])
    assert caught.value.number == 3
    assert counted(store) == 201


def test_a_field_of_another_type_is_refused_and_the_rest_kept(server: Influx) -> None:
    mine = server.server("types")
    store = InfluxStore(mine)
    store.write(batch(1))
    where = f"{server.url}/write?db=types&rp=raw"
    urllib.request.urlopen(where, b'other value="text" 1', timeout=5)  # noqa: S310
    wrong = [Point("other", (), {"value": 1.0}, n) for n in range(2, 7)]
    with pytest.raises(PointsRefused, match="conflict") as caught:
        store.write([*wrong, *batch(2)])
    assert caught.value.number == 5
    assert counted(store) == 200


@pytest.mark.parametrize("kind", ["duckdb", "influxdb"])
def test_slow_queries_do_not_hold_up_ingestion(kind: str, server: Influx, tmp_path: Path) -> None:
    store: Store = DuckStore(tmp_path / "m.duckdb") if kind == "duckdb" else InfluxStore(server.server())
    for number in range(4):
        store.write(batch(number, 10_000))
    slow = Query("m", "value", NOW - 2_000 * SECOND, NOW, Aggregate.PERCENTILE, 95.0, 1_000, group_by=("k",))
    done, asked = threading.Event(), 0

    def ask() -> None:
        nonlocal asked
        while not done.is_set():
            store.query(slow)
            asked += 1

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        began = time.monotonic()
        for number in range(20, 25):
            store.write(batch(number, 1_000), f"b{number}")
        took = time.monotonic() - began
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert asked
    assert took < 10, f"5 writes took {took:.1f} s"
    assert counted(store) == 4 * 10_000 + 5 * 1_000
    store.close()


def test_two_write_to_one_influxdb(server: Influx) -> None:
    mine = server.server()
    stores = [InfluxStore(mine) for _ in range(2)]
    threads = [
        threading.Thread(target=lambda s=store, first=first: [s.write(batch(n)) for n in range(first, 40, 2)])
        for first, store in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    for store in stores:
        store.retain(3600, 7200)
    for thread in threads:
        thread.join()
    assert [counted(store) for store in stores] == [4000, 4000]


def test_one_file_of_duckdb_is_for_one_process(tmp_path: Path) -> None:
    store = DuckStore(tmp_path / "m.duckdb")
    code = "import sys; from pathlib import Path; from services.metrics.stores.duck import DuckStore; "
    code += "DuckStore(Path(sys.argv[1]))"
    argv = [sys.executable, "-c", code, str(tmp_path / "m.duckdb")]
    other = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert other.returncode
    assert "cannot be opened as a store of metrics" in other.stderr
    store.write(batch(1))
    store.close()


def test_a_damaged_file_of_duckdb_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "m.duckdb").write_bytes(os.urandom(100_000))
    with pytest.raises(LingquError, match="cannot be opened"):
        DuckStore(tmp_path / "m.duckdb")


async def test_wrong_credentials_are_told_and_points_wait(tmp_path: Path) -> None:
    with influx(tmp_path / "influx", auth=True) as server:
        _statement(server.url, "CREATE USER admin WITH PASSWORD 'right' WITH ALL PRIVILEGES")
        wrong = InfluxStore(Server(server.url, user="admin", password="wrong"))
        with pytest.raises(StoreRefusesAccess, match="correct user and password"):
            wrong.query(ALL)
        with Spooled(wrong, tmp_path / "spool") as spooled:
            spooled.write(batch(1))
            assert spooled.waiting.points == 100
        right = InfluxStore(Server(server.url, user="admin", password="right"))
        with Spooled(right, tmp_path / "spool") as spooled:
            await until(lambda: not spooled.waiting.points, "the spool is drained")
        assert counted(right) == 100


def test_a_damaged_spool_costs_its_record_only(server: Influx, tmp_path: Path) -> None:
    away = InfluxStore(Server("http://127.0.0.1:1"))
    with Spooled(away, tmp_path) as spooled:
        for number in range(5):
            spooled.write(batch(number))
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    store = InfluxStore(server.server())
    with Spooled(store, tmp_path) as spooled:
        deadline = time.monotonic() + 10
        while (spooled.waiting.points or any(tmp_path.iterdir())) and time.monotonic() < deadline:
            threading.Event().wait(0.02)
        assert spooled.waiting.corrupt == 1
    assert counted(store) == 400


def _statement(url: str, text: str) -> None:
    urllib.request.urlopen(f"{url}/query", urllib.parse.urlencode({"q": text}).encode(), timeout=5)  # noqa: S310
