"""What one connection, one request and one client may cost the entry, after Envoy's guide for such proxies
(https://www.envoyproxy.io/docs/envoy/latest/configuration/best_practices/edge)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_MESSAGE_BYTES = 16 << 20
# Of one request: keys are below 1 KiB, so that this is for cookies and traces of others.
MAX_HEADERS_KIB = 32
MAX_HEADERS = 100
# Of one connection. A client with more streams waits, or opens another connection.
MAX_STREAMS = 2048
# What a peer may send before it is read, of a stream and of all streams of a connection: this, times the
# connections, is what senders who are faster than their backends can make Envoy keep.
STREAM_WINDOW_BYTES = 256 << 10
CONNECTION_WINDOW_BYTES = 2 << 20
BUFFER_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Times:
    """In seconds. `headers`: until the headers of a request are there, and until a TLS handshake is done.
    `request`, `silence`: how long it takes altogether, and how long nothing may come, until the first message
    of an RPC, or the body of a REST request, is there. `flush`: how long a client may not read the rest of
    an answer that is whole. `idle`: of a connection without requests. `ping`, `pong`: between two looks at
    whether the peer of a connection lives, and until it is taken for dead."""

    headers: float = 10
    request: float = 120
    silence: float = 30
    flush: float = 60
    idle: float = 900
    ping: float = 30
    pong: float = 20


def connection_manager(times: Times) -> dict[str, Any]:
    """Limits of requests and connections. Nothing here bounds a stream whose request has come: it may wait
    for its tokens as long as its client does; routes say so."""
    return {
        "max_request_headers_kb": MAX_HEADERS_KIB,
        "request_headers_timeout": _seconds(times.headers),
        "stream_idle_timeout": _seconds(times.silence),
        "stream_flush_timeout": _seconds(times.flush),
        "delayed_close_timeout": "1s",
        "common_http_protocol_options": {
            "idle_timeout": _seconds(times.idle),
            "max_headers_count": MAX_HEADERS,
            # Routes to backends take it off again: it bounds requests of which nothing is known yet.
            "max_stream_duration": _seconds(times.request),
            # Backends may take '_' and '-' for the same: a client could write x_lingqu_client.
            "headers_with_underscores_action": "REJECT_REQUEST",
        },
        "http2_protocol_options": {
            "max_concurrent_streams": MAX_STREAMS,
            "initial_stream_window_size": STREAM_WINDOW_BYTES,
            "initial_connection_window_size": CONNECTION_WINDOW_BYTES,
            "connection_keepalive": {"interval": _seconds(times.ping), "timeout": _seconds(times.pong)},
            # Floods (CVE-2019-9512 to 9518): what is waiting to be sent, and frames that carry nothing.
            "max_outbound_frames": 10_000,
            "max_outbound_control_frames": 1_000,
            "max_consecutive_inbound_frames_with_empty_payload": 1,
            "max_inbound_priority_frames_per_stream": 100,
            "max_inbound_window_update_frames_per_data_frame_sent": 10,
        },
        # One path has one spelling: what matches rules and routes is what backends get.
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        # The address of the connection counts, and no client is trusted with x-envoy-* headers.
        "use_remote_address": True,
        "skip_xff_append": True,
        "server_header_transformation": "PASS_THROUGH",
    }


def _seconds(value: float) -> str:
    return f"{value:g}s"
