"""Watch streams of the registry as bare HTTP/2, for bench/registry.py: real gRPC calls whose messages are
only timed. A thousand streams of a Python gRPC client take as much of the machine as the registry does.

Frames after RFC 9113, gRPC over HTTP/2 after https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import asyncio
import struct
import sys
import time
from collections import defaultdict

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK, END_STREAM, END_HEADERS = 1, 1, 4
WINDOW = (1 << 31) - 1


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: str, value: str) -> bytes:
    """A header field without indexing and without compression (RFC 7541, 6.2.2)."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


class Connection(asyncio.Protocol):
    """`streams` watches on one connection; `received` has the time of every message by its revision."""

    def __init__(self, path: str, authority: str, streams: int) -> None:
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": authority}
        fields |= {"te": "trailers", "content-type": "application/grpc"}
        self._headers = b"".join(literal(name, value) for name, value in fields.items())
        self._streams = streams
        self._buffer = bytearray()
        self._messages: defaultdict[int, bytearray] = defaultdict(bytearray)
        self._snapshots = 0
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.received: list[tuple[float, bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        settings = struct.pack(">HI", 4, WINDOW)  # SETTINGS_INITIAL_WINDOW_SIZE
        out = PREFACE + frame(SETTINGS, 0, 0, settings)
        out += frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW - 65535))
        for number in range(self._streams):
            out += frame(HEADERS, END_HEADERS, 2 * number + 1, self._headers)
            out += frame(DATA, END_STREAM, 2 * number + 1, b"\0\0\0\0\0")  # an empty request
        transport.write(out)

    def data_received(self, data: bytes) -> None:
        at = time.monotonic()
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= 9:
            size = int.from_bytes(self._buffer[start : start + 3], "big")
            if len(self._buffer) - start - 9 < size:
                break
            kind, flags, stream = struct.unpack_from(">BBI", self._buffer, start + 3)
            self._take(at, kind, flags, stream, bytes(self._buffer[start + 9 : start + 9 + size]))
            start += 9 + size
        del self._buffer[:start]

    def _take(self, at: float, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == DATA:
            buffer = self._messages[stream]
            buffer += payload
            while len(buffer) >= 5 and len(buffer) >= 5 + (size := int.from_bytes(buffer[1:5], "big")):
                self._message(at, bytes(buffer[5 : 5 + size]))
                del buffer[: 5 + size]
        elif kind == SETTINGS and not flags & ACK:
            self._transport.write(frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            self._transport.write(frame(PING, ACK, 0, payload))
        elif kind in (RST_STREAM, GOAWAY) or (kind == HEADERS and flags & END_STREAM):
            sys.exit(f"a watch ended: frame {kind} on stream {stream}")

    def _message(self, at: float, message: bytes) -> None:
        if self._snapshots < self._streams:
            self._snapshots += 1
            if self._snapshots == self._streams:
                self.ready.set_result(None)
        else:
            self.received.append((at, message))


async def watches(address: str, path: str, streams: int, connections: int) -> list[Connection]:
    """Open watches that have had their snapshots."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    opened = []
    for _ in range(connections):
        make = lambda: Connection(path, address, streams // connections)  # noqa: E731
        _, connection = await loop.create_connection(make, host, int(port))
        opened.append(connection)
    await asyncio.gather(*(connection.ready for connection in opened))
    return opened
