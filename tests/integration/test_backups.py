"""Backup and restore: between real etcds, with etcd gone, corrupt, cut off, interrupted."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from deploy.local.layout import Layout
from lingqu.registry.v1 import access_pb2, models_pb2, rollouts_pb2
from lingqu.registry.v1 import backups_pb2 as pb
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
        await restore(api, saved)
        assert await api.create() == 3
        await etcd.close()
