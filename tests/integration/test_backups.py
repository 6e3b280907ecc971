"""Backup and restore: between real etcds, with etcd gone, corrupt, cut off, interrupted."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from deploy.local.layout import Layout
from lingqu.client import LingquError
from lingqu.registry.v1 import access_pb2, models_pb2, rollouts_pb2
from lingqu.registry.v1 import backups_pb2 as pb
from services.core.errors import Conflict
from services.registry import keyspace
from services.registry.backups import digest
from services.registry.claims import Claim
from services.registry.etcd import Etcd, Put
from services.registry.keyspace import RESTORING
from tests.conftest import EtcdServer, free_offset
from tests.registries import Api, refused, served, weights
from tests.waiting import until


@pytest.fixture
async def other_etcd(tmp_path: Path) -> AsyncIterator[EtcdServer]:
    server = EtcdServer(Layout(tmp_path / "other", free_offset()))
    await server.start()
    yield server
    await server.stop()


async def fill(api: Api) -> None:
    """Two models, releases, a policy, a running rollout, a client and a revoked key."""
    for model in ("m", "n"):
        await api.create(model)
        await api.create(model)
    await api.host(1, 2)
    await api.host(1, 2, model="n", instance="i2")
    await api.promote(1)
    await api.promote(2)
    await api.rollback()
    await api.promote(1, "n")
    policy = models_pb2.Policy(min_release_interval=Duration(seconds=60))
    await api.models.SetPolicy(models_pb2.SetPolicyRequest(model="m", policy=policy), timeout=5)
    plan = rollouts_pb2.RolloutPlan(steps=[rollouts_pb2.RolloutStep(percent=10, wait=Duration(seconds=600))])
    await api.rollouts.StartRollout(
        rollouts_pb2.StartRolloutRequest(model="n", version=2, plan=plan), timeout=5
    )
    client = access_pb2.Client(name="alice", models=["*"])
    await api.access.SetClient(access_pb2.SetClientRequest(client=client), timeout=5)
    await api.access.RevokeKey(access_pb2.RevokeKeyRequest(key_id="k1"), timeout=5)


async def backup(api: Api) -> list[pb.RestoreRequest]:
    """As the messages that restore it."""
    messages = []
    async for part in api.backups.Backup(pb.BackupRequest(), timeout=10):
        header = part.header if part.HasField("header") else None
        messages.append(pb.RestoreRequest(header=header, records=part.records))
    return messages


async def restore(api: Api, messages: Iterable[pb.RestoreRequest], *, overwrite: bool = False) -> Any:
    first, *rest = copy.deepcopy(list(messages))
    first.overwrite = overwrite
    return await api.backups.Restore(iter([first, *rest]), timeout=20)


async def records(api: Api) -> dict[str, bytes]:
    return {r.key: r.value for message in await backup(api) for r in message.records}


async def test_what_was_backed_up_is_there_again_in_another_etcd(
    etcd_server: EtcdServer, other_etcd: EtcdServer
) -> None:
    async with served(etcd_server) as api:
        await fill(api)
        saved = await backup(api)
        before = await api.model()
    async with served(other_etcd) as api:
        answer = await restore(api, saved)
        assert answer.records == saved[0].header.records
        after = await api.model()
        after.traffic_revision = before.traffic_revision  # another etcd counts on its own
        assert after == before
        keys = await api.access.ListRevokedKeys(access_pb2.ListRevokedKeysRequest(), timeout=5)
        assert [k.key_id for k in keys.keys] == ["k1"]
        # A rollout whose timer is lost must not go on by itself.
        assert (await api.rollout("n")).state == rollouts_pb2.ROLLOUT_STATE_ENDED
        assert weights(await api.model("n")) == {1: 90, 2: 10}
        # And the suite goes on from there: the way back included.
        await api.host(1, 2, model="n", instance="i2")
        assert weights(await api.rollback("n")) == {1: 100}
        assert await api.create() == 3


async def test_the_last_known_state_can_be_saved_while_etcd_is_gone(
    etcd_server: EtcdServer, other_etcd: EtcdServer
) -> None:
    """The disaster: etcd is lost for good, a registry still runs."""
    async with served(etcd_server) as api:
        await fill(api)
        before = await records(api)
        await etcd_server.kill()

        async def noticed() -> bool:
            listed = await api.models.ListModelVersions(models_pb2.ListModelVersionsRequest(), timeout=5)
            return bool(listed.stale)

        await until(noticed, "the registry knows that etcd is away")
        saved = await backup(api)
        assert saved[0].header.stale
    async with served(other_etcd) as api:
        await restore(api, saved)
        assert {k: v for k, v in (await records(api)).items() if "rollout" not in k} == {
            k: v for k, v in before.items() if "rollout" not in k
        }


async def test_a_restore_replaces_only_when_told(etcd_server: EtcdServer) -> None:
    async with served(etcd_server) as api:
        await fill(api)
        saved = await backup(api)
        await api.create("new")
        error = await refused(restore(api, saved))
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "OCCUPIED")
        answer = await restore(api, saved, overwrite=True)
        assert answer.removed >= 1
        listed = await api.models.ListModelVersions(models_pb2.ListModelVersionsRequest(), timeout=5)
        assert [m.name for m in listed.models] == ["m", "n"]


def _corrupted(saved: list[pb.RestoreRequest]) -> Iterator[tuple[str, list[pb.RestoreRequest]]]:
    cut = copy.deepcopy(saved)
    del cut[-1].records[-1]
    yield "records", cut
    flipped = copy.deepcopy(saved)
    flipped[-1].records[0].value = flipped[-1].records[0].value[:-1] + b"!"
    yield "records", flipped
    newer = copy.deepcopy(saved)
    newer[0].header.format = 2
    yield "header.format", newer
    yield "header", copy.deepcopy(saved)[1:]
    yield "header", []


async def test_what_is_no_whole_backup_changes_nothing(etcd_server: EtcdServer) -> None:
    async with served(etcd_server) as api:
        await fill(api)
        saved, before = await backup(api), await records(api)
        for field, wrong in _corrupted(saved):
            call = api.backups.Restore(iter(wrong), timeout=5)
            error = await refused(call)
            assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        assert await records(api) == before


async def test_an_interrupted_restore_keeps_other_writes_out_until_it_is_repeated(
    etcd_server: EtcdServer,
) -> None:
    async with served(etcd_server) as api:
        await fill(api)
        saved = await backup(api)
        etcd = Etcd(etcd_server.address)
        await etcd.commit([Put(RESTORING, b"")])  # as a registry killed in the middle leaves it

        async def refused_now() -> bool:
            error = await refused(api.create())
            return error.reason == "RESTORING"

        await until(refused_now, "writes are refused")
        error = await refused(backup(api))
        assert error.reason == "RESTORING", "half a state must not replace a good backup"
        await restore(api, saved)
        assert await api.create() == 3
        await etcd.close()


@pytest.fixture
async def etcd(etcd_server: EtcdServer) -> AsyncIterator[Etcd]:
    etcd = Etcd(etcd_server.address)
    yield etcd
    await etcd.close()


async def test_of_two_restores_the_one_that_came_last_finishes(
    etcd_server: EtcdServer, other_etcd: EtcdServer
) -> None:
    async with served(other_etcd) as api:
        for number in range(300):  # several batches each
            client = access_pb2.Client(name=f"a{number}")
            await api.access.SetClient(access_pb2.SetClientRequest(client=client), timeout=5)
        first = await backup(api)
    second = _backup_of({f"access/clients/b{n}": access_pb2.Client(name=f"b{n}") for n in range(300)})
    async with served(etcd_server) as one, served(etcd_server) as two:
        answers = await asyncio.gather(restore(one, first), restore(two, second), return_exceptions=True)
        done = [backup for backup, a in zip((first, second), answers, strict=True) if not _is_error(a)]
        assert len(done) == 1, answers
        # CONFLICT: it was overtaken. OCCUPIED: the other one had finished before it began.
        reasons = {LingquError(a).reason for a in answers if isinstance(a, grpc.aio.AioRpcError)}
        assert reasons <= {"CONFLICT", "OCCUPIED"}
        expected = {r.key: r.value for message in done[0] for r in message.records}
        for api in (one, two):
            assert await records(await _caught_up(api)) == expected


def _is_error(answer: object) -> bool:
    return isinstance(answer, BaseException)


async def _caught_up(api: Api) -> Api:
    async def written() -> bool:
        client = access_pb2.Client(name="x")
        try:
            await api.access.SetClient(access_pb2.SetClientRequest(client=client), timeout=5)
        except grpc.aio.AioRpcError as err:
            if LingquError(err).reason != "RESTORING":
                raise
            return False
        await api.access.DeleteClient(access_pb2.DeleteClientRequest(name="x"), timeout=5)
        return True

    await until(written, "writes are taken again")
    return api


async def test_a_restore_that_was_overtaken_writes_nothing_more(etcd: Etcd) -> None:
    overtaken = await Claim.made(etcd)
    await overtaken.begun()
    await overtaken.write([Put(keyspace.model("m", "policy"), b"")])
    claim = await Claim.made(etcd)
    assert claim.interrupted
    for write in (
        overtaken.write([Put(keyspace.model("m", "placement"), b"")]),
        overtaken.write(deletes=[keyspace.model("m", "policy")]),
        overtaken.ended(),
    ):
        with pytest.raises(Conflict):
            await write
    await claim.ended()
    found, _ = await etcd.read(keyspace.MODELS)
    assert [r.key for r in found] == [keyspace.model("m", "policy")]
    assert await etcd.get(RESTORING) is None


async def test_whole_state_is_not_taken_for_an_interrupted_restore(
    etcd_server: EtcdServer, etcd: Etcd
) -> None:
    """One that has only begun to look, and is overtaken or dies, has replaced nothing."""
    async with served(etcd_server) as api:
        await fill(api)
        saved, before = await backup(api), await records(api)
        await Claim.made(etcd)
        error = await refused(restore(api, saved))
        assert error.reason == "OCCUPIED"
        assert await etcd.get(RESTORING) is None
        await _caught_up(api)
        assert await records(api) == before


def _backup_of(values: dict[str, Any]) -> list[pb.RestoreRequest]:
    """A backup with these records, whole by its digest."""
    found = [
        pb.BackupRecord(key=key, value=value if isinstance(value, bytes) else value.SerializeToString())
        for key, value in values.items()
    ]
    return _sealed(found)


def _sealed(found: list[pb.BackupRecord]) -> list[pb.RestoreRequest]:
    header = pb.BackupHeader(format=1, records=len(found), sha256=digest(found))
    return [pb.RestoreRequest(header=header, records=found)]


LATE = access_pb2.RevokedKey(key_id="k")
LATE.expire_time.seconds = 2**60
VERSION = models_pb2.ModelVersion(model="m", version=1)


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("models/m", b"", "key"),
        ("models//traffic", b"", "key"),
        ("models/-m/traffic", b"", "key"),
        ("models/m/other", b"", "key"),
        ("models/m/cooldown", b"", "key"),
        ("models/m/versions/1", VERSION, "key"),
        ("models/m/versions/00000000", VERSION, "key"),
        ("models/m/traffic/x", b"", "key"),
        ("access/clients/", b"", "key"),
        ("access/other/x", b"", "key"),
        ("instances/i1", b"", "key"),
        ("models/m/versions/00000001", b"\xff", "value"),
        ("models/m/versions/00000002", VERSION, "value"),
        ("models/n/versions/00000001", VERSION, "value"),
        ("models/m/releases/00000002", models_pb2.Release(number=1), "value"),
        ("models/m/stages/00000001", b"\x70\x63", "value"),
        ("models/m/traffic", models_pb2.Model(name="n"), "value"),
        ("models/m/policy", models_pb2.Policy(releasers=["["]), "value"),
        ("models/m/rollout", rollouts_pb2.Rollout(model="n"), "value"),
        ("access/clients/a", access_pb2.Client(name="b"), "value"),
        ("access/revoked/k", access_pb2.RevokedKey(key_id="j"), "value"),
        ("access/revoked/k", LATE, "value"),
    ],
)
async def test_a_record_that_could_not_be_served_is_refused_by_name(
    registry: Api, key: str, value: Any, field: str
) -> None:
    error = await refused(restore(registry, _backup_of({"access/clients/good": GOOD, key: value})))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, f"records[1].{field}")
    assert await records(registry) == {}


GOOD = access_pb2.Client(name="good")


@pytest.fixture(scope="module")
async def registry(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Api]:
    server = EtcdServer(Layout(tmp_path_factory.mktemp("etcd"), free_offset()))
    await server.start()
    async with served(server) as api:
        yield api
    await server.stop()


async def test_a_record_that_comes_twice_is_refused(registry: Api) -> None:
    twice = [pb.BackupRecord(key="access/clients/good", value=GOOD.SerializeToString())] * 2
    error = await refused(restore(registry, _sealed(twice)))
    assert error.field == "records[1].key"


async def test_a_revoked_key_that_has_expired_by_our_clock_stays_revoked(etcd_server: EtcdServer) -> None:
    past = access_pb2.RevokedKey(key_id="k")
    past.expire_time.FromSeconds(1)
    async with served(etcd_server) as api:
        await restore(api, _backup_of({"access/revoked/k": past}))
        assert list(await records(api)) == ["access/revoked/k"]
        etcd = Etcd(etcd_server.address)
        record = await etcd.get(f"{keyspace.REVOKED}k")
        assert record
        assert await etcd.remaining(record.lease) > 365 * 86_400
        await etcd.close()


async def test_a_record_that_nobody_can_read_ends_watches_and_not_the_registry(
    etcd_server: EtcdServer, etcd: Etcd
) -> None:
    async with served(etcd_server) as api:
        await api.create()
        watch = api.models.WatchModels(models_pb2.WatchModelsRequest())
        assert (await watch.read()).snapshot
        broken = keyspace.model("m", "policy")
        await etcd.commit([Put(broken, b"\xff")])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.read()
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        await etcd.delete(broken)
        assert await api.create() == 2, "it goes on"
