"""Leases granted ahead, so that a registration that follows another is one round to etcd instead of two."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque

from services.core.errors import LingquError
from services.registry.etcd import Etcd

# So many of a kind are kept at most. One nobody takes ends by itself.
AHEAD = 4
# A lease is as good as new for this part of its time.
NEW = 0.1


class Leases:
    """`take` may be called while `run` does."""

    def __init__(self, etcd: Etcd) -> None:
        self._etcd = etcd
        self._ready: defaultdict[int, deque[tuple[float, int]]] = defaultdict(deque)
        self._wanted: asyncio.Queue[int] = asyncio.Queue(AHEAD)

    async def take(self, ttl_s: int) -> int:
        """A new lease that nobody else has. Raises what etcd raises."""
        ready = self._ready[ttl_s]
        oldest = time.monotonic() - ttl_s * NEW
        while ready and ready[0][0] < oldest:
            ready.popleft()
        if not self._wanted.full():
            self._wanted.put_nowait(ttl_s)
        if ready:
            return ready.popleft()[1]
        del self._ready[ttl_s]
        return await self._etcd.grant(ttl_s)

    async def run(self) -> None:
        """Grant one ahead for each that was taken, for ever."""
        while True:
            ttl_s = await self._wanted.get()
            if len(self._ready[ttl_s]) >= AHEAD:
                continue
            granted = time.monotonic()
            try:
                self._ready[ttl_s].append((granted, await self._etcd.grant(ttl_s)))
            except LingquError:
                continue  # whoever needs one next will be told
