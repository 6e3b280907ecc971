"""Which request goes to which cluster, and what is answered when none fits."""

from __future__ import annotations

import itertools
from typing import Any

from services.core.errors import LingquError, Unimplemented
from services.core.rest import MAX_BODY_BYTES
from services.gateway import replies
from services.gateway.clusters import ANY_REST, ANY_TRITON, CONTROL, backends
from services.gateway.descriptors import (
    OPEN_PREFIXES,
    TENSOR_DESCRIPTION,
    TENSOR_INFERENCE,
    TENSOR_SERVER,
    TENSOR_SERVICE,
    TEXT_METHODS,
    TEXT_SERVICE,
)
from services.gateway.edge import MAX_MESSAGE_BYTES
from services.gateway.filters import model
from services.gateway.headers import MODEL_HEADER, VERSION_HEADER
from services.gateway.view import Target, View

ROUTES = "public"
ROUTE = "lingqu"  # metadata of a route: which model and version it is for
NAMING_MODELS = {TEXT_SERVICE: TEXT_METHODS, TENSOR_SERVICE: (*TENSOR_INFERENCE, *TENSOR_DESCRIPTION)}
JSON = "envoy.filters.http.json_to_metadata"
# Requests that name a model in their JSON body, and whatever else REST answers.
REST_WITH_MODEL = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
REST_OTHERS = ("/v1/", "/openapi.json")
REST_SERVICE = "rest"
# Routes of its own, for a script of its own.
TENSOR_STREAM = f"{TENSOR_SERVICE}/ModelStreamInfer"
# Streams and answers may take as long as their client waits, but not be silent for ever both ways.
SILENCE = "3600s"
UNBOUNDED = {
    "timeout": "0s",
    "idle_timeout": SILENCE,
    "max_stream_duration": {"max_stream_duration": "0s", "grpc_timeout_header_max": "0s"},
}


def routes(view: View) -> dict[str, Any]:
    """A tree, not a list: by service, then by model, so that a thousand models cost what one costs."""
    to_control = {"route": {"cluster": CONTROL, **UNBOUNDED}}
    to_any_triton = {
        "route": {"cluster": ANY_TRITON, **UNBOUNDED},
        "request_headers_to_remove": ["authorization"],
    }
    kinds = {
        TEXT_SERVICE: "text", TENSOR_SERVICE: "tensor", TENSOR_STREAM: "tensor", REST_SERVICE: ANY_REST
    }  # fmt: skip
    by_model: dict[str, dict[str, Any]] = {service: {} for service in kinds}
    for service, known in by_model.items():
        for name, targets in itertools.groupby(view.targets, key=lambda target: target.model):
            able = [(t, f"{kinds[service]}/{name}/{t.version}") for t in targets]
            shares = [(_model_route(service, c, t), t.percent) for t, c in able if c in backends(t)]
            if shares:
                known[name] = _split(shares)
    # A script answers for models that are unknown; what names no model is no method of ours.
    elsewhere = _local_reply(Unimplemented("there is no such method on this port"))
    elsewhere["typed_per_filter_config"] = model.script(model.UNKNOWN)
    services = {
        **{prefix: _action(to_control) for prefix in (*OPEN_PREFIXES, "/lingqu.gateway.v1.GatewayService/")},
        **{f"/{TENSOR_SERVICE}/{method}": _action(to_any_triton) for method in TENSOR_SERVER},
        **{
            f"/{service}{'' if service == TENSOR_STREAM else '/'}": _by_model(
                known, _unread(service, elsewhere)
            )
            for service, known in by_model.items()
            if service != REST_SERVICE
        },
        **dict.fromkeys(REST_WITH_MODEL, _rest(by_model[REST_SERVICE])),
        **dict.fromkeys(REST_OTHERS, _action(_to_any_rest())),
    }
    tree = {"matcher_tree": _by_path(services), "on_no_match": _action(elsewhere)}
    return {"name": ROUTES, "virtual_hosts": [{"name": "all", "domains": ["*"], "matcher": tree}]}


def _unread(service: str, elsewhere: dict[str, Any]) -> dict[str, Any]:
    """Where requests come by that have not been read yet, within the times of edge.py, and where those stay
    that name no known model: a script answers them, so that they go nowhere."""
    reading = {
        "route": {"cluster": CONTROL, "timeout": "0s"},
        "typed_per_filter_config": elsewhere["typed_per_filter_config"],
        "request_body_buffer_limit": MAX_MESSAGE_BYTES,
    }
    if service == TENSOR_STREAM:
        # Triton's clients open their stream first, and ask when there is something to ask.
        return _action({**reading, "route": {"cluster": CONTROL, **UNBOUNDED}})
    branches = dict.fromkeys((f"/{service}/{method}" for method in NAMING_MODELS[service]), _action(reading))
    return {"matcher": {"matcher_tree": _by_path(branches), "on_no_match": _action(elsewhere)}}


def _rest(known: dict[str, Any]) -> dict[str, Any]:
    """By model, as soon as the body has been read; whoever names none that is known is told so by any
    replica."""
    # A request comes by here first, without a model: this switches the filter on that looks for one.
    reading = {
        "typed_per_filter_config": {
            JSON: {"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "config": {}}
        },
        "request_body_buffer_limit": MAX_BODY_BYTES,
    }
    unread = _action({**_to_any_rest(), **reading})
    unnamed = {**_to_any_rest(), "request_headers_to_add": _added({MODEL_HEADER: model.NO_MODEL})}
    return _by_model({**known, model.NO_MODEL: _action(unnamed)}, unread, rest=True)


def _by_model(known: dict[str, Any], otherwise: dict[str, Any], *, rest: bool = False) -> dict[str, Any]:
    if not known:  # empty maps are not allowed
        return otherwise
    return {"matcher": {"matcher_tree": model.by_model(known, rest=rest), "on_no_match": otherwise}}


def _to_any_rest() -> dict[str, Any]:
    """Within the times of edge.py, since nothing has been read."""
    return {
        "route": {"cluster": ANY_REST, "timeout": "0s", "retry_policy": _REST_RETRIES},
        "request_headers_to_remove": ["authorization"],
    }


def _by_path(branches: dict[str, Any]) -> dict[str, Any]:
    source = {"@type": "type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput"}
    return {
        "input": {"name": ":path", "typed_config": {**source, "header_name": ":path"}},
        "prefix_match_map": {"map": branches},
    }


def _action(route: dict[str, Any]) -> dict[str, Any]:
    config = {"@type": "type.googleapis.com/envoy.config.route.v3.Route", "match": {"prefix": "/"}, **route}
    return {"action": {"name": "route", "typed_config": config}}


def _split(shares: list[tuple[dict[str, Any], int]]) -> dict[str, Any]:
    """One route, or a list in which each takes its share of what comes. A request draws one random number,
    which every route compares with the sum of the shares up to its own."""
    if len(shares) == 1:
        return _action(shares[0][0])
    total, upto, routes = sum(percent for _, percent in shares), 0, []
    for route, percent in shares:
        upto += percent
        drawn = {"numerator": round(1_000_000 * upto / total), "denominator": "MILLION"}
        match = {"prefix": "/", "runtime_fraction": {"default_value": drawn}}
        routes.append({**route, "match": match})
    config = {"@type": "type.googleapis.com/envoy.config.route.v3.RouteList", "routes": routes}
    return {"action": {"name": "split", "typed_config": config}}


def _model_route(service: str, cluster: str, target: Target) -> dict[str, Any]:
    version = str(target.version)
    tensor = service in (TENSOR_SERVICE, TENSOR_STREAM)
    route: dict[str, Any] = {
        "route": {
            "cluster": cluster,
            **UNBOUNDED,
            "retry_policy": _REST_RETRIES if service == REST_SERVICE else _RETRIES,
        },
        "request_headers_to_remove": ["authorization"],
    }
    if not tensor:
        added = {VERSION_HEADER: version}
        if service == REST_SERVICE:
            added[MODEL_HEADER] = target.model
        route["request_headers_to_add"] = _added(added)
    route["metadata"] = {"filter_metadata": {ROUTE: {"model": target.model, "version": version}}}
    if service == TENSOR_STREAM:
        route["typed_per_filter_config"] = model.script(model.STREAM)
    if tensor and target.pinned:
        route["metadata"]["filter_metadata"][model.LUA] = {"pin": version}
        route.setdefault("typed_per_filter_config", model.script(model.PIN))
    return route


def _added(headers: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
        for key, value in headers.items()
    ]


# Inference has no side effects, so a request whose answer has not begun may run again elsewhere. Waits add
# up to about two seconds: what a restarting replica needs, and less than a caller notices as an outage.
_RETRIES = {
    # A gRPC server that is stopped cancels what it has in progress.
    "retry_on": "connect-failure,refused-stream,reset,unavailable,cancelled",
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
_REST_RETRIES = {
    **_RETRIES,
    "retry_on": "connect-failure,refused-stream,reset,retriable-status-codes",
    "retriable_status_codes": [503],
}


def _local_reply(error: LingquError) -> dict[str, Any]:
    # Without a body: Envoy would make it the grpc-message.
    return {"direct_response": {"status": 404}, "response_headers_to_add": replies.headers(error)}
