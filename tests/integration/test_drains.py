"""Envoys that leave: nobody new is sent to them, and no call is ended."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.drain import drain
from deploy.local.layout import PUBLIC, Layout
from lingqu.gateway.v1 import gateway_pb2 as pb
from services.core.lifecycle import CHANNEL_OPTIONS
from services.gateway.keys import KeyRing
from tests.conftest import free_offset
from tests.controls import Backend, Control, Gate, gated, until_synced
from tests.fake_registry import FakeRegistry, instance, model
from tests.waiting import until


class Entry:
    """An Envoy with a control plane before one backend."""

    def __init__(self, control: Control, gate: Gate, backend: Backend, public: str) -> None:
        self.control = control
        self.gate = gate
        self.backend = backend
        self.public = public

    async def healthy(self) -> bool:
        async with grpc.aio.insecure_channel(self.public, options=CHANNEL_OPTIONS) as channel:
            try:
                answer = await health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=2
                )
            except grpc.aio.AioRpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def refuses(self) -> bool:
        """Whether nobody new is let in."""
        async with grpc.aio.insecure_channel(self.public, options=CHANNEL_OPTIONS) as channel:
            try:
                await channel.unary_unary("/x/y")(b"", timeout=2)
            except grpc.aio.AioRpcError as err:
                return "refused" in (err.debug_error_string() or "").lower()
        return False

    async def state(self) -> int:
        (plane,) = (await self.control.described()).data_planes
        return plane.state


@pytest.fixture
async def entry(tmp_path: Path) -> AsyncIterator[Entry]:
    async with AsyncExitStack() as stack:
        registry, backend = FakeRegistry(), Backend("b")
        await registry.start()
        stack.push_async_callback(registry.stop)
        await backend.start()
        stack.push_async_callback(backend.stop)
        key = tmp_path / "signing.pem"
        KeyRing.at(key)
        public = Layout(tmp_path, free_offset()).address(PUBLIC)
        control = Control(tmp_path / "control", registry.address, public, key)
        await control.start()
        stack.push_async_callback(control.stop)
        await registry.put(model("m", {1: 100}), instance("a", backend.address, ("m", 1)))
        gate = await stack.enter_async_context(gated(tmp_path / "envoy", control.address, key))
        gate.use(public)
        made = Entry(control, gate, backend, public)
        await until(lambda: gate.answered("m"), "the model answers")
        await until(made.healthy, "the port is healthy")
        await until_synced(control)
        yield made


async def test_a_data_plane_leaves_by_its_control_plane_and_comes_back(entry: Entry) -> None:
    stream = entry.gate.stream("m")
    await stream.read()
    request = pb.DrainDataPlaneRequest(node_id="envoy", grace=Duration(seconds=600))
    assert (await entry.control.call("DrainDataPlane", request)).state == pb.DATA_PLANE_STATE_LEAVING
    await until(lambda: _not(entry.healthy()), "its health fails")
    assert await entry.gate.ask("m") == "b"  # but it serves
    undone = pb.DrainDataPlaneRequest(node_id="envoy", undo=True)
    assert (await entry.control.call("DrainDataPlane", undone)).state == pb.DATA_PLANE_STATE_SERVING
    await until(entry.healthy, "it is healthy again")
    request.grace.FromSeconds(0)
    await entry.control.call("DrainDataPlane", request)
    await until(entry.refuses, "its port is closed")
    assert await entry.state() == pb.DATA_PLANE_STATE_CLOSED
    entry.backend.release.set()
    assert (await stream.read()).text == "the end"
    await entry.control.call("DrainDataPlane", undone)
    await until(entry.healthy, "its port is open again")


async def test_who_is_not_connected_cannot_be_drained(entry: Entry) -> None:
    for node_id, code in (("nobody", grpc.StatusCode.NOT_FOUND), ("", grpc.StatusCode.INVALID_ARGUMENT)):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await entry.control.call("DrainDataPlane", pb.DrainDataPlaneRequest(node_id=node_id))
        assert refused.value.code() == code


async def test_an_envoy_that_is_stopped_lets_calls_end(entry: Entry) -> None:
    assert await drain(entry.gate.admin, 0.0, 5.0) == 0  # at once: there is nothing to wait for
    stream = entry.gate.stream("m")
    await stream.read()
    assert await drain(entry.gate.admin, 0.0, 0.2) == 1
    entry.backend.release.set()
    assert (await stream.read()).text == "the end"
    assert await stream.read() == grpc.aio.EOF
    assert await drain(entry.gate.admin, 0.0, 5.0) == 0
    assert await drain("127.0.0.1:1", 0.0, 5.0) == 0  # it is gone already


async def _not(asked: object) -> bool:
    return not await asked  # type: ignore[misc]
