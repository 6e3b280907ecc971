"""A client of the registry, and what its watches tell kept as dictionaries."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

import grpc

from lingqu.registry.v1 import instances_pb2, models_pb2
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceStub
from lingqu.registry.v1.models_pb2_grpc import ModelServiceStub
from services.core import tls
from services.core.backoff import Backoff
from services.core.discovery import Model, Replica
from services.core.lifecycle import CHANNEL_OPTIONS
from services.core.records import to_model, to_replica
from services.core.tls import Identity

log = logging.getLogger(__name__)

# After these, another registry may do better.
NO_ANSWER = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
)
# A registry that does not answer pings is left, even if nothing was to be told.
REGISTRY_OPTIONS = {
    **dict(CHANNEL_OPTIONS),
    "grpc.keepalive_time_ms": 3_000,
    "grpc.http2.ping_timeout_ms": 2_000,  # keepalive_timeout_ms alone did not end a call in 30 s
    "grpc.http2.max_pings_without_data": 0,
}


class _Update(Protocol):
    revision: int
    store_id: str
    snapshot: bool
    stale: bool
    removed: Iterable[str]
    upserted: Iterable[Any]


V = TypeVar("V")


class Registry:
    """A client of the registry at one or several addresses ("host:port,host:port").

    One of them is used until somebody who got no answer there says `leave`. The stubs are those of the
    current one: take them anew for each call."""

    def __init__(self, addresses: str, identity: Identity | None = None) -> None:
        self._channels = [
            tls.channel(address.strip(), list(REGISTRY_OPTIONS.items()), identity)
            for address in addresses.split(",")
        ]
        self._use(random.choice(self._channels))  # noqa: S311 - spreads load

    def _use(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.instances = RegistryServiceStub(channel)
        self.models = ModelServiceStub(channel)

    def leave(self, channel: grpc.aio.Channel) -> None:
        """Use the next one, unless somebody has left `channel` already."""
        if channel is self.channel:
            self._use(self._channels[(self._channels.index(channel) + 1) % len(self._channels)])

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    def watched_replicas(self, service: str, changed: asyncio.Event) -> Watched[Replica]:
        def watch(revision: int, store_id: str) -> Any:
            return self.instances.WatchInstances(
                instances_pb2.WatchInstancesRequest(
                    service=service, resume_revision=revision, store_id=store_id
                )
            )

        return Watched(self, watch, lambda record: (record.id, to_replica(record)), changed)

    def watched_models(self, changed: asyncio.Event) -> Watched[Model]:
        def watch(revision: int, store_id: str) -> Any:
            return self.models.WatchModels(
                models_pb2.WatchModelsRequest(resume_revision=revision, store_id=store_id)
            )

        return Watched(self, watch, lambda record: (record.name, to_model(record)), changed)


class Watched(Generic[V]):
    """A dictionary kept current by a watch RPC of the registry. Losing the registry leaves it as it was; with
    the next one it goes on from the revision it has seen.

    `connected`: a registry tells us what changes. `stale`: it says that it cannot reach etcd."""

    def __init__(
        self,
        registry: Registry,
        watch: Callable[[int, str], AsyncIterator[_Update]],
        convert: Callable[[Any], tuple[str, V]],
        changed: asyncio.Event,
    ) -> None:
        self._registry = registry
        self._watch = watch
        self._convert = convert
        self._changed = changed
        self.revision = 0
        self.store_id = ""
        self.items: dict[str, V] = {}
        self.synced = asyncio.Event()
        self.connected = False
        self.stale = False

    async def run(self) -> None:
        """Follow for ever, with back-off; each change sets `changed`."""
        backoff = Backoff(most_s=1.0)
        while True:
            channel = self._registry.channel
            try:
                async for update in self._watch(self.revision, self.store_id):
                    backoff.reset()
                    self._apply(update)
            except grpc.aio.AioRpcError as err:
                if self.connected or not self.synced.is_set():
                    log.warning("registry watch lost (%s); the last known state holds", err.code().name)
                if err.code() in NO_ANSWER:
                    self._registry.leave(channel)
            self.connected = False
            self._changed.set()
            await asyncio.sleep(backoff.delay())

    def _apply(self, update: _Update) -> None:
        if update.snapshot:
            self.items = {}
        for name in update.removed:
            self.items.pop(name, None)
        self.items.update(self._convert(record) for record in update.upserted)
        self.revision, self.store_id = update.revision, update.store_id
        self.connected = True
        self.stale = update.stale
        self.synced.set()
        self._changed.set()
