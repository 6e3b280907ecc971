"""Which shards this control plane owns: it takes those that are its part, gives back those that are not any
more, and writes down what they need.

A session is an etcd lease. We decide only while we are sure, by our own clock and counted from before the
last renewal was asked for, that it lives; a successor can take a shard only once it is gone. MARGIN_S covers
clocks that run at different speed, and answers that are on their way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from typing import Protocol

from services.core.errors import Conflict, LeaseExpired, LingquError
from services.core.limiters import Owner, Record, Session, staying
from services.gateway.limits.cells import HANDOVER, Writes
from services.gateway.limits.clock import Clock, Moment
from services.gateway.limits.rules import SHARDS
from services.gateway.limits.shard import Shard

log = logging.getLogger(__name__)

MARGIN_S = 0.5
RENEW_S = 0.5
# The longest that what is not urgent waits to be written, and that a change of owners goes unseen.
TURN_S = 0.25
# Between two tries to write when nobody could be reached.
PAUSE_S = 0.1
# Shards that are given back at once: the others are decided here meanwhile.
GIVEN_AT_ONCE = 4
# At a stop: how long others may take to take over, and how long those that have not heard of it may still ask
# here. Envoys are told in a tenth of that.
LEAVE_S, LINGER_S = 2.0, 0.5
# A turn is full with so much, and whatever the last shard adds: etcd takes 128 operations and 1.5 MB at once.
MOST_AT_ONCE = 60
MOST_BYTES = 500_000


class Ledger(Protocol):
    async def open(self, address: str, ttl_s: int) -> int: ...
    async def renew(self, session: int) -> None: ...
    async def leave(self, session: int) -> None: ...
    async def close(self, session: int) -> None: ...
    async def take(self, session: int, address: str, shard: int) -> tuple[int, Mapping[str, bytes]]: ...
    async def write(self, writes: Mapping[int, tuple[int, Writes]]) -> int: ...
    async def release(self, shard: int, fence: int, writes: Writes) -> None: ...


class Shards:
    """`known` gives all sessions and owners, `changed` is set when they have changed."""

    def __init__(
        self,
        ledger: Ledger,
        address: str,
        known: Callable[[], Iterable[Record]],
        changed: asyncio.Event,
        clock: Clock,
        ttl_s: int,
    ) -> None:
        self._ledger = ledger
        self._address = address
        self._known = known
        self._changed = changed
        self._clock = clock
        self._ttl_s = ttl_s
        self._session = 0
        self._sure_until = 0
        self._held: dict[int, Shard] = {}
        self._fences: dict[int, int] = {}  # absent: to be taken again before anything is written
        self._owners: dict[int, Session] = {}
        self._released: set[int] = set()  # and the record says so not yet
        self._leaving = False
        self._giving = 0
        self._needed = asyncio.Event()
        self._turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def held(self, number: int, now: Moment) -> Shard | None:
        """The shard, if it is surely ours."""
        return self._held.get(number) if self.sure(now) else None

    def sure(self, now: Moment) -> bool:
        """Whether our session surely lives: otherwise what we know of others is old, too."""
        return now.steady < self._sure_until

    def owner(self, number: int) -> str:
        """Where the owner answers; empty if nobody else is known to be."""
        session = self._owners.get(number)
        return session.address if session is not None and session.id != self._session else ""

    async def turn(self) -> None:
        """Wait until something was written, or owners have changed."""
        self._needed.set()
        await asyncio.shield(self._turn)

    async def run(self) -> None:
        """For ever. At the end all shards are handed over, and for LINGER_S it is known who has them now."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep_session())
                group.create_task(self._keep_part())
                group.create_task(self._write())
        finally:
            await asyncio.shield(self._hand_over())

    async def leave(self) -> None:
        """Hand over shard by shard to those that stay, and decide the rest meanwhile; `run` has to run still.
        Returns when none is left, or nobody is there to take them."""
        others = any(session.id != self._session for session in staying(self._known()))
        if not self._session or not others:
            return
        try:
            await self._ledger.leave(self._session)
        except LingquError as err:
            log.warning("the limits are handed over all at once: %s", err)
            return
        self._leaving = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                while self._held or self._giving:
                    await asyncio.shield(self._turn)

    async def _keep_session(self) -> None:
        while True:
            before = self._clock()
            try:
                if not self._session:
                    self._session = await self._ledger.open(self._address, self._ttl_s)
                    self._changed.set()
                else:
                    await self._ledger.renew(self._session)
                self._sure_until = before.steady + int((self._ttl_s - MARGIN_S) * 1000)
            except LeaseExpired:
                log.warning("the session of the limiter has ended: its limits are others' now")
                self._session = self._sure_until = 0
                self._held.clear()
                self._fences.clear()
                continue
            except LingquError as err:
                if self._clock().steady >= self._sure_until:
                    log.warning("this control plane cannot decide limits: %s", err)
            await asyncio.sleep(RENEW_S)

    async def _keep_part(self) -> None:
        """Take and give back, whenever sessions or owners change."""
        while True:
            sessions = await self._look()
            if not self._leaving and not any(s.id == self._session for s in sessions):
                continue
            part = {n for n in range(SHARDS) if sessions and _wanted(n, sessions).id == self._session}
            free = [n for n in part if n not in self._held and n not in self._owners]
            # Ours by the record and not by memory: an answer was lost.
            free += [n for n in self._recorded() if n not in self._held and n not in self._released]
            given = [n for n in self._held if n not in part]
            if len(given) > GIVEN_AT_ONCE:
                self._changed.set()
                given = given[:GIVEN_AT_ONCE]
            await asyncio.gather(*(self._take(n) for n in free), *(self._give(n) for n in given))
            if free or given:
                self._tell()

    async def _look(self) -> list[Session]:
        """The sessions, when something has changed, or after TURN_S."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TURN_S):
                await self._changed.wait()
        self._changed.clear()
        records = list(self._known())
        self._owners = {r.shard: r.session for r in records if isinstance(r, Owner)}
        self._released.intersection_update(self._recorded())
        self._tell()
        return staying(records)

    def _recorded(self) -> list[int]:
        """What is ours by the record."""
        return [number for number, session in self._owners.items() if session.id == self._session]

    async def _take(self, number: int) -> None:
        session = self._session
        try:
            fence, entries = await self._ledger.take(session, self._address, number)
            # Not before it is forgotten what the last owner left: our own successor must not believe it.
            if HANDOVER in entries:
                fence = await self._ledger.write({number: (fence, Writes(forget=[HANDOVER]))})
        except LingquError as err:
            log.info("shard %d is not ours: %s", number, err)
            return
        if session == self._session:
            self._held[number] = Shard(uuid.uuid4().hex[:8], entries, self._clock())
            self._fences[number] = fence

    async def _give(self, number: int) -> None:
        """Give back a shard with all that is known of it. If that is not answered, it is taken again."""
        shard, fence = self._held.pop(number), self._fences.pop(number, 0)
        if fence:
            self._giving += 1
            try:
                await self._ledger.release(number, fence, shard.farewell(self._clock()))
                self._released.add(number)
            except LingquError as err:
                log.warning("shard %d could not be handed over: %s", number, err)
            finally:
                self._giving -= 1

    async def _write(self) -> None:
        """One write at a time for all shards: what is asked for meanwhile goes with the next."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TURN_S):
                    await self._needed.wait()
            self._needed.clear()
            now = self._clock()
            due: dict[int, tuple[int, Writes]] = {}
            count = size = 0
            unsure = [number for number in self._held if number not in self._fences]
            if not all(await asyncio.gather(*map(self._refence, unsure))):
                await asyncio.sleep(PAUSE_S)
            for number, fence in list(self._fences.items()):
                shard = self._held[number]
                shard.sweep(now)
                if count >= MOST_AT_ONCE or size >= MOST_BYTES:
                    self._needed.set()  # the next turn begins with another one
                    break
                if writes := shard.due(now):
                    due[number] = fence, writes
                    count += len(writes) + 1
                    size += writes.size
            if due:
                await self._write_all(due)
            self._tell()

    async def _write_all(self, due: Mapping[int, tuple[int, Writes]]) -> None:
        shards = {number: self._held[number] for number in due}
        try:
            fence = await self._ledger.write(due)
        except LingquError as err:
            log.warning("the ledger was not written: %s", err)
            for number in due:
                self._fences.pop(number, None)
            return
        now = self._clock()
        for number, (_, writes) in due.items():
            if self._held.get(number) is shards[number]:
                self._fences.pop(number, None)
                self._fences[number] = fence  # at the end: the others first
                shards[number].written(writes, now)

    async def _refence(self, number: int) -> bool:
        """After a write of which we do not know what became: it must not come later than the next. False:
        this is not known yet."""
        try:
            fence, _ = await self._ledger.take(self._session, self._address, number)
        except Conflict:
            self._held.pop(number, None)
        except LingquError:
            return False
        else:
            if number in self._held:
                self._fences[number] = fence
        return True

    def _tell(self) -> None:
        turn, self._turn = self._turn, asyncio.get_running_loop().create_future()
        turn.set_result(None)

    async def _hand_over(self) -> None:
        await asyncio.gather(*(self._give(number) for number in list(self._held)))
        # From here on we own nothing: to be sure means to pass on what is asked, not to decide.
        end = self._clock().steady + int(LINGER_S * 1000)
        self._sure_until = max(self._sure_until, end)
        if self._session:
            with contextlib.suppress(LingquError):
                await self._ledger.close(self._session)
        others = any(session.id != self._session for session in staying(self._known()))
        while others and self._clock().steady < end:
            await self._look()
        self._session = self._sure_until = 0


def _wanted(shard: int, sessions: list[Session]) -> Session:
    """Whose part a shard is, by rendezvous hashing: few change hands when a control plane comes or goes."""

    def score(session: Session) -> bytes:
        return blake2b(f"{session.id} {shard}".encode(), digest_size=8).digest()

    return max(sessions, key=score)
