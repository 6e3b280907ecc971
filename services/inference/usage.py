"""Tells the limiter which tokens clients have used, so that limits of tokens count them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import grpc

from lingqu.gateway.v1 import limiter_pb2 as pb
from lingqu.gateway.v1.limiter_pb2_grpc import LimiterServiceStub
from services.core import tls
from services.core.backoff import Backoff
from services.core.errors import BackendUnavailable
from services.core.lifecycle import CHANNEL_OPTIONS
from services.core.tasks import background
from services.core.tls import Identity

log = logging.getLogger(__name__)

# What was used in this time is told together.
EVERY_S = 0.2
TIMEOUT_S = 2.0
# Pairs of client and model that are kept while nobody listens, and that go in one report.
MOST_KEPT, MOST_TOLD = 100_000, 10_000
# At a stop.
LAST_S = 1.0


class UsageReports:
    """`charge` only adds up; what it has added is told again and again until a control plane has it on
    record. A report keeps its number, so that it is not charged twice. `dropped`: tokens that could not be
    kept."""

    def __init__(self, limiters: Callable[[], Sequence[str]], identity: Identity | None = None) -> None:
        self._limiters = limiters
        self._identity = identity
        self._used: dict[tuple[str, str], int] = {}
        self._reporter = uuid.uuid4().hex
        self._told = 0
        self._report: pb.ReportUsageRequest | None = None
        self._channel: tuple[str, grpc.aio.Channel] | None = None
        self._turn = 0
        self.dropped = 0

    def charge(self, client: str, model: str, tokens: int) -> None:
        """Who came without a gateway has no name, and no limits."""
        if not client or not tokens:
            return
        used = self._used.get((client, model))
        if used is None and len(self._used) >= MOST_KEPT:
            if not self.dropped:
                log.error("tokens of more clients than can be kept are not charged: no limiter listens")
            self.dropped += tokens
        else:
            self._used[client, model] = (used or 0) + tokens

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Tells for as long as the block lasts, and at its end what is left, if somebody listens."""
        async with background(self._run()):
            yield
        try:
            async with asyncio.timeout(LAST_S):
                while self._next():
                    await self._tell()
        except (TimeoutError, BackendUnavailable, grpc.aio.AioRpcError):
            log.warning("the last tokens that were used are not charged: no limiter listens")
        await self._leave()

    async def _run(self) -> None:
        backoff = Backoff(EVERY_S)
        while True:
            await asyncio.sleep(EVERY_S)
            if not self._next():
                continue
            try:
                await self._tell()
            except (BackendUnavailable, grpc.aio.AioRpcError) as err:
                log.info("the limiter does not take what was used: %s", err)
                await self._leave()
                await asyncio.sleep(backoff.delay())
            else:
                backoff.reset()

    def _next(self) -> bool:
        """Whether there is a report to tell: one that was told in vain, or what was used since."""
        if self._report is None and self._used:
            self._told += 1
            told = dict(itertools.islice(self._used.items(), MOST_TOLD))
            for pair in told:
                del self._used[pair]
            usages = [pb.Usage(client=c, model=m, tokens=tokens) for (c, m), tokens in told.items()]
            self._report = pb.ReportUsageRequest(reporter=self._reporter, sequence=self._told, usages=usages)
        return self._report is not None

    async def _tell(self) -> None:
        """Raises AioRpcError, and BackendUnavailable where nobody is there."""
        known = self._limiters()
        if not known:
            raise BackendUnavailable("there is no control plane")
        if self._channel is None or self._channel[0] not in known:
            await self._leave()
            address = known[self._turn % len(known)]
            self._channel = address, tls.channel(address, CHANNEL_OPTIONS, self._identity)
        assert self._report is not None  # noqa: S101 - _next has made it
        await LimiterServiceStub(self._channel[1]).ReportUsage(self._report, timeout=TIMEOUT_S)
        self._report = None

    async def _leave(self) -> None:
        """The next report goes to another one."""
        self._turn += 1
        if self._channel is not None:
            _, channel = self._channel
            self._channel = None
            await channel.close()
