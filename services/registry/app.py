"""Puts the registry together: etcd, its mirror, the services, the leader's work, the server."""

from __future__ import annotations

import gc
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc

from lingqu.registry.v1 import (
    access_pb2_grpc,
    backups_pb2_grpc,
    instances_pb2_grpc,
    ledger_pb2_grpc,
    models_pb2_grpc,
    rollouts_pb2_grpc,
)
from services.core import certificates
from services.core.audit import audited
from services.core.interceptors import LongCalls, server_stack
from services.core.lifecycle import SERVER_OPTIONS, serving
from services.core.settings import Address, Addresses, Settings, Trusted
from services.core.tasks import background
from services.core.telemetry import metering, tracing
from services.registry import figures
from services.registry.access import Access
from services.registry.backups import Backups
from services.registry.callers import AdmittedCallers
from services.registry.catalog import Catalog
from services.registry.commits import Commits
from services.registry.conductor import Conductor
from services.registry.etcd import Etcd
from services.registry.instances import Instances
from services.registry.leader import Leadership
from services.registry.leases import Leases
from services.registry.ledger import Ledger
from services.registry.mirror import Mirror
from services.registry.models import Models
from services.registry.releases import Releases
from services.registry.renewals import Renewals
from services.registry.rollout_service import Rollouts
from services.registry.steward import Steward

SERVICES = tuple(
    f"lingqu.registry.v1.{name}Service"
    for name in ("Registry", "Model", "Rollout", "Access", "Backup", "Ledger")
)
LONG_CALLS = tuple(
    f"/lingqu.registry.v1.{name}"
    for name in (
        *("RegistryService/WatchInstances", "RegistryService/KeepAlive", "ModelService/WatchModels"),
        *("AccessService/WatchAccess", "LedgerService/WatchShards"),
    )
)
# Its clients ping it every three seconds (services/core/registry.py).
OPTIONS = {**dict(SERVER_OPTIONS), "grpc.http2.min_ping_interval_without_data_ms": 1_000}


class RegistrySettings(Settings):
    registry_listen: Address = "127.0.0.1:8082"
    etcd: Addresses = "127.0.0.1:2379"
    jwks: Path | None = None
    """File with the gateway's public keys, so that callers are known by their API keys; unset: nobody is."""
    trusted_keys: Trusted = None
    """Public keys of those who may sign artifacts; unset: signatures are not demanded."""
    max_in_flight: int = 65_536
    """Watches and keep-alives are calls that go on for as long as a process lives."""


@asynccontextmanager
async def running(cfg: RegistrySettings) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        tracer = stack.enter_context(tracing("lingqu-registry", cfg.otlp_endpoint))
        meter = stack.enter_context(metering("lingqu-registry", *cfg.collector, cfg.registry_listen))
        certificates.tell_days_left(meter, certificates.of(cfg.identity))
        etcd = Etcd(cfg.etcd, cfg.identity)
        stack.push_async_callback(etcd.close)
        mirror, leases, renewals = Mirror(etcd), Leases(etcd), Renewals(etcd)
        catalog, commits, callers = Catalog(mirror), Commits(etcd, mirror), AdmittedCallers(cfg.jwks, mirror)
        releases = Releases(catalog, commits)
        conductor = Conductor(catalog, commits, releases)
        leadership = Leadership(etcd, mirror, f"{cfg.registry_listen}/{uuid.uuid4().hex[:8]}")
        steward = Steward(mirror, catalog, commits, conductor, leadership)
        models = Models(mirror, catalog, commits, releases, conductor, callers, cfg.trusted_keys)

        long_calls = LongCalls(LONG_CALLS)
        layers = server_stack(tracer, cfg.max_in_flight, long_calls, *audited(cfg.audit_log, callers.of))
        server = grpc.aio.server(interceptors=layers, options=list(OPTIONS.items()))
        instances_pb2_grpc.add_RegistryServiceServicer_to_server(
            Instances(etcd, mirror, leases, renewals, callers), server
        )
        models_pb2_grpc.add_ModelServiceServicer_to_server(models, server)
        rollouts = Rollouts(catalog, conductor, callers)
        rollouts_pb2_grpc.add_RolloutServiceServicer_to_server(rollouts, server)
        access_pb2_grpc.add_AccessServiceServicer_to_server(Access(mirror, commits, callers), server)
        ledger_pb2_grpc.add_LedgerServiceServicer_to_server(Ledger(etcd, mirror), server)
        backups_pb2_grpc.add_BackupServiceServicer_to_server(Backups(etcd, mirror, callers), server)
        figures.observe(meter, lambda: mirror.stale)
        await stack.enter_async_context(background(mirror.run(), leases.run(), renewals.run()))
        await mirror.synced()
        # Thousands of streams that live long: looking through all of them again and again paused everybody.
        gc.freeze()
        gc.set_threshold(50_000, 50, 100)
        await stack.enter_async_context(background(leadership.run(), steward.run()))
        await stack.enter_async_context(
            serving(server, cfg.registry_listen, SERVICES, cfg.grace_s, cfg.identity)
        )
        stack.callback(long_calls.end)
        yield
