"""Load that is above its limits, at several gateways at once, and what of it came through: more than a
window may have, and less than it could have had."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from bench.fleet import Arrival, Caller, Fleet

UNITS_S = {"requests_per_second": 1.0, "requests_per_minute": 60.0}


@dataclass(frozen=True, slots=True)
class Finding:
    """Of one limit of one client over the whole load: the `most` that were admitted within one window, by the
    owners' clock, which is one clock on this machine; the most that arrived at the backend within one,
    `seen`, which differs by how long they travel; and how many `passed`, where a limiter that knows
    everything at once would have let `possible` pass."""

    client: str
    limit: int
    window_s: float
    most: int
    seen: int
    passed: int
    possible: int

    @property
    def underuse(self) -> float:
        return max(0.0, 1 - self.passed / max(1, self.possible))

    def __str__(self) -> str:
        return (
            f"{self.client}: {self.limit} in {self.window_s:g} s; "
            f"most {self.most} (arrived {self.seen}); "
            f"{self.passed} of {self.possible} passed, under-use {self.underuse:.1%}"
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
        first: dict[str, Arrival] = {}
        for arrival in self.fleet.backend.arrivals:  # what Envoy repeats is one request
            if arrival.admitted and arrival.at >= self.begun:
                first.setdefault(arrival.number, arrival)
        found = []
        for client, limits in self.clients.items():
            mine = [arrival for arrival in first.values() if arrival.client == client]
            asked = [at for c in self._callers if c.client == client for at in c.sent.values()]
            possible = ideal([at for at in asked if at >= self.begun], limits)
            for name, limit in limits.items():
                window_s = UNITS_S[name]
                most = most_within([arrival.admitted for arrival in mine], window_s)
                seen = most_within([arrival.at for arrival in mine], window_s)
                found.append(Finding(client, limit, window_s, most, seen, len(mine), possible))
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


def most_within(times: list[float], window_s: float) -> int:
    """The most in any half-open window of that length."""
    times = sorted(times)
    return max((bisect_left(times, at + window_s) - index for index, at in enumerate(times)), default=0)


def ideal(times: list[float], limits: Mapping[str, int]) -> int:
    """How many of these requests a limiter would let pass that knows everything at once."""
    passed: list[float] = []
    for at in sorted(times):
        used = ((bisect_left(passed, at - UNITS_S[name]), limit) for name, limit in limits.items())
        if all(len(passed) - before < limit for before, limit in used):
            passed.append(at)
    return len(passed)


async def trouble(fleet: Fleet, seconds: float, chance: random.Random) -> None:
    """kill -9 of control planes and Envoys, which are started again, and control planes that stop and go
    on."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        gateway = chance.choice(fleet.gateways)
        process = chance.choice([gateway.control, gateway.control, gateway.envoy])
        if process is gateway.control and chance.random() < 0.4:
            process.signal(signal.SIGSTOP)
            await asyncio.sleep(chance.uniform(0.5, 8))
            process.signal(signal.SIGCONT)
        else:
            await process.kill()
            await asyncio.sleep(chance.uniform(0.1, 4))
            await process.start()
        await asyncio.sleep(chance.uniform(0.5, 6))
