"""The stores of metrics: how fast points get in, and how long a dashboard waits: `python -m bench.stores`.

DuckDB, and a real InfluxDB 1.x where `influxd` is installed, in turn. The client is a process of its own each
time; points are what the collector writes: three labels, two fields, batches of 10,000.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from bench.report import Target, judged, row
from services.metrics.points import Point, labels
from services.metrics.queries import Aggregate, Query
from services.metrics.store import Store
from services.metrics.stores.duck import DuckStore
from services.metrics.stores.influx import InfluxStore
from services.metrics.stores.influxhttp import Server
from tests.influxes import influx

SECOND = 1_000_000_000
START = 1_760_000_000 * SECOND // (86_400 * SECOND) * (86_400 * SECOND)
SERIES, BATCH = 500, 10_000
POINTS, QUICK_POINTS = 500_000, 200_000
DASHBOARD_SERIES, DAY_S, EVERY_S, WINDOW_S = 20, 86_400, 10, 300
QUERIES, QUICK_QUERIES = 100, 40
PASSES = 3
AGGREGATES = (Aggregate.MEAN, Aggregate.MAX, Aggregate.RATE, Aggregate.PERCENTILE)
MIN_POINTS_S, MAX_P95_MS, MAX_RSS_MIB = 50_000, 150.0, 1024.0


def written(store: Store, number: int) -> float:
    """Points a second into the store, and out of an encoder where it has one."""
    known = [
        labels({"client": f"c{n % 25}", "model": f"m{n % 10}", "version": f"{n}"}) for n in range(SERIES)
    ]
    fields = [{"value": 1.0, "seconds": random.random()} for _ in range(1000)]
    took = 0.0
    for first in range(0, number, BATCH):
        points = [
            Point("requests", known[n % SERIES], fields[n % 1000], START + n * 1_000_000)
            for n in range(first, first + BATCH)
        ]
        began = time.perf_counter()
        store.write(points, f"batch {first}")
        took += time.perf_counter() - began
    return number / took


def fill(store: Store) -> None:
    """A day of the dashboard's series."""
    known = [labels({"model": f"m{n}", "host": "a"}) for n in range(DASHBOARD_SERIES)]
    for hour in range(DAY_S // 3600):
        times = range(hour * 3600, (hour + 1) * 3600, EVERY_S)
        values = [(second, n) for second in times for n in range(DASHBOARD_SERIES)]
        points = [
            Point("dashboard", known[n], {"value": math.sin(second / 1e4) + n}, START + second * SECOND)
            for second, n in values
        ]
        store.write(points, f"hour {hour}")


def asked(store: Store, queries: int) -> float:
    """95 % of the dashboard's queries take at most so many ms. Each is about all series and the whole day."""
    end, window = START + DAY_S * SECOND, WINDOW_S * SECOND
    took = []
    for number in range(queries):
        aggregate = AGGREGATES[number % len(AGGREGATES)]
        query = Query(
            "dashboard", "value", START, end, aggregate, 95.0, window_ns=window, group_by=("model",)
        )
        began = time.perf_counter()
        found = store.query(query)
        took.append((time.perf_counter() - began) * 1000)
        assert len(found) == DASHBOARD_SERIES
        assert all(len(series.values) == DAY_S // WINDOW_S for series in found)
    return sorted(took)[math.ceil(0.95 * len(took)) - 1]


def run(kind: str, where: str, points: int, queries: int) -> dict[str, float]:
    """What this process measures of a store, and by how many MiB it grew at most meanwhile."""
    before = psutil.Process().memory_info().rss / 2**20
    store: Store = DuckStore(Path(where)) if kind == "duckdb" else InfluxStore(Server(where, "bench"))
    figures = {"points": written(store, points)}
    fill(store)
    gc.collect()
    gc.freeze()  # as services do when they are ready
    figures["p95"] = asked(store, queries)
    figures["grown"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    store.close()
    return figures


def child(kind: str, where: str, points: int, queries: int) -> dict[str, float]:
    argv = [sys.executable, "-m", "bench.stores", "--run", kind, where, str(points), str(queries)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=True)
    found = dict(json.loads(done.stdout))
    print(f"  {kind}: {found['points']:,.0f} points/s, p95 {found['p95']:.0f} ms", flush=True)
    return found


def measure(points: int, queries: int, passes: int) -> list[Target]:
    kinds = ["duckdb"] + (["influxdb"] if shutil.which("influxd") else [])
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    servers = []
    for _ in range(passes):
        for kind in kinds:
            with tempfile.TemporaryDirectory(prefix="lingqu-bench-") as folder:
                if kind == "duckdb":
                    found[kind].append(child(kind, f"{folder}/metrics.duckdb", points, queries))
                    continue
                with influx(Path(folder)) as server:
                    found[kind].append(child(kind, server.url, points, queries))
                    servers.append(psutil.Process(server.pid).memory_info().rss / 2**20)
    targets = []
    for kind, runs in found.items():
        print(f"\n{kind}")
        rates, waits, grown = ([each[name] for each in runs] for name in ("points", "p95", "grown"))
        print(row(f"points written, of {points:,}", rates, "points/s"))
        print(row(f"{DASHBOARD_SERIES} series over a day, p95", waits, "ms"))
        print(row("memory that the client grew by", grown, "MiB"))
        if kind == "influxdb":
            print(row("memory of influxd at the end", servers, "MiB"))
        targets += [
            Target(f"{kind}, points a second", sorted(rates)[len(rates) // 2], MIN_POINTS_S, unit=""),
            Target(f"{kind}, dashboard p95", sorted(waits)[len(waits) // 2], MAX_P95_MS, False, "ms"),
            Target(f"{kind}, memory of the client", max(grown), MAX_RSS_MIB, False, "MiB"),
        ]
    if "influxdb" not in kinds:
        print("\ninfluxd is not installed: apt-get install influxdb")
    return targets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of it, once")
    parser.add_argument(
        "--run", nargs=4, metavar=("KIND", "WHERE", "POINTS", "QUERIES"), help=argparse.SUPPRESS
    )
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # influxd is ended then, too
    if given.run:
        kind, where, points, queries = given.run
        print(json.dumps(run(kind, where, int(points), int(queries))))
        return 0
    quick = given.quick
    targets = measure(
        QUICK_POINTS if quick else POINTS, QUICK_QUERIES if quick else QUERIES, 1 if quick else PASSES
    )
    return judged(targets)


if __name__ == "__main__":
    sys.exit(main())
