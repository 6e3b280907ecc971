"""The registry as other services see it: small values, kept current by its watches, and a registration
that outlives the loss of the registry, of etcd and of the lease."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration

from lingqu.client import LingquError
from lingqu.registry.v1 import instances_pb2, models_pb2
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceStub
from lingqu.registry.v1.models_pb2_grpc import ModelServiceStub
from services.core import tls
from services.core.backoff import Backoff
from services.core.lifecycle import CHANNEL_OPTIONS
from services.core.tls import Identity

log = logging.getLogger(__name__)

READY = instances_pb2.HOSTED_STATE_READY
LOADING = instances_pb2.HOSTED_STATE_LOADING
FAILED = instances_pb2.HOSTED_STATE_FAILED

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
    replica tries to get over by itself. `progress`: of its fetching, 0 to 1."""

    key: VersionKey
    state: int
    detail: str = ""
    will_retry: bool = False
    progress: float = 0.0


@dataclass(frozen=True, slots=True)
class Replica:
    """A live instance. `endpoints` maps a protocol to "host:port"; one that is `draining` gets no new
    requests."""

    id: str
    service: str
    endpoints: Mapping[str, str] = field(default_factory=dict)
    models: tuple[Hosted, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    draining: bool = False


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
    golden_examples: int = 0
    evaluation: Mapping[str, float] = field(default_factory=dict)
    offline: bool = False
    """Retired or rejected: nobody loads it."""
    labels: Mapping[str, str] = field(default_factory=dict)
    created: int = 0
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Which replicas load a model's versions: those with `labels`, `replicas` of them (0: all)."""

    labels: Mapping[str, str] = field(default_factory=dict)
    replicas: int = 0
    keep: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Protection:
    """How gateways protect a model's replicas, as Protection in models.proto says; 0: the default.
    `fallback`: a model, or empty."""

    max_requests: int = 0
    error_percent: int = 0
    min_requests: int = 0
    latency_s: float = 0.0
    no_breaker: bool = False
    fallback: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """A model; `weights` are (version, percent), `previous` the versions that a rollback would give traffic,
    `shadow` a version that gets `shadow_percent` of the requests as copies, or 0."""

    name: str
    versions: tuple[Version, ...]
    weights: tuple[tuple[int, int], ...] = ()
    previous: tuple[int, ...] = ()
    shadow: int = 0
    aliases: Mapping[str, int] = field(default_factory=dict)
    placement: Placement = Placement()
    shadow_percent: int = 100
    protection: Protection = Protection()

    @property
    def traffic(self) -> int:
        """The version with the largest share, the newer of two alike; 0 for none."""
        return max(((percent, version) for version, percent in self.weights), default=(0, 0))[1]


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


def to_replica(record: instances_pb2.Instance) -> Replica:
    hosted = tuple(
        Hosted(VersionKey(m.model, m.version), m.state, m.detail, m.will_retry, m.progress)
        for m in record.models
    )
    endpoints, labels = dict(record.endpoints), dict(record.labels)
    return Replica(record.id, record.service, endpoints, hosted, labels, record.draining)


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
                progress=h.progress,
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
            v.golden_examples,
            dict(v.evaluation),
            v.stage in (models_pb2.STAGE_RETIRED, models_pb2.STAGE_REJECTED),
            dict(v.labels),
            v.create_time.seconds,
        )
        for v in record.versions
    )
    placement = record.placement
    return Model(
        record.name,
        versions,
        tuple((w.version, w.percent) for w in record.traffic.weights),
        tuple(w.version for w in record.previous_traffic.weights),
        record.traffic.shadow_version,
        dict(record.traffic.aliases),
        Placement(dict(placement.labels), placement.replicas, tuple(placement.keep)),
        record.traffic.shadow_percent or 100,
        protection=_protection(record.policy.protection),
    )


def _protection(record: models_pb2.Protection) -> Protection:
    return Protection(
        record.max_requests,
        record.breaker_error_percent,
        record.breaker_min_requests,
        record.breaker_latency.ToNanoseconds() / 1e9,
        record.breaker_off,
        record.fallback_model,
    )
