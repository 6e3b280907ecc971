"""The registry as other services see it: small values, kept current by its watches, and a registration
that outlives the loss of the registry, of etcd and of the lease."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration

from lingqu.registry.v1 import instances_pb2, models_pb2
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceStub
from lingqu.registry.v1.models_pb2_grpc import ModelServiceStub
from services.core.backoff import Backoff
from services.core.lifecycle import CHANNEL_OPTIONS

log = logging.getLogger(__name__)

READY = instances_pb2.HOSTED_STATE_READY
LOADING = instances_pb2.HOSTED_STATE_LOADING
FAILED = instances_pb2.HOSTED_STATE_FAILED


@dataclass(frozen=True, slots=True, order=True)
class VersionKey:
    """A version of a model."""

    model: str
    version: int

    def __str__(self) -> str:
        return f"{self.model} v{self.version}"


@dataclass(frozen=True, slots=True)
class Hosted:
    """A version on a replica; `state` is one of READY, LOADING, FAILED. `will_retry`: a failure that the
    replica tries to get over by itself."""

    key: VersionKey
    state: int
    detail: str = ""
    will_retry: bool = False


@dataclass(frozen=True, slots=True)
class Replica:
    """A live instance. `endpoints` maps a protocol to "host:port"."""

    id: str
    service: str
    endpoints: Mapping[str, str] = field(default_factory=dict)
    models: tuple[Hosted, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Requirements:
    """`engine` is a PEP 440 specifier, `fingerprint` a kind of machine; empty: any."""

    engine: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Version:
    key: VersionKey
    uri: str
    sha256: str
    task: str
    runtime: str
    signature: bytes = b""
    signer: str = ""
    requirements: Requirements = Requirements()
    offline: bool = False
    """Retired or rejected: nobody loads it."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Which replicas load a model's versions: those with `labels`, `replicas` of them (0: all)."""

    labels: Mapping[str, str] = field(default_factory=dict)
    replicas: int = 0
    keep: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """A model; `weights` are (version, percent), `previous` and `shadow` version numbers, 0 for none."""

    name: str
    versions: tuple[Version, ...]
    weights: tuple[tuple[int, int], ...] = ()
    previous: int = 0
    shadow: int = 0
    aliases: Mapping[str, int] = field(default_factory=dict)
    placement: Placement = Placement()

    @property
    def traffic(self) -> int:
        """The version with the largest share, the newer of two alike; 0 for none."""
        return max(((percent, version) for version, percent in self.weights), default=(0, 0))[1]


class _Update(Protocol):
    snapshot: bool
    removed: Iterable[str]
    upserted: Iterable[Any]


V = TypeVar("V")


class Watched(Generic[V]):
    """A dictionary kept current by a watch RPC of the registry. Losing the registry leaves it as it was."""

    def __init__(
        self,
        watch: Callable[[], AsyncIterator[_Update]],
        convert: Callable[[Any], tuple[str, V]],
        changed: asyncio.Event,
    ) -> None:
        self._watch = watch
        self._convert = convert
        self._changed = changed
        self.items: dict[str, V] = {}
        self.synced = asyncio.Event()
        self.connected = False

    async def run(self) -> None:
        """Follow for ever, with back-off; each change sets `changed`."""
        backoff = Backoff(most_s=1.0)
        while True:
            try:
                async for update in self._watch():
                    backoff.reset()
                    self._apply(update)
            except grpc.aio.AioRpcError as err:
                if self.connected or not self.synced.is_set():
                    log.warning("registry watch lost (%s); the last known state holds", err.code().name)
            self.connected = False
            self._changed.set()
            await asyncio.sleep(backoff.delay())

    def _apply(self, update: _Update) -> None:
        if update.snapshot:
            self.items = {}
        for name in update.removed:
            self.items.pop(name, None)
        self.items.update(self._convert(record) for record in update.upserted)
        self.connected = True
        self.synced.set()
        self._changed.set()


class Registry:
    """A client of the registry; the channel finds it again by itself after it was away."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.instances = RegistryServiceStub(self._channel)
        self.models = ModelServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    def watched_replicas(self, service: str, changed: asyncio.Event) -> Watched[Replica]:
        request = instances_pb2.WatchInstancesRequest(service=service)
        watch: Any = lambda: self.instances.WatchInstances(request)  # noqa: E731
        return Watched(watch, lambda record: (record.id, to_replica(record)), changed)

    def watched_models(self, changed: asyncio.Event) -> Watched[Model]:
        watch: Any = lambda: self.models.WatchModels(models_pb2.WatchModelsRequest())  # noqa: E731
        return Watched(watch, lambda record: (record.name, to_model(record)), changed)


class Registration:
    """Keeps one replica registered until `withdraw`; `update` tells what it serves now."""

    def __init__(self, registry: Registry, replica: Replica, ttl_s: int) -> None:
        self._registry = registry
        self._replica = replica
        self._ttl_s = ttl_s
        self._dirty = asyncio.Event()

    @property
    def replica(self) -> Replica:
        """As it is told to others."""
        return self._replica

    def update(self, models: Iterable[Hosted]) -> None:
        now = tuple(models)
        if now != self._replica.models:
            old = self._replica
            self._replica = Replica(old.id, old.service, old.endpoints, now, old.labels)
            self._dirty.set()

    async def run(self) -> None:
        """Register, keep alive, and register again whenever the lease or the connection is lost."""
        backoff = Backoff(most_s=1.0)
        while True:
            try:
                lease = await self._register()
                backoff.reset()
                await self._keep(lease)
            except grpc.aio.AioRpcError as err:
                log.warning("registration of %s lost: %s; registering again", self._replica.id, err.details())
                await asyncio.sleep(backoff.delay())

    async def withdraw(self) -> None:
        """Say goodbye, so that nobody waits for the lease to end; if the registry is away, it will."""
        request = instances_pb2.DeregisterInstanceRequest(id=self._replica.id)
        try:
            await self._registry.instances.DeregisterInstance(request, timeout=1.0)
        except grpc.aio.AioRpcError as err:
            log.warning("could not deregister %s: %s", self._replica.id, err.details())

    async def _register(self) -> int:
        self._dirty.clear()
        request = instances_pb2.RegisterInstanceRequest(
            instance=to_instance(self._replica), ttl=Duration(seconds=self._ttl_s)
        )
        answer = await self._registry.instances.RegisterInstance(request, timeout=5.0, wait_for_ready=True)
        return answer.lease_id

    async def _keep(self, lease: int) -> None:
        call: Any = self._registry.instances.KeepAlive()
        try:
            while True:
                await call.write(instances_pb2.KeepAliveRequest(lease_id=lease))
                async with asyncio.timeout(self._ttl_s):
                    if await call.read() is grpc.aio.EOF:
                        return
                try:
                    await asyncio.wait_for(self._dirty.wait(), self._ttl_s / 3)
                    lease = await self._register()
                except TimeoutError:
                    continue
        except (TimeoutError, asyncio.InvalidStateError):
            log.warning("no answer to the keep-alive of %s", self._replica.id)
        finally:
            call.cancel()


def to_replica(record: instances_pb2.Instance) -> Replica:
    hosted = tuple(
        Hosted(VersionKey(m.model, m.version), m.state, m.detail, m.will_retry) for m in record.models
    )
    return Replica(record.id, record.service, dict(record.endpoints), hosted, dict(record.labels))


def to_instance(replica: Replica) -> instances_pb2.Instance:
    return instances_pb2.Instance(
        id=replica.id,
        service=replica.service,
        endpoints=replica.endpoints,
        labels=replica.labels,
        models=[
            instances_pb2.HostedModel(
                model=h.key.model,
                version=h.key.version,
                state=instances_pb2.HostedState.ValueType(h.state),
                detail=h.detail,
                will_retry=h.will_retry,
            )
            for h in replica.models
        ],
    )


def to_model(record: models_pb2.Model) -> Model:
    versions = tuple(
        Version(
            VersionKey(record.name, v.version),
            v.artifact.uri,
            v.artifact.sha256,
            v.task,
            v.runtime,
            v.artifact.signature,
            v.artifact.signer,
            Requirements(v.requirements.engine, v.requirements.fingerprint),
            v.stage in (models_pb2.STAGE_RETIRED, models_pb2.STAGE_REJECTED),
        )
        for v in record.versions
    )
    placement = record.placement
    return Model(
        record.name,
        versions,
        tuple((w.version, w.percent) for w in record.traffic.weights),
        record.previous_version,
        record.traffic.shadow_version,
        dict(record.traffic.aliases),
        Placement(dict(placement.labels), placement.replicas, tuple(placement.keep)),
    )
