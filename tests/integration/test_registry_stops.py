"""A registry that stops does not wait for those who watch, and they lose nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest

from lingqu.client import LingquError
from lingqu.registry.v1 import access_pb2, instances_pb2, ledger_pb2, models_pb2
from lingqu.registry.v1.access_pb2_grpc import AccessServiceStub
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceStub
from lingqu.registry.v1.ledger_pb2_grpc import LedgerServiceStub
from lingqu.registry.v1.models_pb2_grpc import ModelServiceStub
from services.core.discovery import READY, Hosted, Replica, VersionKey
from services.core.registration import Registration
from services.core.registry import Registry
from services.core.tasks import background
from services.registry.app import RegistrySettings, running
from tests.conftest import EtcdServer, free_offset
from tests.registries import register
from tests.waiting import until

GRACE_S = 5.0


def settings(etcd: EtcdServer) -> RegistrySettings:
    return RegistrySettings(
        registry_listen=f"127.0.0.1:{8082 + free_offset()}", etcd=etcd.address, grace_s=GRACE_S
    )


async def test_watches_and_keep_alives_end_at_once_and_say_why(etcd_server: EtcdServer) -> None:
    cfg = settings(etcd_server)
    async with grpc.aio.insecure_channel(cfg.registry_listen) as channel, AsyncExitStack() as stack:
        instances: Any = RegistryServiceStub(channel)
        await stack.enter_async_context(running(cfg))
        client = Registry(cfg.registry_listen)
        lease = await register(client)
        await client.close()

        async def kept() -> AsyncIterator[instances_pb2.KeepAliveRequest]:
            yield instances_pb2.KeepAliveRequest(lease_id=lease)
            await asyncio.Event().wait()

        calls = {
            "instances": instances.WatchInstances(instances_pb2.WatchInstancesRequest()),
            "models": ModelServiceStub(channel).WatchModels(models_pb2.WatchModelsRequest()),
            "access": AccessServiceStub(channel).WatchAccess(access_pb2.WatchAccessRequest()),
            "shards": LedgerServiceStub(channel).WatchShards(ledger_pb2.WatchShardsRequest()),
            "a lease": instances.KeepAlive(kept()),
        }
        for what, call in calls.items():
            assert await call.read() is not grpc.aio.EOF, what
        begun = time.monotonic()
        await stack.aclose()
        assert time.monotonic() - begun < GRACE_S / 2
        for what, call in calls.items():
            assert await call.code() == grpc.StatusCode.UNAVAILABLE, what
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await call.read()
            assert LingquError(ended.value).reason == "STOPPING", what


async def test_who_watches_goes_on_with_another_registry(etcd_server: EtcdServer) -> None:
    """Every change is told, and the lease is kept."""
    one, other = settings(etcd_server), settings(etcd_server)
    replica = Replica("r", "inference", {"grpc": "10.0.0.1:8083"})
    async with running(other), AsyncExitStack() as stack:
        await stack.enter_async_context(running(one))
        client = Registry(f"{one.registry_listen},{other.registry_listen}")
        client._use(client._channels[0])  # it begins with any
        watched = client.watched_replicas("inference", asyncio.Event())
        registration = Registration(client, replica, 10)
        async with background(watched.run(), registration.run()):
            await until(lambda: "r" in watched.items, "it is registered")
            revision = watched.revision
            begun = time.monotonic()
            await stack.aclose()
            assert time.monotonic() - begun < GRACE_S / 2
            ready = (Hosted(VersionKey("m", 1), READY),)
            registration.update(ready)
            await until(lambda: watched.items["r"].models == ready, "the change is told")
            assert watched.revision > revision
            assert watched.connected
        await client.close()
