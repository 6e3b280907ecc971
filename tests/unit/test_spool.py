"""What is kept on disk while the store of metrics is away."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.errors import BackendUnavailable
from services.metrics.points import Labels, Point, labels
from services.metrics.queries import Query, Series
from services.metrics.spool import Spool
from services.metrics.spooled import Spooled
from services.metrics.store import PointsRefused
from tests.waiting import until


def points(number: int, count: int = 3) -> list[Point]:
    return [
        Point("m", labels({"k": f"{number}"}), {"value": float(number), "ü": 0.5}, 1000 * number + n)
        for n in range(count)
    ]


def drained(spool: Spool) -> list[tuple[str, list[Point]]]:
    found = []
    while record := spool.first():
        found.append((record.batch, record.points))
        spool.taken(record)
    return found


class Memory:
    """A store that is away when it is told to be; `batches` are what it got, in order."""

    def __init__(self) -> None:
        self.away = False
        self.batches: list[str] = []
        self.kept: list[Point] = []

    def write(self, points: Sequence[Point], batch: str = "") -> None:
        if self.away:
            raise BackendUnavailable("away")
        if batch in self.batches:
            return
        self.batches.append(batch)
        bad = [point for point in points if point.measurement == "bad"]
        self.kept += [point for point in points if point.measurement != "bad"]
        if bad:
            raise PointsRefused(len(bad), "bad")

    def query(self, query: Query) -> list[Series]:
        return []

    def series(self, measurement: str = "", limit: int = 1000) -> list[tuple[str, Labels]]:
        return []

    def retain(self, seconds: int, rolled_up: int = 0) -> None: ...

    def close(self) -> None: ...


def test_records_come_back_in_order_and_files_go(tmp_path: Path) -> None:
    spool = Spool(tmp_path, segment_bytes=400)
    for number in range(20):
        spool.append(points(number), f"b{number}")
    assert spool.waiting.points == 60
    assert len(list(tmp_path.iterdir())) > 3
    assert drained(spool) == [(f"b{number}", points(number)) for number in range(20)]
    assert spool.waiting.points == spool.waiting.size == 0
    assert not list(tmp_path.iterdir())


def test_what_was_there_before_comes_first(tmp_path: Path) -> None:
    Spool(tmp_path).append(points(1), "b1")
    spool = Spool(tmp_path)
    assert spool.waiting.points == 3
    spool.append(points(2), "b2")
    assert [batch for batch, _ in drained(spool)] == ["b1", "b2"]


@settings(max_examples=40)
@given(st.data())
def test_wherever_a_file_ends_whole_records_come_back(data: st.DataObject) -> None:
    """As a crash leaves it: nothing is counted as damaged, and what follows is kept."""
    with folder() as path:
        spool = Spool(path)
        sizes = []
        for number in range(4):
            spool.append(points(number), f"b{number}")
            sizes.append(spool.waiting.size)
        cut = data.draw(st.integers(0, sizes[-1]))
        (file,) = path.iterdir()
        os.truncate(file, cut)
        spool = Spool(path)
        spool.append(points(9), "b9")
        whole = sum(size <= cut for size in sizes)
        assert [batch for batch, _ in drained(spool)] == [f"b{n}" for n in range(whole)] + ["b9"]
        assert spool.waiting.corrupt == 0


@settings(max_examples=40)
@given(st.data())
def test_a_damaged_record_is_skipped_and_counted(data: st.DataObject) -> None:
    with folder() as path:
        spool = Spool(path)
        sizes = [0]
        for number in range(4):
            spool.append(points(number), f"b{number}")
            sizes.append(spool.waiting.size)
        (file,) = path.iterdir()
        content = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
        file.write_bytes(content)
        damaged = next(n for n in range(4) if sizes[n] <= at < sizes[n + 1])
        for read in (spool, Spool(path)):
            found = [batch for batch, _ in drained(read)]
            assert found == [f"b{n}" for n in range(4) if n != damaged]
            assert read.waiting.corrupt == 1
            assert read.waiting.points == 0
            path.mkdir(exist_ok=True)
            file.write_bytes(content)


def test_beyond_its_bound_the_newest_is_refused(tmp_path: Path) -> None:
    spool = Spool(tmp_path, most_bytes=2000)
    kept = 0
    while spool.waiting.size < 1850:
        spool.append(points(kept), f"b{kept}")
        kept += 1
    with pytest.raises(BackendUnavailable, match="full"):
        spool.append(points(kept, 200), f"b{kept}")
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 2000
    assert drained(spool) == [(f"b{number}", points(number)) for number in range(kept)]
    spool.append(points(1), "again")


def test_a_full_disk_refuses_and_harms_nothing(tmp_path: Path) -> None:
    """A file may not grow beyond the limit, as a disk may not: half a record is taken back."""
    spool = Spool(tmp_path)
    spool.append(points(1), "b1")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (spool.waiting.size + 20, hard))
    try:
        with pytest.raises(BackendUnavailable, match="too large"):
            spool.append(points(2, 500), "b2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    spool.append(points(3), "b3")
    assert [batch for batch, _ in drained(spool)] == ["b1", "b3"]
    assert spool.waiting.corrupt == 0


KILLED = """
import sys
from pathlib import Path
from services.metrics.points import Point
from services.metrics.spool import Spool
spool = Spool(Path(sys.argv[1]), segment_bytes=20_000)
for number in range(1_000_000):
    spool.append([Point("m", (), {"value": float(number)}, n) for n in range(50)], str(number))
    print(number, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    for _ in range(60):
        child.stdout.readline()
    child.kill()
    acknowledged = [int(line) for line in child.stdout.read().split()]
    child.wait()
    last = acknowledged[-1] if acknowledged else 59
    spool = Spool(tmp_path)
    found = [int(batch) for batch, _ in drained(spool)]
    assert found == list(range(len(found)))
    assert found[-1] >= last
    assert spool.waiting.corrupt == 0


async def test_what_comes_while_the_store_is_away_gets_there_in_order(tmp_path: Path) -> None:
    store = Memory()
    with Spooled(store, tmp_path) as spooled:
        spooled.write(points(0), "b0")
        store.away = True
        for number in range(1, 5):
            spooled.write(points(number), f"b{number}")
        assert spooled.waiting.points == 12
        store.away = False
        await until(lambda: not spooled.waiting.points, "the spool is drained")
        spooled.write(points(5), "b5")
    assert store.batches == [f"b{number}" for number in range(6)]


async def test_what_waits_outlives_the_process(tmp_path: Path) -> None:
    store = Memory()
    store.away = True
    with Spooled(store, tmp_path) as spooled:
        spooled.write(points(1), "b1")
    store.away = False
    with Spooled(store, tmp_path) as spooled:
        await until(lambda: not spooled.waiting.points, "the spool is drained")
    assert store.kept == points(1)


async def test_what_is_refused_or_damaged_is_told(tmp_path: Path) -> None:
    store = Memory()
    store.away = True
    with Spooled(store, tmp_path) as spooled:
        spooled.write(points(1), "b1")
        with pytest.raises(PointsRefused) as caught:
            spooled.write([*points(2), Point("m", (), {"value": float("nan")}, 1)], "b2")
        assert caught.value.number == 1
        spooled.write([*points(3), Point("bad", (), {"value": 1.0}, 1)], "b3")
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[60] ^= 1
    file.write_bytes(content)
    store.away = False
    with Spooled(store, tmp_path, labels=labels({"host": "a"}), report_s=0.05) as spooled:
        await until(lambda: any(point.fields.get("drained") for point in store.kept), "it is told")
    told = [point for point in store.kept if point.measurement == "spool"]
    assert {point.labels for point in told} == {labels({"host": "a"})}
    sums = {name: sum(point.fields[name] for point in told) for name in told[0].fields}
    assert (sums["corrupt"], sums["lost"], sums["refused"]) == (1, 3, 1)
    assert [point for point in store.kept if point.measurement == "m"] == points(2) + points(3)


def test_a_full_spool_says_so_and_keeps_nothing(tmp_path: Path) -> None:
    store = Memory()
    store.away = True
    with Spooled(store, tmp_path, most_bytes=10) as spooled:
        with pytest.raises(BackendUnavailable, match="full"):
            spooled.write(points(1), "b1")
        assert spooled.waiting.points == 0
        store.away = False
        spooled.write(points(1), "b1")
    assert store.batches == ["b1"]


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)
