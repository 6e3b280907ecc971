"""From a view of the suite to everything Envoy has to know: one pure function.

Resources are written as the dictionaries that Envoy's documentation shows and parsed into its messages, so
that a misspelt field fails here and not in a data plane. Names of clusters carry model and version; a
cluster's configuration never changes, only its endpoints do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from services.core.errors import (
    BackendUnavailable,
    InvalidInput,
    LingquError,
    ModelNotFound,
    PermissionDenied,
    QueueFull,
    Unauthenticated,
    Unimplemented,
    to_rpc_status,
)
from services.gateway import replies, xds
from services.gateway.descriptors import (
    TENSOR_SERVER,
    TENSOR_SERVICE,
    TEXT_SERVICE,
    descriptor_set,
    extractions,
)
from services.gateway.keys import AUDIENCE, ISSUER
from services.gateway.view import Target, View

LISTENER = "public"
ROUTES = "public"
CONTROL = "control"
TRACES = "traces"
ANY_TRITON = "tensor"
MODEL_HEADER = "x-lingqu-model"
VERSION_HEADER = "x-lingqu-model-version"
CLIENT_HEADER = "x-lingqu-client"
HTTP = "envoy.extensions.filters.http"
LUA = "envoy.filters.http.lua"
# Open to everybody: they tell nothing but what the published protos tell.
OPEN_PREFIXES = (
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1.ServerReflection/",
    "/grpc.reflection.v1alpha.ServerReflection/",
)
UNBOUNDED = {"timeout": "0s", "idle_timeout": "0s", "max_stream_duration": {"grpc_timeout_header_max": "0s"}}


@dataclass(frozen=True, slots=True)
class Entry:
    """What of the configuration does not come from the registry. Addresses are "host:port"."""

    listen: str
    control: str
    jwks: Mapping[str, object]
    traces: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Resources by type URL and name, each with a version that is the digest of its content."""

    resources: Mapping[str, Mapping[str, Message]]
    versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    version: str = ""


def snapshot(view: View, entry: Entry) -> Snapshot:
    """Everything for one state of the suite. The same arguments give the same snapshot."""
    clusters = [_static_cluster(CONTROL, entry.control), _eds_cluster(ANY_TRITON)]
    endpoints = [_endpoints(ANY_TRITON, view.tritons)]
    if entry.traces:
        clusters.append(_static_cluster(TRACES, entry.traces))
    for target in view.targets:
        for name, addresses in _backends(target).items():
            clusters.append(_eds_cluster(name))
            endpoints.append(_endpoints(name, addresses))
    found = {
        xds.CLUSTER: _named(xds.CLUSTER, "name", clusters),
        xds.ENDPOINTS: _named(xds.ENDPOINTS, "cluster_name", endpoints),
        xds.LISTENER: _named(xds.LISTENER, "name", [_listener(entry)]),
        xds.ROUTES: _named(xds.ROUTES, "name", [_routes(view)]),
    }
    versions = {kind: {name: _digest([m]) for name, m in named.items()} for kind, named in found.items()}
    return Snapshot(found, versions, _digest(m for named in found.values() for m in named.values()))


def _backends(target: Target) -> dict[str, tuple[str, ...]]:
    """Clusters of a model's traffic version with their endpoints; tensor models have no text API."""
    suffix = f"{target.model}/{target.version}"
    found = {f"tensor/{suffix}": target.tensor_endpoints}
    if target.task != "tensor":
        found[f"text/{suffix}"] = target.text_endpoints
    return found


def _routes(view: View) -> dict[str, Any]:
    to_control = {"cluster": CONTROL, **UNBOUNDED}
    routes: list[dict[str, Any]] = [
        {"match": {"prefix": prefix}, "route": to_control}
        for prefix in (*OPEN_PREFIXES, "/lingqu.gateway.v1.GatewayService/")
    ]
    for target in view.targets:
        backends = _backends(target)
        for service, kind in ((TEXT_SERVICE, "text"), (TENSOR_SERVICE, "tensor")):
            if (cluster := f"{kind}/{target.model}/{target.version}") in backends:
                routes.append(_model_route(service, cluster, target))
    routes += [
        {
            "match": {"path": f"/{TENSOR_SERVICE}/{method}"},
            "route": {"cluster": ANY_TRITON, **UNBOUNDED},
            "request_headers_to_remove": ["authorization"],
        }
        for method in TENSOR_SERVER
    ]
    field = InvalidInput("model", "is missing or malformed: 1 to 64 letters, digits, '.', '_' and '-'")
    elsewhere = Unimplemented("there is no such method on this port")
    routes += [
        _local_reply(field, {"name": MODEL_HEADER, "string_match": {"exact": "<invalid>"}}),
        {
            "match": {"prefix": "/", "headers": [{"name": MODEL_HEADER, "present_match": True}]},
            "direct_response": {"status": 404},  # routing.lua answers before it comes to this
            "metadata": {"filter_metadata": {LUA: {"unknown": True}}},
        },
        _local_reply(elsewhere),
    ]
    return {"name": ROUTES, "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]}


def _model_route(service: str, cluster: str, target: Target) -> dict[str, Any]:
    version = str(target.version)
    route: dict[str, Any] = {
        "match": {
            "prefix": f"/{service}/",
            "headers": [{"name": MODEL_HEADER, "string_match": {"exact": target.model}}],
        },
        "route": {"cluster": cluster, **UNBOUNDED, "retry_policy": _RETRIES},
        "request_headers_to_add": [
            {
                "header": {"key": VERSION_HEADER, "value": version},
                "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
            }
        ],
        "request_headers_to_remove": ["authorization"],
    }
    if service == TENSOR_SERVICE and target.pinned:
        route["metadata"] = {"filter_metadata": {LUA: {"pin": version}}}
    return route


# Inference has no side effects, so a request whose answer has not begun may run again elsewhere. Waits add
# up to about two seconds: what a restarting replica needs, and less than a caller notices as an outage.
_RETRIES = {
    "retry_on": "connect-failure,refused-stream,reset,unavailable",
    "num_retries": 4,
    "retry_back_off": {"base_interval": "0.1s", "max_interval": "1s"},
    "retry_host_predicate": [
        {
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {
                "@type": "type.googleapis.com/"
                "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
            },
        }
    ],
    "host_selection_retry_max_attempts": 5,
}


def _local_reply(error: LingquError, *when: dict[str, Any]) -> dict[str, Any]:
    # Without a body: Envoy would make it the grpc-message.
    return {
        "match": {"prefix": "/", "headers": list(when)},
        "direct_response": {"status": 404},
        "response_headers_to_add": replies.headers(error),
    }


def _listener(entry: Entry) -> dict[str, Any]:
    manager: dict[str, Any] = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network."
        "http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "public",
        "codec_type": "AUTO",
        "stream_idle_timeout": "0s",
        "use_remote_address": True,
        "server_header_transformation": "PASS_THROUGH",
        "normalize_path": True,
        "rds": {"config_source": _ADS, "route_config_name": ROUTES},
        "early_header_mutation_extensions": [_strip_own_headers()],
        "http_filters": [
            _filter("jwt_authn", "v3.JwtAuthentication", _authentication(entry.jwks)),
            _filter(
                "grpc_field_extraction",
                "v3.GrpcFieldExtractionConfig",
                {
                    "descriptor_set": {"inline_bytes": descriptor_set()},
                    "extractions_by_method": extractions(),
                },
            ),
            _filter("lua", "v3.Lua", {"default_source_code": {"inline_string": _lua()}}),
            _filter("router", "v3.Router", {"suppress_envoy_headers": True}),
        ],
        "local_reply_config": {"mappers": _mappers()},
    }
    if entry.traces:
        manager["tracing"] = {
            "provider": {
                "name": "envoy.tracers.opentelemetry",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
                    "grpc_service": {"envoy_grpc": {"cluster_name": TRACES}, "timeout": "1s"},
                    "service_name": "lingqu-gateway",
                },
            }
        }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    return {
        "name": LISTENER,
        "address": socket_address(entry.listen),
        "enable_reuse_port": False,
        "filter_chains": [chain],
    }


def _authentication(jwks: Mapping[str, object]) -> dict[str, Any]:
    provider = {
        "issuer": ISSUER,
        "audiences": [AUDIENCE],
        "local_jwks": {"inline_string": json.dumps(jwks, sort_keys=True)},
        "claim_to_headers": [{"header_name": CLIENT_HEADER, "claim_name": "sub"}],
        "jwt_cache_config": {"jwt_cache_size": 1000},
        "require_expiration": True,
        "clock_skew_seconds": 1,
        # Nowhere else, above all not in a URL, which ends up in logs.
        "from_headers": [{"name": "authorization", "value_prefix": "Bearer "}],
        "forward": True,  # the control plane checks scopes; routes to backends remove it
    }
    open_rules = [{"match": {"prefix": prefix}} for prefix in OPEN_PREFIXES]
    closed_rule = {"match": {"prefix": "/"}, "requires": {"provider_name": ISSUER}}
    return {"providers": {ISSUER: provider}, "rules": [*open_rules, closed_rule]}


def _mappers() -> list[dict[str, Any]]:
    """What Envoy refuses by itself, in the words and with the details that every other error has."""
    by_details = {
        "grpc_field_extraction_FAILED_PRECONDITION": QueueFull(
            "the message is larger than the gateway reads"
        ),
        "Jwt_is_missing": Unauthenticated("no key was sent: authorization: Bearer <key>"),
        "Jwt_is_expired": Unauthenticated("the key has expired"),
    }
    by_status = {
        401: Unauthenticated("the key is malformed, of another issuer, or was not signed by this suite"),
        403: PermissionDenied("the key is not for this suite"),
        503: BackendUnavailable("no replica can answer at the moment; try again"),
    }
    return [
        {"filter": _code_details_contain(text), **replies.local_reply(error)}
        for text, error in by_details.items()
    ] + [
        {
            "filter": {
                "status_code_filter": {
                    "comparison": {"value": {"default_value": status, "runtime_key": f"lingqu.{status}"}}
                }
            },
            **replies.local_reply(error),
        }
        for status, error in by_status.items()
    ]


def _code_details_contain(text: str) -> dict[str, Any]:
    return {
        "extension_filter": {
            "name": "cel",
            "typed_config": {
                "@type": "type.googleapis.com/"
                "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter",
                "expression": f"response.code_details.contains('{text}')",
            },
        }
    }


def _strip_own_headers() -> dict[str, Any]:
    """No client may say which model it was routed for or who it is."""
    return {
        "name": "strip",
        "typed_config": {
            "@type": "type.googleapis.com/"
            "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
            "mutations": [{"remove": name} for name in (MODEL_HEADER, VERSION_HEADER, CLIENT_HEADER)],
        },
    }


def _filter(name: str, message: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": f"envoy.filters.http.{name}",
        "typed_config": {"@type": f"type.googleapis.com/{HTTP}.{name}.{message}", **config},
    }


def _eds_cluster(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "EDS",
        "eds_cluster_config": {"eds_config": _ADS},
        "lb_policy": "LEAST_REQUEST",
        **_CONNECTIONS,
    }


def _static_cluster(name: str, address: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "STRICT_DNS",
        "load_assignment": _endpoints(name, (address,)),
        **_CONNECTIONS,
    }


_CONNECTIONS: dict[str, Any] = {
    "connect_timeout": "1s",
    # Far above what two cores serve: Envoy's defaults (1024 requests, 3 retries) would refuse healthy load.
    "circuit_breakers": {
        "thresholds": [
            {
                "max_connections": 10_000,
                "max_pending_requests": 10_000,
                "max_requests": 100_000,
                "max_retries": 1024,
            }
        ]
    },
    "typed_extension_protocol_options": {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {
                "http2_protocol_options": {"connection_keepalive": {"interval": "30s", "timeout": "5s"}}
            },
        }
    },
}
_ADS = {"ads": {}, "resource_api_version": "V3"}


def _endpoints(cluster: str, addresses: Iterable[str]) -> dict[str, Any]:
    members = [{"endpoint": {"address": socket_address(address)}} for address in addresses]
    return {"cluster_name": cluster, "endpoints": [{"lb_endpoints": members}] if members else []}


def socket_address(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}


def _named(kind: str, key: str, bodies: Iterable[dict[str, Any]]) -> dict[str, Message]:
    return {body[key]: ParseDict(body, xds.MESSAGES[kind]()) for body in bodies}


def _digest(messages: Iterable[Message]) -> str:
    hasher = hashlib.sha256()
    for message in messages:
        hasher.update(message.SerializeToString(deterministic=True))
    return hasher.hexdigest()[:16]


def _lua() -> str:
    source = resources.files("services.gateway").joinpath("routing.lua").read_text()
    status = to_rpc_status(ModelNotFound(""))
    status.ClearField("code")
    status.ClearField("message")
    escaped = "".join(f"\\x{byte:02x}" for byte in status.SerializeToString())
    return source.replace("@MODEL_NOT_FOUND_DETAILS@", escaped)
