"""Who keeps global limits: control planes with a session in the registry, and which shards each of them
owns."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from lingqu.registry.v1 import ledger_pb2 as pb
from lingqu.registry.v1.ledger_pb2_grpc import LedgerServiceStub
from services.core.registry import Registry, Watched


@dataclass(frozen=True, slots=True)
class Session:
    """A control plane that can own shards; `address` is "host:port"."""

    id: int
    address: str


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a shard."""

    shard: int
    session: Session


@dataclass(frozen=True, slots=True)
class Leaving:
    """A session that is about to end: its control plane hands over what it owns."""

    session: int


Record: TypeAlias = Session | Owner | Leaving


def watched_owners(registry: Registry, changed: asyncio.Event) -> Watched[Record]:
    """Sessions as "session ID", those that leave as "leaving ID" too, and owners as "shard NUMBER", kept
    current."""

    async def watch(revision: int, store_id: str) -> Any:
        request = pb.WatchShardsRequest(resume_revision=revision, store_id=store_id)
        async for update in LedgerServiceStub(registry.channel).WatchShards(request):
            yield _Update(update)

    return Watched(registry, watch, lambda record: record, changed)


def staying(records: Iterable[Record]) -> list[Session]:
    """The sessions that do not leave."""
    found = list(records)
    gone = {record.session for record in found if isinstance(record, Leaving)}
    return [record for record in found if isinstance(record, Session) and record.id not in gone]


def addresses(records: Iterable[Record]) -> tuple[str, ...]:
    """Of all control planes that can be asked, in order."""
    return tuple(sorted({session.address for session in staying(records)}))


class _Update:
    """One answer of WatchShards, with sessions and owners under names of their own."""

    def __init__(self, update: pb.WatchShardsResponse) -> None:
        self.revision = update.revision
        self.store_id = update.store_id
        self.snapshot = update.snapshot
        self.stale = update.stale
        self.removed = [f"session {session_id}" for session_id in update.ended_sessions]
        self.removed += [f"leaving {session_id}" for session_id in update.ended_sessions]
        self.removed += [f"shard {shard}" for shard in update.freed_shards]
        self._update = update

    @property
    def upserted(self) -> Iterator[tuple[str, Record]]:
        for session in self._update.sessions:
            yield f"session {session.session_id}", Session(session.session_id, session.address)
        for session_id in self._update.leaving_sessions:
            yield f"leaving {session_id}", Leaving(session_id)
        for owner in self._update.owners:
            holder = Session(owner.session_id, owner.address)
            yield f"shard {owner.shard}", Owner(owner.shard, holder)
