"""The registry on a real etcd: leases, watches, versions, two writers at once, etcd lost and found."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from lingqu.client import LingquError
from lingqu.registry.v1 import instances_pb2 as pb
from lingqu.registry.v1 import models_pb2
from services.core.discovery import READY, Hosted, Registration, Registry, Replica, VersionKey
from services.core.errors import SlowWatcher
from services.core.tasks import background
from services.registry import keyspace
from services.registry import mirror as mirrors
from services.registry.app import RegistrySettings, running
from services.registry.etcd import Etcd, Put
from tests.conftest import EtcdServer, free_offset
from tests.waiting import pause, until

INSTANCE = pb.Instance(id="i1", service="inference", endpoints={"grpc": "127.0.0.1:1"})


@asynccontextmanager
async def served(etcd: EtcdServer) -> AsyncIterator[Registry]:
    """A registry of its own on `etcd`, and a client of it."""
    address = f"127.0.0.1:{8082 + free_offset()}"
    async with running(RegistrySettings(registry_listen=address, etcd=etcd.address, grace_s=0.1)):
        client = Registry(address)
        try:
            yield client
        finally:
            await client.close()


@pytest.fixture
async def registry(etcd_server: EtcdServer) -> AsyncIterator[Registry]:
    async with served(etcd_server) as client:
        yield client


async def register(
    registry: Registry, instance: pb.Instance = INSTANCE, ttl_s: int = 10, lease: int = 0
) -> int:
    request = pb.RegisterInstanceRequest(instance=instance, ttl=Duration(seconds=ttl_s), lease_id=lease)
    answer = await registry.instances.RegisterInstance(request, timeout=5)
    return answer.lease_id


async def ids(registry: Registry, service: str = "") -> list[str]:
    answer = await registry.instances.ListInstances(pb.ListInstancesRequest(service=service), timeout=5)
    return [instance.id for instance in answer.instances]


def version(model: str = "m", **fields: Any) -> models_pb2.ModelVersion:
    artifact = models_pb2.Artifact(uri="file:///x", sha256="0" * 64)
    return models_pb2.ModelVersion(
        **{"model": model, "artifact": artifact, "task": "tensor", "runtime": "python", **fields}
    )


async def create(registry: Registry, model: str = "m", request_id: str = "") -> int:
    request = models_pb2.CreateModelVersionRequest(version=version(model), request_id=request_id)
    answer = await registry.models.CreateModelVersion(request, timeout=5)
    return answer.version.version


async def refused(call: Any) -> LingquError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return LingquError(caught.value)


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
        await etcd.commit([Put(f"{keyspace.PREFIX}{number % 7}", str(number).encode())])
    seen, start = 0, 1
    while seen < 1500:
        stream = etcd.watch(keyspace.PREFIX, start)
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
        stream = mirror.follow(keyspace.PREFIX)
        await anext(stream)
        for number in range(10):  # one update each
            await mirror.reached(await etcd.commit([Put(f"{keyspace.PREFIX}k{number}", b"")]))
        with pytest.raises(SlowWatcher):
            await _read_all(stream)
    await etcd.close()


async def _read_all(stream: AsyncIterator[Any]) -> None:
    async for _ in stream:
        continue


async def test_versions_are_numbered_from_one_and_never_twice(registry: Registry) -> None:
    numbers = await asyncio.gather(*(create(registry) for _ in range(8)))
    assert sorted(numbers) == list(range(1, 9))
    assert await create(registry, "other") == 1


async def test_two_registries_never_give_the_same_number(etcd_server: EtcdServer) -> None:
    async with served(etcd_server) as one, served(etcd_server) as two:
        numbers = await asyncio.gather(*(create(r) for r in (one, two) for _ in range(8)))
        assert sorted(numbers) == list(range(1, 17))
        listed = await two.models.ListModelVersions(models_pb2.ListModelVersionsRequest(), timeout=5)
        assert len(listed.models) == 1


async def test_creating_is_safe_to_retry(registry: Registry) -> None:
    numbers = await asyncio.gather(*(create(registry, request_id="same") for _ in range(5)))
    assert set(numbers) == {1}
    assert await create(registry, request_id="another") == 2


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model": ""}, "version.model"),
        ({"model": "a/b"}, "version.model"),
        ({"model": "x" * 65}, "version.model"),
        ({"model": "bad\nname"}, "version.model"),
        ({"artifact": models_pb2.Artifact(uri="/x", sha256="0" * 64)}, "version.artifact.uri"),
        ({"artifact": models_pb2.Artifact(uri="file:///x", sha256="abc")}, "version.artifact.sha256"),
        ({"task": "dream"}, "version.task"),
        ({"runtime": "abacus"}, "version.runtime"),
    ],
)
async def test_a_wrong_version_is_refused_by_field(
    registry: Registry, fields: dict[str, Any], field: str
) -> None:
    request = models_pb2.CreateModelVersionRequest(version=version(**fields))
    error = await refused(registry.models.CreateModelVersion(request, timeout=5))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_a_model_keeps_its_task(registry: Registry) -> None:
    await create(registry)
    request = models_pb2.CreateModelVersionRequest(version=version(task="embed"))
    error = await refused(registry.models.CreateModelVersion(request, timeout=5))
    assert error.field == "version.task"


def hosting(number: int, state: int, detail: str = "") -> pb.Instance:
    hosted = pb.HostedModel(model="m", version=number, state=state, detail=detail)  # type: ignore[arg-type]
    return pb.Instance(id="i1", service="inference", models=[hosted])


async def test_traffic_goes_only_to_a_version_that_some_replica_has_ready(registry: Registry) -> None:
    request = models_pb2.SetTrafficRequest(model="m", version=1)
    assert (await refused(registry.models.SetTraffic(request, timeout=5))).code == grpc.StatusCode.NOT_FOUND
    await create(registry)
    await register(registry, hosting(1, pb.HOSTED_STATE_LOADING))
    error = await refused(registry.models.SetTraffic(request, timeout=5))
    assert error.code == grpc.StatusCode.FAILED_PRECONDITION
    await register(registry, hosting(1, pb.HOSTED_STATE_FAILED, "model.onnx is corrupt"))
    assert "model.onnx is corrupt" in str(await refused(registry.models.SetTraffic(request, timeout=5)))
    await register(registry, hosting(1, pb.HOSTED_STATE_READY))
    answer = await registry.models.SetTraffic(request, timeout=5)
    assert (answer.model.traffic_version, answer.model.previous_version) == (1, 0)
    await create(registry)
    await register(registry, hosting(2, pb.HOSTED_STATE_READY))
    request = models_pb2.SetTrafficRequest(model="m", version=2)
    answer = await registry.models.SetTraffic(request, timeout=5)
    assert (answer.model.traffic_version, answer.model.previous_version) == (2, 1)


async def test_models_are_watched_whole(registry: Registry) -> None:
    watch: Any = registry.models.WatchModels(models_pb2.WatchModelsRequest())
    assert (await watch.read()).snapshot
    await create(registry)
    await create(registry)
    await watch.read()
    second = await watch.read()
    assert [v.version for v in second.upserted[0].versions] == [1, 2]
    watch.cancel()


async def test_etcd_away_reads_go_on_and_writes_say_so(etcd_server: EtcdServer) -> None:
    async with served(etcd_server) as registry:
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
        await etcd.commit([Put(f"{keyspace.PREFIX}{key}", b"1")])
    follower = asyncio.create_task(mirror.run())
    stream = mirror.follow(keyspace.PREFIX)
    await anext(stream)
    follower.cancel()
    await asyncio.gather(follower, return_exceptions=True)
    await etcd.delete(f"{keyspace.PREFIX}goes")
    await etcd.commit([Put(f"{keyspace.PREFIX}changes", b"2")])
    revision = await etcd.commit([Put(f"{keyspace.PREFIX}comes", b"1")])
    async with grpc.aio.insecure_channel(etcd_server.address) as channel:
        await stubs.KVStub(channel).Compact(stubs.CompactionRequest(revision=revision, physical=True))
    async with background(mirror.run()):
        batch = await asyncio.wait_for(anext(stream), 5)
    changes = {c.key.removeprefix(keyspace.PREFIX): c.record and c.record.value for c in batch.changes}
    assert changes == {"goes": None, "changes": b"2", "comes": b"1"}
    await etcd.close()


async def test_a_registration_survives_the_loss_of_its_lease(etcd_server: EtcdServer) -> None:
    async with served(etcd_server) as registry:
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
