"""Which request goes to which cluster, and what is answered when none fits."""

from __future__ import annotations

from typing import Any

from services.core.errors import InvalidInput, LingquError, Unimplemented
from services.gateway import replies
from services.gateway.clusters import ANY_TRITON, CONTROL, backends
from services.gateway.descriptors import TENSOR_SERVER, TENSOR_SERVICE, TEXT_SERVICE
from services.gateway.view import Target, View

ROUTES = "public"
MODEL_HEADER = "x-lingqu-model"
VERSION_HEADER = "x-lingqu-model-version"
# Open to everybody: they tell nothing but what the published protos tell.
OPEN_PREFIXES = (
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1.ServerReflection/",
    "/grpc.reflection.v1alpha.ServerReflection/",
)
LUA = "envoy.filters.http.lua"
UNBOUNDED = {"timeout": "0s", "idle_timeout": "0s", "max_stream_duration": {"grpc_timeout_header_max": "0s"}}


def routes(view: View) -> dict[str, Any]:
    to_control = {"cluster": CONTROL, **UNBOUNDED}
    found: list[dict[str, Any]] = [
        {"match": {"prefix": prefix}, "route": to_control}
        for prefix in (*OPEN_PREFIXES, "/lingqu.gateway.v1.GatewayService/")
    ]
    for target in view.targets:
        clusters = backends(target)
        for service, kind in ((TEXT_SERVICE, "text"), (TENSOR_SERVICE, "tensor")):
            if (cluster := f"{kind}/{target.model}/{target.version}") in clusters:
                found.append(_model_route(service, cluster, target))
    found += [
        {
            "match": {"path": f"/{TENSOR_SERVICE}/{method}"},
            "route": {"cluster": ANY_TRITON, **UNBOUNDED},
            "request_headers_to_remove": ["authorization"],
        }
        for method in TENSOR_SERVER
    ]
    field = InvalidInput("model", "is missing or malformed: 1 to 64 letters, digits, '.', '_' and '-'")
    elsewhere = Unimplemented("there is no such method on this port")
    found += [
        _local_reply(field, {"name": MODEL_HEADER, "string_match": {"exact": "<invalid>"}}),
        {
            "match": {"prefix": "/", "headers": [{"name": MODEL_HEADER, "present_match": True}]},
            "direct_response": {"status": 404},  # routing.lua answers before it comes to this
            "metadata": {"filter_metadata": {LUA: {"unknown": True}}},
        },
        _local_reply(elsewhere),
    ]
    return {"name": ROUTES, "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": found}]}


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
