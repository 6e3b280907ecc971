"""Watch streams of the registry as bare HTTP/2, for bench/registry.py: real gRPC calls whose messages are
only timed. A thousand streams of a Python gRPC client take as much of the machine as the registry does."""

from __future__ import annotations

import asyncio
import sys

from bench.http2 import GrpcConnection


class Watches(GrpcConnection):
    """`streams` watches on one connection; `received` has the time of every message behind the snapshots."""

    def __init__(self, path: str, authority: str, streams: int) -> None:
        super().__init__(path, authority)
        self._streams = streams
        self._snapshots = 0
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.received: list[tuple[float, bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        for _ in range(self._streams):
            self.call(b"")

    def message(self, at: float, stream: int, message: bytes) -> None:
        if self._snapshots < self._streams:
            self._snapshots += 1
            if self._snapshots == self._streams:
                self.ready.set_result(None)
        else:
            self.received.append((at, message))

    def ended(self, at: float, stream: int, well: bool) -> None:
        sys.exit(f"a watch ended: stream {stream}")


async def watches(address: str, path: str, streams: int, connections: int) -> list[Watches]:
    """Open watches that have had their snapshots."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    opened = []
    for _ in range(connections):
        make = lambda: Watches(path, address, streams // connections)  # noqa: E731
        _, connection = await loop.create_connection(make, host, int(port))
        opened.append(connection)
    await asyncio.gather(*(connection.ready for connection in opened))
    return opened
