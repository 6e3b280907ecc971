"""Follows the registry and keeps the newest snapshot: every change is a view, every view a snapshot."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any, Protocol

import grpc

from lingqu.registry.v1 import instances_pb2
from services.core.access import Access, Record, access, watched_access
from services.core.discovery import Model, Replica
from services.core.registry import Registry, Watched
from services.core.tasks import background
from services.gateway.ads import Snapshots
from services.gateway.deltas import Rejection
from services.gateway.figures import REFUSED, Figures
from services.gateway.filters import stack
from services.gateway.hds import HealthDiscovery
from services.gateway.judge import Judge
from services.gateway.listener import Entry
from services.gateway.progress import NOTHING, Progress, progress
from services.gateway.resources import Refused
from services.gateway.snapshot import Builder
from services.gateway.view import View, view

log = logging.getLogger(__name__)

SERVICE = "gateway"
# The first change is told at once. Of a burst, what comes while a snapshot is made and for as long again, but
# not longer than this, makes one snapshot.
REST_S = (0.005, 0.1)
# Models and replicas come by different watches: where one says that nobody can answer, the other may be late.
DARK_S = 0.05
# How long the first snapshot waits for who keeps global limits.
LIMITERS_S = 1.0
# By how much a suite has to have grown for the garbage collector to be told what lives long.
GROWN = 1.25
# Watches are told what a list shows, though a moment later.
SETTLED_S = 0.1


class Follower(Protocol):
    """Has to know who may call."""

    def follow(self, access: Access) -> None: ...


class Limits(Follower, Protocol):
    """The part of the global limits that Envoy asks."""

    @property
    def addresses(self) -> tuple[str, ...]: ...

    @property
    def synced(self) -> asyncio.Event: ...


class ControlPlane:
    """Turns every change of the registry into a snapshot. `changed` is set whenever something has changed of
    what it reads: the registry, `entry`, or where limits are asked for."""

    def __init__(
        self,
        entry: Callable[[], Entry],
        registry: Registry,
        changed: asyncio.Event,
        limits: Limits,
        followers: Iterable[Follower] = (),
        figures: Figures | None = None,
    ) -> None:
        self._entry = entry
        self._limits = limits
        self._followers = (limits, *followers)
        self.figures = figures or Figures()
        self._registry = registry
        self.changed = changed
        self._replicas: Watched[Replica] = registry.watched_replicas("inference", self.changed)
        self._gateways: Watched[Replica] = registry.watched_replicas(SERVICE, self.changed)
        self._models: Watched[Model] = registry.watched_models(self.changed)
        self._access: Watched[Record] = watched_access(registry, self.changed)
        self.health = HealthDiscovery(self.changed)
        self._builder = Builder()
        self._confirmed = NOTHING
        self._asked = asyncio.Event()
        self.snapshots = Snapshots()
        self.judge = Judge(changed, self.figures.answered)
        self._view = View((), ())
        self.figures.gauge(
            REFUSED, lambda: len(self.snapshots.current.refused) if self.snapshots.current else 0
        )

    def state(self) -> tuple[str, View, bool]:
        current = self.snapshots.current
        return current.version if current else "", self._view, self.connected

    @property
    def connected(self) -> bool:
        return all(watched.connected for watched in self._watches)

    @property
    def gateways(self) -> tuple[Replica, ...]:
        """The control planes that are alive, this one too if it is registered."""
        return tuple(sorted(self._gateways.items.values(), key=lambda g: g.id))

    @property
    def filters(self) -> tuple[str, ...]:
        """Names of what every request passes, outermost first."""
        return tuple(found["name"] for found in stack(self._entry()))

    def watches(self) -> AbstractAsyncContextManager[None]:
        return background(
            *(watched.run() for watched in self._watches),
            self._follow(),
            self._catch_up(),
            self.judge.run(),
        )

    def nack(self, kind: str) -> None:
        """An Envoy refuses something."""
        self.figures.nack(kind)

    def refused(self, rejection: Rejection) -> None:
        """An Envoy refuses a resource: what it belongs to keeps what it had until it changes."""
        if self._builder.refused(rejection.kind, rejection.version, rejection.message):
            self.changed.set()

    def accepted(self, kind: str, version: str) -> None:
        """An Envoy has accepted a resource."""
        if self._builder.accepted(kind, version):
            self.changed.set()

    def tunable(self, all_are: bool) -> None:
        """While one Envoy takes no runtime values, shares are said by routes."""
        if self._builder.tunes != all_are:
            self._builder.tunes = all_are
            self.changed.set()

    def behind(self) -> None:
        """An Envoy has seen more of the registry than we have been told: ask how far the registry is."""
        self._asked.set()

    @property
    def _watches(self) -> tuple[Watched[Any], ...]:
        return self._replicas, self._gateways, self._models, self._access

    def _progress(self) -> Progress:
        store = self._models.store_id
        told = max(w.revision for w in self._watches if w.store_id == store)
        at = progress(told, store)
        return max(at, self._confirmed) if self._confirmed.store == at.store else at

    async def _follow(self) -> None:
        # Until the registry has told all, Envoy keeps what it has: an unknown suite is not an empty one.
        await asyncio.gather(*(watched.synced.wait() for watched in self._watches))
        # Nor does nobody keep the limits because we have not heard who does.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LIMITERS_S):
                await self._limits.synced.wait()
        kept = 0
        while True:
            self.changed.clear()
            begun = time.monotonic()
            now = self._seen()
            if _went_dark(self._view, now):
                await asyncio.sleep(DARK_S)
                now = self._seen()
            await self._make(now)
            took = time.monotonic() - begun
            await asyncio.sleep(min(max(took, REST_S[0]), REST_S[1]))
            size = len(self._view.replicas) + len(self._view.models)
            if self.snapshots.current is not None and size >= GROWN * kept:
                # What snapshots are made of lives long: looking through all of it took 50 ms of a change.
                gc.collect()
                gc.freeze()
                kept = size + 1
            await self.changed.wait()

    def _seen(self) -> View:
        who = access(self._access.items.values())
        for follower in self._followers:
            follower.follow(who)
        seen = view(
            self._replicas.items.values(),
            self._models.items.values(),
            who,
            self.health.unhealthy,
            gateways=self.gateways,
            limiters=self._limits.addresses,
        )
        return self.judge.applied(seen)

    async def _make(self, now: View) -> None:
        current = self.snapshots.current
        try:
            made = replace(self._builder.build(now, self._entry()), at=self._progress())
        except Refused as err:
            log.error("no snapshot can be made, the last one holds: %s", err)  # noqa: TRY400 - it says all
            return
        self._view = now
        known = current.refused if current else {}
        for what, why in made.refused.items():
            if known.get(what) != why:
                log.error("%s is held back: %s", what, why)
        if made != current:
            await self.snapshots.publish(made)
        # After the routes, which somebody waits for.
        self.health.watch(now, secured=self._entry().secrets.own is not None)

    async def _catch_up(self) -> None:
        """The revision of a watch is that of its last event. Whether there was none since or it is late, a
        list tells."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            try:
                answer = await self._registry.instances.ListInstances(
                    instances_pb2.ListInstancesRequest(service=SERVICE), timeout=2.0
                )
            except grpc.aio.AioRpcError as err:
                log.warning("a data plane knows more than this control plane; registry: %s", err.code().name)
            else:
                await asyncio.sleep(SETTLED_S)
                if not answer.stale:
                    self._confirmed = progress(answer.revision, self._models.store_id)
                    self.changed.set()
            await asyncio.sleep(SETTLED_S)


def _went_dark(before: View, now: View) -> bool:
    """Whether a model that had replicas has none."""
    return bool(_lit(before) & {target.model for target in now.targets} - _lit(now))


def _lit(view: View) -> set[str]:
    return {t.model for t in view.targets if t.text_endpoints or t.tensor_endpoints}
