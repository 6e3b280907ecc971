"""The metrics service in the test's process, with a store that tests can look into and take away."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.local import layout as at
from deploy.local.layout import Layout
from services.core.errors import BackendUnavailable
from services.core.tls import Identity
from services.metrics.app import MetricsSettings
from services.metrics.app import running as service_running
from services.metrics.intake import Intake
from services.metrics.points import Labels, Point
from services.metrics.queries import Query, Series
from tests.conftest import free_offset


@dataclass
class Memory:
    """A Store of a list. While `away` is set it does not answer; a query waits for `slow`."""

    points: list[Point] = field(default_factory=list)
    away: threading.Event = field(default_factory=threading.Event)
    slow: threading.Event | None = None
    batches: set[str] = field(default_factory=set)

    def write(self, points: Sequence[Point], batch: str = "") -> None:
        if self.away.is_set():
            raise BackendUnavailable("the store is away")
        if batch not in self.batches:
            self.batches.add(batch)
            self.points += points

    def query(self, query: Query) -> list[Series]:
        if self.away.is_set():
            raise BackendUnavailable("the store is away")
        if self.slow is not None:
            self.slow.wait(10)
        return []

    def series(self, measurement: str = "", limit: int = 1000) -> list[tuple[str, Labels]]:
        found = {(p.measurement, p.labels) for p in self.points}
        return sorted(key for key in found if measurement in ("", key[0]))[:limit]

    def retain(self, seconds: int, rolled_up: int = 0) -> None:
        pass

    def close(self) -> None:
        pass

    def values(self, measurement: str, name: str = "value", **labels: str) -> list[float]:
        return [
            point.fields[name]
            for point in list(self.points)
            if point.measurement == measurement and labels.items() <= dict(point.labels).items()
        ]


@dataclass
class Service:
    """`address` takes gRPC, `http` is a URL; so are the plain ones, if it has any beside them."""

    address: str
    http: str
    store: Memory
    intake: Intake
    identity: Identity | None = None
    plain: str = ""
    plain_http: str = ""


@asynccontextmanager
async def running(
    folder: Path,
    listen: str = "",
    store: Memory | None = None,
    identity: Identity | None = None,
    plain: bool = False,
    **settings: Any,
) -> AsyncIterator[Service]:
    layout = Layout(folder, free_offset())
    store = store or Memory()
    cfg = MetricsSettings(
        metrics_listen=listen or layout.address(at.METRICS),
        metrics_http_listen=layout.address(at.METRICS_HTTP),
        metrics_folder=folder,
        metrics_every_s=0.2,
        grace_s=0.5,
        mtls_certificate=identity and identity.certificate,
        mtls_key=identity and identity.key,
        mtls_ca=identity and identity.ca,
        # Ports of parts that are not there.
        metrics_plain_listen=layout.address(at.INFERENCE) if plain else None,
        metrics_plain_http_listen=layout.address(at.INFERENCE_HTTP) if plain else None,
        **settings,
    )
    async with service_running(cfg, store) as intake:
        intake.writer._window_s = 0.02  # tests are in a hurry
        http, plain_http = f"http://{cfg.metrics_http_listen}", f"http://{cfg.metrics_plain_http_listen}"
        in_clear = cfg.metrics_plain_listen or ""
        yield Service(cfg.metrics_listen, http, store, intake, identity, in_clear, plain_http)
