"""Limits that all gateways keep together: Envoy asks the limiter (services/gateway/limits), but only for
requests of clients and to models that have such limits."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from services.gateway.clusters import LIMITER
from services.gateway.filters.chain import ACTION, matched, nothing, typed
from services.gateway.filters.model import MODEL, state
from services.gateway.headers import CLIENT_HEADER
from services.gateway.limits.rules import limited
from services.gateway.protection import ELSEWHERE
from services.gateway.view import View

if TYPE_CHECKING:
    from services.gateway.listener import Entry

NAME = "global-limits"
# What the limiter is told of a request.
CLIENT_KEY, MODEL_KEY, TYPE_KEY = "client", "model", "type"
# Before another control plane is asked: at random up to so long, the second time up to three times as long.
BACK_OFF_S = 0.002
UNREACHABLE = "rate_limiter_error"  # what Envoy calls it when the limiter has not answered
_EXPRESSION = "type.googleapis.com/envoy.extensions.rate_limit_descriptors.expr.v3.Descriptor"
_HEADER = "type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput"


def global_limits(view: View, entry: Entry) -> dict[str, Any]:
    """The extension. One expression for all names costs the same for any number of them, and unlike a tree
    of names it has the filter once."""
    clients, models = limited(view.access)
    named = [_named(_client(), clients, "", "")] if clients else []
    named += [_named(state(), models, r'(\[")?', r'("\])?')] if models else []
    if not named:
        return {"name": NAME, "typed_config": nothing()}
    predicate = named[0] if len(named) == 1 else {"or_matcher": {"predicate": named}}
    asked = typed(ACTION, {"typed_config": {"name": NAME, "typed_config": _rate_limit(entry)}})
    matcher = {"predicate": predicate, "on_match": {"action": {"name": NAME, "typed_config": asked}}}
    return {"name": NAME, "typed_config": matched({"matcher_list": {"matchers": [matcher]}})}


def _named(source: dict[str, Any], names: Iterable[str], before: str, after: str) -> dict[str, Any]:
    regex = f"{before}({'|'.join(re.escape(name) for name in names)}){after}"
    value = {"safe_regex": {"google_re2": {}, "regex": regex}}
    return {"single_predicate": {"input": source, "value_match": value}}


def _client() -> dict[str, Any]:
    return {"name": CLIENT_HEADER, "typed_config": {"@type": _HEADER, "header_name": CLIENT_HEADER}}


def _rate_limit(entry: Entry) -> dict[str, Any]:
    model = {"descriptor_key": MODEL_KEY, "text": f"filter_state['{MODEL}']", "skip_if_error": True}
    actions = [
        {"request_headers": {"header_name": CLIENT_HEADER, "descriptor_key": CLIENT_KEY}},
        {"extension": {"name": "model", "typed_config": {"@type": _EXPRESSION, **model}}},
        {
            "request_headers": {
                "header_name": "content-type",
                "descriptor_key": TYPE_KEY,
                "skip_if_absent": True,
            }
        },
    ]
    # Another control plane can say as well. One that was asked and died may have counted: then too little is
    # used.
    retries = {
        "retry_on": "connect-failure,refused-stream,reset,unavailable,cancelled",
        "num_retries": 2,
        # By default half a second or so: the request has gone on by then. The longest interval is also how
        # long Envoy lets each attempt take.
        "retry_back_off": {
            "base_interval": f"{BACK_OFF_S:g}s",
            "max_interval": f"{max(BACK_OFF_S, entry.limits.timeout_s):g}s",
        },
        **ELSEWHERE,
    }
    config = {
        "domain": "lingqu",
        "timeout": f"{entry.limits.timeout_s:g}s",
        "failure_mode_deny": entry.limits.closed,
        "status_on_error": {"code": 503},
        "rate_limited_as_resource_exhausted": True,
        "enable_x_ratelimit_headers": "DRAFT_VERSION_03",
        "disable_x_envoy_ratelimited_header": True,
        "rate_limit_service": {
            "grpc_service": {"envoy_grpc": {"cluster_name": LIMITER}, "retry_policy": retries},
            "transport_api_version": "V3",
        },
        "rate_limits": [{"actions": actions}],
    }
    return typed("ratelimit.v3.RateLimit", config)
