"""Envoy's access log as readings: one of `requests` for each request that ended, however it ended.

The cluster, or the route of it, says which API, model and version a request was for ("tensor/echo/1").
Times are seconds from its first byte: `received` until its last byte was there, `upstream` until it was
passed on, `first_byte` until the answer began to come, `duration` until the last byte was sent; what did not
happen has no field. `failed_after` is the duration of a request that failed. `value` is 1, or for how many
requests this one stands, so that a sum counts requests.

Of tensor requests Envoy tells those that it has drawn, however they ended, and each that failed. The ones
have times and bytes, of which means and percentiles are those of all requests, and count what went well; the
others count failures, one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import grpc

from services.metrics.readings import Reading

REQUESTS = "requests"
DRAWN_FIELD = "request_bytes"
"""Readings that have it are all requests of their kind, or were drawn from them whatever became of them."""
CLIENT_HEADER = "x-lingqu-client"  # services/gateway/headers.py
STATUS = "grpc-status"
WEIGHT_TAG, FAILURE_TAG = "weight", "failure"  # services/gateway/listener.py
WELL = frozenset({"OK", *map(str, range(100, 400))})
APIS = frozenset({"text", "tensor", "rest", "control"})
OTHER = "other"

_GRPC = "application/grpc"
_CODES = {str(code.value[0]): code.name for code in grpc.StatusCode}
# Of gRPC requests without a status (https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md);
# 0: nothing was answered.
_BY_HTTP = {
    0: "CANCELLED",
    400: "INTERNAL",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "UNIMPLEMENTED",
    429: "UNAVAILABLE",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "UNAVAILABLE",
}


def readings(entries: Iterable[Any]) -> list[Reading]:
    """Of HTTPAccessLogEntry messages; those of requests that go on are left out. Thousands a second come by
    here: what is read of an entry is read once."""
    found = []
    for number, entry in enumerate(entries):
        common, request, response = entry.common_properties, entry.request, entry.response
        if common.intermediate_log_entry:
            continue
        cluster = common.upstream_cluster or common.route_name  # of no replica there is only the route
        client = request.request_headers.get(CLIENT_HEADER, "")
        status = _status(response, cluster)
        tags = common.custom_tags
        if FAILURE_TAG in tags:
            fields = {"value": 1.0}
        else:
            fields = {
                "request_bytes": float(request.request_headers_bytes + request.request_body_bytes),
                "response_bytes": float(response.response_headers_bytes + response.response_body_bytes),
            }
            for field, name in _TIMES:
                time = getattr(common, name)
                if passed := time.seconds + time.nanos * 1e-9:
                    fields[field] = passed
            if "duration" not in fields and (passed := _duration(common)):
                fields["duration"] = passed
            weight = tags.get(WEIGHT_TAG)
            if weight is None or status == "OK":  # others are told again, as failures
                fields["value"] = _weight(weight)
        if status not in WELL and (passed := fields.get("duration") or _duration(common)):
            fields["failed_after"] = passed
        begun = common.start_time
        # Envoy counts microseconds: the rest keeps requests of one microsecond apart.
        time_ns = begun.seconds * 1_000_000_000 + begun.nanos // 1000 * 1000 + number % 1000
        found.append(Reading(REQUESTS, _labels(cluster, client, status), fields, time_ns))
    return found


_TIMES = (
    ("received", "time_to_last_rx_byte"),
    ("upstream", "time_to_first_upstream_tx_byte"),
    ("first_byte", "time_to_first_upstream_rx_byte"),
    ("duration", "time_to_last_downstream_tx_byte"),
)


def _duration(common: Any) -> float:
    """0.0: it is not known."""
    for time in (common.time_to_last_downstream_tx_byte, common.duration):
        if passed := float(time.seconds + time.nanos * 1e-9):
            return passed
    return 0.0


@lru_cache(64)
def _weight(text: str | None) -> float:
    try:
        return float(text) if text else 1.0
    except ValueError:
        return 1.0


@lru_cache(4096)
def _labels(cluster: str, client: str, status: str) -> Mapping[str, str]:
    """The same object for the same request, which the intake knows by that."""
    api, model, version = _target(cluster)
    return {"client": client, "model": model, "version": version, "status": status, "api": api}


@lru_cache(4096)
def _target(cluster: str) -> tuple[str, str, str]:
    """API, model and version; the names of clusters are the gateway's own, so there are not many."""
    api, _, rest = cluster.partition("/")
    model, _, version = rest.partition("/")
    return (api, model, version) if api in APIS else (OTHER, "", "")


def _status(response: Any, cluster: str) -> str:
    """The code of gRPC by name; of REST the status of HTTP, and CANCELLED if there was none."""
    status = response.response_trailers.get(STATUS) or response.response_headers.get(STATUS)
    if status:
        return _CODES.get(status, "UNKNOWN")
    code = response.response_code.value
    content = response.response_headers.get("content-type", _GRPC)
    if _target(cluster)[0] == "rest" or (code and not content.startswith(_GRPC)):
        return str(code) if code else "CANCELLED"
    # A stream that was cut has the headers of one that is well.
    return "CANCELLED" if code == 200 else _BY_HTTP.get(code, "UNKNOWN")
