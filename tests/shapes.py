"""A gRPC service with methods of every shape, of bytes, and a server of it in the test's process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from services.core import http2
from tests.waiting import forever

MOST = 1 << 20  # bytes of a message
SERVICE = "test.Shapes"


@dataclass
class Shapes:
    """Methods of every shape, of bytes; what they saw, and how many of them run."""

    running: int = 0
    written: int = 0
    metadata: list[tuple[str, Any]] = field(default_factory=list)
    done: list[bool] = field(default_factory=list)
    let_go: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def ran(self) -> AsyncIterator[None]:
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    async def echo(self, request: bytes, context: Any) -> bytes:
        async with self.ran():
            self.metadata = list(context.invocation_metadata())
            return request

    async def hang(self, request: bytes, context: Any) -> bytes:
        async with self.ran():
            await forever()
        return b""

    async def held(self, request: bytes, context: Any) -> bytes:
        async with self.ran():
            await self.let_go.wait()
        return request

    async def told(self, request: bytes, context: Any) -> bytes:
        """The status that the request names."""
        await context.send_initial_metadata((("first", "1"), ("first-bin", b"\0\xff")))
        details = (("last", "2"), ("last-bin", b"\1"))
        await context.abort(list(grpc.StatusCode)[int(request)], "naïve 100 %\n", details)

    async def ends(self, request: bytes, context: Any) -> bytes:
        """With a status, the way the request says."""
        context.add_done_callback(lambda context: self.done.append(context.cancelled()))
        context.set_trailing_metadata((("last", "1"),))
        context.set_code(grpc.StatusCode.NOT_FOUND)
        context.set_details("nobody here")
        if request == b"abort":
            await context.abort(grpc.StatusCode.NOT_FOUND)
        assert request == b"return"
        return b"not told"

    async def metadatum(self, request: bytes, context: Any) -> bytes:
        """Tells `metadata`."""
        if request == b"first":
            await context.send_initial_metadata(tuple(self.metadata))
        else:
            context.set_trailing_metadata(tuple(self.metadata))
        return b""

    async def deaf(self, request: bytes, context: Any) -> bytes:
        """Goes on when it is cancelled."""
        async with self.ran():
            while not self.let_go.is_set():
                with suppress(asyncio.CancelledError):
                    await self.let_go.wait()
        return b"late"

    async def boom(self, request: bytes, context: Any) -> bytes:
        raise ValueError("secret")

    async def words(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """As many messages as the request says, and of so many bytes."""
        number, size = map(int, request.split())
        async with self.ran():
            for _ in range(number):
                yield b"w" * size
                self.written += 1

    async def writes(self, request: bytes, context: Any) -> None:
        for word in request.split():
            await context.write(word)

    async def joined(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b" ".join([request async for request in requests])

    async def never(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        """Reads none."""
        await forever()
        return b""

    async def upper(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async with self.ran():
            async for request in requests:
                yield request.upper()

    def handler(self) -> grpc.GenericRpcHandler:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods: dict[str, Any] = {
            "Echo": unary(self.echo),
            "Hang": unary(self.hang),
            "Held": unary(self.held),
            "Told": unary(self.told),
            "Boom": unary(self.boom),
            "Ends": unary(self.ends),
            "Metadata": unary(self.metadatum),
            "Deaf": unary(self.deaf),
            "Words": stream(self.words),
            "Writes": stream(self.writes),
            "Joined": grpc.stream_unary_rpc_method_handler(self.joined),
            "Never": grpc.stream_unary_rpc_method_handler(self.never),
            "Upper": grpc.stream_stream_rpc_method_handler(self.upper),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)


@dataclass
class Served:
    shapes: Shapes
    server: grpc.aio.Server
    address: str
    channel: grpc.aio.Channel

    def unary(self, method: str, request: bytes, **more: Any) -> Any:
        return self.channel.unary_unary(f"/{SERVICE}/{method}")(request, **more)

    def stream(self, method: str, request: bytes, **more: Any) -> Any:
        return self.channel.unary_stream(f"/{SERVICE}/{method}")(request, **more)

    async def well(self) -> bool:
        """It answers, and nothing of what came before is left."""
        assert await self.unary("Echo", b"x", timeout=10) == b"x"
        return not self.shapes.running


def ours() -> http2.Server:
    return http2.Server(max_message=MOST)


def grpcio() -> grpc.aio.Server:
    return grpc.aio.server(options=[("grpc.max_receive_message_length", MOST)])


@asynccontextmanager
async def served(made: Callable[[], grpc.aio.Server] = ours) -> AsyncIterator[Served]:
    shapes, server = Shapes(), made()
    server.add_generic_rpc_handlers((shapes.handler(),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    told = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=told) as channel:
        yield Served(shapes, server, address, channel)
    await server.stop(0)


async def status(call: Any) -> tuple[grpc.StatusCode, str]:
    try:
        await call
    except grpc.aio.AioRpcError as err:
        return err.code(), err.details() or ""
    return grpc.StatusCode.OK, ""
