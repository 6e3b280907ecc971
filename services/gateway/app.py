"""Puts the control plane together: registry watches → view → snapshot → Envoys; keys; health of the entry."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

import grpc
from envoy.service.discovery.v3 import ads_pb2_grpc
from envoy.service.health.v3 import hds_pb2_grpc
from envoy.service.load_stats.v3 import lrs_pb2_grpc
from grpc_health.v1 import health_pb2
from pydantic import Field, model_validator
from tritonclient.grpc import service_pb2 as _oip  # noqa: F401 - reflection shows it

from lingqu.gateway.v1.gateway_pb2_grpc import add_GatewayServiceServicer_to_server
from services.core import certificates
from services.core.audit import audited
from services.core.backoff import Backoff
from services.core.discovery import Replica
from services.core.errors import LingquError
from services.core.interceptors import server_stack
from services.core.lifecycle import SERVER_OPTIONS, serving
from services.core.registration import Registration
from services.core.registry import Registry
from services.core.settings import Address, Addresses, Labels, Origins, Settings, is_loopback
from services.core.tasks import background
from services.core.telemetry import metering, tracing
from services.gateway.accounts import Accounts
from services.gateway.ads import Ads
from services.gateway.control import SERVICE, ControlPlane
from services.gateway.descriptors import TENSOR_SERVICE, TEXT_SERVICE
from services.gateway.figures import BEHIND, CLIENTS, DATA_PLANES, Figures
from services.gateway.issuers import Issuers
from services.gateway.keys import KeyRing
from services.gateway.limits.app import GlobalLimits
from services.gateway.listener import TOLD_PERCENT, Entry, Limiting
from services.gateway.providers import ProvidersFile
from services.gateway.secrets import SecretFiles, WatchedSecrets
from services.gateway.service import Gateway
from services.gateway.sotw import Clients
from services.gateway.view import is_address

GATEWAY_SERVICE = "lingqu.gateway.v1.GatewayService"
ADS_SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
RECORD_LOOK_S, RECORD_MOST_S = 1.0, 30.0


class GatewaySettings(Settings):
    public_listen: Address = "127.0.0.1:8080"
    """Where Envoy listens for clients."""
    gateway_listen: Address = "127.0.0.1:8081"
    gateway_address: Address | None = None
    """Where Envoy reaches this process; default: gateway_listen."""
    gateway_ttl_s: int = Field(10, ge=1)
    """How long this control plane is believed alive in silence."""
    labels: Labels = Field(default_factory=dict)
    """Of this control plane, such as its zone."""
    registry: Addresses = "127.0.0.1:8082"
    tls_certificate: Path | None = None
    """PEM files of the public port's certificate and its key. None: clients connect without TLS."""
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    """PEM file of the CAs whose certificates say who a client is, in place of a key."""
    metrics_percent: int = Field(TOLD_PERCENT, ge=1, le=100)
    """Of how many tensor requests in a hundred the metrics service is told; of all others of each."""
    cors_origins: Origins = ()
    """Web pages that may call the public port, "https://app.example,https://*.lab.example"; default: none."""
    signing_key: Path = Path(".lingqu/gateway/signing.pem")
    jwks: Path | None = None
    """Where the public half is written, for those who have to know callers; default: jwks.json beside it."""
    known_clients_only: bool = False
    """Whether clients without a record in the registry are refused; otherwise they may call every model."""
    limiter_address: Address | None = None
    """Where other control planes and their Envoys reach this one, an IP address; default: gateway_address."""
    limits_fail: Literal["open", "closed"] = "open"
    """What becomes of a request if nobody says in time whether it is within its global limits."""
    limits_timeout_s: float = Field(default=0.25, gt=0, le=5)
    """How long it waits for that."""
    limits_tell: bool = False
    """Whether backends are told when a request was admitted (x-lingqu-admitted): to check limits by."""
    limits_lease_s: int = Field(default=3, ge=2, le=60)
    """How long after a control plane was lost others keep its part of the global limits closed."""
    issuers: ProvidersFile = ()
    """File with other issuers whose keys are taken (providers.py)."""
    dev_key: Path | None = None
    """If set, an admin key is written there at start, valid for 30 days."""

    @model_validator(mode="after")
    def _whole_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("LINGQU_TLS_CERTIFICATE and LINGQU_TLS_KEY go together")
        if self.tls_client_ca is not None and self.tls_key is None:
            raise ValueError("LINGQU_TLS_CLIENT_CA needs LINGQU_TLS_CERTIFICATE")
        if self.tls_key is not None and self.identity is None and not is_loopback(self.gateway_listen):
            raise ValueError(
                "Envoys get LINGQU_TLS_KEY from the control plane, and whoever reaches it could: let "
                "LINGQU_GATEWAY_LISTEN be on loopback, or set LINGQU_MTLS_CERTIFICATE, _KEY and _CA"
            )
        return self

    @property
    def secret_files(self) -> SecretFiles:
        public = (self.tls_certificate, self.tls_key) if self.tls_certificate and self.tls_key else None
        return SecretFiles(public, self.tls_client_ca, self.identity)


@asynccontextmanager
async def running(cfg: GatewaySettings) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        tracer = stack.enter_context(tracing("lingqu-gateway-control", cfg.otlp_endpoint))
        changed = asyncio.Event()
        registry = Registry(cfg.registry, cfg.identity)
        stack.push_async_callback(registry.close)
        issuers = Issuers(
            KeyRing.at(cfg.signing_key),
            cfg.jwks or cfg.signing_key.with_name("jwks.json"),
            cfg.dev_key,
            cfg.issuers,
            changed=changed.set,
        )
        address = _resolved(cfg.gateway_address or cfg.gateway_listen)
        secrets = WatchedSecrets(cfg.secret_files, changed.set)
        entry = Entry(
            listen=cfg.public_listen,
            control=address,
            jwks=issuers.jwks,
            traces=cfg.otlp_endpoint,
            known_clients_only=cfg.known_clients_only,
            limits=Limiting(cfg.limits_timeout_s, cfg.limits_fail == "closed"),
            cors_origins=cfg.cors_origins,
            secrets=secrets.current,
            metrics=cfg.metrics,
            metrics_percent=cfg.metrics_percent,
        )

        def current_entry() -> Entry:
            return replace(entry, jwks=issuers.jwks, issuers=issuers.others, secrets=secrets.current)

        meter = stack.enter_context(metering("lingqu-gateway-control", *cfg.collector, address))
        certificates.tell_days_left(meter, cfg.secret_files.used())
        figures = Figures(meter)
        limiter = cfg.limiter_address or address
        limits = GlobalLimits(registry, limiter, cfg.limits_lease_s, changed, cfg.identity)
        control = ControlPlane(current_entry, registry, changed, limits, (issuers,), figures)
        accounts = Accounts(registry)
        clients = Clients(control.snapshots, lambda: control.state()[1])
        ads = Ads(control.snapshots, control, clients)
        figures.gauge(CLIENTS, lambda: clients.connected)
        figures.gauge(DATA_PLANES, lambda: len(ads.planes))
        figures.gauge(
            BEHIND, lambda: sum(plane.synced != control.state()[0] for plane in ads.planes.values())
        )
        layers = server_stack(tracer, cfg.max_in_flight, *audited(cfg.audit_log, issuers.of))
        server = grpc.aio.server(interceptors=layers, options=SERVER_OPTIONS)
        ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(ads, server)
        lrs_pb2_grpc.add_LoadReportingServiceServicer_to_server(control.judge.loads, server)
        hds_pb2_grpc.add_HealthDiscoveryServiceServicer_to_server(control.health, server)
        gateway = Gateway(issuers, accounts, control, ads)
        add_GatewayServiceServicer_to_server(gateway, server)
        await stack.enter_async_context(issuers.watching())
        await stack.enter_async_context(control.watches())
        limits.add_to(server, tells=cfg.limits_tell)
        # Health and reflection of the public port are answered here, for the services behind it.
        public = [TEXT_SERVICE, TENSOR_SERVICE, GATEWAY_SERVICE]
        checks = await stack.enter_async_context(
            serving(server, cfg.gateway_listen, public, cfg.grace_s, cfg.identity)
        )
        await stack.enter_async_context(limits.running())
        await stack.enter_async_context(
            background(_report_health(control, checks), _record(issuers, accounts), secrets.run())
        )
        own = Replica(
            "gateway-" + re.sub(r"[^0-9a-zA-Z.]", "-", address), SERVICE, {"grpc": address}, (), cfg.labels
        )
        registration = Registration(registry, own, cfg.gateway_ttl_s)
        # Known to others last, forgotten by them first.
        stack.push_async_callback(registration.withdraw)
        await stack.enter_async_context(background(registration.run()))
        yield


def _resolved(address: str) -> str:
    """As "IP:port": others find it in the registry, which has no names."""
    host, _, port = address.rpartition(":")
    return address if is_address(address) else f"{socket.gethostbyname(host)}:{port}"


async def _record(issuers: Issuers, accounts: Accounts) -> None:
    """Have the admin key on record that this process makes by itself, as soon as the registry is there."""
    backoff, recorded = Backoff(most_s=RECORD_MOST_S), None
    while True:
        try:
            if issuers.dev is not None and issuers.dev is not recorded:
                own, made = issuers.ring.mint("gateway", 60, admin=True).key, issuers.dev
                await accounts.record(made, "", f"Bearer {own}")
                recorded = made
            backoff.reset()
            await asyncio.sleep(RECORD_LOOK_S)
        except LingquError:
            await asyncio.sleep(backoff.delay())


async def _report_health(control: ControlPlane, checks: object) -> None:
    """SERVING for a service as long as some replica can answer it, and for the data planes' as long as the
    registry tells what changes: they prefer control planes that know."""
    while True:
        version, now, connected = control.state()
        able = {
            TEXT_SERVICE: any(t.text_endpoints for t in now.targets),
            TENSOR_SERVICE: bool(now.tritons),
            ADS_SERVICE: bool(version) and connected,
        }
        for service, serves in able.items():
            status = (
                health_pb2.HealthCheckResponse.SERVING
                if serves
                else health_pb2.HealthCheckResponse.NOT_SERVING
            )
            await checks.set(service, status)  # type: ignore[attr-defined]
        await asyncio.sleep(0.5)
