"""Publishing an artifact: register a version, wait until a replica has proven it, give it the traffic."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingqu.registry.v1 import instances_pb2, models_pb2
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceStub
from lingqu.registry.v1.models_pb2_grpc import ModelServiceStub


class PublishFailed(Exception):
    """The version was refused or no replica got it ready; the text has the reason."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """What the registry needs to know of an artifact."""

    uri: str
    sha256: str
    size_bytes: int
    task: str
    runtime: str

    @classmethod
    def at(cls, folder: Path) -> Artifact:
        """Raises PublishFailed if `folder` is no artifact."""
        try:
            raw = (folder / "manifest.json").read_bytes()
            body = json.loads(raw)
            size = sum(int(file["size"]) for file in body["files"].values())
            sha256 = hashlib.sha256(raw).hexdigest()
            return cls(folder.resolve().as_uri(), sha256, size, body["task"], body["runtime"])
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise PublishFailed(
                f"{folder} is no artifact ({err}); `python -m pipeline --help` shows how to make one"
            ) from err


class Publisher:
    """Talks to one registry."""

    def __init__(self, instances: RegistryServiceStub, models: ModelServiceStub) -> None:
        self._instances: Any = instances
        self._models: Any = models

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
        version = await self._existing(name, artifact.sha256)
        if version is None:
            version = await self._create(name, artifact)
            tell(f"{name} v{version}: registered")
        await self._until_ready(name, version, timeout_s)
        tell(f"{name} v{version}: ready")
        if traffic:
            request = models_pb2.SetTrafficRequest(model=name, version=version)
            await self._models.SetTraffic(request, timeout=10)
            tell(f"{name} v{version}: takes the traffic")
        return version

    async def _existing(self, name: str, sha256: str) -> int | None:
        request = models_pb2.ListModelVersionsRequest(model=name)
        answer = await self._models.ListModelVersions(request, timeout=10)
        found = [v.version for model in answer.models for v in model.versions if v.artifact.sha256 == sha256]
        return max(found, default=None)

    async def _create(self, name: str, artifact: Artifact) -> int:
        record = models_pb2.ModelVersion(
            model=name,
            artifact=models_pb2.Artifact(
                uri=artifact.uri, sha256=artifact.sha256, size_bytes=artifact.size_bytes
            ),
            task=artifact.task,
            runtime=artifact.runtime,
        )
        request = models_pb2.CreateModelVersionRequest(version=record, request_id=uuid.uuid4().hex)
        answer = await self._models.CreateModelVersion(request, timeout=10)
        return int(answer.version.version)

    async def _until_ready(self, name: str, version: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        request = instances_pb2.ListInstancesRequest(service="inference")
        while time.monotonic() < deadline:
            answer = await self._instances.ListInstances(request, timeout=10)
            hosted = [
                (instance.id, model)
                for instance in answer.instances
                for model in instance.models
                if (model.model, model.version) == (name, version)
            ]
            if any(model.state == instances_pb2.HOSTED_STATE_READY for _, model in hosted):
                return
            failed = [
                f"{where}: {model.detail}"
                for where, model in hosted
                if model.state == instances_pb2.HOSTED_STATE_FAILED
            ]
            if failed and len(failed) == len(hosted):
                raise PublishFailed(f"{name} v{version} was refused by every replica: " + "; ".join(failed))
            await asyncio.sleep(0.1)
        raise PublishFailed(f"no replica had {name} v{version} ready within {timeout_s:.0f} s")
