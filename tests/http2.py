"""HTTP/2 by hand (RFC 9113, RFC 7541), for frames that no client library would send."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable
from dataclasses import dataclass

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = range(5)
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(5, 10)
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
INITIAL_WINDOW_SIZE = 0x4
Headers = Iterable[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Frame:
    kind: int
    flags: int
    stream: int
    payload: bytes


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """`length` is what the frame says of itself; default: the truth."""
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def of_stream(frames: bytes, stream: int) -> bytes:
    """The same frames on another stream."""
    out, at = b"", 0
    while at < len(frames):
        end = at + 9 + int.from_bytes(frames[at : at + 3], "big")
        out += frames[at : at + 5] + struct.pack(">I", stream) + frames[at + 9 : end]
        at = end
    return out


def block(headers: Headers) -> bytes:
    """A header block without compression: literal fields that nobody indexes. Latin-1, as on the wire."""
    return b"".join(
        b"\x00" + _length(len(name)) + name.encode("latin-1") + _length(len(value)) + value.encode("latin-1")
        for name, value in headers
    )


def _length(value: int) -> bytes:
    if value < 127:
        return bytes([value])
    value -= 127
    out = b"\x7f"
    while value >= 128:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def message(body: bytes, flags: int = 0, length: int | None = None) -> bytes:
    """A length-prefixed gRPC message; `length` is what the prefix says."""
    return struct.pack(">BI", flags, len(body) if length is None else length) + body


def call(path: str, kind: str = "application/grpc") -> tuple[tuple[str, str], ...]:
    """Headers of a gRPC request."""
    return (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "test"),
        ("te", "trailers"),
        ("content-type", kind),
    )


def request(stream: int, body: bytes, headers: Headers) -> bytes:
    """All of a call: its headers and one frame of data."""
    return frame(HEADERS, END_HEADERS, stream, block(headers)) + frame(DATA, END_STREAM, stream, body)


class Connection:
    """A connection that says what it is told to say, and keeps what it hears until the peer hangs up."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.frames: list[Frame] = []
        self.closed = asyncio.Event()
        self._heard = asyncio.Condition()
        self._listening = asyncio.ensure_future(self._listen())

    @classmethod
    async def open(cls, address: str, window: int | None = None) -> Connection:
        """`window` is what may be sent to us on each stream, bytes."""
        host, _, port = address.rpartition(":")
        connection = cls(*await asyncio.open_connection(host, int(port)))
        settings = b"" if window is None else struct.pack(">HI", INITIAL_WINDOW_SIZE, window)
        await connection.send(PREFACE + frame(SETTINGS, 0, 0, settings))
        return connection

    async def send(self, raw: bytes) -> None:
        """What the peer does not take any more is lost."""
        try:
            self._writer.write(raw)
            await self._writer.drain()
        except ConnectionError:
            self.closed.set()

    async def of(self, stream: int, *kinds: int, timeout_s: float = 10) -> Frame | None:
        """The first frame of such a kind on that stream; None if the peer hangs up before."""

        def found() -> Frame | None:
            return next((f for f in self.frames if f.stream == stream and f.kind in kinds), None)

        async with asyncio.timeout(timeout_s), self._heard:
            await self._heard.wait_for(lambda: found() is not None or self.closed.is_set())
        return found()

    async def close(self) -> None:
        self._listening.cancel()
        self._writer.close()

    async def _listen(self) -> None:
        try:
            while head := await self._reader.readexactly(9):
                kind, flags, stream = struct.unpack(">BBI", head[3:])
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                if kind == SETTINGS and not flags & ACK:
                    await self.send(frame(SETTINGS, ACK, 0))
                async with self._heard:
                    self.frames.append(Frame(kind, flags, stream & 0x7FFFFFFF, payload))
                    self._heard.notify_all()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.closed.set()
            async with self._heard:
                self._heard.notify_all()
