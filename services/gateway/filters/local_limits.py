"""Limits that each Envoy enforces by itself, without asking anyone: requests per second and per minute where
their scope is local, requests in progress, and how urgent a request may be.

Who has limits passes through filters of its own, chosen by its name; all others pay for one look-up. A rate
is a token bucket of `local_ratelimit`. Requests in progress are counted by `adaptive_concurrency`, held at a
fixed limit: it takes back what it counted when the stream is gone, however it went.

Every change of these configurations begins all of their counts anew, so they hold nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from services.core.access import Client, Limits
from services.core.errors import LimitReached
from services.core.patterns import matches
from services.gateway import replies
from services.gateway.filters.chain import by_header, chosen, typed
from services.gateway.filters.model import by_any_model
from services.gateway.headers import CLIENT_HEADER, MAX_PRIORITY_HEADER
from services.gateway.view import View

CLIENTS, MODELS = "local-limits-of-clients", "local-limits-of-models"
# In an answer to a request that was refused: which limit it was, in words.
LIMIT_HEADER = "x-lingqu-limit"

_TOLD = ("x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset")

# Statuses by which the listener tells whose limit it was; no client sees them.
_STATUSES = {"client": 423, "model": 424, "client_model": 426}
_HOLDERS = {"client": "the client", "model": "the model", "client_model": "the client"}
# An interval after which Envoy would think about the limit it is to keep.
_NEVER = "86400000s"


def local_limits(view: View) -> list[dict[str, Any]]:
    """The two extensions."""
    models = tuple(model.name for model in view.models)
    clients = {client.name: _of_client(client, models) for client in view.access.clients}
    shared = {of.model: _chain(of.limits, "model", f'model "{of.model}" takes') for of in view.access.shared}
    return [
        chosen(CLIENTS, by_header(CLIENT_HEADER), {name: chain for name, chain in clients.items() if chain}),
        chosen(MODELS, by_any_model, {name: chain for name, chain in shared.items() if chain}, named=True),
    ]


def concurrency_refusals() -> Iterator[tuple[int, LimitReached]]:
    """What a request that found too many others in progress is answered, by the status it is refused with."""
    for of, status in _STATUSES.items():
        where = " of this model" if of == "client_model" else ""
        message = f"{_HOLDERS[of]} has as many requests{where} in progress as it may; try again when one ends"
        yield status, LimitReached(message, "concurrent_requests", of, 1.0)


def limits_of(client: Client, model: str) -> Limits:
    """Those of the client's requests to that model alone."""
    return next((limits for models, limits in client.model_limits if matches(models, model)), Limits())


@lru_cache(4096)
def _of_client(client: Client, models: tuple[str, ...]) -> list[dict[str, Any]]:
    """Outermost the limits of a single model, so that what they refuse takes nothing from those of all."""
    may = f'client "{client.name}" may make'
    chains = {
        model: _chain(limits_of(client, model), "client_model", f'{may} of model "{model}"')
        for model in (models if client.model_limits else ())
        if any(matches(pattern, model) for pattern in client.models)
    }
    found = {model: chain for model, chain in chains.items() if chain}
    single = [chosen("of-one-model", by_any_model, found, named=True)] if found else []
    capped = [_capped(client.max_priority)] if client.max_priority else []
    return [*capped, *single, *_chain(client.limits, "client", may)]


def _chain(limits: Limits, of: str, may: str) -> list[dict[str, Any]]:
    rates = [
        ("requests_per_second", "second", 1, limits.requests_per_second),
        ("requests_per_minute", "minute", 60, limits.requests_per_minute),
    ]
    kept = [rate for rate in rates if rate[3] and rate[0] in limits.local]
    chain = [_at_once(limits.concurrent_requests, of)] if limits.concurrent_requests else []
    return chain + [
        _rate(
            of, field, number, seconds, f"{may} {_requests(number)} per {unit}", told=seconds == kept[-1][2]
        )
        for field, unit, seconds, number in kept
    ]


def _requests(number: int) -> str:
    return "1 request" if number == 1 else f"{number} requests"


def _capped(priority: int) -> dict[str, Any]:
    """Inference reads how urgent a request is, and makes it no more urgent than this."""
    header = {"header": {"key": MAX_PRIORITY_HEADER, "value": str(priority)}}
    mutations = {"request_mutations": [{"append": header}]}
    return {
        "name": "priority",
        "typed_config": typed("header_mutation.v3.HeaderMutation", {"mutations": mutations}),
    }


def _at_once(number: int, of: str) -> dict[str, Any]:
    """A controller that is never told how long requests may take keeps the limit it begins with."""
    controller = {
        "concurrency_limit_params": {
            "max_concurrency_limit": number,
            "concurrency_update_interval": _NEVER,
        },
        "min_rtt_calc_params": {"fixed_value": "1s", "min_concurrency": number},
    }
    config = {
        "gradient_controller_config": controller,
        "enabled": {"default_value": True, "runtime_key": "lingqu.concurrency_limits"},
        "concurrency_limit_exceeded_status": {"code": _STATUSES[of]},
    }
    return {"name": "at-once", "typed_config": typed("adaptive_concurrency.v3.AdaptiveConcurrency", config)}


def _rate(of: str, field: str, number: int, seconds: int, text: str, *, told: bool) -> dict[str, Any]:
    """`told`: answers to requests that pass say what is left of it."""
    refusal = LimitReached(text, field, of, seconds / number)  # when the next token comes
    wait = str(math.ceil(seconds / number))
    added = {
        LIMIT_HEADER: text,
        "grpc-status-details-bin": replies.details_header(refusal),
        "retry-after": wait,
    }
    if not told:  # Envoy adds them to refusals only where it adds them to all answers
        added |= dict(zip(_TOLD, (str(number), "0", wait), strict=True))
    always = {"default_value": {"numerator": 100}}
    config = {
        "stat_prefix": of,
        "token_bucket": {"max_tokens": number, "tokens_per_fill": number, "fill_interval": f"{seconds}s"},
        "filter_enabled": always,
        "filter_enforced": always,
        "rate_limited_as_resource_exhausted": True,
        "enable_x_ratelimit_headers": "DRAFT_VERSION_03" if told else "OFF",
        "response_headers_to_add": [{"header": {"key": k, "value": v}} for k, v in added.items()],
    }
    return {"name": field, "typed_config": typed("local_ratelimit.v3.LocalRateLimit", config)}
