"""Publishing an artifact: register a version, wait until a replica has proven it, give it the traffic."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc

from lingqu.artifacts import Artifact as Artifact
from lingqu.artifacts import PublishFailed as PublishFailed
from lingqu.gateway.v1 import gateway_pb2
from lingqu.gateway.v1.gateway_pb2_grpc import GatewayServiceStub
from lingqu.registry.v1 import instances_pb2, models_pb2
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceStub
from lingqu.registry.v1.models_pb2_grpc import ModelServiceStub

ROUTED_TIMEOUT_S = 10.0
PATIENCE_S = 15.0

T = TypeVar("T")
Hosting = list[tuple[str, instances_pb2.HostedModel]]


class Publisher:
    """Talks to one registry, and to a gateway, if there is one, to see when a version is routed."""

    def __init__(
        self, registry: grpc.aio.Channel, gateway: grpc.aio.Channel | None = None, key: str = ""
    ) -> None:
        self._instances: Any = RegistryServiceStub(registry)
        self._models: Any = ModelServiceStub(registry)
        self._gateway: Any = None if gateway is None else GatewayServiceStub(gateway)
        self._metadata = (("authorization", f"Bearer {key}"),)

    async def publish(
        self,
        name: str,
        artifact: Artifact,
        *,
        traffic: bool,
        timeout_s: float,
        tell: Callable[[str], None],
    ) -> int:
        """The number of the version, once it is ready (and has the traffic, if asked). An artifact that is
        a version of the model already is not published twice. Raises PublishFailed, grpc.aio.AioRpcError."""
        version = await self._wanted(name, artifact.sha256)
        if version is not None and await self._refused(name, version):
            version = None  # asked again, it is tried again
        if version is None:
            version = await self._create(name, artifact)
            tell(f"{name} v{version}: registered")
        await self._until_ready(name, version, timeout_s)
        tell(f"{name} v{version}: ready")
        if traffic:
            request = models_pb2.SetTrafficRequest(model=name, version=version)
            await _patient(lambda: self._models.SetTraffic(request, timeout=10))
            await self._until_routed(name, version)
            tell(f"{name} v{version}: takes the traffic")
        return version

    async def _until_routed(self, name: str, version: int) -> None:
        """Wait until every data plane has the route; a gateway that is away will have it when it is back."""
        deadline = time.monotonic() + ROUTED_TIMEOUT_S
        while self._gateway is not None and time.monotonic() < deadline:
            answer = await _patient(self._routes)
            routed = any((r.model, r.version) == (name, version) for r in answer.routes)
            if routed and all(p.synced_version == answer.version for p in answer.data_planes):
                return
            await asyncio.sleep(0.02)

    async def _routes(self) -> gateway_pb2.DescribeRoutesResponse:
        request = gateway_pb2.DescribeRoutesRequest()
        answer: gateway_pb2.DescribeRoutesResponse = await self._gateway.DescribeRoutes(
            request, timeout=10, metadata=self._metadata
        )
        return answer

    async def ready(self, name: str, timeout_s: float) -> int:
        """Wait until the version that has the model's traffic is ready, and return it; 0 if none has it."""
        request = models_pb2.ListModelVersionsRequest(model=name)
        answer = await _patient(lambda: self._models.ListModelVersions(request, timeout=10))
        version = next((int(model.traffic_version) for model in answer.models), 0)
        if version:
            await self._until_ready(name, version, timeout_s)
            await self._until_routed(name, version)
        return version

    async def _wanted(self, name: str, sha256: str) -> int | None:
        """The version that is this artifact already, if replicas keep it loaded; see placement.desired."""
        request = models_pb2.ListModelVersionsRequest(model=name)
        answer = await _patient(lambda: self._models.ListModelVersions(request, timeout=10))
        for model in answer.models:
            newest = model.versions[-1].version
            kept = (newest, model.traffic_version, model.previous_version)
            found = [v.version for v in model.versions if v.artifact.sha256 == sha256 and v.version in kept]
            return max(found, default=None)
        return None

    async def _create(self, name: str, artifact: Artifact) -> int:
        request = models_pb2.CreateModelVersionRequest(
            version=artifact.record(name), request_id=uuid.uuid4().hex
        )
        answer = await _patient(lambda: self._models.CreateModelVersion(request, timeout=10))
        return int(answer.version.version)

    async def _until_ready(self, name: str, version: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            hosted = await self._hosted(name, version)
            if any(model.state == instances_pb2.HOSTED_STATE_READY for _, model in hosted):
                return
            if reasons := _refusals(hosted):
                raise PublishFailed(f"{name} v{version} was refused by every replica: " + "; ".join(reasons))
            await asyncio.sleep(0.1)
        raise PublishFailed(f"no replica had {name} v{version} ready within {timeout_s:.0f} s")

    async def _refused(self, name: str, version: int) -> bool:
        return bool(_refusals(await self._hosted(name, version)))

    async def _hosted(self, name: str, version: int) -> Hosting:
        request = instances_pb2.ListInstancesRequest(service="inference")
        answer = await _patient(lambda: self._instances.ListInstances(request, timeout=10))
        return [
            (instance.id, model)
            for instance in answer.instances
            for model in instance.models
            if (model.model, model.version) == (name, version)
        ]


def _refusals(hosted: Hosting) -> list[str]:
    """Every replica's reason, if all of them have refused the version."""
    failed = [(where, m.detail) for where, m in hosted if m.state == instances_pb2.HOSTED_STATE_FAILED]
    return [f"{where}: {detail}" for where, detail in failed] if len(failed) == len(hosted) else []


async def _patient(call: Callable[[], Awaitable[T]]) -> T:
    """Try again while the registry or the gateway is away, for PATIENCE_S at most. Every call here is safe to
    repeat: reads, and writes with a request id or with the same effect twice."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await call()
        except grpc.aio.AioRpcError as err:
            if err.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.2)
