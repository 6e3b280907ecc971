"""Envoy's bootstrap: who it is, where its control plane is, and nothing else."""

from __future__ import annotations

from typing import Any

from services.gateway.clusters import socket_address


def bootstrap(node_id: str, control: str, admin: str) -> dict[str, Any]:
    """To be written as JSON and given to `envoy -c`. `control` and `admin` are "host:port"."""
    return {
        "node": {"id": node_id, "cluster": "lingqu"},
        "admin": {"address": socket_address(admin)},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "ads"}}],
            },
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
            "lds_config": {"ads": {}, "resource_api_version": "V3"},
        },
        "static_resources": {
            "clusters": [
                {
                    "name": "ads",
                    "type": "STRICT_DNS",
                    "connect_timeout": "1s",
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "@type": "type.googleapis.com/"
                            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                            "explicit_http_config": {
                                "http2_protocol_options": {
                                    "connection_keepalive": {"interval": "5s", "timeout": "2s"}
                                }
                            },
                        }
                    },
                    "load_assignment": {
                        "cluster_name": "ads",
                        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": socket_address(control)}}]}],
                    },
                }
            ]
        },
        "layered_runtime": {
            "layers": [{"name": "static", "static_layer": {"tracing.opentelemetry.flush_interval_ms": 500}}]
        },
    }
