"""What browsers and JSON need: gRPC-Web, the gRPC-JSON mapping of our own API, and CORS. All of it is off in
the chain and switched on by routes, so that a plain gRPC request does not pass through it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from services.gateway.descriptors import TEXT_SERVICE, descriptor_set
from services.gateway.filters.chain import fixed, typed

CORS = "envoy.filters.http.cors"
GRPC_WEB = "envoy.filters.http.grpc_web"
TRANSCODER = "envoy.filters.http.grpc_json_transcoder"
GRPC_WEB_TYPE = "application/grpc-web"
# What an answer as JSON may have, since numbers take more room in it than in a message. Envoy 1.40 reads
# requests up to the same size.
MAX_ANSWER_BYTES = 32 << 20


def cors() -> dict[str, Any]:
    return fixed("cors", typed("cors.v3.Cors", {}))


def grpc_web() -> dict[str, Any]:
    return fixed("grpc_web", typed("grpc_web.v3.GrpcWeb", {}), disabled=True)


def transcoder() -> dict[str, Any]:
    """POST /v1/models/{model}:verb, as the protos say; behind it a request is one of gRPC like any other."""
    config = {
        "proto_descriptor_bin": descriptor_set(),
        "services": [TEXT_SERVICE],
        "print_options": {
            "always_print_primitive_fields": True,
            "preserve_proto_field_names": True,
            "stream_newline_delimited": True,
            "stream_sse_style_delimited": True,
        },
        "convert_grpc_status": True,
        "request_validation_options": {
            "reject_unknown_method": True,
            "reject_unknown_query_parameters": True,
            "reject_binding_body_field_collisions": True,
        },
        "max_response_body_size": MAX_ANSWER_BYTES,
    }
    made = typed("grpc_json_transcoder.v3.GrpcJsonTranscoder", config)
    return fixed("grpc_json_transcoder", made, disabled=True)


def switched_on(*names: str) -> dict[str, Any]:
    """The `typed_per_filter_config` of a route that wants these filters."""
    on = {"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "config": {}}
    return dict.fromkeys(names, on)


def cors_policy(origins: Sequence[str]) -> dict[str, Any]:
    """The `typed_per_filter_config` of all routes: which pages may call. An origin is "https://host[:port]",
    in which "*" stands for any text without "/"."""
    policy = {
        "allow_origin_string_match": [{"safe_regex": {"regex": _regex(origin)}} for origin in origins],
        "allow_methods": "GET, POST, OPTIONS",
        "allow_headers": "authorization, content-type, x-grpc-web, x-user-agent, grpc-timeout, traceparent",
        "expose_headers": "grpc-status, grpc-message, grpc-status-details-bin, retry-after",
        "max_age": "7200",
    }
    return {CORS: typed("cors.v3.CorsPolicy", policy)}


def _regex(origin: str) -> str:
    return "[^/]*".join(re.escape(part) for part in origin.split("*"))
