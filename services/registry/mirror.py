"""A copy of etcd's records in memory, kept current by one watch, and the streams fed from it.

Reads never touch etcd. While etcd is away the copy stays as it was and says that it is stale. After a
compaction the copy is made anew and the difference is told to the subscribers, so that they see every
state change that still matters and none that did not happen. A store that was wiped or restored from a
backup is another store: its id differs, and subscribers have to start from a snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import uuid
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Hashable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from services.core.backoff import Backoff
from services.core.errors import (
    BackendUnavailable,
    LingquError,
    OutcomeUnknown,
    SlowWatcher,
    StoreFull,
    StoreReplaced,
)
from services.registry.etcd import (
    Change,
    ChangeBatch,
    CompactedError,
    Etcd,
    FutureRevisionError,
    Put,
    Record,
    Unchanged,
)
from services.registry.history import History, folded
from services.registry.keys import SortedKeys
from services.registry.keyspace import MARK, PREFIX, STORE

log = logging.getLogger(__name__)

# Updates a subscriber may lag behind before it is cut off.
SUBSCRIBER_BUFFER = 1024
# Looking for etcd again must not hang: no answer within this time is one, too.
PROBE_TIMEOUT_S = 1.0
CATCH_UP_S = 0.5


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a watcher left off: the last revision it was told and the store it was told about."""

    revision: int = 0
    store_id: str = ""


@dataclass(frozen=True, slots=True)
class Update:
    """A step of a subscriber from one consistent state to the next, the same object for all with its prefix.

    `changes` has each key once; in a `snapshot` it has all there is. `expected` ones are told to a watcher
    even if it finds nothing in them: the first one, and those that tell a change of `stale`. `encoded` keeps
    what was made of it, so that it is made once for all watchers."""

    revision: int
    changes: tuple[Change, ...]
    stale: bool
    store_id: str
    snapshot: bool = False
    expected: bool = False
    encoded: dict[Hashable, bytes] = field(default_factory=dict, compare=False)


class _Subscriber:
    """A queue for one reader. Not asyncio's: with a thousand watchers its bookkeeping is half the cost."""

    __slots__ = ("_arrived", "_loop", "_updates", "ended")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._updates: deque[Update | LingquError] = deque()
        self._arrived: asyncio.Future[None] | None = None
        self.ended = False

    async def next(self) -> Update | LingquError:
        while not self._updates:
            self._arrived = self._loop.create_future()
            await self._arrived
        return self._updates.popleft()

    def feed(self, update: Update) -> None:
        if self.ended:
            return
        if len(self._updates) >= SUBSCRIBER_BUFFER:
            self.end(SlowWatcher(f"more than {SUBSCRIBER_BUFFER} changes behind; watch again"))
        else:
            self._put(update)

    def end(self, error: LingquError) -> None:
        """Let it read what it has, then fail."""
        if not self.ended:
            self.ended = True
            self._put(error)

    def _put(self, item: Update | LingquError) -> None:
        self._updates.append(item)
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)


class Mirror:
    """Owns nothing but the copy: writing goes to etcd, and comes back through the watch."""

    def __init__(self, etcd: Etcd) -> None:
        self._etcd = etcd
        self._records: dict[str, Record] = {}
        self._keys = SortedKeys()
        self._revision = 0
        self._store_id = ""
        self._stale = True
        self._history = History()
        self._subscribers: defaultdict[str, set[_Subscriber]] = defaultdict(set)
        self._snapshots: dict[str, Update] = {}
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self._prepared: dict[str, Callable[[Update], object]] = {}

    @property
    def revision(self) -> int:
        return self._revision

    @property
    def stale(self) -> bool:
        return self._stale or self._etcd.members.away

    @property
    def store_id(self) -> str:
        return self._store_id

    def get(self, key: str) -> Record | None:
        return self._records.get(key)

    def under(self, prefix: str) -> list[Record]:
        """Records with that prefix, ordered by key."""
        return [self._records[key] for key in self._keys.under(prefix)]

    async def reached(self, revision: int, timeout_s: float = 3.0) -> None:
        """Wait until the copy has caught up with `revision`, so that a caller reads its own write.

        Raises OutcomeUnknown: the write is done, but nothing can be said about what came of it."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._arrival(revision)
        except TimeoutError as err:
            raise OutcomeUnknown(f"revision {revision} is written, but has not come back from etcd") from err

    async def moved_from(self, revision: int, timeout_s: float) -> None:
        """Wait until the copy is newer than `revision`, but no longer than `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._arrival(revision + 1)
        except TimeoutError:
            return

    async def synced(self) -> None:
        """Wait until etcd was read for the first time: before that nothing is known, not even nothing."""
        await self._arrival(1)

    def prepare(self, prefix: str, make: Callable[[Update], object]) -> None:
        """Have `make` called with each later update of `prefix` while the copy is exactly at its revision."""
        self._prepared[prefix] = make

    async def follow(self, prefix: str, resume: Resume | None = None) -> AsyncGenerator[Update, None]:
        """All records under `prefix` as a snapshot, then every later change as it happens.

        With `resume`, only what changed after its revision instead of the snapshot, as one update, if it
        speaks of this store and the history goes back that far. A revision that this registry has not seen
        yet is waited for; if etcd has never seen it, the store was restored from a backup, and the answer is
        a snapshot. A change of `stale` comes as an update without changes.

        Raises SlowWatcher when the consumer lags by more than SUBSCRIBER_BUFFER updates, StoreReplaced when
        etcd lost what it had, BackendUnavailable when `resume` is ahead of what can be known now."""
        await self.synced()
        if resume is not None and resume.store_id == self._store_id and resume.revision > self._revision:
            await self._overtake(resume.revision)
        # Nothing awaits between here and the registration: no change is lost, none comes twice.
        first = self._since(prefix, resume) if resume is not None else None
        subscriber = _Subscriber()
        self._subscribers[prefix].add(subscriber)
        try:
            yield first or self._snapshot(prefix)
            while True:
                update = await subscriber.next()
                if isinstance(update, LingquError):
                    raise update
                yield update
        finally:
            self._subscribers[prefix].discard(subscriber)

    async def run(self) -> None:
        """Keep the copy current, for ever."""
        backoff, at_once = Backoff(most_s=1.0), False
        while True:
            try:
                await self._check_store()
                async with aclosing(self._etcd.watch(PREFIX, self._revision + 1)) as batches:
                    async for batch in batches:
                        backoff.reset()
                        at_once = True
                        self._set_stale(False)
                        self._apply(batch)
            except CompactedError as err:
                log.warning("%s; listing again", err)
                await self._relist_quietly()
            except FutureRevisionError as err:
                log.warning("etcd member %s, we are at %d; looking again", err, self._revision)
                await asyncio.sleep(backoff.delay())
            except BackendUnavailable as err:
                log.info("watch of etcd lost: %s", err)
                if not at_once:
                    await asyncio.sleep(backoff.delay())
                at_once = False
            except Exception:  # a registry with the last known state is better than none
                log.exception("cannot follow etcd")
                self._set_stale(True)
                await asyncio.sleep(backoff.delay())

    async def _check_store(self) -> None:
        """Find etcd, and find out whether it still is the one we know. Reads it whole if not."""
        try:
            records, revision = await self._etcd.read(STORE, PROBE_TIMEOUT_S)
        except LingquError as err:
            if not self._stale:
                log.warning("serving the last known state: %s", err)
            self._set_stale(True)
            raise
        found = records[0].value.decode(errors="replace") if records else ""
        if self._revision and revision >= self._revision and found == self._store_id:
            return
        if self._revision:
            log.warning("etcd was at revision %d and is at %d: it is another store", self._revision, revision)
        if not found or (self._revision and found == self._store_id):
            await self._name_store(records[0].mod_revision if records else 0)
        await self._relist()

    async def _name_store(self, mod_revision: int) -> None:
        """Give the store a new id, unless another registry was faster."""
        name = Put(STORE, uuid.uuid4().hex.encode())
        try:
            await self._etcd.commit([name], only_if=[Unchanged(STORE, mod_revision)])
        except StoreFull as err:
            log.warning("the store stays without an id, watchers cannot resume: %s", err)

    async def _overtake(self, revision: int) -> None:
        """A watcher was told of a revision that is not here yet: wait for it, or find that it never was."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CATCH_UP_S):
                await self._arrival(revision)
                return
        records, newest = await self._etcd.read(STORE, PROBE_TIMEOUT_S)
        if newest >= revision:
            # It may be one of keys that are not ours, and not come; one of our own will.
            await self.reached(await self._etcd.commit([Put(MARK, b"")]))
            return
        log.warning("a watcher knows revision %d and etcd is at %d: it was restored", revision, newest)
        if records and records[0].value.decode(errors="replace") == self._store_id:
            await self._name_store(records[0].mod_revision)

    async def _relist_quietly(self) -> None:
        try:
            await self._relist()
        except Exception as err:
            self._set_stale(True)
            log.warning("cannot list etcd: %s", err, exc_info=not isinstance(err, LingquError))

    async def _relist(self) -> None:
        """Read etcd whole. The difference is told to subscribers, unless it is one between two stores."""
        records, revision = await self._etcd.read(PREFIX)
        now = {record.key: record for record in records}
        store_id = now[STORE].value.decode(errors="replace") if STORE in now else ""
        if self._revision and (store_id != self._store_id or revision < self._revision):
            error = StoreReplaced("etcd lost what it had; start from a snapshot")
            for subscriber in itertools.chain.from_iterable(self._subscribers.values()):
                subscriber.end(error)
        gone = [Change(key, None, revision) for key in self._records if key not in now]
        new = [Change(key, r, r.mod_revision) for key, r in now.items() if self._records.get(key) != r]
        self._revision = min(self._revision, revision)
        self._apply(ChangeBatch(revision, (*gone, *new)))
        self._history.restart(revision)
        self._set_stale(False)

    def _apply(self, batch: ChangeBatch) -> None:
        """Never awaits: nobody sees half a batch."""
        changes = []
        for change in batch.changes:
            key, before = change.key, self._records.get(change.key)
            changes.append(replace(change, before=before) if before is not None else change)
            if change.record is None:
                if before is not None:
                    del self._records[key]
                    self._keys.discard(key)
            else:
                self._records[key] = change.record
                if before is None:
                    self._keys.add(key)
                if key == STORE:
                    self._store_id = change.record.value.decode(errors="replace")
        self._revision = batch.revision
        if changes:
            self._snapshots.clear()
            self._history.add(changes)
            self._tell(changes)
            self._etcd.members.crowd = len(self._records)
        while self._waiting and self._waiting[0][0] <= self._revision:
            arrived = heapq.heappop(self._waiting)[2]
            if not arrived.done():
                arrived.set_result(None)

    def _tell(self, changes: list[Change]) -> None:
        for prefix, subscribers in self._subscribers.items():
            own = folded(c for c in changes if c.key.startswith(prefix)) if subscribers else ()
            if own:
                update = Update(self._revision, own, self._stale, self._store_id)
                try:
                    if prefix in self._prepared:
                        self._prepared[prefix](update)
                except Exception:  # one record that nobody can read must not end the copy for everybody
                    log.exception("revision %d of %s cannot be told", self._revision, prefix)
                    for subscriber in subscribers:
                        subscriber.end(LingquError(f"the registry cannot tell revision {self._revision}"))
                    continue
                for subscriber in subscribers:
                    subscriber.feed(update)

    def _set_stale(self, stale: bool) -> None:
        if stale == self._stale:
            return
        self._stale = stale
        self._snapshots.clear()
        for subscribers in self._subscribers.values():
            update = Update(self._revision, (), stale, self._store_id, expected=True)
            for subscriber in subscribers:
                subscriber.feed(update)

    def _since(self, prefix: str, resume: Resume) -> Update | None:
        if not resume.store_id or resume.store_id != self._store_id or resume.revision > self._revision:
            return None
        changes = self._history.since(resume.revision, prefix)
        if changes is None:
            return None
        return Update(self._revision, folded(changes), self._stale, self._store_id, expected=True)

    def _snapshot(self, prefix: str) -> Update:
        """All there is, made once for all who come before the next change."""
        update = self._snapshots.get(prefix)
        if update is None or update.revision != self._revision:
            all_ = tuple(Change(r.key, r, r.mod_revision) for r in self.under(prefix))
            update = Update(self._revision, all_, self._stale, self._store_id, snapshot=True, expected=True)
            self._snapshots[prefix] = update
        return update

    async def _arrival(self, revision: int) -> None:
        if self._revision < revision:
            arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiting = (revision, next(self._numbers), arrived)
            heapq.heappush(self._waiting, waiting)
            try:
                await arrived
            except asyncio.CancelledError:
                with contextlib.suppress(ValueError):  # it arrived in the same moment
                    self._waiting.remove(waiting)
                    heapq.heapify(self._waiting)
                raise
