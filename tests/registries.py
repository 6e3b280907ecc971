"""A registry for tests in the test's own process, on a real etcd, and the calls they make most."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from lingqu.client import LingquError
from lingqu.registry.v1 import instances_pb2 as pb
from services.core.discovery import Registry
from services.registry.app import RegistrySettings, running
from tests.conftest import EtcdServer, free_offset

INSTANCE = pb.Instance(id="i1", service="inference", endpoints={"grpc": "127.0.0.1:1"})


@asynccontextmanager
async def served(etcd: EtcdServer) -> AsyncIterator[Registry]:
    """A registry of its own on `etcd`, and a client of it."""
    address = f"127.0.0.1:{8082 + free_offset()}"
    async with running(RegistrySettings(registry_listen=address, etcd=etcd.address, grace_s=0.1)):
        client = Registry(address)
        try:
            yield client
        finally:
            await client.close()


async def register(
    registry: Registry, instance: pb.Instance = INSTANCE, ttl_s: int = 10, lease: int = 0
) -> int:
    request = pb.RegisterInstanceRequest(instance=instance, ttl=Duration(seconds=ttl_s), lease_id=lease)
    answer = await registry.instances.RegisterInstance(request, timeout=5)
    return answer.lease_id


async def ids(registry: Registry, service: str = "") -> list[str]:
    answer = await registry.instances.ListInstances(pb.ListInstancesRequest(service=service), timeout=5)
    return [instance.id for instance in answer.instances]


async def refused(call: Any) -> LingquError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return LingquError(caught.value)
