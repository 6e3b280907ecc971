"""Instances on a real etcd: leases, watches and how they resume, takeovers, etcd lost and found."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from lingqu.registry.v1 import instances_pb2 as pb
from services.core.discovery import READY, Hosted, Replica, VersionKey
from services.core.errors import OutcomeUnknown, SlowWatcher
from services.core.registration import Registration
from services.core.registry import Registry
from services.core.tasks import background
from services.registry import mirror as mirrors
from services.registry.etcd import Change, Etcd, Put, Record, Unchanged
from services.registry.history import History
from tests.conftest import EtcdServer
from tests.registries import connected, ids, refused, register
from tests.waiting import pause, until


@pytest.fixture
async def registry(etcd_server: EtcdServer) -> AsyncIterator[Registry]:
    async with connected(etcd_server) as client:
        yield client


async def test_a_registered_instance_is_listed_at_once(registry: Registry) -> None:
    await register(registry)
    await register(registry, pb.Instance(id="other", service="else"))
    assert await ids(registry) == ["i1", "other"]
    assert await ids(registry, "inference") == ["i1"]


async def test_registering_again_replaces_the_record_under_the_same_lease(registry: Registry) -> None:
    lease = await register(registry)
    changed = pb.Instance(id="i1", service="inference", endpoints={"grpc": "127.0.0.1:2"})
    assert await register(registry, changed, lease=lease) == lease
    answer = await registry.instances.ListInstances(pb.ListInstancesRequest(), timeout=5)
    assert answer.instances[0].endpoints["grpc"] == "127.0.0.1:2"


async def test_an_instance_that_falls_silent_is_gone_within_its_ttl(registry: Registry) -> None:
    lease = await register(registry, ttl_s=2)
    # etcd looks for expired leases every half second, and rounds.
    await until(lambda: _empty(registry), "the instance is gone", timeout_s=2 + 2)
    call: Any = registry.instances.KeepAlive()
    await call.write(pb.KeepAliveRequest(lease_id=lease))
    error = await refused(call.read())
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "LEASE_EXPIRED")


async def _empty(registry: Registry) -> bool:
    return not await ids(registry)


async def test_kept_alive_it_stays(registry: Registry) -> None:
    lease = await register(registry, ttl_s=1)
    call: Any = registry.instances.KeepAlive()
    for _ in range(10):
        await call.write(pb.KeepAliveRequest(lease_id=lease))
        answer = await call.read()
        assert answer.lease_id == lease
        await pause(0.3, "three seconds of a lease of one")
    assert await ids(registry) == ["i1"]
    call.cancel()


@pytest.mark.parametrize(
    ("lease", "code"), [(0, grpc.StatusCode.INVALID_ARGUMENT), (12345, grpc.StatusCode.NOT_FOUND)]
)
async def test_a_lease_that_never_was_is_refused_at_once(
    registry: Registry, lease: int, code: grpc.StatusCode
) -> None:
    call: Any = registry.instances.KeepAlive(timeout=5)
    await call.write(pb.KeepAliveRequest(lease_id=lease))
    assert (await refused(call.read())).code == code


async def test_a_watch_that_breaks_while_it_catches_up_misses_nothing(etcd_server: EtcdServer) -> None:
    """etcd splits a backlog; each part is followed up from where it ended, not from the store's revision."""
    etcd = Etcd(etcd_server.address)
    for number in range(1500):
        await etcd.commit([Put(f"{mirrors.PREFIX}{number % 7}", str(number).encode())])
    seen, start = 0, 1
    while seen < 1500:
        stream = etcd.watch(mirrors.PREFIX, start)
        assert not (await asyncio.wait_for(anext(stream), 5)).changes
        batch = await asyncio.wait_for(anext(stream), 5)
        await stream.aclose()
        seen, start = seen + len(batch.changes), batch.revision + 1
    assert seen == 1500
    await etcd.close()


async def test_deregistering_twice_is_no_error(registry: Registry) -> None:
    await register(registry)
    for _ in range(2):
        await registry.instances.DeregisterInstance(pb.DeregisterInstanceRequest(id="i1"), timeout=5)
    assert await ids(registry) == []


@pytest.mark.parametrize(
    ("instance", "field"),
    [
        (pb.Instance(id="", service="s"), "instance.id"),
        (pb.Instance(id="a/b", service="s"), "instance.id"),
        (pb.Instance(id="a", service=""), "instance.service"),
        (pb.Instance(id="a", service="s", endpoints={"grpc": "no port"}), "instance.endpoints[grpc]"),
        (pb.Instance(id="a", service="s", endpoints={"grpc": "0.0.0.0:1"}), "instance.endpoints[grpc]"),
        (pb.Instance(id="a", service="s", endpoints={"grpc": "host.name:1"}), "instance.endpoints[grpc]"),
        (pb.Instance(id="a", service="s", models=[pb.HostedModel(model="m")]), "instance.models[0].version"),
        (pb.Instance(id="a", service="s", labels={"k": "x" * 300}), "instance.labels[k]"),
    ],
)
async def test_a_wrong_instance_is_refused_by_field(
    registry: Registry, instance: pb.Instance, field: str
) -> None:
    call = registry.instances.RegisterInstance(pb.RegisterInstanceRequest(instance=instance), timeout=5)
    error = await refused(call)
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_a_watch_starts_with_a_snapshot_and_goes_on_with_changes(registry: Registry) -> None:
    await register(registry)
    watch: Any = registry.instances.WatchInstances(pb.WatchInstancesRequest(service="inference"))
    first = await watch.read()
    assert first.snapshot
    assert [i.id for i in first.upserted] == ["i1"]
    await register(registry, pb.Instance(id="elsewhere", service="else"))
    await register(registry, pb.Instance(id="i2", service="inference"))
    second = await watch.read()
    assert [i.id for i in second.upserted] == ["i2"]
    assert not second.snapshot
    await registry.instances.DeregisterInstance(pb.DeregisterInstanceRequest(id="i1"), timeout=5)
    third = await watch.read()
    assert list(third.removed) == ["i1"]
    assert first.revision < second.revision < third.revision
    watch.cancel()


async def test_a_watcher_that_does_not_read_is_cut_off(
    etcd_server: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "SUBSCRIBER_BUFFER", 4)
    etcd = Etcd(etcd_server.address)
    mirror = mirrors.Mirror(etcd)
    async with background(mirror.run()):
        stream = mirror.follow(mirrors.PREFIX)
        await anext(stream)
        for number in range(10):  # one update each
            await mirror.reached(await etcd.commit([Put(f"{mirrors.PREFIX}k{number}", b"")]))
        with pytest.raises(SlowWatcher):
            await _read_all(stream)
    await etcd.close()


async def _read_all(stream: AsyncIterator[Any]) -> None:
    async for _ in stream:
        continue


async def test_etcd_away_reads_go_on_and_writes_say_so(etcd_server: EtcdServer) -> None:
    async with connected(etcd_server) as registry:
        await register(registry, ttl_s=30)
        await etcd_server.kill()
        error = await refused(register(registry, pb.Instance(id="i2", service="inference")))
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "BACKEND_UNAVAILABLE")
        assert error.retry_after_s
        answer = await registry.instances.ListInstances(pb.ListInstancesRequest(), timeout=5)
        assert answer.stale
        assert [i.id for i in answer.instances] == ["i1"]
        await etcd_server.start()

        async def writable() -> bool:
            try:
                await register(registry, pb.Instance(id="i2", service="inference"))
            except grpc.aio.AioRpcError:
                return False
            return True

        await until(writable, "the registry writes again")
        answer = await registry.instances.ListInstances(pb.ListInstancesRequest(), timeout=5)
        assert not answer.stale
        assert [i.id for i in answer.instances] == ["i1", "i2"]


async def test_a_compaction_behind_the_mirror_loses_nothing(etcd_server: EtcdServer) -> None:
    """The mirror is made to resume from a revision that is gone: what changed meanwhile arrives, once."""
    from etcd3aio import _protobuf as stubs

    etcd = Etcd(etcd_server.address)
    mirror = mirrors.Mirror(etcd)
    for key in ("stays", "goes", "changes"):
        await etcd.commit([Put(f"{mirrors.PREFIX}{key}", b"1")])
    follower = asyncio.create_task(mirror.run())
    stream = mirror.follow(mirrors.PREFIX)
    await anext(stream)
    follower.cancel()
    await asyncio.gather(follower, return_exceptions=True)
    await etcd.delete(f"{mirrors.PREFIX}goes")
    await etcd.commit([Put(f"{mirrors.PREFIX}changes", b"2")])
    revision = await etcd.commit([Put(f"{mirrors.PREFIX}comes", b"1")])
    async with grpc.aio.insecure_channel(etcd_server.address) as channel:
        await stubs.KVStub(channel).Compact(stubs.CompactionRequest(revision=revision, physical=True))
    async with background(mirror.run()):
        batch = await asyncio.wait_for(anext(stream), 5)
    changes = {c.key.removeprefix(mirrors.PREFIX): c.record and c.record.value for c in batch.changes}
    assert changes == {"goes": None, "changes": b"2", "comes": b"1"}
    await etcd.close()


async def test_a_registration_survives_the_loss_of_its_lease(etcd_server: EtcdServer) -> None:
    async with connected(etcd_server) as registry:
        registration = Registration(registry, Replica("i1", "inference", {"grpc": "127.0.0.1:1"}), 3)
        async with background(registration.run()):
            await until(lambda: ids(registry), "registered")
            await registry.instances.DeregisterInstance(pb.DeregisterInstanceRequest(id="i1"), timeout=5)
            await until(lambda: ids(registry), "registered again")
            registration.update([Hosted(VersionKey("m", 1), READY)])

            async def told() -> bool:
                answer = await registry.instances.ListInstances(pb.ListInstancesRequest(), timeout=5)
                return bool(answer.instances and answer.instances[0].models)

            await until(told, "the update arrived", timeout_s=2)
        await registration.withdraw()
        assert await ids(registry) == []


def watching(registry: Registry, revision: int = 0, store_id: str = "", service: str = "") -> Any:
    request = pb.WatchInstancesRequest(service=service, resume_revision=revision, store_id=store_id)
    return registry.instances.WatchInstances(request)


async def read(watch: Any) -> Any:
    return await asyncio.wait_for(watch.read(), 10)


async def test_a_watch_resumes_with_what_changed_since(etcd_server: EtcdServer) -> None:
    """At another registry, whose batches need not be the same: each change once, and no snapshot."""
    async with connected(etcd_server) as one, connected(etcd_server) as two:
        await register(one)
        await register(one, pb.Instance(id="goes", service="inference"))
        watch = watching(one, service="inference")
        seen = await read(watch)
        watch.cancel()
        await register(one, pb.Instance(id="comes", service="inference"))
        await register(one, pb.Instance(id="elsewhere", service="else"))
        await register(one, pb.Instance(id="comes-and-goes", service="inference"))
        for name in ("goes", "comes-and-goes"):
            await one.instances.DeregisterInstance(pb.DeregisterInstanceRequest(id=name), timeout=5)
        await until(lambda: _names(two, ["comes", "elsewhere", "i1"]), "the other registry has caught up")
        resumed = watching(two, seen.revision, seen.store_id, "inference")
        answer = await read(resumed)
        assert not answer.snapshot
        assert [i.id for i in answer.upserted] == ["comes"]
        assert list(answer.removed) == ["goes"]
        again = watching(two, answer.revision, answer.store_id, "inference")
        nothing = await read(again)
        assert (nothing.snapshot, len(nothing.upserted), len(nothing.removed)) == (False, 0, 0)
        await register(one, pb.Instance(id="later", service="inference"))
        for watch in (resumed, again):
            assert [i.id for i in (await read(watch)).upserted] == ["later"]
            watch.cancel()


async def _names(registry: Registry, names: list[str]) -> bool:
    return await ids(registry) == names


@pytest.mark.parametrize("ahead", [0, 1000])
async def test_what_cannot_be_resumed_starts_with_a_snapshot(registry: Registry, ahead: int) -> None:
    """Another store's id; and a revision that etcd has never seen, which is not waited for."""
    await register(registry)
    first = await read(watching(registry))
    store_id = first.store_id if ahead else "another"
    answer = await read(watching(registry, first.revision + ahead, store_id))
    assert answer.snapshot
    assert [i.id for i in answer.upserted] == ["i1"]


async def test_a_revision_of_keys_that_are_not_ours_is_no_future(etcd_server: EtcdServer) -> None:
    """A registry that has listed etcd later knows a revision that no watch of ours will tell."""
    async with connected(etcd_server) as one:
        etcd = Etcd(etcd_server.address)
        await etcd.commit([Put("/elsewhere", b"")])
        await etcd.close()
        async with connected(etcd_server) as two:
            first = await read(watching(two))
            assert not (await read(watching(one, first.revision, first.store_id))).snapshot


def test_history_is_bounded_in_number_and_bytes() -> None:
    history = History(most_changes=2)
    for revision in (1, 2, 3):
        record = Record(f"/k{revision}", b"x" * 10, revision)
        history.add([Change(record.key, record, revision)])
    assert history.since(0, "/") is None
    assert [c.revision for c in history.since(1, "/") or ()] == [2, 3]
    small = History(most_bytes=15)
    small.add([Change(f"/{n}", Record(f"/{n}", b"x" * 10, n), n) for n in (1, 2)])
    assert (small.floor, [c.revision for c in small.since(1, "/") or ()]) == (1, [2])


async def test_a_successor_is_neither_robbed_nor_removed(registry: Registry) -> None:
    """A process was paused, another one was started under its id, and the first one wakes up."""
    paused = await register(registry)
    successor = await register(registry, pb.Instance(id="i1", service="inference", labels={"new": "1"}))
    assert successor != paused
    call: Any = registry.instances.KeepAlive(timeout=5)
    await call.write(pb.KeepAliveRequest(lease_id=paused))
    assert (await refused(call.read())).code == grpc.StatusCode.NOT_FOUND
    assert (await refused(register(registry, lease=paused))).reason == "ALREADY_EXISTS"
    gone = pb.DeregisterInstanceRequest(id="i1", lease_id=paused)
    await registry.instances.DeregisterInstance(gone, timeout=5)
    listed = await registry.instances.ListInstances(pb.ListInstancesRequest(), timeout=5)
    assert [dict(i.labels) for i in listed.instances] == [{"new": "1"}]
    gone.lease_id = successor
    await registry.instances.DeregisterInstance(gone, timeout=5)
    assert await register(registry, lease=paused) == paused


async def test_a_lost_answer_to_a_registration_is_asked_for_again(registry: Registry) -> None:
    lease = await register(registry)
    await registry.instances.DeregisterInstance(pb.DeregisterInstanceRequest(id="i1"), timeout=5)
    assert [await register(registry, lease=lease) for _ in range(2)] == [lease, lease]
    assert await ids(registry) == ["i1"]


async def test_two_registrations_under_one_id_leave_one_of_them(registry: Registry) -> None:
    """The later one stays; the earlier one waits until it is gone."""
    one, two = (
        Registration(registry, Replica("i1", "inference", {"grpc": f"127.0.0.1:{port}"}), 2)
        for port in (1, 2)
    )

    async def at(port: int) -> bool:
        listed = await registry.instances.ListInstances(pb.ListInstancesRequest(), timeout=5)
        return [dict(i.endpoints) for i in listed.instances] == [{"grpc": f"127.0.0.1:{port}"}]

    async with background(one.run()):
        await until(lambda: at(1), "the first is there")
        async with background(two.run()):
            await until(lambda: at(2), "the second took over")
            await pause(2.0, "the first has tried to come back meanwhile")
            assert await at(2)
        await two.withdraw()
        await until(lambda: at(1), "the first is back")
        await two.withdraw()
        assert await at(1)


async def test_a_commit_whose_answer_is_lost_is_a_success_if_it_was_made(etcd_server: EtcdServer) -> None:
    """A member made the change, and its answer never came."""
    etcd = Etcd(etcd_server.address)
    send, lost = etcd.members.call, 0

    async def losing(*args: Any, **kwargs: Any) -> Any:
        nonlocal lost
        answer = await send(*args, **kwargs)
        if not kwargs["repeatable"] and lost < 2:
            lost += 1
            raise OutcomeUnknown("the answer was lost")
        return answer

    etcd.members.call = losing  # type: ignore[method-assign]
    revision = await etcd.commit([Put("/a", b"1")], [Unchanged("/a", 0)])
    assert lost == 2
    record = await etcd.get("/a")
    assert record is not None
    assert (record.value, record.mod_revision) == (b"1", revision)
    assert await etcd.commit([Put("/a", b"2")], [Unchanged("/a", 0)]) == 0
    lost = 1
    with pytest.raises(OutcomeUnknown):  # the key is not as it was, and not as we wrote it
        await etcd.commit([Put("/a", b"2")], [Unchanged("/a", 0)])
    await etcd.close()


async def test_a_drained_instance_stays_so_until_it_is_undone_or_starts_anew(registry: Registry) -> None:
    async def draining() -> bool:
        answer = await registry.instances.ListInstances(pb.ListInstancesRequest(), timeout=5)
        return bool(answer.instances[0].draining)

    lease = await register(registry)
    for _ in range(2):  # once more changes nothing
        await registry.instances.DrainInstance(pb.DrainInstanceRequest(id="i1"), timeout=5)
        assert await draining()
    claimed = pb.Instance(id="i1", service="inference", endpoints={"grpc": "127.0.0.1:2"})
    assert await register(registry, claimed, lease=lease) == lease
    assert await draining()  # a replica tells of its models as before
    await registry.instances.DrainInstance(pb.DrainInstanceRequest(id="i1", undo=True), timeout=5)
    assert not await draining()
    await registry.instances.DrainInstance(pb.DrainInstanceRequest(id="i1"), timeout=5)
    await register(registry)  # another process
    assert not await draining()
    error = await refused(registry.instances.DrainInstance(pb.DrainInstanceRequest(id="nobody"), timeout=5))
    assert error.code == grpc.StatusCode.NOT_FOUND


async def test_a_drained_instance_stays_so_when_its_lease_has_ended(registry: Registry) -> None:
    """A process that was cut off for longer than its lease is still one to be spared."""

    async def draining() -> bool:
        answer = await registry.instances.ListInstances(pb.ListInstancesRequest(), timeout=5)
        return bool(answer.instances[0].draining)

    lease = await register(registry, ttl_s=1)
    await registry.instances.DrainInstance(pb.DrainInstanceRequest(id="i1"), timeout=5)

    async def gone() -> bool:
        return await ids(registry) == []

    await until(gone, "the lease ends")
    assert await register(registry, lease=lease) == lease
    assert await draining()
    await registry.instances.DrainInstance(pb.DrainInstanceRequest(id="i1", undo=True), timeout=5)
    await registry.instances.DeregisterInstance(pb.DeregisterInstanceRequest(id="i1"), timeout=5)
    assert await register(registry, lease=lease) == lease
    assert not await draining()
