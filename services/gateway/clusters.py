"""Where requests go: Envoy's clusters and their endpoints."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

from services.gateway import protection
from services.gateway.view import Target

CONTROL = "control"
TRACES = "traces"
LIMITER = "limiter"
METRICS = "metrics"
ANY_TRITON = "tensor"
ANY_REST = "rest"
SHADOW = "shadow"
TOLD_BYTES = 16 << 20  # about 50,000 requests
ADS = {"ads": {}, "resource_api_version": "V3"}
# How long a replica that has come takes to get its full share.
SLOW_START_S = 15
# What a shadow that does not keep up may hold, and for how long: the rest of the copies are dropped.
SHADOW_REQUESTS = 256
SHADOW_S = 300


def backends(target: Target) -> dict[str, tuple[str, ...]]:
    """Clusters of a version, with their endpoints; tensor models have no text API."""
    suffix = f"{target.model}/{target.version}"
    found = {f"tensor/{suffix}": target.tensor_endpoints}
    if target.task != "tensor":
        found[f"text/{suffix}"] = target.text_endpoints
        found[f"rest/{suffix}"] = target.rest_endpoints
    return found


def discovered(name: str, affinity: str = "none", max_requests: int = 0) -> dict[str, Any]:
    """A cluster whose endpoints come by EDS: HTTP/2, or HTTP/1.1 for REST, which uvicorn serves. Without
    affinity, requests go to the replica with the fewest in progress."""
    return {
        "name": name,
        "type": "EDS",
        "eds_cluster_config": {"eds_config": ADS},
        "outlier_detection": protection.OUTLIERS,
        "circuit_breakers": protection.circuit_breakers(max_requests),
        # Whoever does not answer is left out as long as one does; when none does, the checks may be wrong.
        "common_lb_config": {"healthy_panic_threshold": {"value": 1}},
        **(_LEAST_REQUESTS if affinity == "none" or name.startswith("tensor/") else _BY_HASH),
        **(_REST_CONNECTIONS if name.split("/")[0] == ANY_REST else _CONNECTIONS),
    }


def shadow(name: str, appending: Mapping[str, Any] | None) -> dict[str, Any]:
    """The cluster that gets copies of requests: what it holds is bounded in number and time. `appending`: the
    filter that gives a tensor request the shadow's version, since only the copy is for it."""
    made = discovered(name)
    kind = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    protocol = made["typed_extension_protocol_options"][kind]
    common = protocol.get("common_http_protocol_options", {})
    bounded: dict[str, Any] = {
        **protocol,
        "common_http_protocol_options": {**common, "max_stream_duration": f"{SHADOW_S}s"},
    }
    if appending is not None:
        bounded["http_filters"] = [appending, _UPSTREAM_CODEC]
    bounds = {"max_connections": 64, "max_pending_requests": SHADOW_REQUESTS, "max_requests": SHADOW_REQUESTS}
    return {
        **made,
        "name": f"{SHADOW}/{name}",
        "circuit_breakers": {"thresholds": [{**bounds, "max_retries": 0}]},
        "typed_extension_protocol_options": {kind: bounded},
    }


def limiter() -> dict[str, Any]:
    """All control planes: whichever is asked knows whom to ask. One that does not answer is left for a
    while."""
    return {
        **discovered(LIMITER),
        "connect_timeout": "0.25s",
        "outlier_detection": {
            "consecutive_5xx": 3,
            "consecutive_gateway_failure": 3,
            "enforcing_consecutive_gateway_failure": 100,
            "interval": "0.5s",
            "base_ejection_time": "1s",
            "max_ejection_time": "5s",
            "max_ejection_percent": 100,
        },
    }


def fixed(name: str, address: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "STRICT_DNS",
        "load_assignment": endpoints(name, (address,)),
        "circuit_breakers": protection.circuit_breakers(),
        **_CONNECTIONS,
    }


def metrics(address: str) -> dict[str, Any]:
    """What it is told of requests waits here, up to so much, when it does not take it at once; what is more
    is dropped."""
    return {**fixed(METRICS, address), "per_connection_buffer_limit_bytes": TOLD_BYTES}


_UPSTREAM_CODEC = {
    "name": "envoy.filters.http.upstream_codec",
    "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.upstream_codec.v3.UpstreamCodec"
    },
}

# The caches of a replica that has come are cold, and its engine has to warm up.
SLOW_START: dict[str, Any] = {
    "slow_start_window": f"{SLOW_START_S}s",
    "min_weight_percent": {"value": 10},
}
_LEAST_REQUESTS: dict[str, Any] = {
    "lb_policy": "LEAST_REQUEST",
    "least_request_lb_config": {"slow_start_config": SLOW_START},
}
# The ring is small, since there are many clusters and few replicas of each. A replica with more than 1.5
# times the mean of requests in progress passes what is over on to the next on the ring.
_BY_HASH: dict[str, Any] = {
    "lb_policy": "RING_HASH",
    "ring_hash_lb_config": {"minimum_ring_size": 512, "maximum_ring_size": 8192},
    "common_lb_config": {
        "healthy_panic_threshold": {"value": 1},
        "consistent_hashing_lb_config": {"hash_balance_factor": 150},
    },
}

_CONNECTIONS: dict[str, Any] = {
    "connect_timeout": "1s",
    "typed_extension_protocol_options": {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {
                "http2_protocol_options": {
                    # A client that reads nothing makes Envoy keep so much of its answer, ...
                    "initial_stream_window_size": 64 << 10,
                    # ... and however many do, others go on over the same connection.
                    "initial_connection_window_size": 1 << 30,
                    "connection_keepalive": {"interval": "30s", "timeout": "5s"},
                }
            },
        }
    },
}

_REST_CONNECTIONS: dict[str, Any] = {
    **_CONNECTIONS,
    "typed_extension_protocol_options": {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            # Less than the server keeps an idle connection, or a request might meet its end.
            "common_http_protocol_options": {"idle_timeout": "60s"},
            "explicit_http_config": {"http_protocol_options": {}},
        }
    },
}


def endpoints(
    cluster: str,
    addresses: Iterable[str],
    zones: Mapping[str, str] | None = None,
    unhealthy: Collection[str] = (),
) -> dict[str, Any]:
    """The members of a cluster by zone, those without one first."""
    known = zones or {}

    def zone(address: str) -> str:
        return known.get(address, "")

    groups = [
        {
            "locality": {"zone": name} if name else {},
            "lb_endpoints": [_member(address, address in unhealthy) for address in found],
        }
        for name, found in itertools.groupby(sorted(addresses, key=zone), key=zone)
    ]
    return {"cluster_name": cluster, "endpoints": groups}


@lru_cache(maxsize=65_536)
def _member(address: str, unhealthy: bool) -> dict[str, Any]:
    """Not to be changed: the same for all clusters."""
    made: dict[str, Any] = {"endpoint": {"address": socket_address(address)}}
    return {**made, "health_status": "UNHEALTHY"} if unhealthy else made


def socket_address(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}
