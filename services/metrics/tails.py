"""What is published, for those who follow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import grpc

from services.core.errors import LingquError, QueueFull

MAX_TAILS = 32
MAX_WAITING = 10_000
STALL_S = 5.0

T = TypeVar("T")


class SlowTail(LingquError):
    """Took so little that what waited for it had to be bounded."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "SLOW_TAIL"
    retry_after_s = 0.1


class Tails(Generic[T]):
    """Everything that is published goes to all who follow; who falls behind is cut off. `what` it is, is said
    to them."""

    def __init__(self, what: str = "points") -> None:
        self._what = what
        self._tails: set[Tail[T]] = set()

    def __bool__(self) -> bool:
        return bool(self._tails)

    def publish(self, some: Sequence[T]) -> None:
        for tail in list(self._tails):
            tail.offer(some)

    @contextmanager
    def following(self, wanted: Callable[[T], bool]) -> Iterator[Tail[T]]:
        """From now on. Raises QueueFull if too many follow already."""
        if len(self._tails) >= MAX_TAILS:
            raise QueueFull(f"{MAX_TAILS} calls follow already", 5.0)
        tail = Tail(self._what, wanted)
        self._tails.add(tail)
        try:
            yield tail
        finally:
            self._tails.discard(tail)

    async def follow(self, wanted: Callable[[T], bool]) -> AsyncGenerator[T, None]:
        """One by one, from when the first is asked for. Raises QueueFull and SlowTail."""
        with self.following(wanted) as tail:
            while True:
                for one in await tail.take():
                    yield one


class Tail(Generic[T]):
    def __init__(self, what: str, wanted: Callable[[T], bool]) -> None:
        self._what, self._wanted = what, wanted
        self._waiting: list[T] = []
        self._some = asyncio.Event()
        self._lost = False

    def offer(self, some: Sequence[T]) -> None:
        found = [one for one in some if self._wanted(one)]
        if len(self._waiting) + len(found) > MAX_WAITING:
            self._waiting, self._lost = [], True
        elif not self._lost:
            self._waiting += found
        if found:
            self._some.set()

    async def take(self) -> list[T]:
        """What has come, at least one. Raises SlowTail."""
        await self._some.wait()
        if self._lost:
            raise SlowTail(
                f"more than {MAX_WAITING} {self._what} waited to be taken; follow again, with filters"
            )
        self._some.clear()
        taken, self._waiting = self._waiting, []
        return taken


async def send(context: Any, response: Any) -> None:
    """For a handler, in place of yielding: only a write of our own can be given up when nobody takes it.
    Raises SlowTail then."""
    try:
        async with asyncio.timeout(STALL_S):
            await context.write(response)
    except TimeoutError as err:
        raise SlowTail(f"took nothing for {STALL_S:.0f} s; follow again") from err
