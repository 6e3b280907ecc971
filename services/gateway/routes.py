"""Which request goes to which cluster, and what is answered when none fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from services.core.errors import LingquError, Unimplemented
from services.core.rest import MAX_BODY_BYTES
from services.gateway import replies
from services.gateway.clusters import ANY_REST, ANY_TRITON, CONTROL
from services.gateway.descriptors import (
    HEALTH_PREFIX,
    NAMING,
    OPEN_PREFIXES,
    TENSOR_SERVER,
    TENSOR_SERVICE,
)
from services.gateway.edge import MAX_MESSAGE_BYTES
from services.gateway.filters import model, versions, web
from services.gateway.headers import MODEL_HEADER
from services.gateway.splits import (
    KINDS,
    REST_RETRIES,
    REST_SERVICE,
    RETRIES,
    TENSOR_STREAM,
    UNBOUNDED,
    Branch,
    action,
    added,
    branch,
)
from services.gateway.view import Target, View

ROUTES = "public"
JSON = "envoy.filters.http.json_to_metadata"
HEALTH_CHECK = "envoy.filters.http.health_check"
# Requests that name a model in their JSON body, and whatever else REST answers.
REST_WITH_MODEL = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
REST_OTHERS = ("/v1/", "/openapi.json")
# GET is OpenAI's; POST /v1/models/{model}:verb is ours.
OWN_REST = "/v1/models/"


def routes(view: View, cors_origins: Sequence[str] = (), branch: Branch = branch) -> dict[str, Any]:
    """A tree, not a list: by service, then by model, then by the version asked for, so that a thousand
    models cost what one costs. They depend on whether there are addresses, not on which. `branch` may
    remember what it has made."""
    # What is asked of a control plane may change something: not again once it may have been heard.
    unheard = {"retry_on": "connect-failure,refused-stream", "num_retries": 2}
    to_control = {"route": {"cluster": CONTROL, **UNBOUNDED, "retry_policy": unheard}}
    to_any_triton = {
        "route": {"cluster": ANY_TRITON, **UNBOUNDED},
        "request_headers_to_remove": ["authorization"],
    }
    by_model = {service: _models(service, view, branch) for service in KINDS}
    # A script answers for models that are unknown; what names no model is no method of ours.
    elsewhere = local_reply(Unimplemented("there is no such method on this port"))
    elsewhere["typed_per_filter_config"] = {**model.script(model.UNKNOWN), **versions.asked()}
    health = {**to_control, "typed_per_filter_config": web.switched_on(HEALTH_CHECK)}
    services = {
        **{prefix: _grpc(to_control) for prefix in (*OPEN_PREFIXES, "/lingqu.gateway.v1.GatewayService/")},
        HEALTH_PREFIX: _grpc(health),
        **{f"/{TENSOR_SERVICE}/{method}": _grpc(to_any_triton) for method in TENSOR_SERVER},
        **{
            f"/{service}{'' if service == TENSOR_STREAM else '/'}": _by_model(
                known, _unread(service, elsewhere)
            )
            for service, known in by_model.items()
            if service != REST_SERVICE
        },
        **dict.fromkeys(REST_WITH_MODEL, _rest(by_model[REST_SERVICE])),
        **dict.fromkeys(REST_OTHERS, action(_to_any_rest())),
        OWN_REST: _own_rest(),
    }
    tree = {"matcher_tree": _by_header(":path", services), "on_no_match": action(elsewhere)}
    host: dict[str, Any] = {"name": "all", "domains": ["*"], "retry_policy": RETRIES, "matcher": tree}
    if cors_origins:
        host["typed_per_filter_config"] = web.cors_policy(cors_origins)
    return {"name": ROUTES, "virtual_hosts": [host]}


def _grpc(route: dict[str, Any]) -> dict[str, Any]:
    """The same for gRPC and gRPC-Web, which is told apart by its content type."""
    extras = {**route.get("typed_per_filter_config", {}), **web.switched_on(web.GRPC_WEB)}
    branches = {web.GRPC_WEB_TYPE: action({**route, "typed_per_filter_config": extras})}
    return {"matcher": {"matcher_tree": _by_header("content-type", branches), "on_no_match": action(route)}}


def _own_rest() -> dict[str, Any]:
    """Our own API as JSON. It comes by here as it was sent, goes nowhere, and is routed anew as gRPC."""
    transcoded = {
        "route": {"cluster": CONTROL, "timeout": "0s"},
        "typed_per_filter_config": web.switched_on(web.TRANSCODER),
        "request_body_buffer_limit": MAX_MESSAGE_BYTES,
    }
    posted = _by_header(":method", {"POST": action(transcoded)})
    return {"matcher": {"matcher_tree": posted, "on_no_match": action(_to_any_rest())}}


def _unread(service: str, elsewhere: dict[str, Any]) -> dict[str, Any]:
    """Where requests come by that have not been read yet, within the times of edge.py, and where those stay
    that name no known model: a script answers them, so that they go nowhere."""

    def reading(fields: Iterable[str]) -> dict[str, Any]:
        return {
            "route": {"cluster": CONTROL, "timeout": "0s"},
            "typed_per_filter_config": {**elsewhere["typed_per_filter_config"], **model.named_by(fields)},
            "request_body_buffer_limit": MAX_MESSAGE_BYTES,
        }

    if service == TENSOR_STREAM:
        # Triton's clients open their stream first, and ask when there is something to ask.
        fields = NAMING[TENSOR_SERVICE]["ModelStreamInfer"]
        return _grpc({**reading(fields), "route": {"cluster": CONTROL, **UNBOUNDED}})
    methods = NAMING[service].items()
    branches = {f"/{service}/{method}": _grpc(reading(fields)) for method, fields in methods}
    return {"matcher": {"matcher_tree": _by_header(":path", branches), "on_no_match": action(elsewhere)}}


def _models(service: str, view: View, branch: Branch) -> dict[str, Any]:
    """What is done with the requests of each model that the service has."""
    targets: dict[str, list[Target]] = {}
    for target in (*view.targets, *view.named):
        if KINDS[service] == "tensor" or target.task != "tensor":
            targets.setdefault(target.model, []).append(target)
    models = {model.name: model for model in view.models}
    spares = {name: targets.get(model.protection.fallback, ()) for name, model in models.items()}
    return {
        name: branch(service, models.get(name), found, spares.get(name, ()))
        for name, found in sorted(targets.items())
    }


def _rest(known: dict[str, Any]) -> dict[str, Any]:
    """By model, as soon as the body has been read; whoever names none that is known is told so by any
    replica."""
    # A request comes by here first, without a model: this switches the filter on that looks for one.
    reading = {
        "typed_per_filter_config": {**web.switched_on(JSON), **model.named_in_json(), **versions.asked()},
        "request_body_buffer_limit": MAX_BODY_BYTES,
    }
    unread = action({**_to_any_rest(), **reading})
    unnamed = {**_to_any_rest(), "request_headers_to_add": added({MODEL_HEADER: model.NO_MODEL})}
    return _by_model({**known, model.NO_MODEL: action(unnamed)}, unread, rest=True)


def _by_model(known: dict[str, Any], otherwise: dict[str, Any], *, rest: bool = False) -> dict[str, Any]:
    if not known:  # empty maps are not allowed
        return otherwise
    return {"matcher": {"matcher_tree": model.by_model(known, rest=rest), "on_no_match": otherwise}}


def _to_any_rest() -> dict[str, Any]:
    """Within the times of edge.py, since nothing has been read."""
    return {
        "route": {"cluster": ANY_REST, "timeout": "0s", "retry_policy": REST_RETRIES},
        "request_headers_to_remove": ["authorization"],
    }


def _by_header(name: str, branches: dict[str, Any]) -> dict[str, Any]:
    """By the longest beginning of the header's value."""
    source = {"@type": "type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput"}
    return {
        "input": {"name": name, "typed_config": {**source, "header_name": name}},
        "prefix_match_map": {"map": branches},
    }


def local_reply(error: LingquError) -> dict[str, Any]:
    """A route that Envoy answers by itself."""
    # Without a body: Envoy would make it the grpc-message.
    return {"direct_response": {"status": 404}, "response_headers_to_add": replies.headers(error)}
