"""Clients that do random operations against random registries, and watchers that go from one to another."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import grpc

from lingqu.registry.v1 import access_pb2, instances_pb2, models_pb2
from services.core.lifecycle import CHANNEL_OPTIONS
from tests.histories.records import Operation, Outcome, Stream, told
from tests.registries import READY, Api, version
from tests.waiting import pause

MODELS = ("a", "b", "c")
MOST_VERSIONS = 25
TIMEOUT_S = 3.0
TRIES = 8

SERVICES = {
    "CreateModelVersion": "models",
    "SetTraffic": "models",
    "PromoteModelVersion": "models",
    "RollbackModel": "models",
    "SetAlias": "models",
    "RetireModelVersion": "models",
    "RestoreModelVersion": "models",
    "SetClient": "access",
    "DeleteClient": "access",
    "RevokeKey": "access",
    "RegisterInstance": "instances",
    "DeregisterInstance": "instances",
}
WATCHES = {
    "instances": ("WatchInstances", instances_pb2.WatchInstancesRequest),
    "models": ("WatchModels", models_pb2.WatchModelsRequest),
    "access": ("WatchAccess", access_pb2.WatchAccessRequest),
}


class Crowd:
    """All that is done to the registries at `addresses`, and the record of it."""

    def __init__(self, addresses: list[str], rng: random.Random) -> None:
        self._rng = rng
        self._channels = [grpc.aio.insecure_channel(a, options=CHANNEL_OPTIONS) for a in addresses]
        self._apis = [Api(channel) for channel in self._channels]
        self.operations: list[Operation] = []
        self.streams: list[Stream] = []
        self._versions = dict.fromkeys(MODELS, 0)
        self._revisions: dict[str, int] = {}
        self._leases: dict[str, int] = {}

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def prepare(self) -> None:
        """Two versions of each model, and a replica that has all versions there will ever be ready."""
        hosted = [
            instances_pb2.HostedModel(model=model, version=number, state=READY)
            for model in MODELS
            for number in range(1, MOST_VERSIONS + 1)
        ]
        await self._register(instances_pb2.Instance(id="host", service="inference", models=hosted), 600)
        for model in MODELS * 2:
            await self._create(model)

    async def client(self, pace_s: float) -> None:
        """Random operations, for ever."""
        while True:
            choices: list[tuple[int, Callable[[], Any]]] = [
                (1, lambda: self._create(self._rng.choice(MODELS))),
                (8, lambda: self._release(self._rng.choice(MODELS))),
                (1, lambda: self._restage(self._rng.choice(MODELS))),
                (4, self._access),
                (3, self._instance),
            ]
            [(_, act)] = self._rng.choices(choices, [weight for weight, _ in choices])
            await act()
            await pause(self._rng.uniform(0, 2 * pace_s), "the pace of a client")

    async def watcher(self, view: str, at: int) -> None:
        """Watch, for ever: calls end at random, and the next one, here or there, goes on from where it was.
        Now and then a watcher is replaced by one that knows nothing."""
        while True:
            stream = Stream(view, f"watcher {len(self.streams)} of {view}")
            self.streams.append(stream)
            for _ in range(self._rng.randint(2, 6)):
                await self._watch(stream, at, self._rng.uniform(0.5, 6))
                at = self._rng.choice((at, self._rng.randrange(len(self._apis))))

    async def mark(self) -> None:
        """A last write in each watched service, until it is acknowledged."""
        while True:
            registered = await self._register(instances_pb2.Instance(id="end", service="test"), 600)
            created = await self._create("end")
            client = access_pb2.SetClientRequest(client=access_pb2.Client(name="end"))
            set_ = await self._perform("SetClient", "end", client)
            if {op.outcome for op in (registered, created, set_)} == {Outcome.DONE}:
                return

    async def catch_up(self, revisions: dict[str, int]) -> None:
        """Have the last watchers of each service go on until they were told of these revisions."""
        for view, revision in revisions.items():
            for at, stream in enumerate([s for s in self.streams if s.view == view][-len(self._apis) :]):
                while stream.revision < revision:
                    await self._watch(stream, at, 5, revision)

    async def _watch(self, stream: Stream, at: int, seconds: float, revision: int = 1 << 62) -> None:
        """One call, resumed, for so long or until it has told of `revision`."""
        method, request = WATCHES[stream.view]
        service = getattr(self._apis[at], stream.view)
        call = getattr(service, method)(request(resume_revision=stream.revision, store_id=stream.store_id))
        try:
            async with asyncio.timeout(seconds):
                async for answer in call:
                    stream.messages.append(told(answer))
                    if answer.revision >= revision:
                        return
        except TimeoutError:
            return
        except grpc.aio.AioRpcError:
            await pause(0.1, "all may be away")
        finally:
            call.cancel()

    async def _perform(self, method: str, target: str, request: Any) -> Operation:
        """At a random registry. With a request id, again at others until there is an answer."""
        op = self._labelled(Operation(f"op{len(self.operations)}", method, target, request))
        self.operations.append(op)
        earlier = False
        for _ in range(TRIES if getattr(request, "request_id", "") else 1):
            api = self._rng.choice(self._apis)
            op.begin()
            try:
                op.succeed(await getattr(getattr(api, SERVICES[method]), method)(request, timeout=TIMEOUT_S))
                break
            except grpc.aio.AioRpcError as err:
                if not op.fail(err, earlier):
                    break
                earlier = op.outcome is Outcome.UNKNOWN
                await pause(self._rng.uniform(0.1, 0.5), "as clients do before they try again")
        return op

    @staticmethod
    def _labelled(op: Operation) -> Operation:
        """With its id in what it will write, and as its request id if it is to have one."""
        request = op.request
        match op.method:
            case "CreateModelVersion":
                request.version.labels["op"] = op.id
            case "SetClient":
                request.client.labels["op"] = op.id
            case "RegisterInstance":
                request.instance.labels["op"] = op.id
            case "DeleteClient" | "DeregisterInstance":
                pass
            case _:
                request.reason = op.id
        if getattr(request, "request_id", ""):
            request.request_id = op.id
        return op

    async def _create(self, model: str) -> Operation:
        if self._versions.get(model, 0) >= MOST_VERSIONS:
            return await self._release(model)
        request = models_pb2.CreateModelVersionRequest(version=version(model), request_id="yes")
        op = await self._perform("CreateModelVersion", model, request)
        # Counted even where the outcome is unknown: the replica has no more than so many ready.
        self._versions[model] = self._versions.get(model, 0) + 1
        return op

    async def _release(self, model: str) -> Operation:
        newest = max(1, self._versions[model])
        number = self._rng.randint(max(1, newest - 3), newest)
        common: dict[str, Any] = {"model": model, "request_id": self._rng.choice(("", "yes"))}
        if self._rng.random() < 0.4:
            common["expected_revision"] = self._revisions.get(model, 0)
        request: Any
        match self._rng.randrange(4):
            case 0:
                method, request = (
                    "PromoteModelVersion",
                    models_pb2.PromoteModelVersionRequest(version=number, **common),
                )
            case 1:
                method, request = "RollbackModel", models_pb2.RollbackModelRequest(**common)
            case 2:
                alias = self._rng.choice(("next", "old"))
                number = self._rng.choice((0, number))
                method, request = (
                    "SetAlias",
                    models_pb2.SetAliasRequest(alias=alias, version=number, **common),
                )
            case _:
                method, request = "SetTraffic", self._split(number, common)
        op = await self._perform(method, model, request)
        if op.response is not None:
            self._revisions[model] = max(self._revisions.get(model, 0), op.response.model.traffic_revision)
        return op

    def _split(self, number: int, common: dict[str, Any]) -> models_pb2.SetTrafficRequest:
        percent = self._rng.choice((10, 50, 100)) if number > 1 else 100
        shares = [models_pb2.Weight(version=number, percent=percent)]
        if percent < 100:
            shares.insert(0, models_pb2.Weight(version=number - 1, percent=100 - percent))
        return models_pb2.SetTrafficRequest(weights=shares, **common)

    async def _restage(self, model: str) -> Operation:
        number = self._rng.randint(1, max(1, self._versions[model]))
        if self._rng.random() < 0.5:
            retire = models_pb2.RetireModelVersionRequest(model=model, version=number)
            return await self._perform("RetireModelVersion", model, retire)
        restore = models_pb2.RestoreModelVersionRequest(model=model, version=number)
        return await self._perform("RestoreModelVersion", model, restore)

    async def _access(self) -> Operation:
        name = self._rng.choice(("u1", "u2", "u3"))
        match self._rng.randrange(4):
            case 0:
                return await self._perform("DeleteClient", name, access_pb2.DeleteClientRequest(name=name))
            case 1:
                key = f"k{self._rng.randrange(40)}"
                return await self._perform(
                    "RevokeKey", key, access_pb2.RevokeKeyRequest(key_id=key, client=name)
                )
            case _:
                request = access_pb2.SetClientRequest(client=access_pb2.Client(name=name, models=["*"]))
                if self._rng.random() < 0.4:
                    request.expected_revision = self._revisions.get(name, 0)
                op = await self._perform("SetClient", name, request)
                if op.response is not None:
                    self._revisions[name] = op.response.client.revision
                return op

    async def _instance(self) -> Operation:
        name = self._rng.choice(("i1", "i2", "i3"))
        lease = self._rng.choice((0, self._leases.get(name, 0)))
        if self._rng.random() < 0.3:
            gone = instances_pb2.DeregisterInstanceRequest(id=name, lease_id=lease)
            return await self._perform("DeregisterInstance", name, gone)
        return await self._register(
            instances_pb2.Instance(id=name, service="test"), self._rng.choice((1, 30)), lease
        )

    async def _register(self, instance: instances_pb2.Instance, ttl_s: int, lease: int = 0) -> Operation:
        request = instances_pb2.RegisterInstanceRequest(instance=instance, lease_id=lease)
        request.ttl.FromSeconds(ttl_s)
        op = await self._perform("RegisterInstance", instance.id, request)
        if op.response is not None:
            self._leases[instance.id] = op.response.lease_id
        return op
