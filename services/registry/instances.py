"""`RegistryService`: instances, each bound to an etcd lease."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from google.protobuf.duration_pb2 import Duration

from lingqu.registry.v1 import instances_pb2 as pb
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceServicer
from services.core.errors import InvalidInput, LeaseExpired
from services.core.interceptors import Context
from services.registry import validation
from services.registry.etcd import Etcd, Put
from services.registry.mirror import PREFIX, Mirror

INSTANCES = f"{PREFIX}instances/"


class Instances(RegistryServiceServicer):
    def __init__(self, etcd: Etcd, mirror: Mirror) -> None:
        self._etcd = etcd
        self._mirror = mirror

    async def RegisterInstance(
        self, request: pb.RegisterInstanceRequest, context: Context
    ) -> pb.RegisterInstanceResponse:
        if not request.HasField("instance"):
            raise InvalidInput("instance", "is required")
        instance = validation.instance(request.instance)
        ttl = validation.ttl_s(request.ttl if request.HasField("ttl") else None)
        key = INSTANCES + instance.id
        known = self._mirror.get(key)
        revision = lease = 0
        if known is not None:
            lease, revision = known.lease, await self._replace(key, instance, known.lease)
        if not revision:
            lease = await self._etcd.grant(ttl)
            revision = await self._etcd.commit([Put(key, instance.SerializeToString(), lease)])
        await self._mirror.reached(revision)
        return pb.RegisterInstanceResponse(lease_id=lease, ttl=Duration(seconds=ttl), revision=revision)

    async def _replace(self, key: str, instance: pb.Instance, lease: int) -> int:
        """Write under the lease the instance has; 0 if that lease has just expired."""
        try:
            return await self._etcd.commit([Put(key, instance.SerializeToString(), lease)])
        except LeaseExpired:
            return 0

    async def KeepAlive(
        self, request_iterator: AsyncIterator[pb.KeepAliveRequest], context: Context
    ) -> AsyncIterator[pb.KeepAliveResponse]:
        # One at a time: what is wrong with a request must reach this handler, not etcd's call.
        leases: asyncio.Queue[int] = asyncio.Queue()

        async def queued() -> AsyncIterator[int]:
            while True:
                yield await leases.get()

        async with aclosing(self._etcd.renew(queued())) as renewed:
            async for request in request_iterator:
                if request.lease_id <= 0:
                    raise InvalidInput("lease_id", "is required; RegisterInstance returns it")
                leases.put_nowait(request.lease_id)
                lease, left_s = await anext(renewed)
                if not left_s:
                    raise LeaseExpired(f"lease {lease} has expired; register again")
                yield pb.KeepAliveResponse(lease_id=lease, ttl=Duration(seconds=left_s))

    async def DeregisterInstance(
        self, request: pb.DeregisterInstanceRequest, context: Context
    ) -> pb.DeregisterInstanceResponse:
        key = INSTANCES + validation.instance_id("id", request.id)
        known = self._mirror.get(key)
        revision = await self._etcd.delete(key)
        if known is not None and known.lease:
            await self._etcd.revoke(known.lease)
        await self._mirror.reached(revision)
        return pb.DeregisterInstanceResponse()

    async def ListInstances(
        self, request: pb.ListInstancesRequest, context: Context
    ) -> pb.ListInstancesResponse:
        return pb.ListInstancesResponse(
            instances=[
                instance
                for record in self._mirror.under(INSTANCES)
                if _matches(instance := pb.Instance.FromString(record.value), request.service)
            ],
            revision=self._mirror.revision,
            stale=self._mirror.stale,
        )

    async def WatchInstances(
        self, request: pb.WatchInstancesRequest, context: Context
    ) -> AsyncIterator[pb.WatchInstancesResponse]:
        snapshot = True
        shown: set[str] = set()
        async for batch in self._mirror.follow(INSTANCES):
            upserted: dict[str, pb.Instance] = {}
            removed: list[str] = []
            for change in batch.changes:
                name = change.key.removeprefix(INSTANCES)
                instance = None if change.record is None else pb.Instance.FromString(change.record.value)
                if instance is not None and _matches(instance, request.service):
                    upserted[name] = instance
                    shown.add(name)
                elif name in shown:
                    upserted.pop(name, None)
                    removed.append(name)
                    shown.discard(name)
            if snapshot or upserted or removed:
                gone = [name for name in removed if name not in upserted]
                yield pb.WatchInstancesResponse(
                    revision=batch.revision, snapshot=snapshot, upserted=upserted.values(), removed=gone
                )
            snapshot = False


def _matches(instance: pb.Instance, service: str) -> bool:
    return not service or instance.service == service
