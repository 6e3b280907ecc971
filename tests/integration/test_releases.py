"""Releases on a real etcd: what is refused, what is atomic, what the history tells."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from lingqu.client import LingquError
from lingqu.registry.v1 import models_pb2
from lingqu.registry.v1.models_pb2 import (
    STAGE_READY,
    STAGE_REGISTERED,
    STAGE_REJECTED,
    STAGE_RETIRED,
    STAGE_SERVING,
    Policy,
    Threshold,
)
from services.gateway.keys import KeyRing
from tests.conftest import EtcdServer
from tests.registries import FAILED, LOADING, Api, refused, served, version, weights
from tests.waiting import until

PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture
async def api(etcd_server: EtcdServer) -> AsyncIterator[Api]:
    async with served(etcd_server) as found:
        yield found


async def two_ready(api: Api) -> None:
    """Two versions of "m", both ready, the first one promoted."""
    await api.create()
    await api.create()
    await api.host(1, 2)
    await api.promote(1)


async def set_policy(api: Api, policy: Policy, **call: Any) -> None:
    await api.models.SetPolicy(models_pb2.SetPolicyRequest(model="m", policy=policy), timeout=5, **call)


async def history(api: Api) -> list[models_pb2.Release]:
    answer = await api.models.ListReleases(models_pb2.ListReleasesRequest(model="m"), timeout=5)
    return list(answer.releases)


async def test_promote_and_roll_back_with_history(api: Api) -> None:
    await two_ready(api)
    promoted = await api.promote(2, reason="better answers")
    assert weights(promoted) == {2: 100}
    assert (promoted.traffic_version, promoted.previous_version) == (2, 1)
    assert dict(promoted.traffic.aliases) == {"stable": 2}
    back = await api.rollback(reason="worse answers")
    assert weights(back) == {1: 100}
    assert dict(back.traffic.aliases) == {"stable": 1}
    error = await refused(api.rollback())
    assert (error.code, error.reason) == (PRECONDITION, "NOTHING_TO_ROLL_BACK")
    told = [(r.number, models_pb2.ReleaseKind.Name(r.kind), r.reason) for r in await history(api)]
    assert told == [
        (3, "RELEASE_KIND_ROLLBACK", "worse answers"),
        (2, "RELEASE_KIND_PROMOTE", "better answers"),
        (1, "RELEASE_KIND_PROMOTE", ""),
    ]


async def test_weights_shadow_and_offline(api: Api) -> None:
    await two_ready(api)
    await api.create()
    await api.host(1, 2, 3)
    split = await api.split({1: 90, 2: 10}, shadow_version=3)
    assert weights(split) == {1: 90, 2: 10}
    assert split.traffic.shadow_version == 3
    assert [v.stage for v in split.versions] == [STAGE_SERVING] * 3
    request = models_pb2.SetTrafficRequest(model="m", offline=True)
    offline = (await api.models.SetTraffic(request, timeout=5)).model
    assert not weights(offline)
    assert [v.stage for v in offline.versions] == [STAGE_READY] * 3
    assert weights(await api.rollback()) == {1: 90, 2: 10}


async def test_a_rollback_brings_nothing_back_that_was_retired_since(api: Api) -> None:
    await two_ready(api)
    await api.create()
    await api.host(1, 2, 3)
    await api.split({1: 100}, shadow_version=3)
    await api.models.SetAlias(models_pb2.SetAliasRequest(model="m", alias="stable", version=3), timeout=5)
    await api.promote(2)
    await api.models.RetireModelVersion(models_pb2.RetireModelVersionRequest(model="m", version=3), timeout=5)
    back = await api.rollback()
    assert weights(back) == {1: 100}
    assert (dict(back.traffic.aliases), back.traffic.shadow_version) == ({"stable": 1}, 0)
    assert back.versions[2].stage == STAGE_RETIRED


@pytest.mark.parametrize(
    ("shares", "fields", "field"),
    [
        ({1: 90, 2: 9}, {}, "weights"),
        ({1: 100, 2: 100}, {}, "weights"),
        ({1: 0, 2: 100}, {}, "weights[0].percent"),
        ({}, {}, "weights"),
        ({1: 50, 2: 50}, {"version": 1}, "weights"),
        ({1: 50, 2: 50}, {"shadow_version": 2}, "shadow_version"),
        ({}, {"offline": True, "version": 1}, "offline"),
        ({1: 50, 2: 50}, {"reason": "x" * 2000}, "reason"),
        ({1: 50, 2: 50}, {"request_id": "a b"}, "request_id"),
    ],
)
async def test_wrong_traffic_is_refused_by_field(
    api: Api, shares: dict[int, int], fields: dict[str, Any], field: str
) -> None:
    error = await refused(api.split(shares, **fields))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_a_version_needs_as_many_ready_replicas_as_the_policy_says(api: Api) -> None:
    await two_ready(api)
    await set_policy(api, Policy(min_ready_replicas=2))
    error = await refused(api.promote(2))
    assert (error.code, error.reason) == (PRECONDITION, "NOT_READY")
    await api.host(2, instance="i2", state=LOADING)
    assert "1 loading" in str(await refused(api.promote(2)))
    await api.host(1, 2, instance="i2")
    assert weights(await api.promote(2)) == {2: 100}
    # The way back needs one replica only: it is for when things are bad.
    await api.host(2, instance="i2")
    assert weights(await api.rollback()) == {1: 100}


async def test_releases_keep_the_policys_distance_and_rollbacks_do_not(api: Api) -> None:
    await two_ready(api)
    policy = Policy()
    policy.min_release_interval.FromSeconds(30)
    await set_policy(api, policy)
    await api.promote(2)
    error = await refused(api.promote(1))
    assert (error.code, error.reason) == (PRECONDITION, "TOO_SOON")
    assert error.retry_after_s
    assert 20 < error.retry_after_s <= 30
    await api.rollback()


async def test_the_distance_ends_by_etcds_clock(api: Api) -> None:
    await two_ready(api)
    policy = Policy()
    policy.min_release_interval.FromSeconds(2)
    await set_policy(api, policy)
    await api.promote(2)
    await refused(api.promote(1))

    refusals = set()

    async def released() -> bool:
        try:
            await api.promote(1)
        except grpc.aio.AioRpcError as err:
            refusals.add(LingquError(err).reason)
            return False
        return True

    await until(released, "the interval has passed")
    assert refusals == {"TOO_SOON"}, "in its last second, too, which etcd rounds down"


async def test_released_while_replicas_announce_it_a_version_is_serving(api: Api) -> None:
    """The registry moves versions on by itself, and must not take the stage from one that got traffic."""
    models = [f"m{n}" for n in range(10)]
    for model in models:
        await api.create(model)
        await api.create(model)
    for model in models:
        await api.host(1, 2, model=model, instance=model)
        await api.promote(2, model)
    for model in models:
        await api.until_stage(1, STAGE_READY, model)
        assert (await api.until_stage(2, STAGE_SERVING, model)).version == 2


async def test_evaluation_below_its_thresholds_is_not_released(api: Api) -> None:
    await api.create(evaluation={"accuracy": 0.91})
    await api.host(1)
    await api.promote(1)
    await set_policy(api, Policy(thresholds=[Threshold(metric="accuracy", min=0.9)], require_golden=True))
    for figures, golden in (
        ({"accuracy": 0.89}, 3),
        ({}, 3),
        ({"accuracy": float("nan")}, 3),
        ({"accuracy": 0.95}, 0),
    ):
        number = await api.create(evaluation=figures, golden_examples=golden)
        await api.host(1, number)
        for release in (api.promote(number), api.split({1: 50, number: 50})):
            error = await refused(release)
            assert (error.code, error.reason) == (PRECONDITION, "BELOW_THRESHOLD")
    number = await api.create(evaluation={"accuracy": 0.95}, golden_examples=3)
    await api.host(1, number)
    await api.promote(number)
    # The first version is below what is asked for by now (no golden examples): going back is still possible.
    assert weights(await api.rollback()) == {1: 100}


async def test_callers_who_are_not_on_the_list_release_nothing(
    etcd_server: EtcdServer, tmp_path: Path
) -> None:
    import json

    ring = KeyRing.at(tmp_path / "signing.pem")
    jwks = tmp_path / "jwks.json"
    jwks.write_text(json.dumps(ring.jwks()))
    async with served(etcd_server, jwks=jwks) as api:
        await two_ready(api)
        await set_policy(api, Policy(releasers=["ci-*"]))

        def as_client(name: str, *, admin: bool = False) -> tuple[tuple[str, str], ...]:
            return (("authorization", f"Bearer {ring.mint(name, 60, admin=admin).key}"),)

        request = models_pb2.PromoteModelVersionRequest(model="m", version=2)
        for metadata in ((), as_client("alice"), as_client("admin", admin=True)):
            error = await refused(api.models.PromoteModelVersion(request, metadata=metadata, timeout=5))
            assert error.code == grpc.StatusCode.PERMISSION_DENIED
        forged = KeyRing.at(tmp_path / "other.pem").mint("ci-1", 60).key
        error = await refused(
            api.models.PromoteModelVersion(
                request, metadata=(("authorization", f"Bearer {forged}"),), timeout=5
            )
        )
        assert error.code == grpc.StatusCode.UNAUTHENTICATED
        await api.models.PromoteModelVersion(request, metadata=as_client("ci-1"), timeout=5)
        assert (await history(api))[0].actor == "ci-1"
        # Nobody else can take the list away, but an administrator can.
        error = await refused(set_policy(api, Policy(), metadata=as_client("alice")))
        assert error.code == grpc.StatusCode.PERMISSION_DENIED
        await set_policy(api, Policy(), metadata=as_client("root", admin=True))
        await api.promote(1)


async def test_of_two_promotions_at_once_one_wins(etcd_server: EtcdServer) -> None:
    async with served(etcd_server) as one, served(etcd_server) as two:
        await two_ready(one)
        await one.create()
        await one.host(1, 2, 3)
        await two.until_stage(3, STAGE_READY)
        now = await one.model()
        for _ in range(5):
            first, second = {1, 2, 3} - {now.traffic_version}
            results = await asyncio.gather(
                one.promote(first, expected_revision=now.traffic_revision),
                two.promote(second, expected_revision=now.traffic_revision),
                return_exceptions=True,
            )
            won = [r for r in results if not isinstance(r, BaseException)]
            lost = [r for r in results if isinstance(r, grpc.aio.AioRpcError)]
            assert (len(won), [e.code() for e in lost]) == (1, [grpc.StatusCode.ABORTED])
            assert (await history(one))[0].after == won[0].traffic
            now = won[0]

            async def told(revision: int = now.traffic_revision) -> bool:
                return all([(await api.model()).traffic_revision == revision for api in (one, two)])

            await until(told, "both replicas have it")


async def test_a_repeated_request_is_carried_out_once(api: Api) -> None:
    await two_ready(api)
    first = await api.promote(2, request_id="r1")
    await api.rollback(request_id="r2")
    again = await api.promote(2, request_id="r1")
    assert weights(again) == {1: 100}, "it was done already, and undone since"
    assert again.last_release == first.last_release + 1
    assert weights(await api.rollback(request_id="r2")) == {1: 100}


async def test_aliases_are_set_moved_and_removed(api: Api) -> None:
    await two_ready(api)

    async def alias(name: str, number: int) -> models_pb2.Model:
        request = models_pb2.SetAliasRequest(model="m", alias=name, version=number)
        return (await api.models.SetAlias(request, timeout=5)).model  # type: ignore[no-any-return]

    assert dict((await alias("next", 2)).traffic.aliases) == {"stable": 1, "next": 2}
    assert (await refused(alias("next", 9))).code == grpc.StatusCode.NOT_FOUND
    assert (await refused(alias("No!", 1))).field == "alias"
    error = await refused(
        api.models.RetireModelVersion(models_pb2.RetireModelVersionRequest(model="m", version=2), timeout=5)
    )
    assert error.code == PRECONDITION
    assert dict((await alias("next", 0)).traffic.aliases) == {"stable": 1}


async def test_a_version_goes_through_its_stages(api: Api) -> None:
    assert (await api.create(), await api.create()) == (1, 2)
    await api.until_stage(1, STAGE_REGISTERED)
    await api.host(1, state=LOADING)
    await api.until_stage(1, models_pb2.STAGE_VALIDATING)
    await api.host(1)
    await api.until_stage(1, STAGE_READY)
    await api.promote(1)
    await api.until_stage(1, STAGE_SERVING)
    retire = models_pb2.RetireModelVersionRequest(model="m", version=1, reason="old")
    assert (await refused(api.models.RetireModelVersion(retire, timeout=5))).reason in (
        "WRONG_STAGE",
        "NOT_READY",
    )
    await api.host(1, 2)
    await api.promote(2)
    retired = (await api.models.RetireModelVersion(retire, timeout=5)).version
    assert (retired.stage, retired.stage_detail) == (STAGE_RETIRED, "old")
    error = await refused(api.promote(1))
    assert (error.code, error.reason) == (PRECONDITION, "WRONG_STAGE")
    assert (await refused(api.rollback())).reason == "WRONG_STAGE"
    restore = models_pb2.RestoreModelVersionRequest(model="m", version=1)
    await api.models.RestoreModelVersion(restore, timeout=5)
    await api.until_stage(1, STAGE_READY)
    await api.promote(1)


async def test_a_version_that_every_replica_refuses_is_rejected_with_the_reason(api: Api) -> None:
    await api.create()
    await api.host(1, state=FAILED, detail="golden example 3 differs", will_retry=True)
    await api.until_stage(1, models_pb2.STAGE_VALIDATING)
    await api.host(1, state=FAILED, detail="golden example 3 differs")
    rejected = await api.until_stage(1, STAGE_REJECTED)
    assert rejected.stage_detail == "i1: golden example 3 differs"
    await api.host(1)
    assert (await refused(api.promote(1))).reason == "WRONG_STAGE"


async def test_records_from_before_there_were_weights_are_understood(
    etcd_server: EtcdServer, api: Api
) -> None:
    from services.registry.etcd import Etcd, Put

    await api.create()
    await api.create()
    await api.host(1, 2)
    etcd = Etcd(etcd_server.address)
    old = models_pb2.Model(traffic_version=2, previous_version=1)
    revision = await etcd.commit([Put("/lingqu/models/m/traffic", old.SerializeToString())])

    async def arrived() -> bool:
        return (await api.model()).traffic_revision == revision

    await until(arrived, "the old record is seen")
    model = await api.model()
    assert (model.traffic_version, model.previous_version, weights(model)) == (2, 1, {2: 100})
    assert weights(await api.promote(1)) == {1: 100}
    await etcd.close()


async def test_a_dead_shadow_is_in_nobodys_way(api: Api) -> None:
    """Neither of a rollback nor of taking a name away."""
    await two_ready(api)
    await api.create()
    await api.host(1, 2, 3)
    await api.split({1: 100}, shadow_version=3)
    await api.promote(2)
    await api.host(1, 2)
    back = await api.rollback()
    assert (weights(back), back.traffic.shadow_version) == ({1: 100}, 3)
    await api.host(2)
    request = models_pb2.SetAliasRequest(model="m", alias="stable", version=0)
    assert "stable" not in (await api.models.SetAlias(request, timeout=5)).model.traffic.aliases


async def test_an_id_of_another_request_is_refused(api: Api) -> None:
    await two_ready(api)
    await api.promote(2, request_id="x")
    await api.promote(2, request_id="x")
    for call in (
        api.promote(1, request_id="x"),
        api.rollback(request_id="x"),
        api.split({1: 100}, request_id="x"),
    ):
        error = await refused(call)
        assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "request_id")
    for sha256, ok in (("1" * 64, True), ("1" * 64, True), ("2" * 64, False)):
        artifact = models_pb2.Artifact(uri="file:///x", sha256=sha256)
        request = models_pb2.CreateModelVersionRequest(version=version(artifact=artifact), request_id="y")
        if ok:
            assert (await api.models.CreateModelVersion(request, timeout=5)).version.version == 3
        else:
            assert (await refused(api.models.CreateModelVersion(request, timeout=5))).field == "request_id"


async def test_what_could_never_be_satisfied_is_refused(api: Api) -> None:
    await two_ready(api)
    error = await refused(set_policy(api, Policy(releasers=["ci"])))
    assert error.field == "policy.releasers", "this registry knows no callers: nobody could release any more"
    await set_policy(api, Policy(min_ready_replicas=3))
    request = models_pb2.SetPlacementRequest(model="m", placement=models_pb2.Placement(replicas=2))
    assert (await refused(api.models.SetPlacement(request, timeout=5))).field == "placement.replicas"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        (
            {"artifact": models_pb2.Artifact(uri="file:///x", sha256="0" * 64, signer="x" * 65)},
            "version.artifact.signer",
        ),
        (
            {"artifact": models_pb2.Artifact(uri="file:///x", sha256="0" * 64, size_bytes=-5)},
            "version.artifact.size_bytes",
        ),
        ({"requirements": models_pb2.Requirements(engine="about 3")}, "version.requirements.engine"),
        (
            {
                "signature": models_pb2.Signature(
                    inputs=[models_pb2.TensorSignature(name="x" * 128, datatype="FP32", shape=[1] * 32)]
                    * 256,
                    outputs=[models_pb2.TensorSignature(name="x" * 128, datatype="FP32", shape=[1] * 32)]
                    * 256,
                )
            },
            "version",
        ),
        ({"lineage": models_pb2.Lineage(data_sha256="zz")}, "version.lineage.data_sha256"),
    ],
)
async def test_a_record_that_would_weigh_on_every_watcher_is_refused(
    api: Api, fields: dict[str, Any], field: str
) -> None:
    assert (await refused(api.create(**fields))).field == field


async def test_more_weights_than_a_transaction_takes_are_refused(api: Api) -> None:
    error = await refused(api.split(dict.fromkeys(range(1, 101), 1)))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "weights")
    request = models_pb2.SetTrafficRequest(model="m", version=1, shadow_version=1)
    assert (await refused(api.models.SetTraffic(request, timeout=5))).field == "shadow_version"


async def test_a_version_is_not_rejected_while_a_replica_has_not_tried(api: Api) -> None:
    await api.host(instance="i2")
    await api.create()
    await api.host(1, state=FAILED, detail="no such device")
    await api.until_stage(1, models_pb2.STAGE_VALIDATING)
    await api.host(1, instance="i2")
    await api.until_stage(1, STAGE_READY)
