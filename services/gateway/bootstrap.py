"""Envoy's bootstrap: who it is, where its control plane is, what it does when memory runs short, and nothing
else."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Any

from services.gateway.clusters import ADS, endpoints, socket_address
from services.gateway.secrets import upstream_from_files
from services.gateway.shares import LAYER

# Envoy's own default grows to half a minute: a control plane that is back would be found that late.
_RECONNECTS = {"retry_back_off": {"base_interval": "0.1s", "max_interval": "1s"}}
# One that has lost the registry says so.
_KNOWS_WHAT_CHANGES = {
    "timeout": "1s",
    "interval": "2s",
    "no_traffic_interval": "2s",
    "unhealthy_threshold": 2,
    "healthy_threshold": 1,
    "grpc_health_check": {"service_name": "envoy.service.discovery.v3.AggregatedDiscoveryService"},
}

HEAP_BYTES = 1 << 30
MAX_CONNECTIONS = 20_000
_HEAP = "envoy.resource_monitors.fixed_heap"
_CONNECTIONS = "envoy.resource_monitors.global_downstream_max_connections"
# A stream that holds at least this much, a power of two, may be reset when memory runs short.
_EXPENSIVE_BYTES_LOG2 = 18


def bootstrap(
    node_id: str,
    control: str,
    admin: str,
    heap_bytes: int = HEAP_BYTES,
    zone: str = "",
    secrets: Path | None = None,
) -> dict[str, Any]:
    """To be written as JSON and given to `envoy -c`. `control` and `admin` are "host:port"; of control planes
    there may be several, separated by commas: Envoy keeps to one that is healthy. The admin interface has no
    authentication and must be on loopback (ValueError otherwise). `heap_bytes`: what Envoy may allocate.
    `zone`: that of the replicas that are to be asked first. `secrets`: a folder with `secret_files`, if the
    control plane asks for TLS."""
    host = admin.rpartition(":")[0].strip("[]")
    if host != "localhost" and not ip_address(host).is_loopback:
        raise ValueError(f"Envoy's admin interface would be open to others on {admin}")
    return {
        "node": {
            "id": node_id,
            "cluster": "lingqu",
            "metadata": {"admin": admin},
            **({"locality": {"zone": zone}} if zone else {}),
        },
        "overload_manager": _overload(heap_bytes),
        "admin": {"address": socket_address(admin)},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "ads", "retry_policy": _RECONNECTS}}],
            },
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
            "lds_config": {"ads": {}, "resource_api_version": "V3"},
        },
        # What became of requests, for breakers.
        "cluster_manager": {
            "load_stats_config": {
                "api_type": "GRPC",
                "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "ads"}}],
            }
        },
        # Which replicas are to be asked for their health, and what they say.
        "hds_config": {
            "api_type": "GRPC",
            "transport_api_version": "V3",
            "grpc_services": [{"envoy_grpc": {"cluster_name": "ads"}}],
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
                    "load_assignment": endpoints("ads", (part.strip() for part in control.split(","))),
                    "health_checks": [_KNOWS_WHAT_CHANGES],
                    "close_connections_on_host_health_failure": True,
                    # If none is healthy, any is better than none.
                    "common_lb_config": {"healthy_panic_threshold": {"value": 1}},
                    **({"transport_socket": upstream_from_files(secrets)} if secrets else {}),
                }
            ]
        },
        "layered_runtime": {
            "layers": [
                {"name": "static", "static_layer": {"tracing.opentelemetry.flush_interval_ms": 500}},
                # A control plane of an earlier release has none: that must not hold up the start for long.
                {
                    "name": LAYER,
                    "rtds_layer": {"name": LAYER, "rtds_config": {**ADS, "initial_fetch_timeout": "1s"}},
                },
            ]
        },
    }


def _overload(heap_bytes: int) -> dict[str, Any]:
    """Before the kernel ends Envoy: idle connections go, then the streams that hold most, then new requests,
    then new connections. Shares of `heap_bytes`."""
    monitors = "type.googleapis.com/envoy.extensions.resource_monitors"
    timers = [
        {"timer": "HTTP_DOWNSTREAM_CONNECTION_IDLE", "min_timeout": "2s"},
        {"timer": "HTTP_DOWNSTREAM_STREAM_IDLE", "min_timeout": "2s"},
    ]
    timeouts = {
        "@type": "type.googleapis.com/envoy.config.overload.v3.ScaleTimersOverloadActionConfig",
        "timer_scale_factors": timers,
    }
    return {
        "refresh_interval": "0.25s",
        "resource_monitors": [
            {
                "name": _HEAP,
                "typed_config": {
                    "@type": f"{monitors}.fixed_heap.v3.FixedHeapConfig",
                    "max_heap_size_bytes": heap_bytes,
                },
            },
            {
                "name": _CONNECTIONS,
                "typed_config": {
                    "@type": f"{monitors}.downstream_connections.v3.DownstreamConnectionsConfig",
                    "max_active_downstream_connections": MAX_CONNECTIONS,
                },
            },
        ],
        "buffer_factory_config": {"minimum_account_to_track_power_of_two": _EXPENSIVE_BYTES_LOG2},
        "actions": [
            {**_between("reduce_timeouts", 0.80, 0.95), "typed_config": timeouts},
            _between("reset_high_memory_stream", 0.85, 0.95),
            _above("shrink_heap", 0.90),
            _above("disable_http_keepalive", 0.92),
            _above("stop_accepting_requests", 0.95),
            _above("reject_incoming_connections", 0.98),
        ],
    }


def _above(action: str, share: float) -> dict[str, Any]:
    trigger = {"name": _HEAP, "threshold": {"value": share}}
    return {"name": f"envoy.overload_actions.{action}", "triggers": [trigger]}


def _between(action: str, share: float, full: float) -> dict[str, Any]:
    scaled = {"scaling_threshold": share, "saturation_threshold": full}
    return {"name": f"envoy.overload_actions.{action}", "triggers": [{"name": _HEAP, "scaled": scaled}]}
