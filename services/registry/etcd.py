"""The few etcd v3 calls the registry needs, over `grpc.aio`, with errors in the suite's words.

Uses etcd3aio's generated stubs only: its watch would wait for ever after a compaction.
Protocol: https://etcd.io/docs/v3.5/learning/api/
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from etcd3aio import _protobuf as pb

from services.core.backoff import Backoff
from services.core.errors import BackendUnavailable, LeaseExpired, LingquError, OutcomeUnknown
from services.core.tls import Identity
from services.registry.members import CALL_TIMEOUT_S, METADATA, Members

# A commit whose answer was lost is looked into for this long: an election takes one to two seconds.
RESOLVE_S = 4.0
# A watch asks for a sign of life this often, and is given up when none came for that long.
PROGRESS_S = 1.0
SILENCE_S = 4.0


class CompactedError(Exception):
    """The revision asked for is gone from etcd's history: list again and watch from there."""


class FutureRevisionError(Exception):
    """The member has not seen the revision asked for: it lags, or the store was replaced by an older one."""


@dataclass(frozen=True, slots=True)
class Record:
    """A key with its value. `lease` is 0 for a key that stays."""

    key: str
    value: bytes
    mod_revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """`record` is None when the key was deleted, at `revision`. `before` is what the mirror had there."""

    key: str
    record: Record | None
    revision: int
    before: Record | None = None


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
    """A client of one etcd with one or several members ("host:port,host:port").

    Every method raises BackendUnavailable (nothing was changed) while etcd cannot answer. Once no member
    answers, writes fail at once until a `read` or a `watch` has found etcd again."""

    def __init__(self, endpoints: str, identity: Identity | None = None) -> None:
        self.members = Members(endpoints, identity)

    async def close(self) -> None:
        await self.members.close()

    async def read(self, prefix: str, timeout_s: float = CALL_TIMEOUT_S) -> tuple[list[Record], int]:
        """All records under `prefix`, and the revision of that moment; never older than the last commit."""
        request = pb.RangeRequest(key=prefix.encode(), range_end=_after(prefix))
        answer = await self.members.call(
            lambda member, timeout: member.kv.Range(request, timeout=timeout, metadata=METADATA),
            repeatable=True,
            probes=True,
            timeout_s=timeout_s,
        )
        return [_record(kv) for kv in answer.kvs], answer.header.revision

    async def get(self, key: str) -> Record | None:
        """One record; never older than the last commit."""
        request = pb.RangeRequest(key=key.encode())
        answer = await self.members.call(
            lambda member, timeout: member.kv.Range(request, timeout=timeout, metadata=METADATA),
            repeatable=True,
        )
        return _record(answer.kvs[0]) if answer.kvs else None

    async def commit(
        self, puts: Sequence[Put], only_if: Sequence[Unchanged] = (), deletes: Sequence[str] = ()
    ) -> int:
        """Write all or nothing; returns the revision, or 0 if a precondition did not hold.

        When the answer is lost, the transaction is sent again and its keys are read: a write of ours that
        did go through is a success. Raises OutcomeUnknown where that cannot be told, LeaseExpired if a lease
        of `puts` is gone, StoreFull."""
        request = _transaction(puts, only_if, deletes)
        deadline = time.monotonic() + CALL_TIMEOUT_S + RESOLVE_S
        backoff = Backoff(0.05, 0.5)
        lost: OutcomeUnknown | None = None
        while True:
            timeout_s = min(CALL_TIMEOUT_S, max(0.1, deadline - time.monotonic()))
            try:
                answer = await self.members.call(
                    lambda member, timeout: member.kv.Txn(request, timeout=timeout, metadata=METADATA),
                    repeatable=False,
                    probes=lost is not None,
                    timeout_s=timeout_s,
                )
            except (OutcomeUnknown, BackendUnavailable) as err:
                if isinstance(err, OutcomeUnknown):
                    lost = lost or err
                if lost is None:
                    raise
                pause = backoff.delay()
                if time.monotonic() + pause > deadline:
                    self.members.away = True
                    raise lost from err
                await asyncio.sleep(pause)
                continue
            if answer.succeeded:
                return int(answer.header.revision)
            if lost is None:
                return 0
            if revision := _applied(answer, puts):
                return revision
            raise lost

    async def delete(self, key: str) -> int:
        """Delete a key, which need not exist; returns the revision."""
        return await self.commit([], deletes=[key])

    async def grant(self, ttl_s: int, lease: int = 0) -> int:
        """A new lease; with the id `lease` if one is given, and then that one if it lives already."""
        request = pb.LeaseGrantRequest(TTL=ttl_s, ID=lease)
        try:
            answer = await self.members.call(
                lambda member, timeout: member.lease.LeaseGrant(request, timeout=timeout, metadata=METADATA),
                repeatable=True,  # one that is granted twice ends by itself
            )
        except LingquError as err:
            if lease and "already exists" in str(err):
                return lease
            raise
        return int(answer.ID)

    async def remaining(self, lease: int) -> int:
        """Whole seconds until the lease ends, rounded down; negative if it is gone."""
        request = pb.LeaseTimeToLiveRequest(ID=lease)
        try:
            answer = await self.members.call(
                lambda member, timeout: member.lease.LeaseTimeToLive(
                    request, timeout=timeout, metadata=METADATA
                ),
                repeatable=True,
            )
        except LeaseExpired:
            return -1
        return int(answer.TTL)

    async def revoke(self, lease: int) -> int:
        """End a lease and delete its keys; returns the revision, 0 if it was gone already."""
        request = pb.LeaseRevokeRequest(ID=lease)
        try:
            answer = await self.members.call(
                lambda member, timeout: member.lease.LeaseRevoke(request, timeout=timeout, metadata=METADATA),
                repeatable=True,
            )
        except LeaseExpired:
            return 0
        return int(answer.header.revision)

    async def renew(self, leases: AsyncIterator[int]) -> AsyncGenerator[tuple[int, int], None]:
        """Renew each lease of `leases`; yields (lease, seconds left), 0 for one that has expired."""

        async def requests() -> AsyncIterator[Any]:
            async for lease in leases:
                yield pb.LeaseKeepAliveRequest(ID=lease)

        member = self.members.current
        call = member.lease.LeaseKeepAlive(requests(), metadata=METADATA)
        try:
            async for answer in call:
                yield int(answer.ID), max(0, int(answer.TTL))
            raise self.members.unavailable("etcd ended the renewal of leases")
        except grpc.aio.AioRpcError as err:
            self.members.leave(member)
            raise self.members.translated(err) from err
        finally:
            call.cancel()

    async def watch(self, prefix: str, start_revision: int) -> AsyncGenerator[ChangeBatch, None]:
        """Every change under `prefix` from `start_revision` on, each revision whole; at first an empty batch,
        as soon as etcd has begun to watch.

        Raises CompactedError if that revision is gone, FutureRevisionError if the member has not come as far
        as the one before it, BackendUnavailable when the connection is lost or silent for SILENCE_S."""
        create = pb.WatchCreateRequest(
            key=prefix.encode(),
            range_end=_after(prefix),
            start_revision=start_revision,
            progress_notify=True,
            fragment=False,
        )

        async def requests() -> AsyncIterator[Any]:
            yield pb.WatchRequest(create_request=create)
            while True:  # closing our side would end the watch
                await asyncio.sleep(PROGRESS_S)
                yield pb.WatchRequest(progress_request={})

        member = self.members.current
        call = member.watch.Watch(requests(), metadata=METADATA)
        try:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    answer = await call.read()
                if answer is grpc.aio.EOF:
                    raise self.members.unavailable("etcd closed the watch")
                if answer.compact_revision:
                    raise CompactedError(f"revision {start_revision} was compacted")
                if answer.canceled:
                    raise self.members.unavailable(f"etcd ended the watch: {answer.cancel_reason}")
                self.members.away = False
                if answer.created:
                    if answer.header.revision < start_revision - 1:
                        raise FutureRevisionError(f"{member.address} is at {answer.header.revision}")
                    yield ChangeBatch(start_revision - 1, ())
                elif batch := _batch(answer):
                    yield batch
        except TimeoutError as err:
            self.members.leave(member)
            raise self.members.unavailable(f"etcd was silent for {SILENCE_S:.0f} s") from err
        except grpc.aio.AioRpcError as err:
            self.members.leave(member)
            raise self.members.translated(err) from err
        finally:
            call.cancel()


def _batch(answer: Any) -> ChangeBatch | None:
    """None for an answer to a progress request: etcd before 3.4.25 and 3.5.8 may send it ahead of events
    that belong to its revision, so it says only that etcd lives."""
    if answer.events:
        changes = tuple(
            Change(e.kv.key.decode(), None if e.type == e.DELETE else _record(e.kv), e.kv.mod_revision)
            for e in answer.events
        )
        # The header has the store's revision, which events still on their way may not exceed.
        return ChangeBatch(changes[-1].revision, changes)
    return None if answer.watch_id < 0 else ChangeBatch(answer.header.revision, ())


def _transaction(puts: Sequence[Put], only_if: Sequence[Unchanged], deletes: Sequence[str]) -> Any:
    """If a precondition fails, the answer has what the keys hold instead: first those of `puts`."""
    return pb.TxnRequest(
        compare=[
            pb.Compare(
                key=c.key.encode(),
                target=pb.Compare.MOD,
                result=pb.Compare.EQUAL,
                mod_revision=c.mod_revision,
            )
            for c in only_if
        ],
        success=[
            *(
                pb.RequestOp(request_put=pb.PutRequest(key=p.key.encode(), value=p.value, lease=p.lease))
                for p in puts
            ),
            *(pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key.encode())) for key in deletes),
        ],
        failure=[
            pb.RequestOp(request_range=pb.RangeRequest(key=key.encode()))
            for key in (*(p.key for p in puts), *deletes)
        ],
    )


def _applied(answer: Any, puts: Sequence[Put]) -> int:
    """The revision at which a refused transaction had been executed before, as its keys show; 0 if not."""
    found = [op.response_range.kvs for op in answer.responses]
    for put, kvs in zip(puts, found[: len(puts)], strict=True):
        if not kvs or kvs[0].value != put.value or kvs[0].lease != put.lease:
            return 0
    if any(kvs for kvs in found[len(puts) :]):
        return 0
    return int(found[0][0].mod_revision) if puts else int(answer.header.revision)


def _record(kv: Any) -> Record:
    return Record(kv.key.decode(), kv.value, kv.mod_revision, kv.lease)


def _after(prefix: str) -> bytes:
    """The first key behind all keys with this prefix."""
    raw = prefix.encode()
    return raw[:-1] + bytes([raw[-1] + 1])
