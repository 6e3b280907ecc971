"""A real Envoy with the gateway's own configuration, in front of servers in the test's process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import psutil
from opentelemetry.trace import NoOpTracerProvider
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

from deploy.local.layout import ENVOY_ADMIN, PUBLIC, Layout
from deploy.local.parts import envoy
from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from services.core import http2
from services.core.access import Access
from services.core.discovery import READY, Hosted, Model, Replica, Version, VersionKey
from services.core.interceptors import server_stack
from services.core.lifecycle import MAX_MESSAGE_BYTES
from services.core.tls import Identity
from services.gateway.bootstrap import bootstrap
from services.gateway.keys import KeyRing
from services.gateway.listener import Entry
from services.gateway.snapshot import snapshot
from services.gateway.view import View, view
from tests.conftest import free_offset
from tests.statics import static
from tests.waiting import until

TEXT = "writer"
TENSOR = "numbers"
AWAY = "away"


@dataclass
class Backend(InferenceServiceServicer, oip_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers prompts with themselves, `top_k` times, and streamed a word a chunk; tensors with nothing.
    `hold`: streams wait for it after their first chunk. `error`: what calls end with, streams at `hold`."""

    hold: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    asked: list[tuple[Any, dict[str, str]]] = field(default_factory=list)

    def _heard(self, request: Any, context: Any, *, streams: bool = False) -> None:
        self.asked.append((request, {k: str(v) for k, v in context.invocation_metadata()}))
        if self.error is not None and not streams:
            raise self.error

    async def Generate(self, request: Any, context: Any) -> Any:
        self._heard(request, context)
        text = request.prompt * (request.top_k or 1)
        return pb.GenerateResponse(text=text, finish_reason=pb.FINISH_REASON_STOP, model_version="1")

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self._heard(request, context, streams=" " in request.prompt)
        words = request.prompt.split()
        for index, word in enumerate(words):
            last = index == len(words) - 1
            yield pb.GenerateChunk(text=word, finish_reason=pb.FINISH_REASON_STOP if last else 0)
            if not last:
                await self.hold.wait()
                if self.error is not None:
                    raise self.error

    async def Embed(self, request: Any, context: Any) -> Any:
        self._heard(request, context)
        return pb.EmbedResponse(embeddings=[pb.Embedding(values=[0.5, 1.0])] * len(request.inputs))

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        self._heard(request, context)
        return oip.ModelInferResponse(model_name=request.model_name, id=request.id)

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            self._heard(request, context)
            answer = oip.ModelInferResponse(model_name=request.model_name)
            yield oip.ModelStreamInferResponse(infer_response=answer)


@dataclass
class Gateway:
    """`address`: of the public port. `key`: of client "tester"."""

    address: str
    admin: str
    keys: KeyRing
    pid: int
    backend: Backend
    folder: Path

    @cached_property
    def key(self) -> str:
        return self.keys.mint("tester").key

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.key}"),)

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        sizes = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
        options = [*sizes, ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(self.address, options=options) as channel:
            yield channel

    async def serves(self) -> bool:
        """Whether a request gets its answer."""
        async with self.channel() as channel:
            try:
                stub: Any = InferenceServiceStub(channel)
                request = pb.GenerateRequest(model=TEXT, prompt="well?")
                answer = await stub.Generate(request, metadata=self.metadata, timeout=2)
            except grpc.aio.AioRpcError:
                return False
            return bool(answer.text == "well?")

    @property
    def memory(self) -> int:
        """Resident, bytes."""
        return int(psutil.Process(self.pid).memory_info().rss)


@asynccontextmanager
async def running(
    folder: Path,
    backend: Backend | None = None,
    heap_bytes: int = 512 << 20,
    access: Access | None = None,
    **entry: Any,
) -> AsyncIterator[Gateway]:
    """`entry`: fields of the gateway's Entry. TEXT and TENSOR have a ready replica, AWAY has none."""
    layout = Layout(folder, free_offset())
    backend = backend or Backend()
    keys = KeyRing.at(folder / "key.pem")
    made = replace(Entry(layout.address(PUBLIC), "127.0.0.1:1", keys.jwks()), **entry)
    boot = bootstrap("test", "127.0.0.1:1", layout.address(ENVOY_ADMIN), heap_bytes)
    for dynamic in ("dynamic_resources", "cluster_manager", "hds_config", "layered_runtime"):
        boot.pop(dynamic, None)
    async with serving(backend) as upstream:
        config = boot | static(snapshot(seen(upstream, access), made))
        async with envoy_running(layout, config) as pid:
            gateway = Gateway(made.listen, layout.address(ENVOY_ADMIN), keys, pid, backend, folder)
            await until(gateway.serves, f"Envoy serves: {folder}/envoy.log")
            backend.asked.clear()
            try:
                yield gateway
            finally:
                backend.hold.set()


@asynccontextmanager
async def serving(backend: Backend, identity: Identity | None = None) -> AsyncIterator[str]:
    """The address of a server of both services."""
    layers = server_stack(NoOpTracerProvider().get_tracer("test"), 4096)
    server = http2.Server(layers, max_message=MAX_MESSAGE_BYTES)
    add_InferenceServiceServicer_to_server(backend, server)
    oip_grpc.add_GRPCInferenceServiceServicer_to_server(backend, server)
    port = server.listen("127.0.0.1:0", identity)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def seen(upstream: str, access: Access | None = None) -> View:
    tasks = {TEXT: "generate", TENSOR: "tensor", AWAY: "generate"}
    models = [
        Model(name, (Version(VersionKey(name, 1), "file:///x", "0", task, "x"),), ((1, 100),))
        for name, task in tasks.items()
    ]
    hosted = tuple(Hosted(VersionKey(name, 1), READY) for name in (TEXT, TENSOR))
    endpoints = {"grpc": upstream, "oip": upstream, "http": "127.0.0.1:1"}
    return view([Replica("one", "inference", endpoints, hosted)], models, access)


@asynccontextmanager
async def envoy_running(layout: Layout, config: Mapping[str, Any]) -> AsyncIterator[int]:
    """The process id of an Envoy, which has to live to the end."""
    path, log = layout.state / "envoy.json", layout.state / "envoy.log"
    path.write_text(json.dumps(config))
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            envoy(layout).argv[0], "-c", str(path), "--disable-hot-restart", "--concurrency", "1",
            "--log-level", "warn", stderr=output,
        )  # fmt: skip
    try:
        yield process.pid
        assert process.returncode is None, f"Envoy did not live to the end:\n{log.read_text()}"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
