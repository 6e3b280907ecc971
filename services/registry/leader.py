"""Which registry replica drives rollouts and stages: whoever holds a key in etcd, by a lease.

After https://etcd.io/docs/v3.5/learning/why/#notes-on-the-usage-of-lock-and-lease : a lease alone does not
keep a paused leader from writing, so every write of the leader is conditional on `fence`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing

from services.core.errors import LingquError
from services.registry.etcd import Etcd, Put, Unchanged
from services.registry.keyspace import LEADER
from services.registry.mirror import Mirror

log = logging.getLogger(__name__)

TTL_S = 5
CAMPAIGN_S = 1.0


class Leadership:
    """`fence` is the condition under which this replica leads; None while it does not."""

    def __init__(self, etcd: Etcd, mirror: Mirror, name: str) -> None:
        self._etcd = etcd
        self._mirror = mirror
        self._name = name
        self.fence: Unchanged | None = None

    async def run(self) -> None:
        """Campaign, lead until the lease is lost, campaign again; for ever."""
        while True:
            try:
                if self._mirror.get(LEADER) is None and not self._mirror.stale:
                    await self._lead()
            except (LingquError, TimeoutError) as err:
                log.warning("not leading: %s", str(err) or f"etcd renewed no lease for {TTL_S} s")
            await asyncio.sleep(CAMPAIGN_S)

    async def _lead(self) -> None:
        lease = await self._etcd.grant(TTL_S)
        try:
            revision = await self._etcd.commit(
                [Put(LEADER, self._name.encode(), lease)], [Unchanged(LEADER, 0)]
            )
            if not revision:
                return
            log.info("leading as %s", self._name)
            self.fence = Unchanged(LEADER, revision)
            await self._keep(lease)
        finally:
            self.fence = None
            # At a stop: another replica need not wait for the lease to end. If etcd is away, it will.
            await asyncio.shield(self._resign(lease))

    async def _keep(self, lease: int) -> None:
        """Renew until it fails."""

        async def ticks() -> AsyncIterator[int]:
            while True:
                yield lease
                await asyncio.sleep(TTL_S / 3)

        async with aclosing(self._etcd.renew(ticks())) as renewed:
            while True:
                async with asyncio.timeout(TTL_S):
                    _, left_s = await anext(renewed)
                if not left_s:
                    log.warning("leadership lost: the lease has expired")
                    return

    async def _resign(self, lease: int) -> None:
        try:
            await self._etcd.revoke(lease)
        except LingquError as err:
            log.warning("could not give the leadership back: %s", err)
