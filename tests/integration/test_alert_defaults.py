"""Every default rule fires on what it is for, in a real store, and is quiet in a suite that is well."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from services.metrics.alerts.defaults import DEFAULTS
from services.metrics.alerts.fresh import Fresh
from services.metrics.alerts.questions import questions, readings
from services.metrics.points import Point, labels
from services.metrics.queries import Query, Series
from services.metrics.spool import Waiting
from services.metrics.stores.duck import DuckStore

SECOND = 1_000_000_000
NOW = time.time_ns()
OF_REPLICA = {"service": "lingqu-inference", "instance": "127.0.0.1:8083"}
OF_GATEWAY = {"service": "lingqu-gateway-control", "instance": "127.0.0.1:8081"}


@dataclass
class Spool:
    """A store with a spool before it."""

    store: DuckStore
    waiting: Waiting = field(default_factory=lambda: Waiting(0, 0, 0, 0))

    def query(self, query: Query) -> list[Series]:
        return self.store.query(query)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    store = DuckStore(tmp_path / "metrics.duckdb")
    yield Spool(store)
    store.close()


def series(
    measurement: str, known: Mapping[str, str], value: float = 1.0, name: str = "value", last_s: int = 2
) -> list[Point]:
    """A point a second, from ten minutes to `last_s` ago."""
    return [
        Point(measurement, labels(known), {name: value}, NOW - ago * SECOND) for ago in range(last_s, 600)
    ]


def requests(status: str, share: float) -> list[Point]:
    known = {"model": "m", "client": "alice", "api": "text", "status": status}
    return series("requests", known, share)


def outcomes(outcome: str, share: float) -> list[Point]:
    return series("lingqu.inference.requests", {**OF_REPLICA, "model": "m", "outcome": outcome}, share)


def world(*, well: bool) -> list[Point]:
    bad, gone_s = (0.0, 2) if well else (1.0, 120)
    return [
        *requests("OK", 10.0),
        *requests("UNAVAILABLE", 0.005 if well else 2.0),
        *requests("RESOURCE_EXHAUSTED", 0.5 if well else 3.0),
        *requests("INVALID_ARGUMENT", 5.0),
        *outcomes("ok", 10.0),
        *outcomes("cancelled", 1.0 if well else 4.0),
        *series("lingqu.inference.up", OF_REPLICA, last_s=gone_s),
        *series("triton", {"triton": "127.0.0.1:8002"}, name="pending", last_s=gone_s),
        *series("lingqu.inference.queue.length", {**OF_REPLICA, "model": "m", "priority": "normal"}, bad),
        *series("lingqu.registry.stale", {"service": "lingqu-registry", "instance": "127.0.0.1:8082"}, bad),
        *(series("lingqu.gateway.nacks", {**OF_GATEWAY, "kind": "cluster"}, 1.0) if bad else ()),
        *series("lingqu.gateway.refused", OF_GATEWAY, bad),
        *series("lingqu.gateway.data_planes.behind", OF_GATEWAY, bad),
        *series(
            "lingqu.certificate.days_left", {**OF_GATEWAY, "certificate": "public"}, 30.0 if well else 2.5
        ),
        *series("collector", {"what": "refused", "why": "series"}, 100.0 * bad),
    ]


@pytest.mark.parametrize("well", [True, False])
def test_default_rules_fire_on_what_they_are_for_and_on_nothing_else(spool: Spool, well: bool) -> None:
    spool.store.write(world(well=well))
    spool.waiting = Waiting(0 if well else 1 << 30, 0, 0, 0)
    asked = Fresh(spool)
    fires = {
        rule.name
        for rule in DEFAULTS
        if any(
            found.breach
            for found in readings(
                rule.condition, [asked.query(query) for query in questions(rule.condition, NOW)]
            ).values()
        )
    }
    assert fires == (set() if well else {rule.name for rule in DEFAULTS})
