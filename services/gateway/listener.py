"""The public port: its connections, and what it answers by itself; what a request passes is in `filters`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.core.errors import (
    BackendUnavailable,
    DeadlinePassed,
    InvalidInput,
    LimitReached,
    MessageTooLarge,
    NotFound,
    PermissionDenied,
    QueueFull,
    Unauthenticated,
)
from services.core.rest import MAX_BODY_BYTES
from services.gateway import breakers, edge, filters, replies
from services.gateway.clusters import ADS, METRICS, TRACES, socket_address
from services.gateway.descriptors import TENSOR_SERVICE
from services.gateway.filters.authentication import Issuer
from services.gateway.filters.global_limits import UNREACHABLE
from services.gateway.filters.local_limits import LIMIT_HEADER, concurrency_refusals
from services.gateway.headers import CLIENT_HEADER, OWN_PREFIX
from services.gateway.routes import OWN_REST, ROUTES
from services.gateway.secrets import Secrets, downstream

LISTENER = "public"
TOLD_PERCENT = 5
# In lines of the access log: for how many requests one stands; and that it is told because it failed, whether
# it was drawn or not.
WEIGHT_TAG, FAILURE_TAG = "weight", "failure"


@dataclass(frozen=True, slots=True)
class Limiting:
    """How long a request waits for the limiter, and whether it is refused if there was no answer."""

    timeout_s: float = 0.25
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """What of the configuration does not come from the registry. Addresses are "host:port"."""

    listen: str
    control: str
    jwks: Mapping[str, object]
    traces: str = ""
    cors_origins: tuple[str, ...] = ()
    secrets: Secrets = field(default_factory=Secrets)
    metrics: str = ""
    """Who is told of requests that ended."""
    metrics_percent: int = TOLD_PERCENT
    """Of how many tensor requests, drawn at random."""
    times: edge.Times = field(default_factory=edge.Times)
    issuers: tuple[Issuer, ...] = ()
    known_clients_only: bool = False
    limits: Limiting = field(default_factory=Limiting)


def listener(entry: Entry) -> dict[str, Any]:
    manager: dict[str, Any] = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network."
        "http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "public",
        "codec_type": "AUTO",
        **edge.connection_manager(entry.times),
        # What nobody reads costs every request: a trace has an id of its own.
        "generate_request_id": bool(entry.traces),
        "rds": {"config_source": ADS, "route_config_name": ROUTES},
        "early_header_mutation_extensions": [_strip_own_headers()],
        "http_filters": filters.stack(entry),
        "local_reply_config": {"mappers": _mappers()},
    }
    if entry.metrics:
        manager["access_log"] = _access_logs(entry.metrics_percent)
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
    chain: dict[str, Any] = {
        "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    }
    if entry.secrets.public is not None:
        chain["transport_socket"] = downstream(clients=bool(entry.secrets.clients))
        chain["transport_socket_connect_timeout"] = f"{entry.times.headers:g}s"
    return {
        "name": LISTENER,
        "address": socket_address(entry.listen),
        "enable_reuse_port": False,
        "per_connection_buffer_limit_bytes": edge.BUFFER_BYTES,
        "filter_chains": [chain],
    }


def _access_logs(percent: int) -> list[dict[str, Any]]:
    """Of tensor requests those that were drawn are told, so many in a hundred, and apart from that each that
    failed, so that failures are counted one by one; of all others each."""
    if percent == 100:
        return [_access_log({})]
    tensors: dict[str, Any] = {"name": ":path", "string_match": {"prefix": f"/{TENSOR_SERVICE}/"}}
    of_tensors = {"header_filter": {"header": tensors}}
    others = {"header_filter": {"header": {**tensors, "invert_match": True}}}
    drawn = {
        "runtime_filter": {
            "runtime_key": "lingqu.told",
            "percent_sampled": {"numerator": percent},
            "use_independent_randomness": True,
        }
    }
    failed = {"grpc_status_filter": {"statuses": ["OK"], "exclude": True}}
    # What most requests are not comes first: then the rest is not asked.
    return [
        {**_access_log({}), "filter": others},
        {**_access_log({WEIGHT_TAG: f"{100 / percent:g}"}), "filter": _both(drawn, of_tensors)},
        {**_access_log({FAILURE_TAG: "1"}), "filter": _both(failed, of_tensors)},
    ]


def _access_log(tags: Mapping[str, str]) -> dict[str, Any]:
    """Sent in batches while nobody waits; without a metrics service it is dropped."""
    kind = "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig"
    config = {
        "@type": f"type.googleapis.com/{kind}",
        "common_config": {
            "log_name": "lingqu",
            "transport_api_version": "V3",
            "grpc_service": {"envoy_grpc": {"cluster_name": METRICS}, "timeout": "1s"},
            "buffer_flush_interval": "0.5s",
            "buffer_size_bytes": 64 << 10,
            "custom_tags": [{"tag": tag, "literal": {"value": value}} for tag, value in tags.items()],
        },
        "additional_request_headers_to_log": [CLIENT_HEADER],
        "additional_response_headers_to_log": ["content-type", "grpc-status"],
        "additional_response_trailers_to_log": ["grpc-status"],
    }
    return {"name": "envoy.access_loggers.http_grpc", "typed_config": config}


def _mappers() -> list[dict[str, Any]]:
    """What Envoy refuses by itself, in the words and with the details that every other error has."""
    too_slow = DeadlinePassed("the request did not come in the time that the gateway waits for one")
    by_details = {
        "grpc_field_extraction_FAILED_PRECONDITION": MessageTooLarge(
            "the gateway reads messages up to 16 MiB"
        ),
        "grpc_field_extraction_INVALID_ARGUMENT": InvalidInput(
            "request", "cannot be read: a path /package.Service/Method and uncompressed messages are needed"
        ),
        "{overflow}": QueueFull("the gateway has as many requests to this model in progress as it may"),
        "Jwt_is_missing": Unauthenticated("no key was sent: authorization: Bearer <key>"),
        "Jwt_is_expired": Unauthenticated("the key has expired"),
        "Jwt_not_yet_valid": Unauthenticated("the key is not valid yet"),
        "Audiences_in_Jwt_are_not_allowed": PermissionDenied("the key is not for this suite"),
        "stream_idle_timeout": too_slow,
        "max_duration_timeout": too_slow,
        UNREACHABLE: BackendUnavailable("nobody can say whether a limit is reached; try again"),
        "path_normalization": InvalidInput("path", "cannot be resolved, or has an escaped slash"),
        "overload": BackendUnavailable("the gateway is short of memory; try again"),
        **filters.access.DENIALS,
    }
    by_status = {
        401: Unauthenticated("the key is malformed, of another issuer, or was not signed by this suite"),
        403: filters.access.OTHER_DENIAL,
        502: BackendUnavailable("a replica answered with what is no answer; try again"),
        503: BackendUnavailable("no replica can answer at the moment; try again"),
        breakers.REFUSED: breakers.REFUSAL,
    }
    only_rest = {
        404: NotFound("there is no such path on this port"),
        413: MessageTooLarge(f"the gateway reads bodies up to {MAX_BODY_BYTES >> 20} MiB"),
    }
    any_limit = LimitReached("")  # the rest is in headers of the answer
    too_fast = _code_details_contain("rate_limited")
    too_many = _code_details_contain("reached_concurrency_limit")
    details = [(_code_details_contain(text), error) for text, error in by_details.items()]
    details += [(_both(_status_is(status), too_many), error) for status, error in concurrency_refusals()]
    statuses = [(_status_is(status), error) for status, error in by_status.items()]
    for_rest = [*details, *statuses, *((_status_is(status), error) for status, error in only_rest.items())]
    return [
        {"filter": _both(_OWN_REST, too_fast), **replies.own_rest_reply_from(LIMIT_HEADER, any_limit)},
        *({"filter": _both(_OWN_REST, found), **replies.own_rest_reply(error)} for found, error in for_rest),
        {"filter": _both(_OWN_REST, _status_is(400)), **replies.malformed_reply()},
        # Not what scripts answer as gRPC does, with 200: that is transcoded.
        {"filter": _both(_OWN_REST, _status_is(400, "GE")), **replies.any_own_rest_reply()},
        {"filter": _both(_REST, too_fast), **replies.rest_reply_from(LIMIT_HEADER, any_limit)},
        {"filter": too_fast, **replies.reply_from(LIMIT_HEADER)},
        *({"filter": _both(_REST, found), **replies.rest_reply(error)} for found, error in for_rest),
        {"filter": _REST, **replies.any_rest_reply()},
        *({"filter": found, **replies.local_reply(error)} for found, error in (*details, *statuses)),
    ]


def _expression(text: str) -> dict[str, Any]:
    kind = "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter"
    config = {"@type": f"type.googleapis.com/{kind}", "expression": text}
    return {"extension_filter": {"name": "cel", "typed_config": config}}


# Whatever does not say that it is gRPC, but for what refuse.lua has answered as it should be.
_REST = _expression(
    "!(response.code_details == 'lua_response' && response.code in [400, 404]) && !("
    "'content-type' in request.headers && request.headers['content-type'].startsWith('application/grpc'))"
)
# Our own API, before and after it has become gRPC.
_OWN_REST = _expression(
    f"request.method == 'POST' && request.url_path.startsWith('{OWN_REST}')"
    " || 'x-envoy-original-path' in request.headers"
)


def _code_details_contain(text: str) -> dict[str, Any]:
    return _expression(f"response.code_details.contains('{text}')")


def _status_is(status: int, how: str = "EQ") -> dict[str, Any]:
    value = {"default_value": status, "runtime_key": f"lingqu.{status}"}
    return {"status_code_filter": {"comparison": {"op": how, "value": value}}}


def _both(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {"and_filter": {"filters": [one, other]}}


def _strip_own_headers() -> dict[str, Any]:
    """No client may say who it is, or which model or version it was routed for."""
    return {
        "name": "strip",
        "typed_config": {
            "@type": "type.googleapis.com/"
            "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
            "mutations": [{"remove_on_match": {"key_matcher": {"prefix": OWN_PREFIX}}}],
        },
    }
