"""A registry for one test: its watches and leases as the real one answers them, with whatever a test puts in,
also what the real one would refuse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from lingqu.registry.v1 import (
    access_pb2,
    access_pb2_grpc,
    instances_pb2,
    instances_pb2_grpc,
    ledger_pb2,
    ledger_pb2_grpc,
    models_pb2,
)
from lingqu.registry.v1.models_pb2_grpc import ModelServiceServicer, add_ModelServiceServicer_to_server

STORE_ID = "fake-store-1"
READY = instances_pb2.HOSTED_STATE_READY


class FakeRegistry(
    instances_pb2_grpc.RegistryServiceServicer,
    ModelServiceServicer,
    access_pb2_grpc.AccessServiceServicer,
    ledger_pb2_grpc.LedgerServiceServicer,
):
    """Between `hold` and `let_go` it tells nothing new, as a registry that lags. `knows` False: it has not
    reached etcd yet."""

    def __init__(self) -> None:
        self.instances: dict[str, instances_pb2.Instance] = {}
        self.models: dict[str, models_pb2.Model] = {}
        self.revision = 100
        self.knows = True
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._held_at = 0
        self._changed = asyncio.Condition()

    async def start(self, address: str = "127.0.0.1:0") -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        instances_pb2_grpc.add_RegistryServiceServicer_to_server(self, self._server)
        add_ModelServiceServicer_to_server(self, self._server)
        access_pb2_grpc.add_AccessServiceServicer_to_server(self, self._server)
        ledger_pb2_grpc.add_LedgerServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(address)}"
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    def hold(self) -> None:
        self._flowing.clear()
        self._held_at = self.revision

    def let_go(self) -> None:
        self._flowing.set()

    async def put(self, *records: instances_pb2.Instance | models_pb2.Model) -> None:
        """All in one revision."""
        for record in records:
            if isinstance(record, models_pb2.Model):
                self.models[record.name] = record
            else:
                self.instances[record.id] = record
        await self._moved()

    async def remove(self, *ids: str) -> None:
        for name in ids:
            self.instances.pop(name, None)
            self.models.pop(name, None)
        await self._moved()

    async def _moved(self) -> None:
        async with self._changed:
            self.revision += 1
            self._changed.notify_all()

    async def _watch(self, context: Any, response: Callable[[], Any]) -> AsyncIterator[Any]:
        """A whole snapshot whenever something has changed: watchers must be able to take that."""
        if not self.knows:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "etcd does not answer")
        last = None
        while True:
            await self._flowing.wait()
            told, seen = response(), self.revision
            told.snapshot, told.store_id, told.revision = True, STORE_ID, 0
            if told != last:
                last = type(told).FromString(told.SerializeToString())
                told.revision = seen
                yield told
            async with self._changed:
                await self._changed.wait_for(lambda: self.revision != seen)  # noqa: B023 - awaited here

    async def WatchInstances(self, request: Any, context: Any) -> AsyncIterator[Any]:
        def response() -> Any:
            found = [i for i in self.instances.values() if request.service in ("", i.service)]
            return instances_pb2.WatchInstancesResponse(upserted=found)

        async for told in self._watch(context, response):
            yield told

    async def WatchModels(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for told in self._watch(
            context, lambda: models_pb2.WatchModelsResponse(upserted=self.models.values())
        ):
            yield told

    async def WatchAccess(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for told in self._watch(context, access_pb2.WatchAccessResponse):
            yield told

    async def WatchShards(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for told in self._watch(context, ledger_pb2.WatchShardsResponse):
            yield told

    async def ListInstances(self, request: Any, context: Any) -> Any:
        return instances_pb2.ListInstancesResponse(
            revision=self.revision if self._flowing.is_set() else self._held_at
        )

    async def RegisterInstance(self, request: Any, context: Any) -> Any:
        await self.put(request.instance)
        return instances_pb2.RegisterInstanceResponse(lease_id=hash(request.instance.id) & 0xFFFF | 1)

    async def KeepAlive(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            yield instances_pb2.KeepAliveResponse(lease_id=request.lease_id)

    async def DeregisterInstance(self, request: Any, context: Any) -> Any:
        await self.remove(request.id)
        return instances_pb2.DeregisterInstanceResponse()


def instance(name: str, address: str, *hosted: tuple[str, int]) -> instances_pb2.Instance:
    """A replica with all its protocols at one address."""
    held = [instances_pb2.HostedModel(model=model, version=v, state=READY) for model, v in hosted]
    endpoints = dict.fromkeys(("grpc", "oip", "http"), address)
    return instances_pb2.Instance(id=name, service="inference", endpoints=endpoints, models=held)


def model(name: str, weights: dict[int, int], versions: int = 2) -> models_pb2.Model:
    known = [models_pb2.ModelVersion(model=name, version=n, task="generate") for n in range(1, versions + 1)]
    shares = [models_pb2.Weight(version=v, percent=p) for v, p in weights.items()]
    return models_pb2.Model(name=name, versions=known, traffic=models_pb2.Traffic(weights=shares))
