"""Admission: how many requests of a version run at once, who waits, who is refused and when waiting ends.

The rule is fairqueue.py's; this module gives it tasks, clocks and errors.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from services.core.discovery import VersionKey
from services.core.errors import DeadlinePassed, QueueFull
from services.inference.callers import Caller, Priority
from services.inference.fairqueue import FairQueue, Ticket
from services.inference.figures import (
    QUEUE_LENGTH,
    RUNNING,
    WORK_SQUARED,
    Figures,
    Request,
    gauge_labels,
)
from services.inference.occupancy import Occupancy

LEAST_RETRY_S = 0.1
MOST_RETRY_S = 30.0
UNMEASURED_S = 1.0
RECENT = 0.1  # the weight of one more measured time in the mean of recent ones


@dataclass(slots=True)
class _Lane:
    """One version. `service_s` is how long slots were held lately, 0 before anything was measured."""

    line: FairQueue
    occupancy: Occupancy
    turns: dict[Ticket, asyncio.Future[None]] = field(default_factory=dict)
    service_s: float = 0.0

    def start(self) -> None:
        for ticket in self.line.start():
            turn = self.turns[ticket]
            if not turn.done():  # or its task was cancelled just now, and will leave
                turn.set_result(None)
        self.occupancy.hold(self.line.taken)

    def measured(self, held_s: float) -> None:
        self.service_s += (held_s - self.service_s) * (RECENT if self.service_s else 1.0)


@dataclass(slots=True)
class Hold:
    """Slots that somebody holds, and what was done with them so far, in tokens."""

    occupancy: Occupancy
    tokens: int = 0

    def work(self, tokens: int) -> None:
        """So many more."""
        self.tokens += tokens
        self.occupancy.work(tokens)


class Admission:
    """Each version has `slots` of its own and a queue of `queue` requests."""

    def __init__(self, slots: int, queue: int, figures: Figures) -> None:
        self._slots = slots
        self._queue = queue
        self._figures = figures
        self._lanes: dict[VersionKey, _Lane] = {}
        figures.gauge(QUEUE_LENGTH, self._lengths)
        figures.gauge(RUNNING, self._taken)

    @asynccontextmanager
    async def request(self, key: VersionKey, caller: Caller) -> AsyncIterator[Request]:
        """A request that takes one slot, counted by how it ends. The caller's deadline bounds the block, too.
        Raises QueueFull or DeadlinePassed."""
        with self._figures.request(key, caller) as request:
            async with self.slot(key, caller) as hold:
                try:
                    async with asyncio.timeout(caller.remaining) as limit:
                        yield request
                        hold.work(request.prompt_tokens)
                except TimeoutError as err:
                    if not limit.expired():
                        raise
                    raise DeadlinePassed(f"the deadline passed before {key} had answered") from err

    @asynccontextmanager
    async def slot(self, key: VersionKey, caller: Caller, n: int = 1) -> AsyncIterator[Hold]:
        """`n` slots of a version for the block, or all it has if `n` is more; the caller's deadline bounds
        the waiting. Raises QueueFull, with when to try again, or DeadlinePassed."""
        if caller.remaining == 0:
            raise DeadlinePassed(f"the deadline had passed before {key} was asked")
        async with self.held(key, Ticket(caller.client, caller.priority, n), caller.remaining) as hold:
            yield hold

    @asynccontextmanager
    async def held(
        self, key: VersionKey, ticket: Ticket, timeout: float | None = None
    ) -> AsyncIterator[Hold]:
        """The slots of a new ticket for the block. Raises QueueFull or DeadlinePassed."""
        lane = self._lanes.get(key)
        if lane is None:
            occupancy = Occupancy(self._figures, key)
            lane = self._lanes[key] = _Lane(FairQueue(self._slots, self._queue), occupancy)
        arrived = time.monotonic()
        turn = lane.turns[ticket] = asyncio.get_running_loop().create_future()
        try:
            await self._turn(key, lane, ticket, timeout)
            began = time.monotonic()
            self._figures.admitted(key, ticket.priority, began - arrived)
            hold = Hold(lane.occupancy)
            try:
                yield hold
            finally:
                lane.measured(time.monotonic() - began)
                self._figures.add(WORK_SQUARED, key, hold.tokens**2)
        finally:
            if turn.done() and not turn.cancelled():
                turn.exception()  # it may have been refused and cancelled at once
            del lane.turns[ticket]
            lane.line.leave(ticket)
            lane.start()

    def hasten(self, key: VersionKey, ticket: Ticket, priority: Priority) -> None:
        """Let a ticket go on in a class that is better than its own."""
        lane = self._lanes.get(key)
        if lane is None:  # it has not come yet
            ticket.priority = min(ticket.priority, priority)
        else:
            lane.line.hasten(ticket, priority)

    def busy(self, key: VersionKey) -> bool:
        """Whether anything of a version runs or waits."""
        lane = self._lanes.get(key)
        return lane is not None and not lane.line.idle

    @property
    def versions(self) -> list[VersionKey]:
        """Those that were asked for."""
        return list(self._lanes)

    def keep_only(self, versions: Collection[VersionKey]) -> None:
        """Forget all others that are idle."""
        for key in [k for k, lane in self._lanes.items() if k not in versions and lane.line.idle]:
            del self._lanes[key]

    async def _turn(self, key: VersionKey, lane: _Lane, ticket: Ticket, timeout: float | None) -> None:
        turn = lane.turns[ticket]
        out = lane.line.arrive(ticket)
        if out is not None and not lane.turns[out].done():
            lane.turns[out].set_exception(self._full(key, lane))
        lane.start()
        if turn.done():
            return turn.result()
        try:
            async with asyncio.timeout(timeout):
                return await turn
        except TimeoutError as err:
            raise DeadlinePassed(f"the deadline passed while the request waited for {key}") from err

    def _full(self, key: VersionKey, lane: _Lane) -> QueueFull:
        wait = (lane.service_s or UNMEASURED_S) * lane.line.waiting / self._slots
        return QueueFull(
            f"{lane.line.waiting} requests wait for {key} already; try again later",
            min(max(wait, LEAST_RETRY_S), MOST_RETRY_S),
        )

    def _lengths(self) -> Iterator[tuple[Mapping[str, str], float]]:
        for key, lane in list(self._lanes.items()):
            for priority in Priority:
                yield gauge_labels(key, priority), lane.line.length(priority)

    def _taken(self) -> Iterator[tuple[Mapping[str, str], float]]:
        for key, lane in list(self._lanes.items()):
            yield gauge_labels(key), lane.line.taken
