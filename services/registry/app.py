"""Puts the registry together: etcd, its mirror, the two services, the server."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc

from lingqu.registry.v1 import instances_pb2_grpc, models_pb2_grpc
from services.core.interceptors import server_stack
from services.core.lifecycle import SERVER_OPTIONS, serving
from services.core.settings import Address, Addresses, Settings
from services.core.tasks import background
from services.core.telemetry import tracing
from services.registry.etcd import Etcd
from services.registry.instances import Instances
from services.registry.mirror import Mirror
from services.registry.models import Models
from services.registry.renewals import Renewals

SERVICES = ("lingqu.registry.v1.RegistryService", "lingqu.registry.v1.ModelService")
# Its clients ping it every three seconds (services/core/discovery.py).
OPTIONS = {**dict(SERVER_OPTIONS), "grpc.http2.min_ping_interval_without_data_ms": 1_000}


class RegistrySettings(Settings):
    registry_listen: Address = "127.0.0.1:8082"
    etcd: Addresses = "127.0.0.1:2379"
    max_in_flight: int = 65_536
    """Watches and keep-alives are calls that go on for as long as a process lives."""


@asynccontextmanager
async def running(cfg: RegistrySettings) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        tracer = stack.enter_context(tracing("lingqu-registry", cfg.otlp_endpoint))
        etcd = Etcd(cfg.etcd)
        stack.push_async_callback(etcd.close)
        mirror, renewals = Mirror(etcd), Renewals(etcd)
        server = grpc.aio.server(
            interceptors=server_stack(tracer, cfg.max_in_flight), options=list(OPTIONS.items())
        )
        instances_pb2_grpc.add_RegistryServiceServicer_to_server(Instances(etcd, mirror, renewals), server)
        models_pb2_grpc.add_ModelServiceServicer_to_server(Models(etcd, mirror), server)
        await stack.enter_async_context(background(mirror.run(), renewals.run()))
        await mirror.synced()
        # Thousands of streams that live long: looking through all of them again and again paused everybody.
        gc.freeze()
        gc.set_threshold(10_000, 50, 50)
        await stack.enter_async_context(serving(server, cfg.registry_listen, SERVICES, cfg.grace_s))
        yield
