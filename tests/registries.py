"""A registry of its own on a real etcd, and what tests of governance do with it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from deploy.local.part import Part, Running, grpc_ready
from lingqu.client import LingquError
from lingqu.registry.v1 import instances_pb2, models_pb2, rollouts_pb2
from lingqu.registry.v1.access_pb2_grpc import AccessServiceStub
from lingqu.registry.v1.backups_pb2_grpc import BackupServiceStub
from lingqu.registry.v1.instances_pb2_grpc import RegistryServiceStub
from lingqu.registry.v1.models_pb2_grpc import ModelServiceStub
from lingqu.registry.v1.rollouts_pb2_grpc import RolloutServiceStub
from services.core.registry import Registry
from services.registry.app import RegistrySettings, running
from tests.conftest import EtcdServer, free_offset
from tests.waiting import until

READY = instances_pb2.HOSTED_STATE_READY
LOADING = instances_pb2.HOSTED_STATE_LOADING
INSTANCE = instances_pb2.Instance(id="i1", service="inference", endpoints={"grpc": "127.0.0.1:1"})
FAILED = instances_pb2.HOSTED_STATE_FAILED


class Api:
    """All stubs of one registry."""

    def __init__(self, channel: grpc.aio.Channel, address: str = "") -> None:
        self.address = address
        self.instances: Any = RegistryServiceStub(channel)
        self.models: Any = ModelServiceStub(channel)
        self.rollouts: Any = RolloutServiceStub(channel)
        self.access: Any = AccessServiceStub(channel)
        self.backups: Any = BackupServiceStub(channel)

    async def create(self, model: str = "m", metadata: Any = None, **fields: Any) -> int:
        request = models_pb2.CreateModelVersionRequest(version=version(model, **fields))
        answer = await self.models.CreateModelVersion(request, timeout=5, metadata=metadata)
        return int(answer.version.version)

    async def host(
        self, *versions: int, model: str = "m", instance: str = "i1", state: int = READY, **fields: Any
    ) -> None:
        """Make a replica say that it has these versions."""
        held = [
            instances_pb2.HostedModel(model=model, version=v, state=state, **fields)  # type: ignore[arg-type]
            for v in versions
        ]
        record = instances_pb2.Instance(id=instance, service="inference", models=held)
        request = instances_pb2.RegisterInstanceRequest(instance=record)
        request.ttl.FromSeconds(60)
        await self.instances.RegisterInstance(request, timeout=5)

    async def promote(
        self, number: int, model: str = "m", metadata: Any = None, **fields: Any
    ) -> models_pb2.Model:
        request = models_pb2.PromoteModelVersionRequest(model=model, version=number, **fields)
        answer = await self.models.PromoteModelVersion(request, timeout=5, metadata=metadata)
        return answer.model  # type: ignore[no-any-return]

    async def split(self, weights: dict[int, int], model: str = "m", **fields: Any) -> models_pb2.Model:
        shares = [models_pb2.Weight(version=v, percent=p) for v, p in weights.items()]
        request = models_pb2.SetTrafficRequest(model=model, weights=shares, **fields)
        return (await self.models.SetTraffic(request, timeout=5)).model  # type: ignore[no-any-return]

    async def rollback(self, model: str = "m", **fields: Any) -> models_pb2.Model:
        request = models_pb2.RollbackModelRequest(model=model, **fields)
        return (await self.models.RollbackModel(request, timeout=5)).model  # type: ignore[no-any-return]

    async def model(self, name: str = "m") -> models_pb2.Model:
        request = models_pb2.ListModelVersionsRequest(model=name)
        return (await self.models.ListModelVersions(request, timeout=5)).models[0]  # type: ignore[no-any-return]

    async def rollout(self, name: str = "m") -> rollouts_pb2.Rollout:
        request = rollouts_pb2.GetRolloutRequest(model=name)
        return (await self.rollouts.GetRollout(request, timeout=5)).rollout  # type: ignore[no-any-return]

    async def until_stage(self, number: int, stage: int, model: str = "m") -> models_pb2.ModelVersion:
        async def reached() -> models_pb2.ModelVersion | None:
            request = models_pb2.ListModelVersionsRequest(model=model)
            for known in (await self.models.ListModelVersions(request, timeout=5)).models:
                for found in known.versions:
                    if (found.version, found.stage) == (number, stage):
                        return found  # type: ignore[no-any-return]
            return None

        found = await until(reached, f"v{number} is {models_pb2.Stage.Name(stage)}")  # type: ignore[arg-type]
        assert found
        return found


@asynccontextmanager
async def served(etcd: EtcdServer, **settings: Any) -> AsyncIterator[Api]:
    """A registry on `etcd`, in this process."""
    address = settings.pop("registry_listen", f"127.0.0.1:{8082 + free_offset()}")
    cfg = RegistrySettings(registry_listen=address, etcd=etcd.address, grace_s=0.1, **settings)
    async with running(cfg), grpc.aio.insecure_channel(address) as channel:
        yield Api(channel, address)


class RegistryProcess:
    """A registry as a process of its own, which tests may stop, pause and kill."""

    def __init__(self, address: str, running: Running) -> None:
        self.address = address
        self._running = running
        self._channel = grpc.aio.insecure_channel(address)
        self.api = Api(self._channel)

    @classmethod
    async def start(
        cls,
        etcd: EtcdServer,
        name: str,
        *,
        address: str = "",
        wrapper: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
    ) -> RegistryProcess:
        """`wrapper` comes before the command."""
        address = address or f"127.0.0.1:{8082 + free_offset()}"
        part = Part(
            name,
            (*wrapper, sys.executable, "-m", "services.registry"),
            grpc_ready(address),
            env={"LINGQU_REGISTRY_LISTEN": address, "LINGQU_ETCD": etcd.address, **(env or {})},
        )
        running = await Running.start(part, etcd.layout.logs)
        await running.until_ready()
        return cls(address, running)

    @property
    def pid(self) -> int:
        return self._running.pid

    async def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        await self._running.ended()
        await self._channel.close()

    async def stop(self) -> None:
        await self._running.stop()
        await self._channel.close()


@asynccontextmanager
async def connected(etcd: EtcdServer) -> AsyncIterator[Registry]:
    """A registry on `etcd`, in this process, and the suite's own client of it."""
    address = f"127.0.0.1:{8082 + free_offset()}"
    async with running(RegistrySettings(registry_listen=address, etcd=etcd.address, grace_s=0.1)):
        client = Registry(address)
        try:
            yield client
        finally:
            await client.close()


async def register(
    registry: Registry, instance: instances_pb2.Instance = INSTANCE, ttl_s: int = 10, lease: int = 0
) -> int:
    request = instances_pb2.RegisterInstanceRequest(
        instance=instance, ttl=Duration(seconds=ttl_s), lease_id=lease
    )
    answer = await registry.instances.RegisterInstance(request, timeout=5)
    return answer.lease_id


async def ids(registry: Registry, service: str = "") -> list[str]:
    answer = await registry.instances.ListInstances(
        instances_pb2.ListInstancesRequest(service=service), timeout=5
    )
    return [instance.id for instance in answer.instances]


def version(model: str = "m", **fields: Any) -> models_pb2.ModelVersion:
    artifact = models_pb2.Artifact(uri="file:///x", sha256="0" * 64)
    return models_pb2.ModelVersion(
        **{"model": model, "artifact": artifact, "task": "tensor", "runtime": "python", **fields}
    )


def weights(model: models_pb2.Model) -> dict[int, int]:
    return {w.version: w.percent for w in model.traffic.weights}


async def once_allowed(release: Callable[[], Awaitable[models_pb2.Model]]) -> models_pb2.Model:
    """Ask for a release until the policy's interval lets it be. Other refusals are raised."""

    async def answered() -> models_pb2.Model | None:
        try:
            return await release()
        except grpc.aio.AioRpcError as err:
            if LingquError(err).reason != "TOO_SOON":
                raise
            return None

    model = await until(answered, "the interval between releases has passed")
    assert model
    return model


async def refused(call: Awaitable[Any]) -> LingquError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return LingquError(caught.value)
