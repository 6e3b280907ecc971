"""Where requests go: Envoy's clusters and their endpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from services.gateway import protection
from services.gateway.view import Target

CONTROL = "control"
TRACES = "traces"
ANY_TRITON = "tensor"
ANY_REST = "rest"
ADS = {"ads": {}, "resource_api_version": "V3"}


def backends(target: Target) -> dict[str, tuple[str, ...]]:
    """Clusters of a version with traffic, with their endpoints; tensor models have no text API."""
    suffix = f"{target.model}/{target.version}"
    found = {f"tensor/{suffix}": target.tensor_endpoints}
    if target.task != "tensor":
        found[f"text/{suffix}"] = target.text_endpoints
        found[f"rest/{suffix}"] = target.rest_endpoints
    return found


def discovered(name: str) -> dict[str, Any]:
    """A cluster whose endpoints come by EDS: HTTP/2, or HTTP/1.1 for REST, which uvicorn serves."""
    return {
        "name": name,
        "type": "EDS",
        "eds_cluster_config": {"eds_config": ADS},
        "lb_policy": "LEAST_REQUEST",
        "outlier_detection": protection.OUTLIERS,
        **(_REST_CONNECTIONS if name.split("/")[0] == ANY_REST else _CONNECTIONS),
    }


def fixed(name: str, address: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "STRICT_DNS",
        "load_assignment": endpoints(name, (address,)),
        **_CONNECTIONS,
    }


_CONNECTIONS: dict[str, Any] = {
    "connect_timeout": "1s",
    "circuit_breakers": protection.circuit_breakers(),
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


def endpoints(cluster: str, addresses: Iterable[str]) -> dict[str, Any]:
    members = [{"endpoint": {"address": socket_address(address)}} for address in addresses]
    return {"cluster_name": cluster, "endpoints": [{"lb_endpoints": members}] if members else []}


def socket_address(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}
