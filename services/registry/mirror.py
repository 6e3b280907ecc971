"""A copy of etcd's records in memory, kept current by one watch, and the streams fed from it.

Reads never touch etcd. While etcd is away the copy stays as it was and says that it is stale. After a
compaction the copy is made anew and the difference is told to the subscribers, so that they see every
state change that still matters and none that did not happen.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from services.core.backoff import Backoff
from services.core.errors import BackendUnavailable, LingquError, SlowWatcher
from services.registry.etcd import Change, ChangeBatch, CompactedError, Etcd, FutureRevisionError, Record

log = logging.getLogger(__name__)

PREFIX = "/lingqu/"
# Batches a subscriber may lag behind before it is cut off.
SUBSCRIBER_BUFFER = 1024


@dataclass(eq=False)
class _Subscriber:
    prefix: str
    queue: asyncio.Queue[ChangeBatch] = field(default_factory=lambda: asyncio.Queue(SUBSCRIBER_BUFFER))
    lagging: bool = False


class Mirror:
    """Owns nothing but the copy: writing goes to etcd, and comes back through the watch."""

    def __init__(self, etcd: Etcd) -> None:
        self._etcd = etcd
        self._records: dict[str, Record] = {}
        self._revision = 0
        self._stale = True
        self._moved = asyncio.Condition()
        self._subscribers: set[_Subscriber] = set()

    @property
    def revision(self) -> int:
        return self._revision

    @property
    def store_id(self) -> str:
        return ""

    @property
    def stale(self) -> bool:
        return self._stale

    def get(self, key: str) -> Record | None:
        return self._records.get(key)

    def under(self, prefix: str) -> list[Record]:
        """Records with that prefix, ordered by key."""
        return [self._records[key] for key in sorted(k for k in self._records if k.startswith(prefix))]

    async def reached(self, revision: int, timeout_s: float = 3.0) -> None:
        """Wait until the copy has caught up with `revision`, so that a caller reads its own write."""
        try:
            async with asyncio.timeout(timeout_s), self._moved:
                await self._moved.wait_for(lambda: self._revision >= revision)
        except TimeoutError as err:
            raise BackendUnavailable(f"etcd's revision {revision} has not arrived yet") from err

    async def moved_from(self, revision: int, timeout_s: float) -> None:
        """Wait until the copy is newer than `revision`, but no longer than `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), self._moved:
                await self._moved.wait_for(lambda: self._revision > revision)
        except TimeoutError:
            return

    async def synced(self) -> None:
        """Wait until etcd was read for the first time: before that nothing is known, not even nothing."""
        async with self._moved:
            await self._moved.wait_for(lambda: self._revision > 0)

    async def follow(self, prefix: str) -> AsyncGenerator[ChangeBatch, None]:
        """First all records under `prefix` as one batch, then every later change; ends with SlowWatcher
        when the consumer lags by more than SUBSCRIBER_BUFFER batches."""
        subscriber = _Subscriber(prefix)
        async with self._moved:
            await self._moved.wait_for(lambda: self._revision > 0)
            self._subscribers.add(subscriber)
            first = tuple(Change(r.key, r, r.mod_revision) for r in self.under(prefix))
            snapshot = ChangeBatch(self._revision, first)
        try:
            yield snapshot
            while True:
                if subscriber.lagging and subscriber.queue.empty():
                    raise SlowWatcher(f"more than {SUBSCRIBER_BUFFER} changes behind; watch again")
                yield await subscriber.queue.get()
        finally:
            self._subscribers.discard(subscriber)

    async def run(self) -> None:
        """Keep the copy current, for ever."""
        backoff = Backoff()
        while True:
            try:
                if self._revision == 0:
                    await self._relist()
                self._stale = False
                async with aclosing(self._etcd.watch(PREFIX, self._revision + 1)) as batches:
                    async for batch in batches:
                        backoff.reset()
                        self._stale = False
                        await self._apply(batch)
            except (CompactedError, FutureRevisionError) as err:
                log.warning("%s; listing again", err)
                await self._relist_quietly()
            except LingquError as err:
                if not self._stale:
                    log.warning("serving the last known state: %s", err)
                self._stale = True
                await asyncio.sleep(backoff.delay())

    async def _relist_quietly(self) -> None:
        try:
            await self._relist()
        except LingquError as err:
            self._stale = True
            log.warning("cannot list etcd: %s", err)

    async def _relist(self) -> None:
        records, revision = await self._etcd.read(PREFIX)
        now = {record.key: record for record in records}
        gone = [Change(key, None, revision) for key in self._records if key not in now]
        new = [
            Change(key, record, record.mod_revision)
            for key, record in now.items()
            if self._records.get(key) != record
        ]
        await self._apply(ChangeBatch(revision, (*gone, *new)))

    async def _apply(self, batch: ChangeBatch) -> None:
        for change in batch.changes:
            if change.record is None:
                self._records.pop(change.key, None)
            else:
                self._records[change.key] = change.record
        self._revision = batch.revision  # up to here nothing awaits: no subscriber sees half a batch
        for subscriber in self._subscribers:
            self._feed(subscriber, batch)
        async with self._moved:
            self._moved.notify_all()

    @staticmethod
    def _feed(subscriber: _Subscriber, batch: ChangeBatch) -> None:
        own = tuple(c for c in batch.changes if c.key.startswith(subscriber.prefix))
        if not own or subscriber.lagging:
            return
        try:
            subscriber.queue.put_nowait(ChangeBatch(batch.revision, own))
        except asyncio.QueueFull:
            subscriber.lagging = True
