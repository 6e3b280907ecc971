"""Puts the limiter together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from envoy.service.ratelimit.v3 import rls_pb2_grpc

from lingqu.gateway.v1.limiter_pb2_grpc import add_LimiterServiceServicer_to_server
from services.core.access import Access
from services.core.errors import BackendUnavailable
from services.core.limiters import Record, Session, addresses, watched_owners
from services.core.registry import Registry, Watched
from services.core.tasks import background
from services.core.tls import Identity
from services.gateway.limits.clock import clock
from services.gateway.limits.ledger import RegistryLedger
from services.gateway.limits.limiter import Limiter
from services.gateway.limits.peers import Peers
from services.gateway.limits.rules import Rules
from services.gateway.limits.service import Limits, RateLimits
from services.gateway.limits.shards import Shards

# How often connections to control planes that are gone are closed: before another one is at the same address,
# since a connection that was refused waits for up to a second before it tries again.
FORGET_S = 0.5


class GlobalLimits:
    """This control plane's part of the global limits. `address` is where others reach it, `changed` is set
    whenever `addresses` may have changed."""

    def __init__(
        self,
        registry: Registry,
        address: str,
        lease_s: int,
        changed: asyncio.Event,
        identity: Identity | None = None,
    ) -> None:
        moved = _Both(changed)
        self._owners: Watched[Record] = watched_owners(registry, moved)
        self._access: Access | None = None
        self._followed = asyncio.Event()
        self._rules: Rules | None = None
        self._peers = Peers(identity)
        ledger, known = RegistryLedger(registry), lambda: self._owners.items.values()
        self._shards = Shards(ledger, address, known, moved, clock, lease_s)
        self._limiter = Limiter(self._known_rules, self._shards, self._peers, clock)

    def follow(self, access: Access) -> None:
        """Limits are those of `access` from now on."""
        if access != self._access:
            self._access, self._rules = access, Rules(access)
            self._followed.set()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of all control planes that can be asked."""
        return addresses(self._owners.items.values())

    @property
    def synced(self) -> asyncio.Event:
        """Set when `addresses` are known."""
        return self._owners.synced

    def add_to(self, server: grpc.aio.Server, *, tells: bool) -> None:
        """`tells`: see RateLimits."""
        rate_limits = RateLimits(self._limiter, tells=tells)
        rls_pb2_grpc.add_RateLimitServiceServicer_to_server(rate_limits, server)
        add_LimiterServiceServicer_to_server(Limits(self._limiter), server)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Owns shards while the server answers, and hands them over before it stops."""
        async with background(self._owners.run(), self._keep_peers()), background(self._own()):
            yield
            await self._shards.leave()
        await self._peers.keep(())

    async def _own(self) -> None:
        """Envoys ask us from the first session on: not before we can answer."""
        await asyncio.gather(self._followed.wait(), self._owners.synced.wait())
        await self._shards.run()

    def _known_rules(self) -> Rules:
        if self._rules is None:
            raise BackendUnavailable("the limits are not known yet")
        return self._rules

    async def _keep_peers(self) -> None:
        while True:
            await asyncio.sleep(FORGET_S)
            # Those that leave own something until they have left.
            await self._peers.keep(r.address for r in self._owners.items.values() if isinstance(r, Session))


class _Both(asyncio.Event):
    """An event that sets another one, too."""

    def __init__(self, other: asyncio.Event) -> None:
        super().__init__()
        self._other = other

    def set(self) -> None:
        super().set()
        self._other.set()
