"""etcd under faults, and the registries and their clients meanwhile: killed, paused, compacted, full, wiped.
Real processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from etcd3aio import _protobuf as etcd_pb

from bench.registry_parts import Child, etcd_child
from deploy.local import layout as at
from deploy.local import parts
from deploy.local.layout import Layout
from lingqu.registry.v1 import instances_pb2 as pb
from services.core.errors import StoreFull
from services.core.lifecycle import CHANNEL_OPTIONS
from services.core.tasks import background
from services.registry.etcd import Etcd, Put
from services.registry.instances import INSTANCES
from tests.conftest import free_offset
from tests.outages import (
    Writer,
    client_of,
    fleet,
    paused,
    read_to_the_end,
    running,
    started,
)
from tests.registries import ids, refused, register
from tests.waiting import pause, until

pytestmark = pytest.mark.chaos


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


async def test_etcd_is_wiped(tmp_path: Path) -> None:
    """Another store: watchers start from a snapshot, and all that live are there again."""
    async with running(tmp_path) as suite, fleet(suite.addresses) as living:
        watch: Any = living.client.instances.WatchInstances(pb.WatchInstancesRequest())
        await watch.read()
        await suite.etcd.kill()
        shutil.rmtree(tmp_path / "etcd")
        await suite.etcd.start()
        error = await refused(read_to_the_end(watch))
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
