"""Points as they come in, for those who follow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

import grpc

from services.core.errors import LingquError, QueueFull
from services.metrics.points import Point

MAX_TAILS = 32
MAX_WAITING = 10_000
STALL_S = 5.0


class SlowTail(LingquError):
    """Took so little that what waited for it had to be bounded."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "SLOW_TAIL"
    retry_after_s = 0.1


class Tails:
    """Everything that is published goes to all who follow; who falls behind is cut off."""

    def __init__(self) -> None:
        self._tails: set[_Tail] = set()

    def __bool__(self) -> bool:
        return bool(self._tails)

    def publish(self, points: Sequence[Point]) -> None:
        for tail in list(self._tails):
            tail.offer(points)

    async def follow(self, wanted: Callable[[Point], bool]) -> AsyncGenerator[Point, None]:
        """Raises QueueFull if too many follow already, and SlowTail."""
        if len(self._tails) >= MAX_TAILS:
            raise QueueFull(f"{MAX_TAILS} calls follow already", 5.0)
        tail = _Tail(wanted)
        self._tails.add(tail)
        try:
            while True:
                for point in await tail.take():
                    yield point
        finally:
            self._tails.discard(tail)


class _Tail:
    def __init__(self, wanted: Callable[[Point], bool]) -> None:
        self._wanted = wanted
        self._waiting: list[Point] = []
        self._some = asyncio.Event()
        self._lost = False

    def offer(self, points: Sequence[Point]) -> None:
        found = [point for point in points if self._wanted(point)]
        if len(self._waiting) + len(found) > MAX_WAITING:
            self._waiting, self._lost = [], True
        elif not self._lost:
            self._waiting += found
        if found:
            self._some.set()

    async def take(self) -> list[Point]:
        await self._some.wait()
        if self._lost:
            raise SlowTail(f"more than {MAX_WAITING} points waited to be taken; follow again, with filters")
        self._some.clear()
        taken, self._waiting = self._waiting, []
        return taken
