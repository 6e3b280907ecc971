"""One connection: frames in and out, and the calls in it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import h2.events
import h2.exceptions

from services.core.http2 import headers
from services.core.http2.call import Call
from services.core.http2.messages import Reader, Refused, check_encoding
from services.core.http2.outbox import Outbox
from services.core.http2.protocol import (
    CONNECTION_WINDOW,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    MAX_FRAME,
    REFUSED_STREAM,
    Protocol,
)

log = logging.getLogger(__name__)

# What a client may leave unread of what it is owed without having been asked (acknowledgements), bytes.
MAX_UNREAD = 1 << 20
# How long a client may take to say that it speaks HTTP/2.
GREETING_S = 10.0
# How long a client may take to hear that it is to begin no more calls.
DRAIN_S = 1.0
# How long a client may take to read what it was sent before its connection was closed.
CLOSE_S = 2.0
# What is listened to at a time, bytes: other connections come to their turn in between.
TURN = 16 << 10
# Frames that ask for nothing (CVE-2023-44487, CVE-2019-9512 to 9518): pings, settings, empty data; and
# resets, of which a proxy has many, as its clients leave. At this rate they take a tenth of a core. One more
# for each frame of a response: Go's and Java's clients send a ping when one has come, to measure the way.
IDLE_FRAMES = 10_000
IDLE_FRAMES_PER_S = 1_000.0
ALL_STREAMS = (1 << 31) - 1


@dataclass(slots=True)
class Budget:
    """Bytes of requests that all connections together may hold."""

    most: int
    held: int = 0


@dataclass(slots=True)
class Terms:
    """What a connection needs to know of its server. `handler` gives a method's, and how to get it with
    what is around it; None if there is none."""

    handler: Callable[[str], tuple[Any, Callable[[], Any]] | None]
    max_message: int
    budget: Budget
    connections: set[Connection] = field(default_factory=set)
    stopping: bool = False


@dataclass(slots=True)
class Patience:
    """`left` grows with time, and by what is added to it, up to `most`."""

    most: float
    per_s: float
    left: float
    at: float = 0.0

    def lose(self, now: float) -> None:
        """One of it."""
        self.left = min(self.most, self.left + (now - self.at) * self.per_s) - 1
        self.at = now


class Connection(asyncio.Protocol):
    name = "unknown"

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._calls: dict[int, Call] = {}
        self._held: dict[int, int] = {}
        self._unheard = bytearray()
        self._patience = Patience(IDLE_FRAMES, IDLE_FRAMES_PER_S, IDLE_FRAMES)
        self._paused = False
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._greeting: asyncio.TimerHandle | None = None
        self._draining: asyncio.TimerHandle | None = None
        self._last: int | None = None  # of the streams that are answered, once the client knows it
        self._leaving = False  # no more calls will begin
        self.closed = asyncio.Event()
        self._h2 = Protocol()
        self._outbox = Outbox(self._h2.room, self._send, self._blocked)

    # -- asyncio.Protocol --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses of it
        host = transport.get_extra_info("peername")
        if isinstance(host, tuple):
            self.name = f"ipv6:[{host[0]}]:{host[1]}" if ":" in host[0] else f"ipv4:{host[0]}:{host[1]}"
        self._terms.connections.add(self)
        self._loop = asyncio.get_running_loop()
        if self._terms.stopping:  # it was in a handshake
            self.close()
            return
        self._greeting = self._loop.call_later(GREETING_S, self.close)
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(CONNECTION_WINDOW - 65_535)
        self._flush()

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        if not self._unheard and len(data) <= TURN:
            self._hear(data)
            return
        waits = bool(self._unheard)
        self._unheard += data
        if not waits:
            self._transport.pause_reading()
            self._hear_more()

    def _hear_more(self) -> None:
        if self._transport.is_closing():
            return
        part = bytes(self._unheard[:TURN])
        del self._unheard[:TURN]
        self._hear(part)
        if self._unheard:
            self._loop.call_soon(self._hear_more)
        elif not self._transport.is_closing():
            self._transport.resume_reading()

    def _hear(self, data: bytes) -> None:
        try:
            for event in self._h2.receive_data(data):
                self._on(event)
        except h2.exceptions.ProtocolError as err:
            log.info("%s does not speak HTTP/2: %s", self.name, err)
            self.close()
            return
        self._flush()
        if self._patience.left < 0:
            log.warning("%s is hung up on: it resets or asks for nothing too often", self.name)
            self._write(self._h2.go_away(self._h2.highest_inbound_stream_id, ENHANCE_YOUR_CALM))
            self.close()
        elif self._paused and self._transport.get_write_buffer_size() > MAX_UNREAD:
            self._transport.abort()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._outbox.pump()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        self._terms.connections.discard(self)
        self.closed.set()

    @property
    def certificate(self) -> bytes | None:
        """The client's, DER; None where there is no TLS."""
        found = self._transport.get_extra_info("ssl_object")
        return None if found is None else cast("bytes | None", found.getpeercert(binary_form=True))

    # -- what comes --------------------------------------------------------------------------------------

    def _on(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.DataReceived():
                self._on_data(event)
            case h2.events.RequestReceived():
                self._on_request(event)
            case h2.events.StreamEnded():
                if (call := self._calls.get(event.stream_id)) is not None:
                    self._guarded(call, call.half_close)
            case h2.events.StreamReset():
                self._idle()
                self._dismiss(event.stream_id)
            case h2.events.WindowUpdated():
                if event.stream_id:
                    self._outbox.opened(event.stream_id)
                else:
                    self._outbox.pump()
            case h2.events.RemoteSettingsChanged():
                self._idle()
                if self._greeting is not None:
                    self._greeting.cancel()
                self._outbox.opened()
            case h2.events.PingReceived() | h2.events.PriorityUpdated() | h2.events.UnknownFrameReceived():
                self._idle()
            case h2.events.PingAckReceived():
                if self._draining is not None:
                    self.refuse()
            case h2.events.ConnectionTerminated():
                self._leaving = True
                self._close_if_left()
            case _:
                pass

    def _idle(self) -> None:
        self._patience.lose(time.monotonic())

    def _on_request(self, event: h2.events.RequestReceived) -> None:
        stream = event.stream_id
        if (
            self._last is not None and stream > self._last
        ):  # the client knows, or will, that it is not answered
            self._write(self._h2.forget(stream, REFUSED_STREAM))
            return
        try:
            request = headers.request(event.headers)
            if not request.is_grpc:
                self._finish(stream, headers.NO_GRPC)
                return
            check_encoding(request.encoding)
            found = self._terms.handler(request.path)
            if found is None:
                raise Refused(grpc.StatusCode.UNIMPLEMENTED, "there is no such method")
            reader = Reader(request.encoding, self._terms.max_message)
            self._calls[stream] = Call(self, stream, *found, request.metadata, request.timeout_s, reader)
        except Refused as refused:
            status = headers.status(refused.code.value[0], refused.details)
            self._finish(stream, headers.BEGIN + status + headers.ACCEPTED)

    def _on_data(self, event: h2.events.DataReceived) -> None:
        stream, size = event.stream_id, event.flow_controlled_length
        if not event.data and event.stream_ended is None:
            self._idle()
        call = self._calls.get(stream)
        if call is None:  # refused while it was on its way
            self._h2.acknowledge_received_data(size, stream)
            return
        self._guarded(call, lambda: call.data(event.data, size))
        if self._terms.budget.held > self._terms.budget.most and stream in self._calls:
            call.cut(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much of other requests waits here already")

    def _guarded(self, call: Call, heard: Callable[[], None]) -> None:
        try:
            heard()
        except Refused as refused:
            call.cut(refused.code, refused.details)

    # -- what goes ---------------------------------------------------------------------------------------

    def begin(self, stream: int, initial: bytes) -> None:
        if not self._transport.is_closing():
            self._write(self._h2.headers(stream, headers.BEGIN + initial))

    async def send(self, stream: int, data: bytes, begun: bool) -> None:
        self._patience.left += 1
        if self._transport.is_closing():  # lost, as what is on its way
            return
        head = b"" if begun else self._h2.headers(stream, headers.BEGIN)
        if not self._paused and len(data) <= self._h2.room(stream):
            self._write(head + self._h2.data(stream, data))
            return
        if head:
            self._write(head)
        if stream in self._outbox:
            raise grpc.aio.UsageError("a message of this call is being sent")
        await self._outbox.sent(stream, data)

    def end(self, stream: int, begun: bool, code: int, details: str, trailing: bytes) -> None:
        block = (b"" if begun else headers.BEGIN) + headers.status(code, details) + trailing
        self._finish(stream, block)

    def took(self, stream: int, size: int) -> None:
        if not self._transport.is_closing():
            self._h2.acknowledge_received_data(size, stream)
            self._flush()

    def holds(self, stream: int, size: int) -> None:
        self._terms.budget.held += size - self._held.pop(stream, 0)
        if size:
            self._held[stream] = size

    def _send(self, stream: int, data: bytes) -> None:
        self._write(self._h2.data(stream, data))

    def _blocked(self) -> bool:
        return self._paused or self._h2.outbound_flow_control_window <= 0 or self._transport.is_closing()

    def _finish(self, stream: int, block: bytes) -> None:
        """Send the last headers of a response."""
        if self._h2.is_open(stream) and not self._transport.is_closing():
            self._patience.left += 1
            last = self._h2.headers(stream, block, END_STREAM)
            self._write(last + self._h2.forget(stream))
        self._dismiss(stream)

    def _flush(self) -> None:
        if data := self._h2.data_to_send():
            self._write(data)

    def _write(self, data: bytes) -> None:
        """With all else that is said in this turn of the loop, the messages of a step among it: uvloop would
        ask the kernel for each."""
        if not self._unsent:
            self._loop.call_soon(self._write_out)
        self._unsent.append(data)
        self._unsent_bytes += len(data)
        if self._unsent_bytes > MAX_FRAME:
            self._write_out()

    def _write_out(self) -> None:
        data, self._unsent, self._unsent_bytes = b"".join(self._unsent), [], 0
        if data and not self._transport.is_closing():
            self._transport.write(data)

    # -- the end -----------------------------------------------------------------------------------------

    @property
    def calls(self) -> list[Call]:
        return list(self._calls.values())

    def drain(self) -> None:
        """Ask the client to begin no more calls; close when the last has ended. Those that are on their way
        when it hears of it are answered."""
        if self._draining is not None or self._transport.is_closing():
            return
        self._h2.ping(b"draining")  # what comes before the answer was begun in ignorance
        self._write(self._h2.go_away(ALL_STREAMS))
        self._flush()
        self._draining = self._loop.call_later(DRAIN_S, self.refuse)

    def refuse(self) -> None:
        """Calls that begin from now on are not answered, and the client knows which."""
        if self._last is not None or self._transport.is_closing():
            return
        self._last = self._h2.highest_inbound_stream_id
        self._write(self._h2.go_away(self._last))
        self._leaving = True
        self._close_if_left()

    def _close_if_left(self) -> None:
        if self._leaving and not self._calls:
            self.close()

    def close(self) -> None:
        """Nothing more is heard; what was said is sent, to a client that reads."""
        if self._transport.is_closing():
            return
        self._flush()
        self._write_out()
        self._transport.close()
        self._loop.call_later(CLOSE_S, self._transport.abort)
        self._leave()

    def _leave(self) -> None:
        """No call is there any more."""
        for timer in (self._greeting, self._draining):
            if timer is not None:
                timer.cancel()
        self._unheard.clear()
        for stream in list(self._calls):
            self._dismiss(stream)

    def _dismiss(self, stream: int) -> None:
        """There is no such call any more; what came of it makes room for others."""
        self._outbox.drop(stream)
        self._h2.forget(stream)
        self.holds(stream, 0)
        if (call := self._calls.pop(stream, None)) is not None:
            call.leave()
            if call.untaken:
                self.took(stream, call.untaken)
            self._close_if_left()
