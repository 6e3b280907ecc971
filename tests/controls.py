"""Real Envoys with control planes of their own, before backends in the process of the test."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from deploy.local.layout import ENVOY_ADMIN, GATEWAY, PUBLIC, Layout
from deploy.local.part import Part, Running, grpc_ready, http_ready
from deploy.local.parts import envoy
from lingqu.gateway.v1 import gateway_pb2
from lingqu.gateway.v1.gateway_pb2_grpc import GatewayServiceStub
from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from services.core.lifecycle import CHANNEL_OPTIONS
from services.gateway.bootstrap import bootstrap
from services.gateway.keys import KeyRing
from tests.conftest import free_offset
from tests.waiting import until


class Backend(InferenceServiceServicer):
    """Answers with its name; its streams last until `release` is set."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls = 0
        self.release = asyncio.Event()

    async def start(self, address: str = "127.0.0.1:0") -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add_InferenceServiceServicer_to_server(self, self._server)
        host = address.rpartition(":")[0]
        self.address = f"{host}:{self._server.add_insecure_port(address)}"
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    async def Generate(self, request: Any, context: Any) -> pb.GenerateResponse:
        self.calls += 1
        return pb.GenerateResponse(text=self.name)

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        self.calls += 1
        yield pb.GenerateChunk(text=self.name)
        await self.release.wait()
        yield pb.GenerateChunk(text="the end")


class Gate:
    """An Envoy and the means to call through it."""

    def __init__(self, layout: Layout, key: str) -> None:
        self.layout = layout
        self.admin = layout.address(ENVOY_ADMIN)
        self.metadata = (("authorization", f"Bearer {key}"),)
        self._asked = 0
        self.use(layout.address(PUBLIC))

    def use(self, public: str) -> None:
        """Call this port: the one that its control planes tell it to listen on."""
        self.channel = grpc.aio.insecure_channel(public, options=[*CHANNEL_OPTIONS])
        self.text: Any = InferenceServiceStub(self.channel)

    async def start(self, control: str, node_id: str) -> None:
        part = envoy(self.layout)
        config = self.layout.state / f"{node_id}.json"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps(bootstrap(node_id, control, self.admin)))
        argv = (
            part.argv[0],
            "-c",
            str(config),
            "--disable-hot-restart",
            "--concurrency",
            "1",
            "--log-level",
            "warn",
        )
        ready = http_ready(f"http://{self.admin}/server_info")
        self.running = await Running.start(Part(node_id, argv, ready), self.layout.logs)
        await self.running.until_ready()

    async def stop(self) -> None:
        await self.channel.close()
        await self.running.stop()

    async def ask(self, model: str, timeout: float = 5.0) -> str:
        """The name of the backend that answered."""
        self._asked += 1  # what begins alike goes to one replica
        request = pb.GenerateRequest(model=model, prompt=f"{self._asked} x")
        return str((await self.text.Generate(request, metadata=self.metadata, timeout=timeout)).text)

    async def answered(self, model: str) -> str:
        """The same, empty while nobody answers."""
        try:
            return await self.ask(model)
        except grpc.aio.AioRpcError:
            return ""

    def stream(self, model: str) -> Any:
        self._asked += 1
        request = pb.GenerateRequest(model=model, prompt=f"{self._asked} x")
        return self.text.StreamGenerate(request, metadata=self.metadata)


class Control:
    """A control plane as a process of its own, to be stopped, paused and killed."""

    def __init__(self, folder: Path, registry: str, public: str, signing_key: Path, **env: str) -> None:
        self.layout = Layout(folder, free_offset())
        self.address = self.layout.address(GATEWAY)
        self._env = {
            "LINGQU_REGISTRY": registry,
            "LINGQU_GATEWAY_LISTEN": self.address,
            "LINGQU_PUBLIC_LISTEN": public,
            "LINGQU_SIGNING_KEY": str(signing_key),
            "LINGQU_GRACE_S": "0.1",
            "LINGQU_GATEWAY_TTL_S": "2",
            **env,
        }
        self._metadata = (
            ("authorization", f"Bearer {KeyRing.at(signing_key).mint('boss', admin=True).key}"),
        )

    def take(self, other: Control) -> None:
        """The address of one that has ended."""
        self.address, self._env = other.address, other._env

    async def start(self) -> None:
        argv = (sys.executable, "-m", "services.gateway")
        part = Part("gateway", argv, grpc_ready(self.address), env=self._env)
        self.running = await Running.start(part, self.layout.logs)
        await self.running.until_ready()

    def signal(self, number: int) -> None:
        os.kill(self.running.pid, number)

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        await self.running.ended()

    async def stop(self) -> None:
        if self.running.returncode is None:
            await self.running.stop()

    async def call(self, method: str, request: Any) -> Any:
        async with grpc.aio.insecure_channel(self.address) as channel:
            return await getattr(GatewayServiceStub(channel), method)(
                request, metadata=self._metadata, timeout=10
            )

    async def described(self) -> gateway_pb2.DescribeRoutesResponse:
        return await self.call("DescribeRoutes", gateway_pb2.DescribeRoutesRequest())  # type: ignore[no-any-return]


@asynccontextmanager
async def gated(folder: Path, control: str, signing_key: Path, node_id: str = "envoy") -> AsyncIterator[Gate]:
    """An Envoy of these control planes; not waited for until it has its routes."""
    gate = Gate(Layout(folder, free_offset()), KeyRing.at(signing_key).mint("tester").key)
    await gate.start(control, node_id)
    try:
        yield gate
        assert gate.running.returncode is None, "Envoy did not live to the end"
    finally:
        await gate.stop()


async def until_synced(control: Control, planes: int = 1) -> gateway_pb2.DescribeRoutesResponse:
    """Wait until that many Envoys have everything that this control plane has."""

    async def synced() -> gateway_pb2.DescribeRoutesResponse | None:
        state = await control.described()
        good = [p for p in state.data_planes if state.version and p.synced_version == state.version]
        return state if len(good) == planes else None

    return await until(synced, f"{planes} Envoys have what {control.address} has")  # type: ignore[return-value]
