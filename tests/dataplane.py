"""A real Envoy that is told its configuration by our own discovery service, in front of replicas that are
real servers in this process and tell what reached them."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx2 as httpx
from envoy.service.discovery.v3 import ads_pb2_grpc
from envoy.service.health.v3 import hds_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc.service_pb2_grpc import (
    GRPCInferenceServiceServicer,
    GRPCInferenceServiceStub,
    add_GRPCInferenceServiceServicer_to_server,
)

from deploy.local.layout import ENVOY_ADMIN, PUBLIC, Layout
from deploy.local.parts import envoy
from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from services.core.discovery import READY, Hosted, Model, Replica, Version, VersionKey
from services.gateway import xds
from services.gateway.ads import Ads, Snapshots
from services.gateway.bootstrap import bootstrap
from services.gateway.hds import HealthDiscovery
from services.gateway.keys import KeyRing
from services.gateway.listener import Entry
from services.gateway.snapshot import Builder
from services.gateway.view import View, view
from tests.conftest import free_offset
from tests.waiting import pause, until

VERSION = "x-lingqu-model-version"


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that reached a replica: on "text", "tensor" or "rest", with the model and version that it
    was for, and its headers."""

    path: str
    model: str
    version: str
    headers: Mapping[str, str]


class _Health(health_pb2_grpc.HealthServicer):
    state = "serving"

    async def Check(self, request: Any, context: Any) -> Any:
        if self.state == "hung":
            await asyncio.Event().wait()
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if self.state == "serving" else status.NOT_SERVING)


@dataclass
class FakeReplica(InferenceServiceServicer, GRPCInferenceServiceServicer):
    """Answers with its name. `delay_s` before each answer; `error` instead of one. Streams of text go on
    until `release` is set, streams of tensors as long as the caller's."""

    name: str
    delay_s: float = 0.0
    error: grpc.StatusCode | None = None
    seen: list[Seen] = field(default_factory=list)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    endpoints: dict[str, str] = field(default_factory=dict)
    streams: int = 0

    def hosting(self, *keys: tuple[str, int], **labels: str) -> Replica:
        """Its record in the registry."""
        hosted = tuple(Hosted(VersionKey(*key), READY) for key in keys)
        return Replica(self.name, "inference", self.endpoints, hosted, labels)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeReplica]:
        async with AsyncExitStack() as stack:
            self._health = _Health()
            for protocol, add in (
                ("grpc", add_InferenceServiceServicer_to_server),
                ("oip", add_GRPCInferenceServiceServicer_to_server),
            ):
                server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
                add(self, server)
                health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
                self.endpoints[protocol] = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
                await server.start()
                stack.push_async_callback(server.stop, 0)
            rest = await asyncio.start_server(self._rest, "127.0.0.1", 0)
            self.endpoints["http"] = f"127.0.0.1:{rest.sockets[0].getsockname()[1]}"
            stack.callback(rest.close)
            yield self

    def healthy(self, state: str = "serving") -> None:
        """What it answers who asks for its health: "serving", "not serving", or nothing: "hung"."""
        self._health.state = state

    async def _answer(self, path: str, model: str, version: str, headers: Mapping[str, str]) -> None:
        self.seen.append(Seen(path, model, version, headers))
        if self.delay_s:
            await pause(self.delay_s, "it was told to take so long")

    async def _grpc(self, path: str, model: str, version: str | None, context: Any) -> str:
        headers = {k: str(v) for k, v in context.invocation_metadata()}
        version = headers.get(VERSION, "") if version is None else version
        await self._answer(path, model, version, headers)
        if self.error is not None:
            await context.abort(self.error, "as asked")
        return version

    async def Generate(self, request: Any, context: Any) -> Any:
        version = await self._grpc("text", request.model, None, context)
        return pb.GenerateResponse(text=self.name, model_version=version)

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        version = await self._grpc("text", request.model, None, context)
        self.streams += 1
        try:
            number = 0
            while not self.release.is_set():
                yield pb.GenerateChunk(text=f"{self.name} {number}", model_version=version)
                number += 1
                await pause(0.02, "the pace of a stream")
            yield pb.GenerateChunk(text="end", finish_reason=pb.FINISH_REASON_STOP, model_version=version)
        finally:
            self.streams -= 1

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        await self._grpc("tensor", request.model_name, request.model_version, context)
        return oip.ModelInferResponse(
            model_name=request.model_name, model_version=request.model_version, id=self.name
        )

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        await self._grpc("tensor", request.name, request.version, context)
        return oip.ModelMetadataResponse(name=request.name, versions=[request.version])

    async def ModelStreamInfer(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        self.streams += 1
        try:
            async for request in request_iterator:
                yield oip.ModelStreamInferResponse(infer_response=await self.ModelInfer(request, context))
        finally:
            self.streams -= 1

    async def _rest(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                _, *lines = head.split("\r\n")
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                model = json.loads(body or b"{}").get("model", "")
                await self._answer("rest", model, headers.get(VERSION, ""), headers)
                told = json.dumps({"server": self.name, "version": headers.get(VERSION, "")}).encode()
                writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(told)}\r\n\r\n".encode() + told)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def replicas(*names: str) -> AsyncIterator[list[FakeReplica]]:
    async with AsyncExitStack() as stack:
        found = [await stack.enter_async_context(FakeReplica(name).serving()) for name in names]
        yield found


def model(
    name: str, weights: Mapping[int, int], versions: int = 0, task: str = "generate", **more: Any
) -> Model:
    """A model with the versions 1 to `versions`, or as many as have weights."""
    labels = more.pop("labels", {})
    made = tuple(
        Version(VersionKey(name, n), "file:///x", "0", task, "x", labels=labels)
        for n in range(1, max(versions, *weights) + 1)
    )
    return Model(name, made, tuple(weights.items()), **more)


class DataPlane:
    """One Envoy. `publish` returns once it has taken everything."""

    def __init__(
        self,
        layout: Layout,
        keys: KeyRing,
        snapshots: Snapshots,
        ads: Ads,
        entry: Entry,
        health: HealthDiscovery,
    ) -> None:
        self.address = entry.listen
        self.admin = layout.address(ENVOY_ADMIN)
        self.key = keys.mint("tester").key
        self.metadata = (("authorization", f"Bearer {self.key}"),)
        self._snapshots = snapshots
        self._builder = Builder()
        self._ads = ads
        self._entry = entry
        self.health = health
        self.view = View((), ())
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        self.channel = grpc.aio.insecure_channel(self.address, options=options)
        self.text: Any = InferenceServiceStub(self.channel)
        self.tensor: Any = GRPCInferenceServiceStub(self.channel)
        self.rest = httpx.AsyncClient(base_url=f"http://{self.address}", timeout=20, trust_env=False)
        self.rest.headers["authorization"] = f"Bearer {self.key}"

    async def close(self) -> None:
        await self.rest.aclose()
        await self.channel.close(0)

    async def publish(self, replicas: Iterable[Replica], models: Iterable[Model], **more: Any) -> View:
        now = view(replicas, models, **{"unhealthy": self.health.unhealthy, **more})
        self.health.watch(now)
        self.view = now
        made = self._builder.build(now, self._entry)
        await self._snapshots.publish(made)
        await until(lambda: self._synced(made.version), f"Envoy has {made.version}", every_s=0.01)
        return now

    @property
    def routes_version(self) -> str:
        assert self._snapshots.current is not None
        return self._snapshots.current.versions[xds.ROUTES]["public"]

    def _synced(self, version: str) -> bool:
        planes = list(self._ads.planes.values())
        for plane in planes:
            assert not plane.last_rejection, plane.last_rejection
        return bool(planes) and all(plane.synced == version for plane in planes)

    async def generate(self, model: str, prompt: str = "x", **headers: str) -> Any:
        request = pb.GenerateRequest(model=model, prompt=prompt)
        return await self.text.Generate(request, metadata=self._with(headers), timeout=10)

    async def infer(self, model: str, version: str = "", **headers: str) -> Any:
        request = oip.ModelInferRequest(model_name=model, model_version=version)
        return await self.tensor.ModelInfer(request, metadata=self._with(headers), timeout=10)

    async def chat(self, model: str, **headers: str) -> httpx.Response:
        given = {k.replace("_", "-"): v for k, v in headers.items()}
        return await self.rest.post("/v1/chat/completions", json={"model": model}, headers=given)

    def _with(self, headers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        return (*self.metadata, *((k.replace("_", "-"), v) for k, v in headers.items()))


@asynccontextmanager
async def dataplane(folder: Path, zone: str = "", **settings: Any) -> AsyncIterator[DataPlane]:
    """`settings` are further fields of Entry."""
    layout = Layout(folder, free_offset())
    keys, snapshots = KeyRing.at(folder / "key.pem"), Snapshots()
    ads, health = Ads(snapshots), HealthDiscovery(asyncio.Event())
    async with AsyncExitStack() as stack:
        server = grpc.aio.server()
        ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(ads, server)
        hds_pb2_grpc.add_HealthDiscoveryServiceServicer_to_server(health, server)
        control = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        stack.push_async_callback(server.stop, 0)
        entry = Entry(layout.address(PUBLIC), control, keys.jwks(), **settings)
        config = folder / "bootstrap.json"
        config.write_text(json.dumps(bootstrap("test", control, layout.address(ENVOY_ADMIN), zone=zone)))
        process = await asyncio.create_subprocess_exec(
            envoy(layout).argv[0], "-c", str(config), "--disable-hot-restart", "--concurrency", "1",
            "--log-level", "warn",
        )  # fmt: skip
        try:
            plane = DataPlane(layout, keys, snapshots, ads, entry, health)
            await plane.publish([], [])
            await until(lambda: _listens(entry.listen), "Envoy listens", every_s=0.02)
            yield plane
            assert process.returncode is None, "Envoy did not live to the end"
            await plane.close()
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    return True


def versions(seen: Iterable[Seen]) -> Counter[tuple[str, str]]:
    """How many requests there were by path and version."""
    return Counter((item.path, item.version) for item in seen)
