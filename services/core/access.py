"""Who may call what, as the registry has it: clients with their models and limits, limits of models and of
tiers, and keys that are void."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from lingqu.registry.v1 import access_pb2
from lingqu.registry.v1.access_pb2_grpc import AccessServiceStub
from services.core.registry import Registry, Watched

# What each gateway may count for itself.
RATES = frozenset({"requests_per_second", "requests_per_minute"})


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may be used in any window of that length, and at once; 0: no limit. `local`: names of the
    rates (RATES) that each gateway counts for itself; others are counted by all together, as tokens always
    are."""

    requests_per_second: int = 0
    requests_per_minute: int = 0
    concurrent_requests: int = 0
    tokens_per_minute: int = 0
    tokens_per_day: int = 0
    local: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Client:
    """Somebody with keys. `models` are names in which '*' stands for any text; `model_limits` are (models,
    limits of each of them by itself), of which the first that fits counts. `max_priority` is the most urgent
    class of its requests, as inference numbers them; 0: any. `tier`: whose limits it has beside its own."""

    name: str
    models: tuple[str, ...] = ()
    limits: Limits = Limits()
    model_limits: tuple[tuple[str, Limits], ...] = ()
    disabled: bool = False
    max_priority: int = 0
    tier: str = ""


@dataclass(frozen=True, slots=True)
class Tier:
    """Limits by a name, that each of any number of clients has."""

    name: str
    limits: Limits = Limits()
    model_limits: tuple[tuple[str, Limits], ...] = ()


@dataclass(frozen=True, slots=True)
class SharedLimits:
    """Limits of a model that all its callers share."""

    model: str
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class RevokedKey:
    """A key that is void before its time; `key_id` is its jti."""

    key_id: str
    client: str = ""


@dataclass(frozen=True, slots=True)
class Access:
    """All clients by name, with the limits of their tiers, all revoked keys by id, and limits of models by
    model, each in order."""

    clients: tuple[Client, ...] = ()
    revoked: tuple[RevokedKey, ...] = ()
    shared: tuple[SharedLimits, ...] = ()


Record: TypeAlias = Client | RevokedKey | SharedLimits | Tier


def access(records: Iterable[Record]) -> Access:
    """Sorts what a watch has brought."""
    found = list(records)
    tiers = {r.name: r for r in found if isinstance(r, Tier)}
    clients = (_with_tier(r, tiers.get(r.tier)) for r in found if isinstance(r, Client))
    return Access(
        tuple(sorted(clients, key=lambda c: c.name)),
        tuple(sorted((r for r in found if isinstance(r, RevokedKey)), key=lambda k: k.key_id)),
        tuple(sorted((r for r in found if isinstance(r, SharedLimits)), key=lambda s: s.model)),
    )


def _with_tier(client: Client, tier: Tier | None) -> Client:
    if tier is None:
        return client
    limits = tier.limits if replace(client.limits, local=frozenset()) == Limits() else client.limits
    return replace(client, limits=limits, model_limits=(*client.model_limits, *tier.model_limits))


def watched_access(registry: Registry, changed: asyncio.Event) -> Watched[Record]:
    """All records, kept current; to be read with `access(watched.items.values())`."""

    async def watch(revision: int, store_id: str) -> Any:
        request = access_pb2.WatchAccessRequest(resume_revision=revision, store_id=store_id)
        async for update in AccessServiceStub(registry.channel).WatchAccess(request):
            yield _Update(update)

    return Watched(registry, watch, lambda record: record, changed)


class _Update:
    """One answer of WatchAccess, with each kind of record under names of its own."""

    def __init__(self, update: access_pb2.WatchAccessResponse) -> None:
        self.revision = update.revision
        self.store_id = update.store_id
        self.snapshot = update.snapshot
        self.stale = update.stale
        self.removed = [f"client {name}" for name in update.removed_clients]
        self.removed += [f"key {key_id}" for key_id in update.forgotten_keys]
        self.removed += [f"limits {model}" for model in update.removed_shared_limits]
        self.removed += [f"tier {name}" for name in update.removed_tiers]
        self._update = update

    @property
    def upserted(self) -> Iterator[tuple[str, Record]]:
        for client in self._update.clients:
            yield f"client {client.name}", to_client(client)
        for key in self._update.revoked_keys:
            yield f"key {key.key_id}", RevokedKey(key.key_id, key.client)
        for shared in self._update.shared_limits:
            yield f"limits {shared.model}", SharedLimits(shared.model, _limits(shared.limits))
        for tier in self._update.tiers:
            yield f"tier {tier.name}", Tier(tier.name, _limits(tier.limits), _of_models(tier.model_limits))


def to_client(record: access_pb2.Client) -> Client:
    return Client(
        record.name,
        tuple(record.models),
        _limits(record.limits),
        _of_models(record.model_limits),
        record.disabled,
        record.max_priority,
        record.tier,
    )


def _of_models(entries: Iterable[access_pb2.ModelLimits]) -> tuple[tuple[str, Limits], ...]:
    return tuple((entry.models, _limits(entry.limits)) for entry in entries)


def _limits(record: access_pb2.Limits) -> Limits:
    return Limits(
        record.requests_per_second,
        record.requests_per_minute,
        record.concurrent_requests,
        record.tokens_per_minute,
        record.tokens_per_day,
        frozenset(rate for rate in RATES if _scope(record, rate) == access_pb2.Limits.SCOPE_LOCAL),
    )


def _scope(record: access_pb2.Limits, rate: str) -> int:
    return getattr(record, f"{rate}_scope") or record.scope
