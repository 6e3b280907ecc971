"""The few etcd v3 calls the registry needs, over `grpc.aio`, with errors in the suite's words.

Uses etcd3aio's generated stubs only: its watch would wait for ever after a compaction.
Protocol: https://etcd.io/docs/v3.5/learning/api/
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from etcd3aio import _protobuf as pb

from services.core.errors import BackendUnavailable, LeaseExpired, LingquError
from services.core.lifecycle import CHANNEL_OPTIONS

CALL_TIMEOUT_S = 3.0
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class CompactedError(Exception):
    """The revision asked for is gone from etcd's history: list again and watch from there."""


@dataclass(frozen=True, slots=True)
class Record:
    """A key with its value. `lease` is 0 for a key that stays."""

    key: str
    value: bytes
    mod_revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """`record` is None when the key was deleted."""

    key: str
    record: Record | None


@dataclass(frozen=True, slots=True)
class ChangeBatch:
    """All changes of one or more whole revisions, in order. No changes: only the revision moved on."""

    revision: int
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Unchanged:
    """A transaction's precondition: the key was last written at this revision; 0: it does not exist."""

    key: str
    mod_revision: int


class Etcd:
    """A client of one etcd. Every method raises BackendUnavailable while etcd cannot answer."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._kv: Any = pb.KVStub(self._channel)
        self._lease: Any = pb.LeaseStub(self._channel)
        self._watch: Any = pb.WatchStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def read(self, prefix: str) -> tuple[list[Record], int]:
        """All records under `prefix`, and the revision of that moment."""
        request = pb.RangeRequest(key=prefix.encode(), range_end=_after(prefix))
        answer = await self._call(self._kv.Range, request)
        return [_record(kv) for kv in answer.kvs], answer.header.revision

    async def commit(self, puts: list[Put], only_if: list[Unchanged] | None = None) -> int:
        """Write all or nothing; returns the revision, or 0 if a precondition did not hold.

        Raises LeaseExpired if a lease of `puts` is gone."""
        request = pb.TxnRequest(
            compare=[
                pb.Compare(
                    key=c.key.encode(),
                    target=pb.Compare.MOD,
                    result=pb.Compare.EQUAL,
                    mod_revision=c.mod_revision,
                )
                for c in only_if or ()
            ],
            success=[
                pb.RequestOp(request_put=pb.PutRequest(key=p.key.encode(), value=p.value, lease=p.lease))
                for p in puts
            ],
        )
        answer = await self._call(self._kv.Txn, request)
        return int(answer.header.revision) if answer.succeeded else 0

    async def delete(self, key: str) -> int:
        """Delete a key, which need not exist; returns the revision."""
        answer = await self._call(self._kv.DeleteRange, pb.DeleteRangeRequest(key=key.encode()))
        return int(answer.header.revision)

    async def grant(self, ttl_s: int) -> int:
        answer = await self._call(self._lease.LeaseGrant, pb.LeaseGrantRequest(TTL=ttl_s))
        return int(answer.ID)

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys. One that is gone already is no error."""
        try:
            await self._call(self._lease.LeaseRevoke, pb.LeaseRevokeRequest(ID=lease))
        except LeaseExpired:
            return

    async def renew(self, leases: AsyncIterator[int]) -> AsyncGenerator[tuple[int, int], None]:
        """Renew each lease of `leases`; yields (lease, seconds left), 0 for one that has expired."""

        async def requests() -> AsyncIterator[Any]:
            async for lease in leases:
                yield pb.LeaseKeepAliveRequest(ID=lease)

        call = self._lease.LeaseKeepAlive(requests())
        try:
            async for answer in call:
                yield int(answer.ID), max(0, int(answer.TTL))
        except grpc.aio.AioRpcError as err:
            raise _translated(err) from err
        finally:
            call.cancel()

    async def watch(self, prefix: str, start_revision: int) -> AsyncGenerator[ChangeBatch, None]:
        """Every change under `prefix` from `start_revision` on, each revision whole.

        Raises CompactedError if that revision is gone, BackendUnavailable when the connection is lost."""
        create = pb.WatchCreateRequest(
            key=prefix.encode(),
            range_end=_after(prefix),
            start_revision=start_revision,
            progress_notify=True,
            fragment=False,
        )

        async def requests() -> AsyncIterator[Any]:
            yield pb.WatchRequest(create_request=create)
            await asyncio.Event().wait()  # closing our side would end the watch

        call = self._watch.Watch(requests())
        try:
            async for answer in call:
                if answer.compact_revision:
                    raise CompactedError(f"revision {start_revision} was compacted")
                if answer.canceled:
                    raise BackendUnavailable(f"etcd ended the watch: {answer.cancel_reason}")
                if answer.created:
                    continue
                changes = tuple(
                    Change(e.kv.key.decode(), None if e.type == e.DELETE else _record(e.kv))
                    for e in answer.events
                )
                # The header has the store's revision, which events still on their way may not exceed.
                newest = answer.events[-1].kv.mod_revision if answer.events else answer.header.revision
                yield ChangeBatch(newest, changes)
            raise BackendUnavailable("etcd closed the watch")
        except grpc.aio.AioRpcError as err:
            raise _translated(err) from err
        finally:
            call.cancel()

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as err:
            raise _translated(err) from err


def _translated(err: grpc.aio.AioRpcError) -> Exception:
    if err.code() == grpc.StatusCode.NOT_FOUND and "lease" in (err.details() or ""):
        return LeaseExpired("the lease has expired; register again")
    if err.code() in _AWAY:
        return BackendUnavailable(f"etcd does not answer ({err.code().name}: {err.details()})")
    return LingquError(f"etcd refuses ({err.code().name}: {err.details()})")


def _record(kv: Any) -> Record:
    return Record(kv.key.decode(), kv.value, kv.mod_revision, kv.lease)


def _after(prefix: str) -> bytes:
    """The first key behind all keys with this prefix."""
    raw = prefix.encode()
    return raw[:-1] + bytes([raw[-1] + 1])
