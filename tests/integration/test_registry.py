"""Versions of models and their traffic, on a real etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from lingqu.registry.v1 import instances_pb2 as pb
from lingqu.registry.v1 import models_pb2
from services.core.registry import Registry
from tests.conftest import EtcdServer
from tests.registries import connected, refused, register


@pytest.fixture
async def registry(etcd_server: EtcdServer) -> AsyncIterator[Registry]:
    async with connected(etcd_server) as client:
        yield client


def version(model: str = "m", **fields: Any) -> models_pb2.ModelVersion:
    artifact = models_pb2.Artifact(uri="file:///x", sha256="0" * 64)
    return models_pb2.ModelVersion(
        **{"model": model, "artifact": artifact, "task": "tensor", "runtime": "python", **fields}
    )


async def create(registry: Registry, model: str = "m", request_id: str = "") -> int:
    request = models_pb2.CreateModelVersionRequest(version=version(model), request_id=request_id)
    answer = await registry.models.CreateModelVersion(request, timeout=5)
    return answer.version.version


async def test_versions_are_numbered_from_one_and_never_twice(registry: Registry) -> None:
    numbers = await asyncio.gather(*(create(registry) for _ in range(8)))
    assert sorted(numbers) == list(range(1, 9))
    assert await create(registry, "other") == 1


async def test_two_registries_never_give_the_same_number(etcd_server: EtcdServer) -> None:
    async with connected(etcd_server) as one, connected(etcd_server) as two:
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
