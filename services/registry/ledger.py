"""`LedgerService`: which control plane owns which shard of limits, and what it has written down about it.

Locks and sessions are among the records that the mirror copies; what owners write is not, since it changes
all the time and only the next owner reads it."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from google.protobuf.duration_pb2 import Duration

from lingqu.registry.v1 import ledger_pb2 as pb
from lingqu.registry.v1.ledger_pb2_grpc import LedgerServiceServicer
from services.core.errors import AlreadyExists, Conflict, InvalidInput, LeaseExpired
from services.core.interceptors import Context
from services.registry import validation
from services.registry.etcd import Etcd, Put, Unchanged
from services.registry.keyspace import FENCES, LEAVING, LEDGER, LIMITERS, SESSIONS, SHARDS
from services.registry.mirror import Mirror, Update
from services.registry.watching import Feed

TAKE_TRIES = 4
# A lease is shared by what is written within this part of its time, and is so much longer.
SHARED = 0.1


class Ledger(LedgerServiceServicer):
    """Records: SESSIONS + id, the address, by the session's lease; LEAVING + id, empty, by the same; SHARDS +
    number, the owner's address, by the lease of its session; LEDGER + number + "/" + name, an entry, by a
    lease that nobody renews. FENCES + number changes with every taking and every write, each of which is
    conditional on the one before: a write that is late, of an owner that was or of this one, changes nothing.
    """

    def __init__(self, etcd: Etcd, mirror: Mirror) -> None:
        self._etcd = etcd
        self._feed = Feed(mirror, LIMITERS, _respond)
        self._leases: dict[int, tuple[float, int]] = {}

    async def OpenSession(self, request: pb.OpenSessionRequest, context: Context) -> pb.OpenSessionResponse:
        address = validation.endpoint("address", request.address)
        ttl_s = validation.within("ttl.seconds", request.ttl.seconds, 2, 60)
        lease = await self._etcd.grant(ttl_s)
        await self._etcd.commit([Put(f"{SESSIONS}{lease}", address.encode(), lease)])
        return pb.OpenSessionResponse(session_id=lease, ttl=Duration(seconds=ttl_s))

    async def RenewSession(
        self, request: pb.RenewSessionRequest, context: Context
    ) -> pb.RenewSessionResponse:
        """On a stream of its own: an answer to somebody's earlier question would say too much."""

        async def once() -> AsyncIterator[int]:
            yield _session(request.session_id)

        async with aclosing(self._etcd.renew(once())) as renewed:
            _, left_s = await anext(renewed)
        if not left_s:
            raise LeaseExpired(f"session {request.session_id} has ended; open another")
        return pb.RenewSessionResponse(ttl=Duration(seconds=left_s))

    async def LeaveSession(
        self, request: pb.LeaveSessionRequest, context: Context
    ) -> pb.LeaveSessionResponse:
        lease = _session(request.session_id)
        await self._etcd.commit([Put(f"{LEAVING}{lease}", b"", lease)])
        return pb.LeaveSessionResponse()

    async def CloseSession(
        self, request: pb.CloseSessionRequest, context: Context
    ) -> pb.CloseSessionResponse:
        await self._etcd.revoke(_session(request.session_id))
        return pb.CloseSessionResponse()

    async def TakeShard(self, request: pb.TakeShardRequest, context: Context) -> pb.TakeShardResponse:
        lock, lease = _lock(request.shard), _session(request.session_id)
        taken = Put(lock, validation.endpoint("address", request.address).encode(), lease)
        for _ in range(TAKE_TRIES):
            held = await self._etcd.get(lock)
            if held is not None and held.lease != lease:
                raise AlreadyExists(f"shard {request.shard} is held by {held.value.decode()}")
            only_if = Unchanged(lock, held.mod_revision if held else 0)
            fence = await self._etcd.commit([*([] if held else [taken]), _fence(request.shard)], [only_if])
            if not fence:
                continue  # it changed hands in between
            # Read when it is ours: what a former owner has not written yet, it cannot write any more.
            prefix = _entries(request.shard)
            records, _ = await self._etcd.read(prefix)
            entries = [pb.LedgerEntry(name=r.key.removeprefix(prefix), value=r.value) for r in records]
            return pb.TakeShardResponse(fence=fence, entries=entries)
        raise Conflict(f"shard {request.shard} changes hands all the time; try again")

    async def WriteLedger(self, request: pb.WriteLedgerRequest, context: Context) -> pb.WriteLedgerResponse:
        return pb.WriteLedgerResponse(fence=await self._write(request.writes))

    async def ReleaseShard(
        self, request: pb.ReleaseShardRequest, context: Context
    ) -> pb.ReleaseShardResponse:
        await self._write([request.write], [_lock(request.write.shard)])
        return pb.ReleaseShardResponse()

    def WatchShards(
        self, request: pb.WatchShardsRequest, context: Context
    ) -> AsyncIterator[pb.WatchShardsResponse]:
        return self._feed.serve(request, context)

    async def _write(self, writes: Sequence[pb.ShardWrite], deletes: Sequence[str] = ()) -> int:
        """The new fence of all shards."""
        try:
            return await self._commit(writes, deletes)
        except LeaseExpired:  # of another store, which was replaced
            self._leases.clear()
            return await self._commit(writes, deletes)

    async def _commit(self, writes: Sequence[pb.ShardWrite], deletes: Sequence[str]) -> int:
        puts, gone, only_if = [], list(deletes), []
        for write in writes:
            fence = _fence(write.shard)
            puts.append(fence)
            only_if.append(Unchanged(fence.key, write.fence))
            prefix = _entries(write.shard)
            for entry in write.entries:
                name = validation.ledger_name(entry.name)
                ttl_s = validation.within("ttl.seconds", entry.ttl.seconds, 2, 48 * 3600)
                puts.append(Put(prefix + name, entry.value, await self._lease(ttl_s)))
            gone += [prefix + validation.ledger_name(name) for name in write.forget]
        revision = await self._etcd.commit(puts, only_if, gone)
        if not revision:
            raise Conflict("a shard is not held any more, or not by this fence; nothing was written")
        return revision

    async def _lease(self, ttl_s: int) -> int:
        """One that lives for at least `ttl_s`, shared with what was written shortly before."""
        granted, lease = self._leases.get(ttl_s, (0.0, 0))
        # By a clock that goes on while the machine sleeps.
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        if not lease or now - granted > ttl_s * SHARED:
            lease = await self._etcd.grant(int(ttl_s * (1 + 2 * SHARED)) + 1)
            self._leases[ttl_s] = now, lease
        return lease


def _respond(update: Update, view: str) -> pb.WatchShardsResponse:
    response = pb.WatchShardsResponse()
    for change in update.changes:
        record = change.record
        if change.key.startswith(SESSIONS):
            session_id = int(change.key.removeprefix(SESSIONS))
            if record is None:
                response.ended_sessions.append(session_id)
            else:
                response.sessions.add(session_id=session_id, address=record.value.decode())
        elif change.key.startswith(LEAVING):
            if record is not None:  # its end is that of the session
                response.leaving_sessions.append(int(change.key.removeprefix(LEAVING)))
        elif change.key.startswith(SHARDS):
            shard = int(change.key.removeprefix(SHARDS))
            if record is None:
                response.freed_shards.append(shard)
            else:
                response.owners.add(shard=shard, session_id=record.lease, address=record.value.decode())
    return response


def _session(session_id: int) -> int:
    if session_id <= 0:
        raise InvalidInput("session_id", "is required; OpenSession returns it")
    return session_id


def _lock(shard: int) -> str:
    return f"{SHARDS}{validation.within('shard', shard, 0, 1023):04d}"


def _fence(shard: int) -> Put:
    """Another value each time, so that a write whose answer was lost is told from somebody else's."""
    return Put(f"{FENCES}{shard:04d}", uuid.uuid4().bytes)


def _entries(shard: int) -> str:
    return f"{LEDGER}{shard:04d}/"
