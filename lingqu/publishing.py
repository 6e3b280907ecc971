"""Publishing an artifact: register a version, wait until a replica has proven it, give it the traffic."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc

from lingqu.artifacts import Artifact as Artifact
from lingqu.artifacts import PublishFailed as PublishFailed
from lingqu.client import LingquError
from lingqu.gateway.v1 import gateway_pb2
from lingqu.gateway.v1.gateway_pb2_grpc import GatewayServiceStub
from lingqu.registry.v1 import instances_pb2, models_pb2
from lingqu.registry.v1.models_pb2_grpc import ModelServiceStub

ROUTED_TIMEOUT_S = 10.0
PATIENCE_S = 15.0

T = TypeVar("T")


class Publisher:
    """Talks to one registry, and to a gateway, if there is one, to see when a version is routed."""

    def __init__(
        self, registry: grpc.aio.Channel, gateway: grpc.aio.Channel | None = None, key: str = ""
    ) -> None:
        self._models: Any = ModelServiceStub(registry)
        self._gateway: Any = None if gateway is None else GatewayServiceStub(gateway)
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()

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
        version = await self._known(name, artifact)
        if version is None:
            version = await self._create(name, artifact)
            tell(f"{name} v{version}: registered")
        async with self.held(name, [version], timeout_s):
            tell(f"{name} v{version}: ready")
            if traffic:
                await self.promote(name, version, "published")
                tell(f"{name} v{version}: takes the traffic")
        return version

    async def promote(
        self, name: str, version: int, reason: str, expected_revision: int = 0
    ) -> models_pb2.Model:
        """Give a version all traffic, and wait until it is routed. Raises grpc.aio.AioRpcError."""
        request = models_pb2.PromoteModelVersionRequest(
            model=name,
            version=version,
            reason=reason,
            request_id=uuid.uuid4().hex,
            expected_revision=expected_revision,
        )
        answer = await self._registry(self._models.PromoteModelVersion, request)
        await self._until_routed(name, version)
        return answer.model  # type: ignore[no-any-return]

    async def released(
        self, name: str, versions: Iterable[int], timeout_s: float, release: Callable[[], Awaitable[T]]
    ) -> T:
        """What `release` does; if a version was not ready for it, once more when it is."""
        try:
            return await release()
        except grpc.aio.AioRpcError as error:
            if LingquError(error).reason != "NOT_READY":
                raise
        async with self.held(name, versions, timeout_s):
            return await release()

    @asynccontextmanager
    async def held(self, name: str, versions: Iterable[int], timeout_s: float) -> AsyncIterator[None]:
        """Inside, as many replicas have these versions ready as their model's policy asks. Old ones, which
        replicas do not hold by themselves, are loaded and kept for as long as the block takes; what has
        traffic, or a name, by then stays. Raises PublishFailed."""
        model = await self._model(name)
        borrowed = {version for version in versions if not _held(model, version)}
        if borrowed:
            await self._keep(model, sorted({*model.placement.keep} | borrowed))
        try:
            for version in versions:
                await self._until_ready(name, version, timeout_s, model.policy.min_ready_replicas)
            yield
        finally:
            if borrowed:
                model = await self._model(name)
                await self._keep(model, [kept for kept in model.placement.keep if kept not in borrowed])

    async def _until_routed(self, name: str, version: int) -> None:
        """Wait until every data plane has the route; a gateway that is away will have it when it is back."""
        deadline = time.monotonic() + ROUTED_TIMEOUT_S
        while self._gateway is not None and time.monotonic() < deadline:
            answer = await patient(self._routes)
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
        model = await self._model(name)
        version = int(model.traffic_version)
        if version:
            await self._until_ready(name, version, timeout_s, 1)
            await self._until_routed(name, version)
        return version

    async def _known(self, name: str, artifact: Artifact) -> int | None:
        """The version that is this artifact already. One that is off line comes back, unless it was to be
        found elsewhere or signed otherwise: its record cannot change, so that takes a new version."""
        record = artifact.record(name)
        for version in reversed((await self._model(name)).versions):
            offline = version.stage in (models_pb2.STAGE_REJECTED, models_pb2.STAGE_RETIRED)
            if not _same(version, record, entirely=offline):
                continue
            if offline:
                request = models_pb2.RestoreModelVersionRequest(
                    model=name, version=version.version, reason="published again"
                )
                await self._registry(self._models.RestoreModelVersion, request)
            return int(version.version)
        return None

    async def _create(self, name: str, artifact: Artifact) -> int:
        request = models_pb2.CreateModelVersionRequest(
            version=artifact.record(name), request_id=uuid.uuid4().hex
        )
        answer = await self._registry(self._models.CreateModelVersion, request)
        return int(answer.version.version)

    async def _until_ready(self, name: str, version: int, timeout_s: float, needed: int) -> None:
        deadline = time.monotonic() + timeout_s
        request = models_pb2.GetModelVersionRequest(model=name, version=version)
        while True:
            answer = await self._registry(self._models.GetModelVersion, request)
            ready = sum(r.state == instances_pb2.HOSTED_STATE_READY for r in answer.replicas)
            if ready >= max(1, needed):
                return
            if answer.version.stage == models_pb2.STAGE_REJECTED:
                reason = answer.version.stage_detail
                raise PublishFailed(f"{name} v{version} was refused by every replica: {reason}")
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
        last = "; ".join(f"{r.instance}: {r.detail}" for r in answer.replicas if r.detail)
        raise PublishFailed(
            f"{name} v{version} was ready on {ready} of {max(1, needed)} replicas within {timeout_s:.0f} s"
            + (f" ({last})" if last else "")
        )

    async def _keep(self, model: models_pb2.Model, keep: list[int]) -> None:
        placement = models_pb2.Placement()
        placement.CopyFrom(model.placement)
        placement.keep[:] = keep
        request = models_pb2.SetPlacementRequest(model=model.name, placement=placement)
        await self._registry(self._models.SetPlacement, request)

    async def _model(self, name: str) -> models_pb2.Model:
        """Without versions if it does not exist."""
        request = models_pb2.ListModelVersionsRequest(model=name)
        answer = await self._registry(self._models.ListModelVersions, request)
        return answer.models[0] if answer.models else models_pb2.Model(name=name)

    async def _registry(self, method: Any, request: Any) -> Any:
        return await patient(lambda: method(request, timeout=10, metadata=self._metadata))


def _same(version: models_pb2.ModelVersion, record: models_pb2.ModelVersion, *, entirely: bool) -> bool:
    """Whether a version is what `record` would make, apart from what the registry sets itself and, unless
    `entirely`, from where the artifact is and who signed it."""
    said = models_pb2.ModelVersion()
    said.CopyFrom(version)
    for name in ("version", "create_time", "creator", "stage", "stage_detail", "stage_time"):
        said.ClearField(name)
    if not entirely:
        said.artifact.CopyFrom(record.artifact)
        return version.artifact.sha256 == record.artifact.sha256 and said == record
    return said == record


def _held(model: models_pb2.Model, version: int) -> bool:
    """Whether replicas load it by themselves; see services/inference/placement.py."""
    newest = max((v.version for v in model.versions), default=0)
    shares = [*model.traffic.weights, *model.previous_traffic.weights]
    named = [*model.traffic.aliases.values(), model.traffic.shadow_version, *model.placement.keep]
    return version in {newest, *named, *(share.version for share in shares)}


async def patient(call: Callable[[], Awaitable[T]]) -> T:
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
