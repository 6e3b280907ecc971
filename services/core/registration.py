"""The registration of one replica, which outlives the loss of the registry, of etcd and of the lease."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from lingqu.client import LingquError
from lingqu.registry.v1 import instances_pb2
from services.core.backoff import Backoff
from services.core.discovery import Hosted, Replica
from services.core.records import to_instance
from services.core.registry import NO_ANSWER, Registry

log = logging.getLogger(__name__)


class Registration:
    """Keeps one replica registered until `withdraw`; `update` tells what it serves now.

    The lease is kept through the loss of the registry and of etcd: once they are back, renewing it is
    enough. Only when it has expired the replica registers again, under the same lease id. While another
    process lives that was started under our id since, it is left alone."""

    def __init__(self, registry: Registry, replica: Replica, ttl_s: int) -> None:
        self._registry = registry
        self._replica = replica
        self._ttl_s = ttl_s
        self._lease = 0
        self._registered: Replica | None = None
        self._dirty = asyncio.Event()

    @property
    def replica(self) -> Replica:
        """As it is told to others."""
        return self._replica

    def update(self, models: Iterable[Hosted]) -> None:
        now = tuple(models)
        if now != self._replica.models:
            self._replica = replace(self._replica, models=now)
            self._dirty.set()

    async def run(self) -> None:
        """Register, keep alive, and go on whenever the lease or the connection is lost."""
        backoff = Backoff(most_s=1.0)
        while True:
            channel = self._registry.channel
            try:
                await self._keep(backoff)
                delay = backoff.delay()
            except grpc.aio.AioRpcError as err:
                log.warning("registration of %s: %s (%s)", self._replica.id, err.details(), err.code().name)
                if err.code() in NO_ANSWER:
                    self._registry.leave(channel)
                delay = self._delay(err, backoff)
            except TimeoutError:
                log.warning("no answer to the keep-alive of %s", self._replica.id)
                self._registry.leave(channel)
                delay = 0.0
            await asyncio.sleep(delay)

    async def withdraw(self) -> None:
        """Say goodbye, so that nobody waits for the lease to end; if the registry is away, it will."""
        if not self._lease:
            return
        request = instances_pb2.DeregisterInstanceRequest(id=self._replica.id, lease_id=self._lease)
        try:
            await self._registry.instances.DeregisterInstance(request, timeout=1.0)
        except grpc.aio.AioRpcError as err:
            log.warning("could not deregister %s: %s", self._replica.id, err.details())

    def _delay(self, err: grpc.aio.AioRpcError, backoff: Backoff) -> float:
        """How long to wait after a failure: spread, as all others have just failed, too."""
        if err.code() == grpc.StatusCode.NOT_FOUND:
            self._registered = None
            return random.uniform(0, min(1.0, self._ttl_s / 5))  # noqa: S311 - spreads load
        if err.code() == grpc.StatusCode.ALREADY_EXISTS:
            return random.uniform(0.5, 1) * self._ttl_s  # noqa: S311 - spreads load
        return min(LingquError(err).retry_after_s or backoff.delay(), self._ttl_s / 2)

    async def _register(self) -> None:
        replica = self._replica
        request = instances_pb2.RegisterInstanceRequest(
            instance=to_instance(replica), ttl=Duration(seconds=self._ttl_s), lease_id=self._lease
        )
        answer = await self._registry.instances.RegisterInstance(request, timeout=5.0)
        self._lease, self._registered = answer.lease_id, replica

    async def _keep(self, backoff: Backoff) -> None:
        """Raises AioRpcError, or TimeoutError if a keep-alive is not answered in time to ask another registry
        before the lease ends."""
        if self._registered is None:
            await self._register()
        call: Any = self._registry.instances.KeepAlive()
        try:
            while True:
                async with asyncio.timeout(self._ttl_s / 3):
                    with contextlib.suppress(asyncio.InvalidStateError):  # it has ended; reading tells why
                        await call.write(instances_pb2.KeepAliveRequest(lease_id=self._lease))
                    if await call.read() is grpc.aio.EOF:
                        return
                backoff.reset()
                self._dirty.clear()
                if self._registered != self._replica:
                    await self._register()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._dirty.wait(), self._ttl_s / 3)
        finally:
            call.cancel()
