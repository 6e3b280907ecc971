"""Puts the metrics service together: store, queue, what sends and what is measured, servers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import grpc
from envoy.service.accesslog.v3 import als_pb2_grpc
from opentelemetry import trace
from pydantic import AfterValidator, Field, SecretStr, field_validator

from lingqu.metrics.keda.externalscaler_pb2_grpc import add_ExternalScalerServicer_to_server
from lingqu.metrics.v1.answers_pb2_grpc import add_AnswerServiceServicer_to_server
from lingqu.metrics.v1.metrics_pb2_grpc import add_MetricsServiceServicer_to_server
from services.core.audit import audited
from services.core.errors import LingquError
from services.core.identity import Callers
from services.core.interceptors import server_stack
from services.core.lifecycle import serving
from services.core.registry import Registry
from services.core.settings import Address, Addresses, Loopback, Settings
from services.core.tasks import background
from services.inference.rest.server import serving_http
from services.metrics import otlp_ports, priority, receivers, scaler
from services.metrics.alerts.archive import Archive
from services.metrics.alerts.book import Book
from services.metrics.alerts.engine import Engine
from services.metrics.alerts.fresh import Fresh
from services.metrics.alerts.notices import Timing
from services.metrics.alerts.webhook import Target, Webhook
from services.metrics.cardinality import Cardinality
from services.metrics.host import Gpus, Host
from services.metrics.http import otlp_app
from services.metrics.intake import Intake
from services.metrics.otlp_ports import add_otlp, serving_plain
from services.metrics.points import Point
from services.metrics.readings import Refusal
from services.metrics.sampling import Certificates, measure
from services.metrics.service import Metrics
from services.metrics.spooled import Spooled
from services.metrics.store import Store
from services.metrics.tails import Tails
from services.metrics.verdicts.archive import Archive as Trials
from services.metrics.verdicts.judge import Answers, Judge
from services.metrics.writer import Writer

log = logging.getLogger(__name__)

SERVICES = (
    "lingqu.metrics.v1.MetricsService",
    "lingqu.metrics.v1.AnswerService",
    scaler.SERVICE,
    *otlp_ports.SERVICES,
    "envoy.service.accesslog.v3.AccessLogService",
)
RETAIN_EVERY_S = 3600.0


def _store_url(value: str) -> str:
    if value and not value.startswith(("http://", "https://")):
        raise ValueError(f'"{value}" is not like http://host:8086; empty: a file of DuckDB')
    return value


def _webhook(value: str) -> str:
    found = urlsplit(value)
    if value and (found.scheme not in ("http", "https") or not found.hostname or found.username is not None):
        # Not shown: receivers have secrets in their URLs.
        raise ValueError("is not like https://host/path; credentials go into LINGQU_ALERTS_WEBHOOK_TOKEN")
    return value


class MetricsSettings(Settings):
    metrics_listen: Address = "127.0.0.1:4317"
    metrics_http_listen: Address = "127.0.0.1:4318"
    metrics_plain_listen: Loopback | None = None
    """Where OTLP/gRPC is taken in the clear, from senders of this machine that have no certificate; unset:
    nowhere but at metrics_listen, if connections between parts are plain."""
    metrics_plain_http_listen: Loopback | None = None
    """The same for OTLP/HTTP."""
    metrics_store: Annotated[str, AfterValidator(_store_url)] = ""
    """URL of an InfluxDB; empty: a file of DuckDB in metrics_folder."""
    metrics_folder: Path = Path(".lingqu/metrics")
    metrics_store_database: str = "lingqu"
    metrics_store_user: str = ""
    """Of InfluxDB 1.x, as the password."""
    metrics_store_password: SecretStr = SecretStr("")
    metrics_store_token: SecretStr = SecretStr("")
    """Of InfluxDB 2.x and 3.x."""
    metrics_store_org: str = ""
    """Of InfluxDB 2.x."""
    metrics_retention_h: int = Field(24 * 7, ge=1)
    """How long points are kept, hours."""
    metrics_rolled_up_h: int = Field(24 * 90, ge=0)
    """How long what they are rolled up to, a minute each, is kept, hours; 0: they are not."""
    metrics_every_s: float = Field(10.0, ge=0.1)
    """How often this machine and Tritons are measured."""
    metrics_nice: int = Field(0, ge=0, le=19)
    """Niceness from when it is ready on: a start that others wait for is not held up."""
    metrics_tritons: Addresses | None = None
    """Prometheus ports of Tritons, separated by commas."""
    jwks: Path | None = None
    """File with the gateway's public keys: rules and silences need an admin key; unset: they do not."""
    registry: Addresses | None = None
    """Whose rollouts are judged; unset: none are."""
    verdicts_key: Path | None = None
    """File with an API key that verdicts are reported with, for models whose policy names who may release."""
    alerts_webhook: SecretStr = SecretStr("")
    """URL that gets alerts as Alertmanager sends them; empty: they are listed and logged only."""
    alerts_webhook_token: SecretStr = SecretStr("")
    """Sent to it as a bearer token."""
    alerts_webhook_secret: SecretStr = SecretStr("")
    """Its notifications are signed with this (HMAC-SHA256)."""
    alerts_url: str = ""
    """Where people look further, in notifications."""
    alerts_every_s: float = Field(15.0, ge=0.1)
    """How often rules are evaluated at most."""
    alerts_wait_s: float = Field(5.0, ge=0)
    """How long a first notification of a rule waits for others."""
    alerts_interval_s: float = Field(60.0, ge=0)
    """The least time between two notifications of a rule."""
    alerts_repeat_s: float = Field(4 * 3600.0, ge=1)
    """How often what still fires is told again."""

    @field_validator("alerts_webhook")
    @classmethod
    def _is_url(cls, value: SecretStr) -> SecretStr:
        _webhook(value.get_secret_value())
        return value


@contextmanager
def opened(cfg: MetricsSettings) -> Iterator[Store]:
    """The store that the settings name. Raises LingquError."""
    # Imported here: one of them is not needed, and they take a while.
    if cfg.metrics_store:
        from services.metrics.stores.influx import InfluxStore
        from services.metrics.stores.influxhttp import Server

        server = Server(
            cfg.metrics_store,
            cfg.metrics_store_database,
            cfg.metrics_store_user,
            cfg.metrics_store_password.get_secret_value(),
            cfg.metrics_store_token.get_secret_value(),
            cfg.metrics_store_org,
        )
        with closing(InfluxStore(server)) as influx, Spooled(influx, cfg.metrics_folder / "spool") as spooled:
            yield spooled
    else:
        from services.metrics.stores.duck import DuckStore

        with closing(DuckStore(cfg.metrics_folder / "metrics.duckdb")) as embedded:
            yield embedded


@asynccontextmanager
async def running(cfg: MetricsSettings, store: Store | None = None) -> AsyncIterator[Intake]:
    """Yields the way in. `store` takes the place of the one that the settings name."""
    async with AsyncExitStack() as stack:
        cfg.metrics_folder.mkdir(parents=True, exist_ok=True)
        kept = store if store is not None else stack.enter_context(opened(cfg))
        loop = asyncio.get_running_loop()

        def not_kept(number: int) -> None:
            loop.call_soon_threadsafe(intake.note, "refused", Refusal.STORE, number)

        writer, tails = Writer(kept, not_kept), Tails[Point]()
        intake = Intake(writer, tails, Cardinality())
        stack.enter_context(writer.running())
        alerts, callers = _alerts(kept, cfg), Callers(cfg.jwks)
        stack.callback(alerts.close)
        # Its own spans would come back to it.
        tracer = trace.NoOpTracerProvider().get_tracer("lingqu-metrics")
        server = grpc.aio.server(
            interceptors=server_stack(tracer, cfg.max_in_flight, *audited(cfg.audit_log, callers.of)),
            options=otlp_ports.OPTIONS,
        )
        judge = None
        if cfg.registry:
            registry = Registry(cfg.registry, cfg.identity)
            stack.push_async_callback(registry.close)
            judge = Judge(registry, intake, tails, Trials(cfg.metrics_folder / "verdicts.json"), _key(cfg))
        service = Metrics(kept, tails, alerts, callers)
        stack.callback(service.close)
        add_MetricsServiceServicer_to_server(service, server)
        add_AnswerServiceServicer_to_server(Answers(judge), server)
        add_ExternalScalerServicer_to_server(scaler.Scaler(kept, service.ask), server)
        add_otlp(intake, server)
        als_pb2_grpc.add_AccessLogServiceServicer_to_server(receivers.AccessLog(intake), server)
        await stack.enter_async_context(
            serving(server, cfg.metrics_listen, SERVICES, cfg.grace_s, cfg.identity)
        )
        http = otlp_app(intake)
        await stack.enter_async_context(
            serving_http(http, cfg.metrics_http_listen, cfg.grace_s, cfg.identity, otlp_ports.PATIENCE)
        )
        await stack.enter_async_context(
            serving_plain(
                intake,
                cfg.metrics_plain_listen or "",
                cfg.metrics_plain_http_listen or "",
                cfg.grace_s,
                cfg.max_in_flight,
            )
        )
        tritons = (cfg.metrics_tritons or "").split(",") if cfg.metrics_tritons else ()
        certificates = Certificates(cfg.identity, cfg.metrics_listen) if cfg.identity else None
        measured = measure(
            intake, Host(cfg.metrics_folder), Gpus(), tritons, cfg.metrics_every_s, certificates
        )
        jobs = [measured, _retain(kept, cfg), alerts.run(), *([judge.run()] if judge is not None else [])]
        await stack.enter_async_context(background(*jobs))
        if cfg.metrics_nice:
            priority.lower(cfg.metrics_nice)
        yield intake


def _key(cfg: MetricsSettings) -> str:
    """Raises LingquError."""
    if cfg.verdicts_key is None:
        return ""
    try:
        return cfg.verdicts_key.read_text().strip()
    except OSError as err:
        raise LingquError(f"LINGQU_VERDICTS_KEY: {cfg.verdicts_key} cannot be read: {err.strerror}") from err


def _alerts(store: Store, cfg: MetricsSettings) -> Engine:
    archive, webhook = Archive(cfg.metrics_folder / "alerts"), None
    if url := cfg.alerts_webhook.get_secret_value():
        token, secret = cfg.alerts_webhook_token, cfg.alerts_webhook_secret
        target = Target(url, token.get_secret_value(), secret.get_secret_value(), cfg.alerts_url)
        webhook = Webhook(target)
    timing = Timing(cfg.alerts_wait_s, cfg.alerts_interval_s, cfg.alerts_repeat_s)
    asked = Fresh(store) if isinstance(store, Spooled) else store
    return Engine(asked, archive, Book(archive), webhook, cfg.alerts_every_s, timing)


async def _retain(store: Store, cfg: MetricsSettings) -> None:
    raw, rolled_up = cfg.metrics_retention_h * 3600, cfg.metrics_rolled_up_h * 3600
    while True:
        pause_s = RETAIN_EVERY_S
        try:
            await asyncio.to_thread(store.retain, raw, rolled_up)
        except LingquError as err:
            log.warning("%s; trying again in a minute", err)
            pause_s = 60.0
        await asyncio.sleep(pause_s)
