"""Puts the registry together: etcd, its mirror, the two services, the server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc

from lingqu.registry.v1 import instances_pb2_grpc, models_pb2_grpc
from services.core.interceptors import server_stack
from services.core.lifecycle import SERVER_OPTIONS, serving
from services.core.settings import Address, Settings
from services.core.tasks import background
from services.core.telemetry import tracing
from services.registry.etcd import Etcd
from services.registry.instances import Instances
from services.registry.mirror import Mirror
from services.registry.models import Models

SERVICES = ("lingqu.registry.v1.RegistryService", "lingqu.registry.v1.ModelService")


class RegistrySettings(Settings):
    registry_listen: Address = "127.0.0.1:8082"
    etcd: Address = "127.0.0.1:2379"


@asynccontextmanager
async def running(cfg: RegistrySettings) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        tracer = stack.enter_context(tracing("lingqu-registry", cfg.otlp_endpoint))
        etcd = Etcd(cfg.etcd)
        stack.push_async_callback(etcd.close)
        mirror = Mirror(etcd)
        server = grpc.aio.server(interceptors=server_stack(tracer, cfg.max_in_flight), options=SERVER_OPTIONS)
        instances_pb2_grpc.add_RegistryServiceServicer_to_server(Instances(etcd, mirror), server)
        models_pb2_grpc.add_ModelServiceServicer_to_server(Models(etcd, mirror), server)
        await stack.enter_async_context(background(mirror.run()))
        await mirror.synced()
        await stack.enter_async_context(serving(server, cfg.registry_listen, SERVICES, cfg.grace_s))
        yield
