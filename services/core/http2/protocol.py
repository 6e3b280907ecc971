"""HTTP/2 of a server as h2 does it, but for what a connection with the calls of many clients in it needs."""

from __future__ import annotations

import struct
from typing import Any

import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from h2.config import H2Configuration
from h2.stream import StreamClosedBy, StreamState
from hyperframe.frame import GoAwayFrame, HeadersFrame

from services.core.http2 import headers

MAX_STREAMS = 8_192
STREAM_WINDOW = 1 << 20
CONNECTION_WINDOW = 16 << 20
# Headers of more bytes end the connection, on the wire or as HTTP/2 counts them; of more than MAX_HEADERS,
# their call. Nobody honest needs more on the wire, and for each field hpack copies all that follows it.
MAX_BLOCK = 128 << 10
MAX_INFLATED_HEADERS = 256 << 10
# Of what is sent: a client that would take more is written to as fast as it reads all the same.
MAX_FRAME = 64 << 10

DATA, HEADERS, RST_STREAM, GOAWAY, CONTINUATION = 0x0, 0x1, 0x3, 0x7, 0x9
END_STREAM, END_HEADERS = 0x1, 0x4
NO_ERROR, REFUSED_STREAM, ENHANCE_YOUR_CALM = 0x0, 0x7, 0xB


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">IBI", len(payload) << 8 | kind, flags, stream) + payload


class Protocol(h2.connection.H2Connection):
    """What comes goes through h2, and so do windows and what it says by itself. Responses are put together
    here, for with h2 they take as long as all the rest of a call. What h2 does otherwise:

    - A client's GOAWAY says that no more calls will begin, and not that those there are have ended.
    - A header that HTTP/2 does not allow ends its call, not the connection (headers.py).
    - The streams that are open are not counted one by one for each that begins."""

    MAX_CLOSED_STREAMS = 2 * MAX_STREAMS

    def __init__(self) -> None:
        super().__init__(
            H2Configuration(
                client_side=False,
                header_encoding=None,
                validate_inbound_headers=False,
                normalize_inbound_headers=False,
            )
        )
        codes = h2.settings.SettingCodes
        self.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                codes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                codes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                codes.MAX_HEADER_LIST_SIZE: headers.MAX_HEADERS,
                codes.ENABLE_CONNECT_PROTOCOL: 0,
            },
        )
        self.decoder.max_header_list_size = MAX_INFLATED_HEADERS
        self._prologue = headers.NO_TABLE

    # -- what comes --------------------------------------------------------------------------------------

    @property
    def open_inbound_streams(self) -> int:
        return len(self.streams)

    def _receive_headers_frame(self, frame: HeadersFrame) -> tuple[list[Any], list[h2.events.Event]]:
        if len(frame.data) > MAX_BLOCK:
            raise h2.exceptions.DenialOfServiceError(f"a header block of {len(frame.data)} bytes")
        return super()._receive_headers_frame(frame)

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Any], list[h2.events.Event]]:
        return [], [h2.events.ConnectionTerminated()]

    def _acknowledge_settings(self) -> list[Any]:
        frames = super()._acknowledge_settings()
        self.encoder.table_size_changes.clear()  # for an encoder that encodes nothing
        return frames

    # -- streams -----------------------------------------------------------------------------------------

    def is_open(self, stream: int) -> bool:
        found = self.streams.get(stream)
        return found is not None and not found.closed

    def forget(self, stream: int, error: int | None = None) -> bytes:
        """The end of a stream on our side: what has to be sent if the client could say more, or is to hear of
        an error."""
        if (found := self.streams.pop(stream, None)) is None:
            return b""
        done = found.closed or found.state_machine.state is StreamState.HALF_CLOSED_REMOTE
        if done and error is None:
            self._closed_streams[stream] = found.closed_by or StreamClosedBy.SEND_END_STREAM
            return b""
        self._closed_streams[stream] = StreamClosedBy.SEND_RST_STREAM
        return frame(RST_STREAM, 0, stream, struct.pack(">I", error or NO_ERROR))

    def room(self, stream: int) -> int:
        """How much of it may be sent in one frame now."""
        own = self.streams[stream].outbound_flow_control_window
        return max(0, min(own, self.outbound_flow_control_window, self.max_outbound_frame_size, MAX_FRAME))

    # -- what goes ---------------------------------------------------------------------------------------

    def headers(self, stream: int, block: bytes, flags: int = 0) -> bytes:
        """Frames of a header block."""
        block, self._prologue = self._prologue + block, b""
        most = self.max_outbound_frame_size
        if len(block) <= most:
            return frame(HEADERS, flags | END_HEADERS, stream, block)
        parts = [block[at : at + most] for at in range(0, len(block), most)]
        out = frame(HEADERS, flags, stream, parts[0])
        for part in parts[1:-1]:
            out += frame(CONTINUATION, 0, stream, part)
        return out + frame(CONTINUATION, END_HEADERS, stream, parts[-1])

    def data(self, stream: int, data: bytes) -> bytes:
        """A frame of no more than there is room for."""
        self.outbound_flow_control_window -= len(data)
        self.streams[stream].outbound_flow_control_window -= len(data)
        return frame(DATA, 0, stream, data)

    def go_away(self, last: int, error: int = NO_ERROR) -> bytes:
        """Calls up to stream `last` go on; to h2 it would be the end of everything."""
        return frame(GOAWAY, 0, 0, struct.pack(">II", last, error))
