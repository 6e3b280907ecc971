"""The metrics service with a rule, what it is told and what it asks, and a receiver of its notifications."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from typer.testing import CliRunner

from deploy.local import layout as at
from deploy.local.layout import Layout
from lingqu.cli.main import app
from lingqu.metrics.v1 import alerts_pb2, metrics_pb2
from lingqu.metrics.v1.metrics_pb2_grpc import MetricsServiceStub
from services.metrics.alerts import convert, engine
from services.metrics.alerts.rules import Comparison, Rule, Selection, Threshold
from services.metrics.app import MetricsSettings
from services.metrics.app import running as service_running
from services.metrics.queries import Aggregate, Query, Series
from services.metrics.store import Store
from tests.conftest import free_offset
from tests.metrics import Memory
from tests.waiting import until

FIRING, RESOLVED = alerts_pb2.ALERT_STATE_FIRING, alerts_pb2.ALERT_STATE_RESOLVED
INACTIVE = alerts_pb2.ALERT_STATE_INACTIVE
HOT = Rule(
    "hot",
    Threshold(Selection("oven", aggregate=Aggregate.LAST, group_by=("room",)), 300, Comparison.ABOVE, 100.0),
    summary="{room} is at {value}",
)


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate at once, again and again."""
    monkeypatch.setattr(engine, "TICK_S", 0.05)
    monkeypatch.setattr(Rule, "every_s", lambda rule, least_s: 0.1)
    monkeypatch.setattr(engine, "MAX_PAUSE_S", 0.2)


class Receiver:
    """Takes notifications; answers `status`, and not before `answering` is set."""

    def __init__(self) -> None:
        self.taken: list[tuple[dict[str, Any], dict[str, str], bytes]] = []
        self.status, self.asked = 200, 0
        self.answering = threading.Event()
        self.answering.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.asked += 1
                receiver.answering.wait(10)
                if receiver.status == 200:
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    receiver.taken.append((json.loads(body), headers, body))
                self.send_response(receiver.status)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def told(self, rule: str) -> list[dict[str, Any]]:
        return [body for body, _, _ in self.taken if body["groupLabels"]["alertname"] == rule]

    def close(self) -> None:
        self.answering.set()
        self.server.shutdown()
        self.server.server_close()


class Answering(Memory):
    """A store that answers `found` for the measurement "oven"."""

    found: tuple[Series, ...] = ()

    def query(self, query: Query) -> list[Series]:
        super().query(query)
        return list(self.found) if query.measurement == "oven" else []

    def hot(self, *rooms: str) -> None:
        self.found = tuple(Series((("room", room),), ((1, 200.0),)) for room in rooms)


class Suite:
    """The service, and its parts as others call them."""

    def __init__(self, folder: Path, offset: int, channel: grpc.aio.Channel) -> None:
        self.state, self.offset, self.stub = folder, offset, MetricsServiceStub(channel)
        self._sender = metrics_service_pb2_grpc.MetricsServiceStub(channel)
        (folder / "suite.json").write_text(json.dumps({"offset": offset, "pid": os.getpid()}))
        if not (folder / "dev.key").exists():
            (folder / "dev.key").write_text("none")

    @asynccontextmanager
    async def another(self) -> AsyncIterator[Any]:
        """A stub with a connection of its own."""
        address = Layout(self.state, self.offset).address(at.METRICS)
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            yield MetricsServiceStub(channel)

    async def measured(self, room: str, value: float) -> None:
        request = metrics_service_pb2.ExportMetricsServiceRequest()
        metric = request.resource_metrics.add().scope_metrics.add().metrics.add(name="oven")
        point = metric.gauge.data_points.add(as_double=value, time_unix_nano=time.time_ns())
        point.attributes.add(key="room").value.string_value = room
        await self._sender.Export(request, timeout=10)

    async def create(self, rule: Rule = HOT) -> None:
        request = metrics_pb2.CreateAlertRuleRequest(rule=convert.from_rule(rule))
        await self.stub.CreateAlertRule(request, timeout=10)

    async def alerts(self, *states: Any) -> dict[str, Any]:
        """Of the rule "hot", by room."""
        request = alerts_pb2.ListAlertsRequest(rule="hot", states=states)
        answer = await self.stub.ListAlerts(request, timeout=10)
        return {alert.labels["room"]: alert for alert in answer.alerts}

    async def rule(self, name: str = "hot") -> Any:
        answer = await self.stub.ListAlertRules(metrics_pb2.ListAlertRulesRequest(), timeout=10)
        return next(entry for entry in answer.rules if entry.rule.name == name)

    async def evaluated(self) -> None:
        """The rule was evaluated once more, from now on."""
        now = time.time_ns()

        async def later() -> bool:
            return (await self.rule()).status.evaluated_time.ToNanoseconds() > now

        await until(later, "the rule is evaluated")

    async def cli(self, *args: str) -> tuple[int, str]:
        done = await asyncio.to_thread(CliRunner().invoke, app, ["--state", str(self.state), "alerts", *args])
        return done.exit_code, done.output


@asynccontextmanager
async def suite(
    folder: Path, url: str = "", store: Store | None = None, offset: int = 0, **more: Any
) -> AsyncIterator[Suite]:
    offset = offset or free_offset()
    layout = Layout(folder, offset)
    given = {"alerts_interval_s": 0.0, "alerts_wait_s": 0.0, "alerts_every_s": 0.1, **more}
    cfg = MetricsSettings(
        metrics_listen=layout.address(at.METRICS),
        metrics_http_listen=layout.address(at.METRICS_HTTP),
        metrics_folder=folder,
        grace_s=0.5,
        alerts_webhook=url,
        **given,
    )
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with (
        service_running(cfg, store) as intake,
        grpc.aio.insecure_channel(cfg.metrics_listen, options=options) as channel,
    ):
        intake.writer._window_s = 0.02  # tests are in a hurry
        yield Suite(folder, offset, channel)
