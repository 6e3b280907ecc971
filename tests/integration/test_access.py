"""Clients and revoked keys on a real etcd, and what they mean for who calls the registry."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from lingqu.registry.v1 import access_pb2 as pb
from lingqu.registry.v1 import backups_pb2, models_pb2
from services.gateway.keys import KeyRing
from services.registry import access
from services.registry.backups import digest
from services.registry.etcd import Etcd
from services.registry.keyspace import REVOKED
from tests.conftest import EtcdServer
from tests.registries import Api, refused, served, version
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
        (pb.Client(name="a", limits=pb.Limits(scope=7)), "client.limits.scope"),  # type: ignore[arg-type]
        (
            pb.Client(name="a", limits=pb.Limits(requests_per_minute_scope=7)),  # type: ignore[arg-type]
            "client.limits.requests_per_minute_scope",
        ),
    ],
)
async def test_a_wrong_client_is_refused_by_field(api: Api, client: pb.Client, field: str) -> None:
    error = await refused(set_client(api, client))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_the_limits_of_a_model_are_set_listed_watched_and_deleted(api: Api) -> None:
    async def set_(shared: pb.SharedLimits, expected: int = 0) -> pb.SharedLimits:
        request = pb.SetSharedLimitsRequest(shared_limits=shared, expected_revision=expected)
        return (await api.access.SetSharedLimits(request, timeout=5)).shared_limits  # type: ignore[no-any-return]

    watch: Any = api.access.WatchAccess(pb.WatchAccessRequest(), timeout=20)
    assert not (await watch.read()).shared_limits
    limits = pb.Limits(requests_per_second=5, scope=pb.Limits.SCOPE_LOCAL)
    first = await set_(pb.SharedLimits(model="m", limits=limits))
    assert list((await watch.read()).shared_limits) == [first]
    second = await set_(pb.SharedLimits(model="m"), first.revision)
    assert (await refused(set_(pb.SharedLimits(model="m"), first.revision))).code == grpc.StatusCode.ABORTED
    assert list((await watch.read()).shared_limits) == [second]
    listed = await api.access.ListSharedLimits(pb.ListSharedLimitsRequest(), timeout=5)
    assert list(listed.shared_limits) == [second]
    for _ in range(2):
        await api.access.DeleteSharedLimits(pb.DeleteSharedLimitsRequest(model="m"), timeout=5)
    assert list((await watch.read()).removed_shared_limits) == ["m"]
    error = await refused(set_(pb.SharedLimits(model="m*")))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "shared_limits.model")


async def revoke(api: Api, key_id: str, **fields: Any) -> pb.RevokedKey:
    request = pb.RevokeKeyRequest(key_id=key_id, **fields)
    return (await api.access.RevokeKey(request, timeout=5)).key  # type: ignore[no-any-return]


def at(seconds: float, nanos: int = 0) -> Timestamp:
    return Timestamp(seconds=int(seconds), nanos=nanos)


async def revoked_ids(api: Api) -> list[str]:
    answer = await api.access.ListRevokedKeys(pb.ListRevokedKeysRequest(), timeout=5)
    return [key.key_id for key in answer.keys]


async def test_a_revoked_key_is_forgotten_when_no_key_of_its_time_can_live(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    await revoke(api, "long")
    monkeypatch.setattr(access, "REVOKED_FOR_S", 1)
    await revoke(api, "short", expire_time=at(time.time() + 86_400))

    async def forgotten() -> bool:
        return await revoked_ids(api) == ["long"]

    await until(forgotten, "its lease is over")
    error = await refused(revoke(api, "eyJhbGciOi.the.key.itself"))
    assert error.field == "key_id"


async def test_what_a_clock_says_of_its_end_brings_no_key_back(api: Api, etcd_server: EtcdServer) -> None:
    """A registry whose clock is a month ahead takes the key for expired."""
    await revoke(api, "k", expire_time=at(time.time() - 30 * 86_400))
    etcd = Etcd(etcd_server.address)
    record = await etcd.get(f"{REVOKED}k")
    assert record
    assert await etcd.remaining(record.lease) > access.KEY_TTL_MAX_S
    await etcd.close()


async def test_revoking_again_only_extends(api: Api) -> None:
    first = await revoke(api, "k", client="alice", reason="stolen", expire_time=at(time.time() + 60))
    earlier = at(time.time() + 30)
    assert await revoke(api, "k", reason="again", expire_time=earlier) == first
    later = at(time.time() + 90)
    second = await revoke(api, "k", reason="again", expire_time=later)
    assert (second.expire_time, second.reason, second.client) == (later, "stolen", "alice")
    assert second.revoke_time == first.revoke_time
    third = await revoke(api, "k")
    assert third.expire_time.seconds == first.revoke_time.seconds + access.KEY_TTL_MAX_S
    assert await revoke(api, "k", reason="again") == third, "without an end, revoking twice changes nothing"
    answer = await api.access.ListRevokedKeys(pb.ListRevokedKeysRequest(), timeout=5)
    assert list(answer.keys) == [third]


@pytest.mark.parametrize("wrong", [at(2**60), at(-(2**60)), at(0, 10**9), at(0, -1)])
async def test_an_end_out_of_all_time_is_refused(api: Api, wrong: Timestamp) -> None:
    error = await refused(revoke(api, "k", expire_time=wrong))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "expire_time")


class Keyed:
    """A registry that knows callers by a key set."""

    def __init__(self, api: Api, ring: KeyRing) -> None:
        self.api = api
        self.ring = ring
        self.root = self.metadata(ring.mint("root", 60, admin=True).key)

    @staticmethod
    def metadata(key: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {key}"),)

    async def create(self, key: str) -> str:
        """A call that looks at who calls; the creator it saw."""
        request = models_pb2.CreateModelVersionRequest(version=version())
        call = self.api.models.CreateModelVersion(request, timeout=5, metadata=self.metadata(key))
        return str((await call).version.creator)


@pytest.fixture
async def keyed(etcd_server: EtcdServer, tmp_path: Path) -> AsyncIterator[Keyed]:
    ring = KeyRing.at(tmp_path / "signing.pem")
    jwks = tmp_path / "jwks.json"
    jwks.write_text(json.dumps(ring.jwks()))
    async with served(etcd_server, jwks=jwks) as found:
        yield Keyed(found, ring)


async def test_a_revoked_key_is_refused_and_the_others_of_its_client_are_not(keyed: Keyed) -> None:
    lost, kept = keyed.ring.mint("alice", 60), keyed.ring.mint("alice", 60)
    assert await keyed.create(lost.key) == "alice"
    request = pb.RevokeKeyRequest(key_id=lost.key_id)
    await keyed.api.access.RevokeKey(request, timeout=5, metadata=keyed.root)
    error = await refused(keyed.create(lost.key))
    assert error.code == grpc.StatusCode.UNAUTHENTICATED
    assert "revoked" in str(error)
    assert await keyed.create(kept.key) == "alice"


async def test_no_key_of_a_disabled_client_is_accepted(keyed: Keyed) -> None:
    key = keyed.ring.mint("alice", 60).key
    for disabled in (True, False):
        request = pb.SetClientRequest(client=pb.Client(name="alice", disabled=disabled))
        await keyed.api.access.SetClient(request, timeout=5, metadata=keyed.root)
        if disabled:
            error = await refused(keyed.create(key))
            assert error.code == grpc.StatusCode.UNAUTHENTICATED
            assert "disabled" in str(error)
    assert await keyed.create(key) == "alice"


async def test_where_callers_are_known_only_an_admin_changes_access(keyed: Keyed) -> None:
    access, backups = keyed.api.access, keyed.api.backups
    calls: list[Callable[[Any], Any]] = [
        lambda who: access.SetClient(
            pb.SetClientRequest(client=pb.Client(name="eve")), timeout=5, metadata=who
        ),
        lambda who: access.DeleteClient(pb.DeleteClientRequest(name="eve"), timeout=5, metadata=who),
        lambda who: access.RevokeKey(pb.RevokeKeyRequest(key_id="k"), timeout=5, metadata=who),
        lambda who: backups.Restore(iter(_empty_backup()), timeout=5, metadata=who),
    ]
    for call in calls:
        for who in ((), keyed.metadata(keyed.ring.mint("eve", 60).key)):
            error = await refused(call(who))
            assert error.code == grpc.StatusCode.PERMISSION_DENIED
    assert await revoked_ids(keyed.api) == []
    for call in (calls[3], *calls[:3]):
        await call(keyed.root)


def _empty_backup() -> list[backups_pb2.RestoreRequest]:
    header = backups_pb2.BackupHeader(format=1, sha256=digest([]))
    return [backups_pb2.RestoreRequest(header=header)]


async def test_a_tier_is_set_watched_and_kept_while_clients_are_in_it(api: Api) -> None:
    async def set_(tier: pb.Tier, expected: int = 0) -> pb.Tier:
        request = pb.SetTierRequest(tier=tier, expected_revision=expected)
        return (await api.access.SetTier(request, timeout=5)).tier  # type: ignore[no-any-return]

    async def delete(name: str) -> None:
        await api.access.DeleteTier(pb.DeleteTierRequest(name=name), timeout=5)

    watch: Any = api.access.WatchAccess(pb.WatchAccessRequest())
    assert not (await watch.read()).tiers
    first = await set_(pb.Tier(name="gold", limits=pb.Limits(requests_per_second=50)))
    assert list((await watch.read()).tiers) == [first]
    error = await refused(set_client(api, pb.Client(name="alice", tier="silver")))
    assert (error.code, "silver" in str(error)) == (grpc.StatusCode.NOT_FOUND, True)
    await set_client(api, pb.Client(name="alice", tier="gold"))
    error = await refused(set_(pb.Tier(name="gold"), first.revision))
    assert error.code == grpc.StatusCode.ABORTED, "a client came into it since"
    listed = (await api.access.ListTiers(pb.ListTiersRequest(), timeout=5)).tiers
    assert [tier.name for tier in listed] == ["gold"]
    error = await refused(delete("gold"))
    assert (error.code, "alice" in str(error)) == (grpc.StatusCode.FAILED_PRECONDITION, True)
    await set_client(api, pb.Client(name="alice"))
    for _ in range(2):
        await delete("gold")

    async def gone() -> bool:
        return "gold" in (await watch.read()).removed_tiers

    await until(gone, "the watch tells that it is gone")
    for tier, field in (
        (pb.Tier(), "tier.name"),
        (pb.Tier(name="a/b"), "tier.name"),
        (pb.Tier(name="a", model_limits=[pb.ModelLimits(models="")]), "tier.model_limits[0].models"),
        (pb.Tier(name="a", limits=pb.Limits(scope=7)), "tier.limits.scope"),  # type: ignore[arg-type]
    ):
        error = await refused(set_(tier))
        assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_a_tier_that_goes_while_clients_come_leaves_none_behind(api: Api) -> None:
    """Two writers at once: whoever is second is told."""
    for _ in range(10):
        tier = pb.SetTierRequest(tier=pb.Tier(name="brief"))
        await api.access.SetTier(tier, timeout=5)
        coming = set_client(api, pb.Client(name="carl", tier="brief"))
        going = api.access.DeleteTier(pb.DeleteTierRequest(name="brief"), timeout=5)
        await asyncio.gather(coming, going, return_exceptions=True)
        tiers = (await api.access.ListTiers(pb.ListTiersRequest(), timeout=5)).tiers
        clients = (await api.access.ListClients(pb.ListClientsRequest(), timeout=5)).clients
        assert {c.tier for c in clients} - {""} <= {t.name for t in tiers}
        await set_client(api, pb.Client(name="carl"))


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
