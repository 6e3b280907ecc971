"""As much of HTTP/2 as a load generator needs: a Python gRPC client takes as much of the machine as what it
measures does.

Frames after RFC 9113, gRPC over HTTP/2 after https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import asyncio
import struct
import time
from abc import abstractmethod
from collections import defaultdict
from typing import cast

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK, END_STREAM, END_HEADERS = 1, 1, 4
WINDOW = (1 << 31) - 1
FRAME = 16_384  # bytes of payload every peer takes


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: str, value: str) -> bytes:
    """A header field without indexing and without compression (RFC 7541, 6.2.2)."""
    return b"\0" + _length(name) + name.encode() + _length(value) + value.encode()


def _length(text: str) -> bytes:
    """RFC 7541, 5.1, with a prefix of seven bits."""
    size = len(text.encode())
    if size < 127:
        return bytes([size])
    out, size = bytearray([127]), size - 127
    while size >= 128:
        out.append(size % 128 + 128)
        size //= 128
    return bytes([*out, size])


class GrpcConnection(asyncio.Protocol):
    """Calls on one connection. `message` and `ended` hear of what comes, with the time it came at."""

    def __init__(self, path: str, authority: str, metadata: dict[str, str] | None = None) -> None:
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": authority}
        fields |= {"te": "trailers", "content-type": "application/grpc", **(metadata or {})}
        self._headers = b"".join(literal(name, value) for name, value in fields.items())
        self._buffer = bytearray()
        self._messages: defaultdict[int, bytearray] = defaultdict(bytearray)
        self._next = 1

    @abstractmethod
    def message(self, at: float, stream: int, message: bytes) -> None: ...

    @abstractmethod
    def ended(self, at: float, stream: int, well: bool) -> None:
        """A call, or with stream 0 the connection. `well`: with trailers, whatever they say."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses of it
        settings = struct.pack(">HI", 4, WINDOW)  # SETTINGS_INITIAL_WINDOW_SIZE
        out = PREFACE + frame(SETTINGS, 0, 0, settings)
        self._transport.write(out + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW - 65535)))

    def call(self, request: bytes) -> int:
        """Send one request; its stream's number. Small ones only: the peer's window is not looked at."""
        assert len(request) + 5 <= FRAME
        stream, self._next = self._next, self._next + 2
        body = b"\0" + len(request).to_bytes(4, "big") + request
        out = frame(HEADERS, END_HEADERS, stream, self._headers) + frame(DATA, END_STREAM, stream, body)
        self._transport.write(out)
        return stream

    def close(self) -> None:
        self._transport.close()

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

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended(time.monotonic(), 0, well=exc is None)

    def _take(self, at: float, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == DATA:
            buffer = self._messages[stream]
            buffer += payload
            while len(buffer) >= 5 and len(buffer) >= 5 + (size := int.from_bytes(buffer[1:5], "big")):
                self.message(at, stream, bytes(buffer[5 : 5 + size]))
                del buffer[: 5 + size]
        elif kind == SETTINGS and not flags & ACK:
            self._transport.write(frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            self._transport.write(frame(PING, ACK, 0, payload))
        elif kind == GOAWAY:
            self.ended(at, 0, well=False)
        elif kind == RST_STREAM:
            self.ended(at, stream, well=False)
        if flags & END_STREAM and kind in (DATA, HEADERS):
            self._messages.pop(stream, None)
            self.ended(at, stream, well=kind == HEADERS)
