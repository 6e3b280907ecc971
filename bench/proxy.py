"""The reference for the tensor path: a `grpc.aio` proxy that passes every unary call on and does nothing
else. Run as `python -m bench.proxy LISTEN TARGET`."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc


class PassThrough(grpc.GenericRpcHandler):
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._calls: dict[str, Any] = {}

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method not in self._calls:
            self._calls[details.method] = self._channel.unary_unary(details.method)
        call = self._calls[details.method]

        async def passed_on(request: bytes, context: Any) -> bytes:
            answer: bytes = await call(request)
            return answer

        return grpc.unary_unary_rpc_method_handler(passed_on)


async def main(listen: str, target: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((PassThrough(channel),))
        server.add_insecure_port(listen)
        await server.start()
        await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
