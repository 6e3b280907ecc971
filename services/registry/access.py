"""`AccessService`: clients, limits of models, revoked keys and an account of signed ones."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator

from lingqu.registry.v1 import access_pb2 as pb
from lingqu.registry.v1.access_pb2_grpc import AccessServiceServicer
from services.core.errors import Conflict, InvalidInput, NotFound, NotReady, TooManyKeys
from services.core.interceptors import Context
from services.registry import validation
from services.registry.callers import AdmittedCallers
from services.registry.commits import Commits
from services.registry.etcd import Put, Record, Unchanged
from services.registry.keyspace import ACCESS, CLIENTS, KEYS, REVOKED, SHARED_LIMITS, TIERS
from services.registry.mirror import Mirror, Update
from services.registry.watching import Feed

REPLACE_TRIES = 8
KEY_TTL_MAX_S = 366 * 86_400
# A revocation is kept as long as any key can live, by etcd's count of time alone: what a registry's clock
# says about expire_time must not bring a key back. The margin is for a signer whose clock was ahead.
REVOKED_FOR_S = KEY_TTL_MAX_S + 7 * 86_400
MAX_KEYS = 50_000


class Access(AccessServiceServicer):
    """Records: CLIENTS + name, a Client; SHARED_LIMITS + model, a SharedLimits; TIERS + name, a Tier;
    REVOKED + key id, a RevokedKey by a lease of REVOKED_FOR_S; KEYS + key id, an IssuedKey by a lease as long
    as its life."""

    def __init__(self, mirror: Mirror, commits: Commits, callers: AdmittedCallers) -> None:
        self._mirror = mirror
        self._commits = commits
        self._callers = callers
        self._feed = Feed(mirror, ACCESS, _respond)

    async def SetClient(self, request: pb.SetClientRequest, context: Context) -> pb.SetClientResponse:
        self._callers.check_admin(context.invocation_metadata(), "change clients")
        if not request.HasField("client"):
            raise InvalidInput("client", "is required")
        client = pb.Client()
        client.CopyFrom(validation.client(request.client))
        client.revision = 0
        put = Put(CLIENTS + client.name, client.SerializeToString())
        client.revision = await self._set(put, request.expected_revision, client.tier)
        return pb.SetClientResponse(client=client)

    async def GetClient(self, request: pb.GetClientRequest, context: Context) -> pb.GetClientResponse:
        name = validation.client_name("name", request.name)
        record = self._mirror.get(CLIENTS + name)
        if record is None:
            raise NotFound(f'there is no client "{name}"')
        return pb.GetClientResponse(client=_client(record.value, record.mod_revision))

    async def ListClients(self, request: pb.ListClientsRequest, context: Context) -> pb.ListClientsResponse:
        return pb.ListClientsResponse(
            clients=[_client(r.value, r.mod_revision) for r in self._mirror.under(CLIENTS)],
            revision=self._mirror.revision,
            stale=self._mirror.stale,
        )

    async def DeleteClient(
        self, request: pb.DeleteClientRequest, context: Context
    ) -> pb.DeleteClientResponse:
        self._callers.check_admin(context.invocation_metadata(), "delete clients")
        key = CLIENTS + validation.client_name("name", request.name)
        await self._commits.caught_up()
        await self._replace(key, [], [key])
        return pb.DeleteClientResponse()

    async def SetSharedLimits(
        self, request: pb.SetSharedLimitsRequest, context: Context
    ) -> pb.SetSharedLimitsResponse:
        self._callers.check_admin(context.invocation_metadata(), "change limits")
        if not request.HasField("shared_limits"):
            raise InvalidInput("shared_limits", "is required")
        shared = pb.SharedLimits()
        shared.CopyFrom(validation.shared_limits(request.shared_limits))
        shared.revision = 0
        put = Put(SHARED_LIMITS + shared.model, shared.SerializeToString())
        shared.revision = await self._set(put, request.expected_revision)
        return pb.SetSharedLimitsResponse(shared_limits=shared)

    async def ListSharedLimits(
        self, request: pb.ListSharedLimitsRequest, context: Context
    ) -> pb.ListSharedLimitsResponse:
        return pb.ListSharedLimitsResponse(
            shared_limits=[_shared(r.value, r.mod_revision) for r in self._mirror.under(SHARED_LIMITS)],
            stale=self._mirror.stale,
        )

    async def DeleteSharedLimits(
        self, request: pb.DeleteSharedLimitsRequest, context: Context
    ) -> pb.DeleteSharedLimitsResponse:
        self._callers.check_admin(context.invocation_metadata(), "change limits")
        key = SHARED_LIMITS + validation.model_name("model", request.model)
        await self._commits.caught_up()
        await self._replace(key, [], [key])
        return pb.DeleteSharedLimitsResponse()

    async def SetTier(self, request: pb.SetTierRequest, context: Context) -> pb.SetTierResponse:
        self._callers.check_admin(context.invocation_metadata(), "change tiers")
        if not request.HasField("tier"):
            raise InvalidInput("tier", "is required")
        tier = pb.Tier()
        tier.CopyFrom(validation.tier(request.tier))
        tier.revision = 0
        put = Put(TIERS + tier.name, tier.SerializeToString())
        tier.revision = await self._set(put, request.expected_revision)
        return pb.SetTierResponse(tier=tier)

    async def ListTiers(self, request: pb.ListTiersRequest, context: Context) -> pb.ListTiersResponse:
        return pb.ListTiersResponse(
            tiers=[_tier(r.value, r.mod_revision) for r in self._mirror.under(TIERS)],
            stale=self._mirror.stale,
        )

    async def DeleteTier(self, request: pb.DeleteTierRequest, context: Context) -> pb.DeleteTierResponse:
        self._callers.check_admin(context.invocation_metadata(), "delete tiers")
        key = TIERS + validation.client_name("name", request.name)
        for _ in range(REPLACE_TRIES):
            await self._commits.caught_up()
            if not self._commits.present(key):
                return pb.DeleteTierResponse()
            only_if, clients = self._commits.unchanged(key), self._mirror.under(CLIENTS)
            names = [
                c.name for c in (pb.Client.FromString(r.value) for r in clients) if c.tier == request.name
            ]
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise NotReady(f"{', '.join(names[:3])}{more} are in the tier; give them another first")
            with contextlib.suppress(Conflict):
                await self._commits.commit([], only_if, [key])
        raise Conflict("it is being changed by others all the time; try again")

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Context) -> pb.RevokeKeyResponse:
        self._callers.check_admin(context.invocation_metadata(), "revoke keys")
        key = REVOKED + validation.key_id(request.key_id)
        if request.client:
            validation.client_name("client", request.client)
        validation.reason(request.reason)
        validation.timestamp("expire_time", request.expire_time)
        for _ in range(REPLACE_TRIES):
            known, only_if = self._mirror.get(key), self._commits.unchanged(key)
            revoked = _revoked(request, known.value if known else b"")
            if revoked is None:
                return pb.RevokeKeyResponse(key=pb.RevokedKey.FromString(known.value if known else b""))
            lease = await self._commits.lease(REVOKED_FOR_S)
            put = Put(key, revoked.SerializeToString(), lease)
            try:
                await self._commits.commit([put], only_if)
            except Conflict:  # somebody else has revoked it, and perhaps for longer
                await self._commits.release(lease)
                await self._commits.caught_up()
            else:  # a lease that it had before ends by itself: a restore gives one to many keys
                return pb.RevokeKeyResponse(key=revoked)
        raise Conflict("it is being changed by others all the time; try again")

    async def ListRevokedKeys(
        self, request: pb.ListRevokedKeysRequest, context: Context
    ) -> pb.ListRevokedKeysResponse:
        keys = [pb.RevokedKey.FromString(record.value) for record in self._mirror.under(REVOKED)]
        return pb.ListRevokedKeysResponse(keys=keys, stale=self._mirror.stale)

    async def RecordKey(self, request: pb.RecordKeyRequest, context: Context) -> pb.RecordKeyResponse:
        self._callers.check_admin(context.invocation_metadata(), "record keys")
        key = validation.issued_key(request.key)
        left = key.expire_time.seconds - int(time.time())
        if not 0 < left <= REVOKED_FOR_S:
            raise InvalidInput("key.expire_time", "a time to come, within 366 days, is needed")
        if len(self._mirror.under(KEYS)) >= MAX_KEYS:
            raise TooManyKeys(f"{MAX_KEYS} keys are alive; make fewer, or shorter ones")
        lease = await self._commits.lease(left)
        await self._replace(KEYS + key.key_id, [Put(KEYS + key.key_id, key.SerializeToString(), lease)])
        return pb.RecordKeyResponse()

    async def ListKeys(self, request: pb.ListKeysRequest, context: Context) -> pb.ListKeysResponse:
        self._callers.check_admin(context.invocation_metadata(), "list keys")
        keys = (pb.IssuedKey.FromString(record.value) for record in self._mirror.under(KEYS))
        wanted = [key for key in keys if request.client in ("", key.client)]
        return pb.ListKeysResponse(keys=wanted, stale=self._mirror.stale)

    async def _set(self, put: Put, expected: int, tier: str = "") -> int:
        """The revision. Raises Conflict if `expected` is not 0 and another by now, NotFound if there is no
        such `tier`."""
        for _ in range(REPLACE_TRIES):
            own = [Unchanged(put.key, expected)] if expected else self._commits.unchanged(put.key)
            of_tier = await self._taken(tier) if tier else []
            puts = [put, *(Put(record.key, record.value) for record in of_tier)]
            only_if = [*own, *(Unchanged(record.key, record.mod_revision) for record in of_tier)]
            try:
                return await self._commits.commit(puts, only_if)
            except Conflict:
                await self._commits.caught_up()
                if expected and self._commits.unchanged(put.key) != own:
                    raise
        raise Conflict("it is being changed by others all the time; try again")

    async def _taken(self, tier: str) -> list[Record]:
        """The record of a tier that a client is put into. It is written again then, so that whoever deletes
        it at this moment finds that it is in use. Raises NotFound."""
        if not self._commits.present(TIERS + tier):
            await self._commits.caught_up()
        record = self._mirror.get(TIERS + tier)
        if record is None:
            raise NotFound(f'there is no tier "{tier}"')
        return [record]

    async def _replace(self, key: str, puts: list[Put], deletes: list[str] | None = None) -> int:
        """Write whatever is there now; the revision. On a condition all the same: a write whose answer was
        lost is sent again, and must not undo what somebody else has written since."""
        for _ in range(REPLACE_TRIES):
            if deletes and not self._commits.present(key):
                return 0
            with contextlib.suppress(Conflict):
                return await self._commits.commit(puts, self._commits.unchanged(key), deletes or [])
            await self._commits.caught_up()
        raise Conflict("it is being changed by others all the time; try again")

    def WatchAccess(
        self, request: pb.WatchAccessRequest, context: Context
    ) -> AsyncIterator[pb.WatchAccessResponse]:
        return self._feed.serve(request, context)


def _revoked(request: pb.RevokeKeyRequest, known: bytes) -> pb.RevokedKey | None:
    """The record to write; None if what is known says it already. The first client and reason stay, and the
    later end. Without an end: that of the longest key which was there when it was revoked."""
    revoked = pb.RevokedKey(key_id=request.key_id, client=request.client, reason=request.reason)
    revoked.revoke_time.GetCurrentTime()
    if known:
        revoked.ParseFromString(known)
    ends = revoked.revoke_time.seconds + KEY_TTL_MAX_S, 0
    if request.HasField("expire_time"):
        ends = request.expire_time.seconds, request.expire_time.nanos
    if known and ends <= (revoked.expire_time.seconds, revoked.expire_time.nanos):
        return None
    revoked.expire_time.seconds, revoked.expire_time.nanos = ends
    return revoked


def _respond(update: Update, view: str) -> pb.WatchAccessResponse:
    response = pb.WatchAccessResponse()
    for change in update.changes:
        record, key = change.record, change.key
        if key.startswith(CLIENTS):
            if record is None:
                response.removed_clients.append(key.removeprefix(CLIENTS))
            else:
                response.clients.append(_client(record.value, record.mod_revision))
        elif key.startswith(SHARED_LIMITS):
            if record is None:
                response.removed_shared_limits.append(key.removeprefix(SHARED_LIMITS))
            else:
                response.shared_limits.append(_shared(record.value, record.mod_revision))
        elif key.startswith(TIERS):
            if record is None:
                response.removed_tiers.append(key.removeprefix(TIERS))
            else:
                response.tiers.append(_tier(record.value, record.mod_revision))
        elif key.startswith(REVOKED):
            if record is None:
                response.forgotten_keys.append(key.removeprefix(REVOKED))
            else:
                response.revoked_keys.append(pb.RevokedKey.FromString(record.value))
    return response


def _client(value: bytes, revision: int) -> pb.Client:
    client = pb.Client.FromString(value)
    client.revision = revision
    return client


def _shared(value: bytes, revision: int) -> pb.SharedLimits:
    shared = pb.SharedLimits.FromString(value)
    shared.revision = revision
    return shared


def _tier(value: bytes, revision: int) -> pb.Tier:
    tier = pb.Tier.FromString(value)
    tier.revision = revision
    return tier
