"""The registry, its clients and etcd under faults: killed, paused, compacted, full, wiped. Real processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from etcd3aio import _protobuf as etcd_pb

from bench.registry_parts import Child, etcd_child, registry_child
from deploy.local import layout as at
from deploy.local import parts
from deploy.local.layout import Layout
from lingqu.registry.v1 import instances_pb2 as pb
from services.core.discovery import Replica
from services.core.errors import StoreFull
from services.core.lifecycle import CHANNEL_OPTIONS
from services.core.registration import Registration
from services.core.registry import Registry, Watched
from services.core.tasks import background
from services.registry.etcd import Etcd, Put
from services.registry.instances import INSTANCES
from tests.conftest import free_offset, show_logs
from tests.registries import ids, refused, register
from tests.waiting import pause, until

pytestmark = pytest.mark.chaos
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


@pytest.mark.parametrize("outage_s", [8, pytest.param(60, marks=pytest.mark.soak)])
async def test_etcd_is_away_and_comes_back(tmp_path: Path, outage_s: float) -> None:
    """Longer than the leases: they wait for etcd, so that nobody has to register again."""
    async with running(tmp_path) as suite, fleet(suite.addresses) as living:
        writer = Writer(suite.addresses)
        async with background(writer.run()):
            await until(lambda: len(writer.acknowledged) > 10, "writes are acknowledged")
            await suite.etcd.kill()
            await until(lambda: living.told.stale, "the watcher is told that etcd is away")
            listed = await living.client.instances.ListInstances(pb.ListInstancesRequest(), timeout=2)
            assert listed.stale
            begun = time.monotonic()
            error = await refused(register(living.client, pb.Instance(id="no", service="else")))
            assert error.code == grpc.StatusCode.UNAVAILABLE
            assert error.retry_after_s
            assert time.monotonic() - begun < 2
            await pause(outage_s, "etcd is away for longer than the leases last")
            assert sorted(living.told.items) == living.names
            before = len(writer.acknowledged)
            await suite.etcd.start()
            await until(living.complete, "every living instance is there", timeout_s=20)
            await until(lambda: len(writer.acknowledged) > before, "writes go on")
        assert writer.refusals <= {"UNAVAILABLE", "DEADLINE_EXCEEDED"}
        assert await writer.nothing_lost()
        assert living.told.removed == []
        assert living.told.snapshots == 1
        await writer.client.close()


async def test_etcd_is_paused(tmp_path: Path) -> None:
    """It accepts connections and does not answer; when it goes on, the leases are over."""
    async with running(tmp_path) as suite, fleet(suite.addresses) as living:
        with paused(suite.etcd):
            await until(lambda: living.told.stale, "the silence is noticed", timeout_s=12)
            begun = time.monotonic()
            error = await refused(register(living.client, pb.Instance(id="no", service="else")))
            assert error.code == grpc.StatusCode.UNAVAILABLE
            assert time.monotonic() - begun < 2
            assert len(await ids(living.client)) == len(living.names)
        await until(living.complete, "every living instance is back", timeout_s=30)


async def test_a_registry_is_killed(tmp_path: Path) -> None:
    """Instances stay, and watchers go on at another registry without a snapshot."""
    async with running(tmp_path) as suite, fleet(suite.addresses) as living:
        victim = suite.used_by(living.client)
        await victim.kill()
        await register_somewhere(suite, victim, "late")
        living.names = sorted([*living.names, "late"])
        await until(living.complete, "the watcher goes on elsewhere", timeout_s=20)
        await pause(TTL_S + 1, "leases that nobody renewed would be over")
        assert await living.complete()
        assert living.told.removed == []
        assert living.told.snapshots == 1


async def register_somewhere(suite: Suite, victim: Child, name: str) -> None:
    address = next(r.address for r in suite.registries if r is not victim)
    async with client_of(address) as client:
        await register(client, pb.Instance(id=name, service="inference"), ttl_s=300)


async def test_a_registry_is_paused(tmp_path: Path) -> None:
    """It accepts connections and does not answer: it is left before the leases end."""
    async with running(tmp_path) as suite, fleet(suite.addresses, ttl_s=9) as living:
        victim = suite.used_by(living.client)
        with paused(victim):
            await register_somewhere(suite, victim, "late")
            await until(lambda: "late" in living.told.items, "the watcher goes on elsewhere", timeout_s=15)
            await pause(6.0, "leases that nobody renewed would be over")
            assert living.told.removed == []
            assert living.told.snapshots == 1


async def test_etcd_is_compacted_while_everybody_is_behind(tmp_path: Path) -> None:
    """What changed meanwhile arrives, once; what came and went does not."""
    async with running(tmp_path, registries=1) as suite, client_of(suite.addresses) as client:
        for name in ("goes", "stays", "changes"):
            await register(client, pb.Instance(id=name, service="inference"), ttl_s=300)
        watch: Any = client.instances.WatchInstances(pb.WatchInstancesRequest())
        assert len((await watch.read()).upserted) == 3
        etcd = Etcd(suite.endpoints)
        with paused(suite.registries[0]):
            await suite.etcd.kill()
            await suite.etcd.start()
            await until(lambda: reads(etcd), "etcd is back")
            changed = pb.Instance(id="changes", service="inference", labels={"k": "v"})
            await etcd.commit([Put(INSTANCES + "changes", changed.SerializeToString())])
            await etcd.commit([Put(INSTANCES + "blink", pb.Instance(id="blink").SerializeToString())])
            await etcd.commit([], deletes=[INSTANCES + "goes", INSTANCES + "blink"])
            comes = pb.Instance(id="comes", service="inference")
            revision = await etcd.commit([Put(INSTANCES + "comes", comes.SerializeToString())])
            await etcd.members.current.kv.Compact(etcd_pb.CompactionRequest(revision=revision, physical=True))
        upserted: list[str] = []
        removed: list[str] = []
        while "comes" not in upserted:
            update = await asyncio.wait_for(watch.read(), 15)
            assert not update.snapshot
            upserted += [i.id for i in update.upserted]
            removed += update.removed
        assert (sorted(upserted), removed) == (["changes", "comes"], ["goes"])
        watch.cancel()
        await etcd.close()


async def reads(etcd: Etcd) -> bool:
    try:
        await etcd.read("/x", timeout_s=1)
    except Exception:
        return False
    return True


@asynccontextmanager
async def replica(addresses: str, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process registered as "i1" with a TTL of two seconds."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.replica", addresses, "i1", str(port), "2"
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            os.kill(process.pid, signal.SIGCONT)
            process.kill()
        await process.wait()


async def test_a_replica_is_paused_and_wakes_up(tmp_path: Path) -> None:
    async with running(tmp_path, registries=1) as suite, client_of(suite.addresses) as client:

        async def shown() -> list[str]:
            answer = await client.instances.ListInstances(pb.ListInstancesRequest(), timeout=5)
            return [i.endpoints["grpc"].rpartition(":")[2] for i in answer.instances]

        async def is_shown(*ports: str) -> bool:
            return await shown() == list(ports)

        async with replica(suite.addresses, 1) as first:
            await until(lambda: is_shown("1"), "registered")
            first.send_signal(signal.SIGSTOP)
            await until(lambda: is_shown(), "its lease ends")
            first.send_signal(signal.SIGCONT)
            await until(lambda: is_shown("1"), "it is back by itself", timeout_s=8)

            first.send_signal(signal.SIGSTOP)
            await until(lambda: is_shown(), "its lease ends again")
            async with replica(suite.addresses, 2) as second:
                await until(lambda: is_shown("2"), "its successor is there")
                first.send_signal(signal.SIGCONT)
                await pause(4.0, "it tries to come back meanwhile")
                assert await is_shown("2")
                first.send_signal(signal.SIGTERM)
                await first.wait()
                assert await is_shown("2")
                second.send_signal(signal.SIGTERM)
                await second.wait()
            assert await shown() == []


async def test_etcd_has_no_space_left(tmp_path: Path) -> None:
    """A clear refusal, while reads and leases go on; and the way back that it names."""
    async with (
        running(tmp_path, f"--quota-backend-bytes={1 << 20}", registries=1) as suite,
        fleet(suite.addresses, size=3, ttl_s=2) as living,
    ):
        etcd = Etcd(suite.endpoints)
        with pytest.raises(StoreFull):
            await fill(etcd)
        error = await refused(register(living.client, pb.Instance(id="no", service="else")))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL")
        assert "defrag" in str(error)
        await pause(3.0, "leases that nobody renewed would be over")
        assert await living.complete()
        await recover(suite.etcd.address)

        async def writable() -> bool:
            try:
                await register(living.client, pb.Instance(id="yes", service="else"))
            except grpc.aio.AioRpcError:
                return False
            return True

        await until(writable, "the registry writes again")
        await etcd.close()


async def fill(etcd: Etcd) -> None:
    for _ in range(100):
        await etcd.commit([Put("/filler", os.urandom(100_000))])


async def recover(address: str) -> None:
    """etcdctl compact, defrag, alarm disarm."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        kv: Any = etcd_pb.KVStub(channel)
        maintenance: Any = etcd_pb.MaintenanceStub(channel)
        now = (await kv.Range(etcd_pb.RangeRequest(key=b"x"))).header.revision
        await kv.Compact(etcd_pb.CompactionRequest(revision=now, physical=True))
        await maintenance.Defragment(etcd_pb.DefragmentRequest())
        for alarm in (await maintenance.Alarm(etcd_pb.AlarmRequest(action=0))).alarms:
            await maintenance.Alarm(
                etcd_pb.AlarmRequest(action=2, memberID=alarm.memberID, alarm=alarm.alarm)
            )


async def test_a_watcher_that_does_not_read_is_cut_off_and_costs_little(tmp_path: Path) -> None:
    async with running(tmp_path, registries=1) as suite, client_of(suite.addresses) as client:
        watches: list[Any] = []
        for _ in range(20):
            watch: Any = client.instances.WatchInstances(pb.WatchInstancesRequest())
            assert (await watch.read()).snapshot
            watches.append(watch)
        before = suite.registries[0].rss_mib()
        models = [pb.HostedModel(model="m", version=n + 1, detail="x" * 1000) for n in range(200)]
        for number in range(150):  # 200 kB each: 30 MB for each of them
            big = pb.Instance(id=f"i{number % 3}", service="inference", models=models)
            big.labels["number"] = str(number)
            await register(client, big, ttl_s=300)
        await pause(7.0, "they are given time to read, and do not")
        grown = suite.registries[0].rss_mib() - before
        assert grown < 200, f"{grown:.0f} MiB for 20 watchers that would be told 30 MB each"
        error = await refused(_read_to_the_end(watches[0]))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_WATCHER")
        assert error.retry_after_s
        for watch in watches:
            watch.cancel()


async def _read_to_the_end(watch: Any) -> None:
    async with asyncio.timeout(20):
        while await watch.read() is not grpc.aio.EOF:
            pass


async def test_etcd_is_wiped(tmp_path: Path) -> None:
    """Another store: watchers start from a snapshot, and all that live are there again."""
    async with running(tmp_path) as suite, fleet(suite.addresses) as living:
        watch: Any = living.client.instances.WatchInstances(pb.WatchInstancesRequest())
        await watch.read()
        await suite.etcd.kill()
        shutil.rmtree(tmp_path / "etcd")
        await suite.etcd.start()
        error = await refused(_read_to_the_end(watch))
        assert error.reason == "STORE_REPLACED"
        await until(living.complete, "every living instance is there again", timeout_s=30)
        assert living.told.snapshots > 1


async def test_the_leader_of_three_members_is_killed(tmp_path: Path) -> None:
    if shutil.which("etcd", path=parts._path_without_environment()) is None:
        reason = "needs etcd on PATH: the one of the wheel is not safe in clusters"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    layouts = [Layout(tmp_path / name, free_offset()) for name in ("m0", "m1", "m2")]
    cluster = ",".join(f"m{n}=http://{layout.address(at.ETCD_PEER)}" for n, layout in enumerate(layouts))
    members = [
        etcd_child(layout, f"--name=m{n}", f"--initial-cluster={cluster}") for n, layout in enumerate(layouts)
    ]
    async with started(members, layouts[0], 2) as suite, fleet(suite.addresses) as living:
        writer = Writer(suite.addresses)
        async with background(writer.run()):
            await until(lambda: len(writer.acknowledged) > 10, "writes are acknowledged")
            leader = await leader_of(members)
            await leader.kill()
            before = len(writer.acknowledged)
            await until(lambda: len(writer.acknowledged) > before + 10, "writes go on", timeout_s=20)
            await until(living.complete, "every living instance is known", timeout_s=20)
        assert await living.complete()
        assert await writer.nothing_lost()
        assert living.told.removed == []
        assert living.told.revisions == sorted(living.told.revisions)
        await writer.client.close()


async def leader_of(members: list[Child]) -> Child:
    for member in members:
        async with grpc.aio.insecure_channel(member.address, options=CHANNEL_OPTIONS) as channel:
            maintenance: Any = etcd_pb.MaintenanceStub(channel)
            status = await maintenance.Status(etcd_pb.StatusRequest(), timeout=5)
            if status.leader == status.header.member_id:
                return member
    raise AssertionError("no member leads")
