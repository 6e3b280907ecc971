"""Registries on a real etcd, replicas that live on them, who watches and who writes: for tests that take
something of it away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc

from bench.registry_parts import Child, etcd_child, registry_child
from deploy.local import layout as at
from deploy.local.layout import Layout
from lingqu.registry.v1 import instances_pb2 as pb
from services.core.discovery import Replica
from services.core.registration import Registration
from services.core.registry import Registry, Watched
from services.core.tasks import background
from tests.conftest import free_offset, show_logs
from tests.registries import ids, register
from tests.waiting import pause, until

TTL_S = 5


class Suite:
    """An etcd of one or three members, and registries on it."""

    def __init__(self, members: list[Child], registries: list[Child]) -> None:
        self.members = members
        self.registries = registries

    @property
    def etcd(self) -> Child:
        return self.members[0]

    @property
    def endpoints(self) -> str:
        return ",".join(member.address for member in self.members)

    @property
    def addresses(self) -> str:
        return ",".join(registry.address for registry in self.registries)

    def used_by(self, client: Registry) -> Child:
        """The registry that `client` talks to now."""
        return self.registries[client._channels.index(client.channel)]


@asynccontextmanager
async def running(folder: Path, *etcd_arguments: str, registries: int = 2) -> AsyncIterator[Suite]:
    layout = Layout(folder, free_offset())
    member = etcd_child(layout, *etcd_arguments)
    async with started([member], layout, registries) as suite:
        yield suite


@asynccontextmanager
async def started(members: list[Child], layout: Layout, registries: int) -> AsyncIterator[Suite]:
    endpoints = ",".join(member.address for member in members)
    children = [registry_child(layout, at.REGISTRY + free_offset(), endpoints) for _ in range(registries)]
    try:
        await asyncio.gather(*(member.start() for member in members))
        await asyncio.gather(*(child.start() for child in children))
        yield Suite(members, children)
    finally:
        await asyncio.gather(*(child.stop() for child in (*children, *members)))
        show_logs(layout)


@asynccontextmanager
async def client_of(addresses: str) -> AsyncIterator[Registry]:
    client = Registry(addresses)
    try:
        yield client
    finally:
        await client.close()


class Told(Watched[Replica]):
    """Keeps what it was told."""

    @classmethod
    def by(cls, registry: Registry) -> Told:
        plain = registry.watched_replicas("inference", asyncio.Event())
        told = cls(registry, plain._watch, plain._convert, plain._changed)
        told.snapshots, told.removed, told.revisions = 0, [], []
        return told

    snapshots: int
    removed: list[str]
    revisions: list[int]

    def _apply(self, update: Any) -> None:
        self.snapshots += update.snapshot
        self.removed += update.removed
        self.revisions.append(update.revision)
        super()._apply(update)


class Fleet:
    """Replicas that live, and a watcher of them."""

    def __init__(self, client: Registry, told: Told, names: list[str]) -> None:
        self.client = client
        self.told = told
        self.names = names

    async def complete(self) -> bool:
        """Every living instance is known, to a list and to the watcher, and nothing else is."""
        if self.told.stale or sorted(self.told.items) != self.names:
            return False
        try:
            answer = await self.client.instances.ListInstances(
                pb.ListInstancesRequest(service="inference"), timeout=2
            )
        except grpc.aio.AioRpcError:
            return False
        return not answer.stale and [i.id for i in answer.instances] == self.names


@asynccontextmanager
async def fleet(addresses: str, size: int = 40, ttl_s: int = TTL_S) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        names = [f"r{number:03d}" for number in range(size)]
        clients = [await stack.enter_async_context(client_of(addresses)) for _ in range(5)]
        registrations = [
            Registration(clients[n % 5], Replica(name, "inference", {"grpc": "127.0.0.1:1"}), ttl_s)
            for n, name in enumerate(names)
        ]
        told = Told.by(clients[0])
        await stack.enter_async_context(background(told.run(), *(r.run() for r in registrations)))
        living = Fleet(clients[0], told, names)
        await until(living.complete, "all are registered")
        yield living


@contextmanager
def paused(child: Child) -> Iterator[None]:
    child.freeze()
    try:
        yield
    finally:
        child.go_on()


class Writer:
    """Registers one instance after the other, and remembers which were acknowledged."""

    def __init__(self, addresses: str) -> None:
        self.client = Registry(addresses)
        self.acknowledged: list[str] = []
        self.refusals: set[str] = set()

    async def run(self) -> None:
        number = 0
        while True:
            number += 1
            channel = self.client.channel
            try:
                await register(self.client, pb.Instance(id=f"w{number:04d}", service="writer"), ttl_s=300)
                self.acknowledged.append(f"w{number:04d}")
            except grpc.aio.AioRpcError as err:
                self.refusals.add(err.code().name)
                self.client.leave(channel)
            await pause(0.05, "the pace of a writer")

    async def nothing_lost(self) -> bool:
        return set(self.acknowledged) <= set(await ids(self.client, "writer"))


async def read_to_the_end(watch: Any) -> None:
    """Until the watch ends; raises what ended it."""
    async with asyncio.timeout(20):
        while await watch.read() is not grpc.aio.EOF:
            pass
