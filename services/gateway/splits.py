"""Which version of a model a request goes to: by share, or the one it asks for by number or name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from services.core.discovery import Model
from services.gateway import breakers, protection
from services.gateway.clusters import SHADOW
from services.gateway.descriptors import TENSOR_SERVICE, TEXT_SERVICE
from services.gateway.filters import model, versions
from services.gateway.headers import (
    FALLBACK_HEADER,
    MODEL_HEADER,
    PAIR_HEADER,
    PREFIX_HEADER,
    SESSION_HEADER,
    SHADOW_HEADER,
    VERSION_HEADER,
)
from services.gateway.view import Target

REST_SERVICE = "rest"
# Routes of its own, for a script of its own.
TENSOR_STREAM = f"{TENSOR_SERVICE}/ModelStreamInfer"
KINDS = {TEXT_SERVICE: "text", TENSOR_SERVICE: "tensor", TENSOR_STREAM: "tensor", REST_SERVICE: "rest"}
ROUTE = "lingqu"  # metadata of a route: which model and version it is for
# Streams and answers may take as long as their client waits, but not be silent for ever both ways.
SILENCE = "3600s"
UNBOUNDED = {
    "timeout": "0s",
    "idle_timeout": SILENCE,
    "max_stream_duration": {"max_stream_duration": "0s", "grpc_timeout_header_max": "0s"},
}


Branch = Callable[[str, Model | None, Sequence[Target], Sequence[Target]], dict[str, Any]]


def branch(
    service: str, known: Model | None, targets: Sequence[Target], spare: Sequence[Target] = ()
) -> dict[str, Any]:
    """What is done with the requests of one model: those that ask for a version get that one, or are refused;
    the others are split by share. `spare` are those of the model that answers when none of them can."""
    numbers = {target.version: target for target in targets}
    aliases = {} if known is None else known.aliases
    asked = {str(number): target for number, target in numbers.items()}
    asked |= {name: numbers[number] for name, number in aliases.items() if number in numbers}
    mirrors = _mirrors(service, known, numbers)
    weighted = [target for target in targets if target.percent or target.share_key]
    got, refused = breakers.shares((target.percent, target.admits) for target in weighted)
    keys = [target.share_key for target in weighted]
    shadow = known.shadow if known is not None else 0
    shares = [
        # Nobody learns anything of copies that a version gets of its own requests.
        (_route(service, t, mirrors if t.version != shadow else []), share)
        for t, share in zip(weighted, got, strict=True)
    ]
    fallback = _fallback(service, targets, spare)
    if fallback and not any(_able(service, target) for target in weighted):
        shares, refused, keys = [], 100, []
    if not any(keys):
        instead = fallback or _refused(service, targets[0].model)
        shares = [entry for entry in (*shares, (instead, refused)) if entry[1]]
    named = {name: action(_named(service, target)) for name, target in sorted(asked.items())}
    own = {}
    if KINDS[service] == "tensor":  # their messages say it already: no script has to
        own = {str(number): action(_own(service, target)) for number, target in numbers.items()}
    return versions.by_version(named, own, _UNSERVED, _split(shares, keys if any(keys) else ()))


def thresholds(percents: Sequence[int]) -> list[int]:
    """The growing sums of shares, in millionths: a request draws one random number, and goes to the first
    that is above it."""
    total, upto, found = sum(percents), 0, []
    for percent in percents:
        upto += percent
        found.append(round(1_000_000 * upto / total))
    return found


def action(route: Mapping[str, Any]) -> dict[str, Any]:
    """A leaf of a matcher."""
    config = {"@type": "type.googleapis.com/envoy.config.route.v3.Route", "match": {"prefix": "/"}, **route}
    return {"action": {"name": "route", "typed_config": config}}


def added(headers: Mapping[str, str]) -> list[dict[str, Any]]:
    """Headers that a route sets."""
    return [
        {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
        for key, value in headers.items()
    ]


def _split(shares: Sequence[tuple[dict[str, Any], int]], keys: Sequence[str] = ()) -> dict[str, Any]:
    """One route, or a list in which each takes its share of what comes. Not weighted clusters: whether a
    script has to run is said by the route of a version. `keys`: runtime keys that may say other shares."""
    if len(shares) == 1:
        return action(shares[0][0])
    routes = []
    uptos = thresholds([percent for _, percent in shares])
    for (route, _), upto, key in zip(shares, uptos, keys or [""] * len(shares), strict=True):
        drawn: dict[str, Any] = {"default_value": {"numerator": upto, "denominator": "MILLION"}}
        match = {"prefix": "/", "runtime_fraction": {**drawn, "runtime_key": key} if key else drawn}
        routes.append({**route, "match": match})
    config = {"@type": "type.googleapis.com/envoy.config.route.v3.RouteList", "routes": routes}
    return {"action": {"name": "split", "typed_config": config}}


def _fallback(service: str, targets: Sequence[Target], spare: Sequence[Target]) -> dict[str, Any] | None:
    """The route to another model, whose name goes with the request and with its answer. Tensors mean
    something to their own model only."""
    able = [t for t in spare if t.percent and t.admits == 100 and _able(service, t)]
    if KINDS[service] == "tensor" or not able:
        return None
    best = max(able, key=lambda target: target.percent)
    route = _route(service, best, [])
    told = {VERSION_HEADER: str(best.version), MODEL_HEADER: targets[0].model, FALLBACK_HEADER: best.model}
    checked, named = versions.elsewhere(best.model)
    return {
        **route,
        "typed_per_filter_config": {**route.get("typed_per_filter_config", {}), **checked},
        "metadata": {"filter_metadata": {**route["metadata"]["filter_metadata"], **named}},
        "request_headers_to_add": added(told),
        "response_headers_to_add": added({FALLBACK_HEADER: _if_answered(best.model)}),
    }


def _if_answered(text: str) -> str:
    """A header's value that only answers of backends have, and Envoy's own have not: they are no model's."""
    return f"%CEL(response.code_details == 'via_upstream' ? '{text}' : '')%"


def _able(service: str, target: Target) -> bool:
    kinds = {"text": target.text_endpoints, "tensor": target.tensor_endpoints, "rest": target.rest_endpoints}
    return bool(kinds[KINDS[service]])


def _named(service: str, target: Target) -> dict[str, Any]:
    """The route of requests that ask for the version. They are not copied: a shadow is compared with the
    traffic that it might take over."""
    if not target.admits:
        return _refused(service, target.model, target.version)
    return _route(service, target, [], pinned=True)


def _own(service: str, target: Target) -> dict[str, Any]:
    """The same, where the message asks for it."""
    if not target.admits:
        return _refused(service, target.model, target.version)
    return _route(service, replace(target, pinned=False), [])


def _refused(service: str, name: str, version: int | str = "") -> dict[str, Any]:
    """A breaker is open: the listener's mappers make the answer of it."""
    return {"name": _called(service, name, version), "direct_response": {"status": breakers.REFUSED}}


def _called(service: str, name: str, version: int | str) -> str:
    """A version's cluster, and its routes: by them the metrics service knows what a request was for that no
    replica got."""
    return f"{KINDS[service]}/{name}/{version}"


def _route(
    service: str, target: Target, mirrors: Sequence[dict[str, Any]], *, pinned: bool = False
) -> dict[str, Any]:
    version = str(target.version)
    called = _called(service, target.model, version)
    to: dict[str, Any] = {"cluster": called, **UNBOUNDED}
    if service == REST_SERVICE:
        to["retry_policy"] = REST_RETRIES
    if mirrors:
        to["request_mirror_policies"] = list(mirrors)
    metadata: dict[str, Any] = {ROUTE: {"model": target.model, "version": version}}
    route: dict[str, Any] = {"name": called, "route": to, "request_headers_to_remove": ["authorization"]}
    if KINDS[service] == "tensor":
        pin = pinned or target.pinned
        if pin:
            metadata[model.LUA] = {"pin": version}
        if service == TENSOR_STREAM or pin:
            script = model.STREAM if service == TENSOR_STREAM else model.PIN
            route["typed_per_filter_config"] = model.script(script)
    else:
        told = {VERSION_HEADER: version}
        if service == REST_SERVICE:
            told[MODEL_HEADER] = target.model
        if mirrors:
            told[PAIR_HEADER] = "%UNIQUE_ID%"
        route["request_headers_to_add"] = added(told)
        if target.affinity != "none":
            to["hash_policy"] = _HASHES
        if target.affinity == "prefix":
            route["typed_per_filter_config"] = model.script(model.PREFIX)
    return {**route, "metadata": {"filter_metadata": metadata}}


def _mirrors(service: str, known: Model | None, numbers: Mapping[int, Target]) -> list[dict[str, Any]]:
    """Copies for the shadow version. Envoy does not wait for their answers and throws them away."""
    shadow = numbers.get(known.shadow) if known is not None else None
    if known is None or shadow is None:
        return []
    cluster = f"{KINDS[service]}/{shadow.model}/{shadow.version}"
    fraction = {"numerator": known.shadow_percent * 10_000, "denominator": "MILLION"}
    changes = {SHADOW_HEADER: "1", VERSION_HEADER: str(shadow.version)}
    return [
        {
            "cluster": f"{SHADOW}/{cluster}",
            "runtime_fraction": {"default_value": fraction},
            "request_headers_mutations": [{"append": header} for header in added(changes)],
        }
    ]


# A script answers, since the answer names the version.
_UNSERVED = action(
    {"direct_response": {"status": 404}, "typed_per_filter_config": model.script(model.UNSERVED)}
)
# What the requests of one conversation have in common: what its client says, or else how they begin.
_HASHES = [
    {"header": {"header_name": SESSION_HEADER}, "terminal": True},
    {"header": {"header_name": PREFIX_HEADER}},
]

# Inference has no side effects, so a request whose answer has not begun may run again elsewhere. Waits add
# up to about two seconds: what a restarting replica needs, and less than a caller notices as an outage.
# Said once for all routes that say nothing else: as a part of each, it was half of what Envoy has to read.
RETRIES = {
    # A gRPC server that is stopped cancels what it has in progress.
    "retry_on": "connect-failure,refused-stream,reset,unavailable,cancelled",
    "num_retries": 4,
    "retry_back_off": {"base_interval": "0.1s", "max_interval": "1s"},
    **protection.ELSEWHERE,
}
REST_RETRIES = {
    **RETRIES,
    "retry_on": "connect-failure,refused-stream,reset,retriable-status-codes",
    "retriable_status_codes": [503],
}
