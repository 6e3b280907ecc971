"""One connection: frames in and out, windows, and the calls in it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import grpc
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
from h2.config import H2Configuration
from hyperframe.frame import GoAwayFrame

from services.core.http2.call import Call
from services.core.http2.messages import (
    Metadatum,
    Reader,
    Refused,
    check_encoding,
    fields,
    message_field,
    metadata,
    timeout,
)

log = logging.getLogger(__name__)

MAX_STREAMS = 8_192
MAX_HEADERS = 64 << 10  # bytes, as HTTP/2 counts them
STREAM_WINDOW = 1 << 20
CONNECTION_WINDOW = 16 << 20
# What a client may leave unread of what it is owed without having been asked (acknowledgements), bytes.
MAX_UNREAD = 1 << 20
# How long a client may take to say that it speaks HTTP/2.
GREETING_S = 10.0
# How long a client may take to hear that it is to begin no more calls.
DRAIN_S = 1.0
# Of what is sent: a client that would take more is written to as fast as it reads all the same.
MAX_FRAME = 64 << 10
ALL_STREAMS = (1 << 31) - 1


@dataclass(slots=True)
class Budget:
    """Bytes of requests that all connections together may hold."""

    most: int
    held: int = 0


@dataclass(frozen=True, slots=True)
class Terms:
    """What a connection needs to know of its server. `handler` gives a method's, and how to get it with
    what is around it; None if there is none."""

    handler: Callable[[str], tuple[Any, Callable[[], Any]] | None]
    max_message: int
    budget: Budget
    connections: set[Connection]


class Connection(asyncio.Protocol):
    name = "unknown"

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._calls: dict[int, Call] = {}
        self._held: dict[int, int] = {}
        self._room: set[asyncio.Future[None]] = set()
        self._paused = False
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._drained = False
        self._draining: asyncio.TimerHandle | None = None
        self.closed = asyncio.Event()
        self._h2 = h2.connection.H2Connection(
            H2Configuration(
                client_side=False,
                header_encoding="utf-8",
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self._h2.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEADERS,
                h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL: 0,
            },
        )

    # -- asyncio.Protocol --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses of it
        host = transport.get_extra_info("peername")
        if isinstance(host, tuple):
            self.name = f"ipv6:[{host[0]}]:{host[1]}" if ":" in host[0] else f"ipv4:{host[0]}:{host[1]}"
        self._terms.connections.add(self)
        self._loop = asyncio.get_running_loop()
        self._greeting = self._loop.call_later(GREETING_S, self.close)
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(CONNECTION_WINDOW - 65_535)
        self._flush()

    def data_received(self, data: bytes) -> None:
        try:
            for event in self._h2.receive_data(data):
                self._on(event)
        except (h2.exceptions.ProtocolError, UnicodeDecodeError) as err:
            log.info("%s does not speak HTTP/2: %s", self.name, err)
            self._flush()
            self.close()
            return
        self._flush()
        if self._paused and self._transport.get_write_buffer_size() > MAX_UNREAD:
            self._transport.abort()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
        self._greeting.cancel()
        if self._draining is not None:
            self._draining.cancel()
        self._terms.connections.discard(self)
        calls, self._calls = list(self._calls.values()), {}
        for stream in list(self._held):
            self._hold(stream, 0)
        for call in calls:
            call.leave()
        self._wake()

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
                    self._guarded(call, event.stream_id, call.half_close)
            case h2.events.StreamReset():
                self._forget(event.stream_id)
            case h2.events.WindowUpdated():
                self._wake()
            case h2.events.RemoteSettingsChanged():
                self._greeting.cancel()
                self._wake()
            case h2.events.PingAckReceived():
                self._on_drained()
            case h2.events.ConnectionTerminated():
                self.close()
            case _:
                pass

    def _on_request(self, event: h2.events.RequestReceived) -> None:
        stream = event.stream_id
        told = cast("list[tuple[str, str]]", event.headers)
        headers = dict(told)
        kind = headers.get("content-type", "")
        if headers.get(":method") != "POST" or not kind.startswith("application/grpc"):
            self._h2.send_headers(stream, [(":status", "415")], end_stream=True)
            return
        try:
            encoding = headers.get("grpc-encoding", "identity")
            check_encoding(encoding)
            found = self._terms.handler(headers.get(":path", ""))
            if found is None:
                raise Refused(grpc.StatusCode.UNIMPLEMENTED, "there is no such method")
            seconds = timeout(headers["grpc-timeout"]) if "grpc-timeout" in headers else None
            reader = Reader(encoding, self._terms.max_message)
            self._calls[stream] = Call(self, stream, *found, metadata(told), seconds, reader)
        except Refused as refused:
            self.end(stream, False, refused.code.value[0], refused.details, ())

    def _on_data(self, event: h2.events.DataReceived) -> None:
        stream, size = event.stream_id, event.flow_controlled_length
        call = self._calls.get(stream)
        if call is None:  # refused while it was on its way
            self._h2.acknowledge_received_data(size, stream)
            return
        self._guarded(call, stream, lambda: call.data(event.data, size))
        if stream in self._calls:
            self._hold(stream, call.held)
            if self._terms.budget.held > self._terms.budget.most:
                call.cut(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much of other requests waits here already")

    def _guarded(self, call: Call, stream: int, heard: Callable[[], None]) -> None:
        try:
            heard()
        except Refused as refused:
            call.cut(refused.code, refused.details)

    # -- what goes ---------------------------------------------------------------------------------------

    def begin(self, stream: int, initial: Sequence[Metadatum]) -> None:
        if self._transport.is_closing():
            return
        head = [(":status", "200"), ("content-type", "application/grpc")]
        self._h2.send_headers(stream, head + fields(initial))
        self._flush()

    async def send(self, stream: int, data: bytes) -> None:
        if not self._paused and len(data) <= self._window(stream):
            self._send(stream, data)
            return
        rest = memoryview(data)
        while rest:
            while self._paused or not (window := self._window(stream)):
                await self._room_made()
            self._send(stream, bytes(rest[:window]))
            rest = rest[window:]

    def end(self, stream: int, begun: bool, code: int, details: str, trailing: Sequence[Metadatum]) -> None:
        if self._transport.is_closing():
            return
        head = [] if begun else [(":status", "200"), ("content-type", "application/grpc")]
        head.append(("grpc-status", str(code)))
        if details:
            head.append(("grpc-message", message_field(details)))
        self._h2.send_headers(stream, head + fields(trailing), end_stream=True)
        if stream in self._h2.streams and not self._h2.streams[stream].closed:  # the client has more to say
            self._h2.reset_stream(stream, h2.errors.ErrorCodes.NO_ERROR)
        self._calls.pop(stream, None)
        self._hold(stream, 0)
        self._flush()
        self._close_if_drained()

    def took(self, stream: int, size: int) -> None:
        if self._transport.is_closing():
            return
        self._h2.acknowledge_received_data(size, stream)
        self._flush()

    def _window(self, stream: int) -> int:
        """How much of it may be sent in one frame now."""
        most = self._h2
        room = min(most.outbound_flow_control_window, most.streams[stream].outbound_flow_control_window)
        return max(0, min(room, most.max_outbound_frame_size, MAX_FRAME))

    def _send(self, stream: int, data: bytes) -> None:
        """A DATA frame, which is lost when the client is gone. Not by h2's
        send_data, which takes as long for it as all the rest does; its account of the windows is kept."""
        size = len(data)
        self._h2.outbound_flow_control_window -= size
        self._h2.streams[stream].outbound_flow_control_window -= size
        self._write(size.to_bytes(3, "big") + b"\0\0" + stream.to_bytes(4, "big") + data)

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

    async def _room_made(self) -> None:
        waiter = self._loop.create_future()
        self._room.add(waiter)
        try:
            await waiter
        finally:
            self._room.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._room:
            if not waiter.done():
                waiter.set_result(None)

    # -- the end -----------------------------------------------------------------------------------------

    @property
    def calls(self) -> list[Call]:
        return list(self._calls.values())

    def drain(self) -> None:
        """Ask the client to begin no more calls; close when the last has ended. Those that are on their way
        when it hears of it are answered."""
        self._go_away(ALL_STREAMS)
        self._h2.ping(b"draining")  # what comes before the answer was begun in ignorance
        self._flush()
        self._draining = self._loop.call_later(DRAIN_S, self._on_drained)

    def _on_drained(self) -> None:
        if self._drained or self._transport.is_closing():
            return
        self._go_away(self._h2.highest_inbound_stream_id)
        self._drained = True
        self._close_if_drained()

    def _go_away(self, last: int) -> None:
        """Not by h2, for which it would be the end of everything."""
        self._flush()
        self._write(GoAwayFrame(0, last_stream_id=last).serialize())

    def _close_if_drained(self) -> None:
        if self._drained and not self._calls:
            self.close()

    def close(self) -> None:
        self._write_out()
        self._transport.close()

    def _forget(self, stream: int) -> None:
        self._hold(stream, 0)
        if (call := self._calls.pop(stream, None)) is not None:
            call.leave()
        self._close_if_drained()

    def _hold(self, stream: int, size: int) -> None:
        self._terms.budget.held += size - self._held.pop(stream, 0)
        if size:
            self._held[stream] = size
