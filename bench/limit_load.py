"""Load that is above its limits, at several gateways at once, and what of it came through: more than a
window may have, and less than it could have had."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from bench.fleet import Caller, Fleet

UNITS_S = {"requests_per_second": 1.0, "requests_per_minute": 60.0}


@dataclass(frozen=True, slots=True)
class Finding:
    """Of one limit of one client over the whole load. `most`: admitted requests that were surely decided
    within one window, since they were sent after its begin and had arrived before its end; `seen`: the most
    that arrived at the backend within one; `passed` of `possible` were let through."""

    client: str
    limit: int
    window_s: float
    most: int
    seen: int
    passed: int
    possible: float

    @property
    def underuse(self) -> float:
        return max(0.0, 1 - self.passed / self.possible)

    def __str__(self) -> str:
        return (
            f"{self.client}: {self.limit} in {self.window_s:g} s; "
            f"most {self.most} (at the backend {self.seen}); "
            f"{self.passed} of {self.possible:.0f} passed, under-use {self.underuse:.1%}"
        )


@dataclass
class Load:
    """Clients by name with their limits; each asks at every gateway, without a pause but for `pause_s`."""

    fleet: Fleet
    clients: Mapping[str, Mapping[str, int]]
    pause_s: float = 0.01
    codes: Counter[grpc.StatusCode] = field(default_factory=Counter)
    slowest_s: float = 0.0
    begun: float = 0.0
    ended: float = 0.0
    _callers: list[Caller] = field(default_factory=list)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """From the moment on at which all gateways know the limits."""
        for client, limits in self.clients.items():
            await self.fleet.limit(client, **limits)
        self._callers = [
            Caller(self.fleet, gateway, client) for gateway in self.fleet.gateways for client in self.clients
        ]
        for caller in self._callers:
            await self._until_known(caller)
        self.begun = time.monotonic()
        tasks = [asyncio.create_task(self._ask(caller)) for caller in self._callers]
        try:
            yield
        finally:
            self.ended = time.monotonic()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for caller in self._callers:
                await caller.close()

    def findings(self) -> list[Finding]:
        sent = {
            number: at for caller in self._callers for number, at in caller.sent.items() if at >= self.begun
        }
        arrived: dict[str, float] = {}
        for arrival in self.fleet.backend.arrivals:  # what Envoy repeats is one request
            arrived.setdefault(arrival.number, arrival.at)
        found, took_s = [], self.ended - self.begun
        for client, limits in self.clients.items():
            mine = sorted(
                (at, arrived[n]) for n, at in sent.items() if n in arrived and n.startswith(f"{client}-")
            )
            # A window that is not over yet can be used up all the same.
            possible = min(n * max(1.0, took_s / UNITS_S[name]) for name, n in limits.items())
            for name, limit in limits.items():
                window_s = UNITS_S[name]
                found.append(
                    Finding(
                        client,
                        limit,
                        window_s,
                        most_decided(mine, window_s),
                        most_seen([at for _, at in mine], window_s),
                        len(mine),
                        possible,
                    )
                )
        return found

    async def _until_known(self, caller: Caller) -> None:
        for _ in range(200):
            code = await caller.ask()
            if code == grpc.StatusCode.RESOURCE_EXHAUSTED or "x-ratelimit-limit" in caller.metadata:
                return
            await asyncio.sleep(0.1)
        raise TimeoutError(f"a gateway does not enforce the limits of {caller.client}")

    async def _ask(self, caller: Caller) -> None:
        while True:
            begun = time.monotonic()
            self.codes[await caller.ask(timeout_s=3)] += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - begun)
            await asyncio.sleep(self.pause_s)


def most_decided(requests: list[tuple[float, float]], window_s: float) -> int:
    """Of (sent, arrived), sorted: the most that lie within one window as a whole."""
    most = 0
    for index, (begin, _) in enumerate(requests):
        end = begin + window_s
        inside = requests[index : bisect_left(requests, (end, 0.0))]
        if len(inside) > most:
            most = max(most, sum(1 for _, at in inside if at < end))
    return most


def most_seen(times: list[float], window_s: float) -> int:
    times = sorted(times)
    return max((bisect_left(times, at + window_s) - index for index, at in enumerate(times)), default=0)
