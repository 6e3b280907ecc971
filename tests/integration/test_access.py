"""Clients and revoked keys on a real etcd."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from lingqu.registry.v1 import access_pb2 as pb
from tests.conftest import EtcdServer
from tests.registries import Api, refused, served
from tests.waiting import until


@pytest.fixture
async def api(etcd_server: EtcdServer) -> AsyncIterator[Api]:
    async with served(etcd_server) as found:
        yield found


async def set_client(api: Api, client: pb.Client, expected: int = 0) -> pb.Client:
    request = pb.SetClientRequest(client=client, expected_revision=expected)
    return (await api.access.SetClient(request, timeout=5)).client  # type: ignore[no-any-return]


async def test_a_client_is_set_replaced_and_deleted(api: Api) -> None:
    first = await set_client(
        api,
        pb.Client(
            name="alice", models=["smollm*"], limits=pb.Limits(requests_per_second=5, tokens_per_day=10**6)
        ),
    )
    second = await set_client(api, pb.Client(name="alice", models=["*"]), first.revision)
    error = await refused(set_client(api, pb.Client(name="alice"), first.revision))
    assert error.code == grpc.StatusCode.ABORTED
    got = (await api.access.GetClient(pb.GetClientRequest(name="alice"), timeout=5)).client
    assert got == second
    await set_client(api, pb.Client(name="bob", disabled=True))
    listed = await api.access.ListClients(pb.ListClientsRequest(), timeout=5)
    assert [c.name for c in listed.clients] == ["alice", "bob"]
    for _ in range(2):
        await api.access.DeleteClient(pb.DeleteClientRequest(name="alice"), timeout=5)
    error = await refused(api.access.GetClient(pb.GetClientRequest(name="alice"), timeout=5))
    assert error.code == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("client", "field"),
    [
        (pb.Client(), "client.name"),
        (pb.Client(name="a/b"), "client.name"),
        (pb.Client(name="a", models=["m["]), "client.models[0]"),
        (pb.Client(name="a", model_limits=[pb.ModelLimits(models="")]), "client.model_limits[0].models"),
        (pb.Client(name="a", labels={"": "x"}), "client.labels[]"),
    ],
)
async def test_a_wrong_client_is_refused_by_field(api: Api, client: pb.Client, field: str) -> None:
    error = await refused(set_client(api, client))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def revoke(api: Api, key_id: str, **fields: Any) -> pb.RevokedKey:
    request = pb.RevokeKeyRequest(key_id=key_id, **fields)
    return (await api.access.RevokeKey(request, timeout=5)).key  # type: ignore[no-any-return]


async def test_a_revoked_key_is_listed_until_it_expires(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    from services.registry import access

    monkeypatch.setattr(access, "MARGIN_S", 1)
    soon = pb.RevokedKey()
    soon.expire_time.FromSeconds(int(time.time()) + 1)
    await revoke(api, "short", client="alice", reason="lost", expire_time=soon.expire_time)
    first = await revoke(api, "long", reason="stolen")
    assert await revoke(api, "long", reason="again") == first, "revoking twice changes nothing"
    assert first.expire_time.ToSeconds() > time.time() + 365 * 86_400

    async def ids() -> list[str]:
        answer = await api.access.ListRevokedKeys(pb.ListRevokedKeysRequest(), timeout=5)
        return [key.key_id for key in answer.keys]

    assert await ids() == ["long", "short"]

    async def forgotten() -> bool:
        return await ids() == ["long"]

    await until(forgotten, "the record of the expired key is gone")
    error = await refused(revoke(api, "eyJhbGciOi.the.key.itself"))
    assert error.field == "key_id"


async def test_access_is_watched_with_a_snapshot_first(api: Api) -> None:
    await set_client(api, pb.Client(name="alice"))
    await revoke(api, "k1")
    watch: Any = api.access.WatchAccess(pb.WatchAccessRequest())
    first = await watch.read()
    assert first.snapshot
    assert [c.name for c in first.clients] == ["alice"]
    assert [k.key_id for k in first.revoked_keys] == ["k1"]
    await revoke(api, "k2")
    second = await watch.read()
    assert ([k.key_id for k in second.revoked_keys], list(second.clients)) == (["k2"], [])
    await api.access.DeleteClient(pb.DeleteClientRequest(name="alice"), timeout=5)
    third = await watch.read()
    assert list(third.removed_clients) == ["alice"]
    assert first.revision < second.revision < third.revision
    watch.cancel()
