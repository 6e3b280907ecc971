"""`RegistryService`: instances, each bound to an etcd lease of its own. The lease's id is what tells a
process from another one that was started under the same instance id."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from google.protobuf.duration_pb2 import Duration

from lingqu.registry.v1 import instances_pb2 as pb
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceServicer
from services.core.errors import (
    AlreadyExists,
    BackendUnavailable,
    Conflict,
    InvalidInput,
    LeaseExpired,
    NotFound,
)
from services.core.interceptors import Context
from services.registry import validation
from services.registry.callers import AdmittedCallers
from services.registry.etcd import Etcd, Put, Record, Unchanged
from services.registry.keyspace import DRAINED, INSTANCES
from services.registry.leases import Leases
from services.registry.mirror import Mirror, Update
from services.registry.renewals import Renewals
from services.registry.watching import Feed

REGISTER_TRIES = 4
# How long it is remembered of a process that lost its lease.
DRAINED_S = 86_400


class Instances(RegistryServiceServicer):
    def __init__(
        self, etcd: Etcd, mirror: Mirror, leases: Leases, renewals: Renewals, callers: AdmittedCallers
    ) -> None:
        self._etcd = etcd
        self._callers = callers
        self._mirror = mirror
        self._leases = leases
        self._renewals = renewals
        self._feed = Feed(mirror, INSTANCES, _respond)

    async def RegisterInstance(
        self, request: pb.RegisterInstanceRequest, context: Context
    ) -> pb.RegisterInstanceResponse:
        if not request.HasField("instance"):
            raise InvalidInput("instance", "is required")
        instance = validation.instance(request.instance)
        ttl = validation.ttl_s(request.ttl if request.HasField("ttl") else None)
        if request.lease_id < 0:
            raise InvalidInput("lease_id", "is one that RegisterInstance returned, or 0")
        key = INSTANCES + instance.id
        known = self._mirror.get(key)
        for _ in range(REGISTER_TRIES):
            lease = await self._lease(known, request.lease_id, ttl)
            same = known is not None and known.lease == lease
            instance.draining = (
                pb.Instance.FromString(known.value).draining
                if same and known is not None
                else await self._was_drained(instance.id, request.lease_id)
            )
            value = instance.SerializeToString()
            only_if = [Unchanged(key, known.mod_revision if known else 0)]
            with contextlib.suppress(LeaseExpired):  # just now; then its record is gone as well
                if revision := await self._etcd.commit([Put(key, value, lease)], only_if):
                    await self._release(known, lease)
                    await self._mirror.reached(revision)
                    return pb.RegisterInstanceResponse(
                        lease_id=lease, ttl=Duration(seconds=ttl), revision=revision
                    )
            known = await self._etcd.get(key)  # somebody else was faster, or our copy is behind
        raise Conflict(f'"{instance.id}" is being registered by others at the same time; try again')

    async def _lease(self, known: Record | None, held: int, ttl_s: int) -> int:
        """The lease to write under, for a caller that holds `held`."""
        if known is None:
            return await (self._etcd.grant(ttl_s, held) if held else self._leases.take(ttl_s))
        if known.lease == held:
            return held
        if held:
            raise AlreadyExists("another process has registered under this id since, and lives")
        return await self._leases.take(ttl_s)

    async def _was_drained(self, name: str, lease: int) -> bool:
        """Whether the process that holds the lease was, whose record has ended with it."""
        found = await self._etcd.get(DRAINED + name) if lease else None
        return found is not None and found.value == str(lease).encode()

    async def _release(self, known: Record | None, lease: int) -> None:
        """End the lease of a record that is not under it any more, so that its holder learns of that with its
        next keep-alive."""
        if known is not None and known.lease not in (0, lease):
            with contextlib.suppress(BackendUnavailable):  # it ends by itself
                await self._etcd.revoke(known.lease)

    async def KeepAlive(
        self, request_iterator: AsyncIterator[pb.KeepAliveRequest], context: Context
    ) -> AsyncIterator[pb.KeepAliveResponse]:
        async for request in request_iterator:
            if request.lease_id <= 0:
                raise InvalidInput("lease_id", "is required; RegisterInstance returns it")
            left_s = await self._renewals.renew(request.lease_id)
            if not left_s:
                raise LeaseExpired(f"lease {request.lease_id} has expired; register again")
            yield pb.KeepAliveResponse(lease_id=request.lease_id, ttl=Duration(seconds=left_s))

    async def DeregisterInstance(
        self, request: pb.DeregisterInstanceRequest, context: Context
    ) -> pb.DeregisterInstanceResponse:
        key = INSTANCES + validation.instance_id("id", request.id)
        for _ in range(REGISTER_TRIES):
            known = await self._etcd.get(key)  # our copy may be behind
            if known is None or request.lease_id not in (0, known.lease):
                return pb.DeregisterInstanceResponse()
            # Not by ending its lease: a successor may have taken the record over, and would stay.
            if revision := await self._etcd.commit(
                [], [Unchanged(key, known.mod_revision)], [key, DRAINED + request.id]
            ):
                await self._release(known, 0)
                await self._mirror.reached(revision)
                return pb.DeregisterInstanceResponse()
        raise Conflict(f'"{request.id}" is being registered by others at the same time; try again')

    async def DrainInstance(
        self, request: pb.DrainInstanceRequest, context: Context
    ) -> pb.DrainInstanceResponse:
        self._callers.check_admin(context.invocation_metadata(), "drain instances")
        key = INSTANCES + validation.instance_id("id", request.id)
        for _ in range(REGISTER_TRIES):
            known = await self._etcd.get(key)
            if known is None:
                raise NotFound(f'there is no instance "{request.id}"; `lingqu instances` lists them')
            instance = pb.Instance.FromString(known.value)
            if instance.draining != request.undo:
                return pb.DrainInstanceResponse(instance=instance)
            instance.draining = not request.undo
            puts, gone = [Put(key, instance.SerializeToString(), known.lease)], []
            if request.undo:
                gone.append(DRAINED + instance.id)
            else:
                mark = str(known.lease).encode()
                puts.append(Put(DRAINED + instance.id, mark, await self._etcd.grant(DRAINED_S)))
            if revision := await self._etcd.commit(puts, [Unchanged(key, known.mod_revision)], gone):
                await self._mirror.reached(revision)
                return pb.DrainInstanceResponse(instance=instance)
        raise Conflict(f'"{request.id}" is being changed by others at the same time; try again')

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

    def WatchInstances(
        self, request: pb.WatchInstancesRequest, context: Context
    ) -> AsyncIterator[pb.WatchInstancesResponse]:
        return self._feed.serve(request, context, request.service)


def _respond(update: Update, service: str) -> pb.WatchInstancesResponse:
    response = pb.WatchInstancesResponse()
    for change in update.changes:
        if (now := _shown(change.record, service)) is not None:
            response.upserted.append(now)
        elif _shown(change.before, service) is not None:
            response.removed.append(change.key.removeprefix(INSTANCES))
    return response


def _shown(record: Record | None, service: str) -> pb.Instance | None:
    """The record's instance if there is one and a watcher of `service` sees it."""
    if record is None:
        return None
    instance = pb.Instance.FromString(record.value)
    return instance if _matches(instance, service) else None


def _matches(instance: pb.Instance, service: str) -> bool:
    return not service or instance.service == service
