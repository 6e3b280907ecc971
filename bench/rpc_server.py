"""Echo and a stream of ticks, behind one of two gRPC servers: `python -m bench.rpc_server own|grpcio` prints
its port and serves until it is ended."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import uvloop

from services.core import http2

SERVICE, MESSAGES, TICK_S = "bench.Echo", 64, 0.01
WORD = b"\x0a\x06 hello\x1a\x011"  # as long as most chunks of generated text


class Ticks:
    """Everybody who waits is woken at the same moment, as by the step of an engine."""

    def __init__(self) -> None:
        self._next: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            due, self._next = self._next, asyncio.get_running_loop().create_future()
            due.set_result(None)

    async def wait(self) -> None:
        await asyncio.shield(self._next)


async def main(kind: str) -> None:
    ticks = Ticks()

    async def echo(request: bytes, context: Any) -> bytes:
        return request

    async def words(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for _ in range(MESSAGES):
            await ticks.wait()
            yield WORD

    methods: dict[str, Any] = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Words": grpc.unary_stream_rpc_method_handler(words),
    }
    server = http2.Server() if kind == "own" else grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await ticks.run()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
