"""What it costs to evaluate rules of alerts: 200 of them on a DuckDB with an hour of requests.

python -m bench.alerts
"""

from __future__ import annotations

import asyncio
import logging
import random
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from services.metrics.alerts import book as books
from services.metrics.alerts.archive import Archive
from services.metrics.alerts.book import Book
from services.metrics.alerts.defaults import DEFAULTS
from services.metrics.alerts.engine import Engine
from services.metrics.alerts.rules import BurnRate, Comparison, Rule, Selection, Threshold
from services.metrics.points import Point, labels
from services.metrics.queries import Aggregate
from services.metrics.stores.duck import DuckStore

RULES = 200
POINTS = 360_000  # 100 a second for an hour
MODELS, CLIENTS = 10, 20
STATUSES = ("OK",) * 97 + ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL")


def fill(store: DuckStore) -> None:
    drawn, now = random.Random(1), time.time_ns()
    step = 3600 * 1_000_000_000 // POINTS
    for start in range(0, POINTS, 20_000):
        store.write(
            [
                Point(
                    "requests",
                    labels(
                        {
                            "model": f"m{drawn.randrange(MODELS)}",
                            "client": f"c{drawn.randrange(CLIENTS)}",
                            "status": drawn.choice(STATUSES),
                            "api": "text",
                        }
                    ),
                    {"value": 1.0, "duration": drawn.expovariate(5)},
                    now - (POINTS - number) * step,
                )
                for number in range(start, start + 20_000)
            ]
        )


def rules() -> list[Rule]:
    """The default ones, and thresholds of rates, means and percentiles over five minutes."""
    found = list(DEFAULTS)
    kinds = (
        ("value", Aggregate.RATE, 0.0),
        ("duration", Aggregate.MEAN, 0.0),
        ("duration", Aggregate.PERCENTILE, 95.0),
    )
    for number in range(RULES - len(found)):
        field, aggregate, percentile = kinds[number % 3]
        only = {"model": (f"m{number % MODELS}",)}
        selection = Selection("requests", field, aggregate, percentile, only, ("client",))
        found.append(Rule(f"rule-{number}", Threshold(selection, 300, Comparison.ABOVE, 1e9)))
    return found


async def main() -> None:
    logging.getLogger("services").setLevel(logging.ERROR)  # what fires is not the question
    with tempfile.TemporaryDirectory() as folder:
        store = DuckStore(Path(folder) / "metrics.duckdb")
        fill(store)
        archive = Archive(Path(folder))
        with patch.object(books, "MAX_RULES", RULES):
            engine = Engine(store, archive, Book(archive, rules()))
        each = {}
        for _ in range(2):  # the second time everything is warm
            begun, used = time.perf_counter(), time.process_time()
            for name, rule in engine.book.rules().items():
                before = time.process_time()
                await engine.evaluate(rule)
                each[name] = time.process_time() - before
            took, used = time.perf_counter() - begun, time.process_time() - used
        kinds = {"burn rate": [], "other": []}  # type: dict[str, list[float]]
        for name, rule in engine.book.rules().items():
            kinds["burn rate" if isinstance(rule.condition, BurnRate) else "other"].append(each[name])
        share = sum(each[name] / engine.every_s(rule) for name, rule in engine.book.rules().items())
        print(
            f"{RULES} rules once: {took:.2f} s, {used:.2f} s of processor,"
            f" {used / RULES * 1000:.1f} ms a rule"
        )
        for kind, costs in kinds.items():
            print(f"  {kind}: {len(costs)} rules, {sum(costs) / len(costs) * 1000:.1f} ms of processor each")
        print(f"at their intervals: {share * 100:.1f} % of a processor")
        engine.close()
        store.close()


if __name__ == "__main__":
    asyncio.run(main())
