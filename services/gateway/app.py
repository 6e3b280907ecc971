"""Puts the control plane together: registry watches → view → snapshot → Envoys; keys; health of the entry."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import grpc
from envoy.service.discovery.v3 import ads_pb2_grpc
from grpc_health.v1 import health_pb2
from pydantic import Field
from tritonclient.grpc import service_pb2 as _oip  # noqa: F401 - reflection shows it

from lingqu.gateway.v1.gateway_pb2_grpc import add_GatewayServiceServicer_to_server
from services.core.access import Record, access, watched_access
from services.core.discovery import Model, Registry, Replica, Watched
from services.core.files import write_secret, write_whole
from services.core.interceptors import server_stack
from services.core.lifecycle import SERVER_OPTIONS, serving
from services.core.settings import Address, Addresses, Origins, Settings
from services.core.tasks import background
from services.core.telemetry import tracing
from services.gateway.ads import Ads, Snapshots
from services.gateway.descriptors import TENSOR_SERVICE, TEXT_SERVICE
from services.gateway.keys import KeyRing
from services.gateway.limits.app import GlobalLimits
from services.gateway.listener import Entry, Limiting
from services.gateway.service import Gateway
from services.gateway.snapshot import snapshot
from services.gateway.view import View, view

GATEWAY_SERVICE = "lingqu.gateway.v1.GatewayService"
# Changes that come together make one snapshot.
DEBOUNCE_S = 0.01


class GatewaySettings(Settings):
    public_listen: Address = "127.0.0.1:8080"
    """Where Envoy listens for clients."""
    gateway_listen: Address = "127.0.0.1:8081"
    gateway_address: Address | None = None
    """Where Envoy reaches this process; default: gateway_listen."""
    registry: Addresses = "127.0.0.1:8082"
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
    limits_timeout_s: float = Field(default=0.05, gt=0, le=5)
    """How long it waits for that."""
    limits_lease_s: int = Field(default=3, ge=2, le=60)
    """How long after a control plane was lost others keep its part of the global limits closed."""
    dev_key: Path | None = None
    """If set, an admin key is written there at start, valid for 30 days."""


class ControlPlane:
    """Turns every change of the registry into a snapshot."""

    def __init__(self, entry: Entry, registry: Registry, limiter: str, lease_s: int) -> None:
        self._entry = entry
        self._changed = asyncio.Event()
        self._replicas: Watched[Replica] = registry.watched_replicas("inference", self._changed)
        self._models: Watched[Model] = registry.watched_models(self._changed)
        self._access: Watched[Record] = watched_access(registry, self._changed)
        self.limits = GlobalLimits(registry, limiter, lease_s, self._changed)
        self.snapshots = Snapshots()
        self._view = View((), ())

    def state(self) -> tuple[str, View, bool]:
        current = self.snapshots.current
        connected = all(watched.connected for watched in self._watches)
        return current.version if current else "", self._view, connected

    def watches(self) -> AbstractAsyncContextManager[None]:
        return background(*(watched.run() for watched in self._watches), self._follow())

    @property
    def _watches(self) -> tuple[Watched[Any], ...]:
        return self._replicas, self._models, self._access

    async def _follow(self) -> None:
        # Until the registry has told all, Envoy keeps what it has: an unknown suite is not an empty one.
        await asyncio.gather(*(watched.synced.wait() for watched in self._watches))
        while True:
            self._changed.clear()
            who = access(self._access.items.values())
            self.limits.follow(who)
            limiters = self.limits.addresses
            now = view(self._replicas.items.values(), self._models.items.values(), who, limiters=limiters)
            made = snapshot(now, self._entry)
            if self.snapshots.current is None or made.version != self.snapshots.current.version:
                await self.snapshots.publish(made)
            self._view = now
            await self._changed.wait()
            await asyncio.sleep(DEBOUNCE_S)


@asynccontextmanager
async def running(cfg: GatewaySettings) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        tracer = stack.enter_context(tracing("lingqu-gateway-control", cfg.otlp_endpoint))
        keys = KeyRing.at(cfg.signing_key)
        jwks = cfg.jwks or cfg.signing_key.with_name("jwks.json")
        write_whole(jwks, json.dumps(keys.jwks()).encode())
        if cfg.dev_key is not None:
            write_secret(cfg.dev_key, keys.mint("dev", admin=True).key.encode())
        registry = Registry(cfg.registry)
        stack.push_async_callback(registry.close)
        entry = Entry(
            listen=cfg.public_listen,
            control=cfg.gateway_address or cfg.gateway_listen,
            jwks=keys.jwks(),
            traces=cfg.otlp_endpoint,
            known_clients_only=cfg.known_clients_only,
            limits=Limiting(cfg.limits_timeout_s, cfg.limits_fail == "closed"),
            cors_origins=cfg.cors_origins,
        )
        address = cfg.limiter_address or entry.control
        control = ControlPlane(entry, registry, address, cfg.limits_lease_s)
        ads = Ads(control.snapshots)
        server = grpc.aio.server(interceptors=server_stack(tracer, cfg.max_in_flight), options=SERVER_OPTIONS)
        ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(ads, server)
        add_GatewayServiceServicer_to_server(Gateway(keys, control.state, ads.planes.values), server)
        await stack.enter_async_context(control.watches())
        control.limits.add_to(server)
        # Health and reflection of the public port are answered here, for the services behind it.
        public = [TEXT_SERVICE, TENSOR_SERVICE, GATEWAY_SERVICE]
        checks = await stack.enter_async_context(serving(server, cfg.gateway_listen, public, cfg.grace_s))
        await stack.enter_async_context(control.limits.running())
        await stack.enter_async_context(background(_report_health(control, checks)))
        yield


async def _report_health(control: ControlPlane, checks: object) -> None:
    """SERVING for a service as long as some replica can answer it."""
    while True:
        _, now, _ = control.state()
        able = {
            TEXT_SERVICE: any(t.text_endpoints for t in now.targets),
            TENSOR_SERVICE: bool(now.tritons),
        }
        for service, serves in able.items():
            status = (
                health_pb2.HealthCheckResponse.SERVING
                if serves
                else health_pb2.HealthCheckResponse.NOT_SERVING
            )
            await checks.set(service, status)  # type: ignore[attr-defined]
        await asyncio.sleep(0.5)
