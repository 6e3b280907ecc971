"""The registry's ledger as owners of shards use it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration

from lingqu.registry.v1 import ledger_pb2 as pb
from lingqu.registry.v1.ledger_pb2_grpc import LedgerServiceStub
from services.core.errors import BackendUnavailable, Conflict, LeaseExpired
from services.core.registry import NO_ANSWER, Registry
from services.gateway.limits.cells import Writes

# Less than a session lives, so that a registry that hangs is left in time.
CALL_TIMEOUT_S = 1.0
# The last that is written at a stop.
FAREWELL_TIMEOUT_S = 2.0

T = TypeVar("T")


class RegistryLedger:
    """Raises Conflict where the shard is somebody else's, LeaseExpired where the session has ended, and
    BackendUnavailable where nobody knows."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def open(self, address: str, ttl_s: int) -> int:
        """A session's id."""
        request = pb.OpenSessionRequest(address=address, ttl=Duration(seconds=ttl_s))
        answer = await self._call(lambda stub, t: stub.OpenSession(request, timeout=t))
        return int(answer.session_id)

    async def renew(self, session: int) -> None:
        request = pb.RenewSessionRequest(session_id=session)
        await self._call(lambda stub, t: stub.RenewSession(request, timeout=t))

    async def leave(self, session: int) -> None:
        request = pb.LeaveSessionRequest(session_id=session)
        await self._call(lambda stub, t: stub.LeaveSession(request, timeout=t))

    async def close(self, session: int) -> None:
        request = pb.CloseSessionRequest(session_id=session)
        await self._call(lambda stub, t: stub.CloseSession(request, timeout=t))

    async def take(self, session: int, address: str, shard: int) -> tuple[int, Mapping[str, bytes]]:
        """The fence, and what former owners have written by name."""
        request = pb.TakeShardRequest(session_id=session, shard=shard, address=address)
        answer = await self._call(lambda stub, t: stub.TakeShard(request, timeout=t))
        return answer.fence, {entry.name: entry.value for entry in answer.entries}

    async def write(self, writes: Mapping[int, tuple[int, Writes]]) -> int:
        """By shard: fence and what to write; the new fence of all of them."""
        request = pb.WriteLedgerRequest(writes=[_write(n, f, w) for n, (f, w) in writes.items()])
        answer = await self._call(lambda stub, t: stub.WriteLedger(request, timeout=t))
        return int(answer.fence)

    async def release(self, shard: int, fence: int, writes: Writes) -> None:
        request = pb.ReleaseShardRequest(write=_write(shard, fence, writes))
        await self._call(lambda stub, _: stub.ReleaseShard(request, timeout=FAREWELL_TIMEOUT_S))

    async def _call(self, method: Callable[[Any, float], Awaitable[T]]) -> T:
        channel = self._registry.channel
        try:
            return await method(LedgerServiceStub(channel), CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as err:
            if err.code() in (grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.ABORTED):
                raise Conflict(err.details() or "somebody else's") from err
            if err.code() == grpc.StatusCode.NOT_FOUND:
                raise LeaseExpired(err.details() or "the session has ended") from err
            if err.code() in NO_ANSWER:
                self._registry.leave(channel)
            raise BackendUnavailable(f"no registry answers: {err.details()}") from err


def _write(shard: int, fence: int, writes: Writes) -> pb.ShardWrite:
    entries = [
        pb.LedgerEntry(name=name, value=value, ttl=Duration(seconds=ttl_s))
        for name, (value, ttl_s) in writes.entries.items()
    ]
    return pb.ShardWrite(shard=shard, fence=fence, entries=entries, forget=writes.forget)
