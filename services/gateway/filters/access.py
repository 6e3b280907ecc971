"""Who may call what: revoked keys, disabled clients and the models that each client may call.

One matcher, walked by exact maps: the id of the key, then the client, then one regular expression for the
models of that client. It costs a request the same with a thousand clients as with one, and does not change
when models come and go. A key that says itself which models it is for is looked at by a script besides, since
no matcher compares with what a request brings."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from services.core.access import Access, Client
from services.core.errors import (
    BackendUnavailable,
    ClientDisabled,
    KeyRevoked,
    LingquError,
    ModelNotAllowed,
    Unauthenticated,
    UnknownClient,
)
from services.core.identity import CLIENT_NAME
from services.core.patterns import matches
from services.gateway.descriptors import OPEN_PREFIXES
from services.gateway.filters import model
from services.gateway.filters.chain import typed, when_present
from services.gateway.headers import CLIENT_HEADER, FALLBACK_HEADER, KEY_HEADER, KEY_MODELS_HEADER

NAME = "access"
TYPE = "rbac.v3.RBAC"

_REVOKED, _DISABLED, _NOBODY = "key-revoked", "client-disabled", "no-client"
_MODEL, _UNKNOWN, _FALLBACK = "model-not-allowed", "unknown-client", "fallback-not-allowed"
# By a part of Envoy's response code details, which name the policy that refused.
DENIALS: dict[str, LingquError] = {
    f"[{_REVOKED}]": KeyRevoked("the key was revoked"),
    f"[{_NOBODY}]": Unauthenticated("the key names no client that could be one: 1 to 64 of A-Za-z0-9._@-"),
    f"[{_DISABLED}]": ClientDisabled("the client of this key is disabled"),
    f"[{_MODEL}]": ModelNotAllowed("this client may not call this model; `lingqu clients show` tells which"),
    f"[{_FALLBACK}]": BackendUnavailable("no replica can answer at the moment; try again"),
    f"[{_UNKNOWN}]": UnknownClient("this suite serves only clients that it has a record of; this is none"),
}
# What key_models.lua refuses; it says 403 and nothing else.
OTHER_DENIAL = ModelNotAllowed("this key is for other models only")


def allowed(access: Access, fallbacks: tuple[str, ...] = (), *, known_only: bool = False) -> dict[str, Any]:
    """The configuration of `rbac`. `fallbacks` are the models that may answer in place of others.
    `known_only`: a client without a record may call nothing."""
    # A token of another issuer may name no client, or one that nobody could keep a record of.
    nobody = _tree(_header(":path"), dict.fromkeys(OPEN_PREFIXES, _ALLOW), _deny(_NOBODY), "prefix_match_map")
    unknown = _deny(_UNKNOWN) if known_only else _ALLOW
    others = _if(_header(CLIENT_HEADER), CLIENT_NAME, unknown, nobody)
    clients = {client.name: _models(client, fallbacks) for client in access.clients}
    revoked = dict.fromkeys((key.key_id for key in access.revoked), _deny(_REVOKED))
    keys = _tree(_header(KEY_HEADER), revoked, _tree(_header(CLIENT_HEADER), clients, others))
    return typed(TYPE, {"matcher": keys["matcher"]})


def key_models() -> dict[str, Any]:
    """The filter for keys that are for some models only; all others pay for looking for a header."""
    script = typed("lua.v3.Lua", {"default_source_code": {"inline_string": model.source("key_models.lua")}})
    return when_present("key-models", KEY_MODELS_HEADER, {"name": "lua", "typed_config": script})


def covering(patterns: tuple[str, ...]) -> str:
    """A regular expression (RE2) for MODEL where one of the patterns covers the model: its name, or a JSON
    list of it alone."""
    names = "|".join(re.escape(pattern).replace(r"\*", '[^"]*') for pattern in patterns)
    return rf'(\[")?({names})("\])?'


@lru_cache(8192)
def _models(client: Client, fallbacks: tuple[str, ...]) -> dict[str, Any]:
    """What names no model passes: it reaches none. Not to be changed."""
    if client.disabled:
        return _deny(_DISABLED)
    if "*" in client.models:
        return _ALLOW
    named = _if(_MODEL_NAME, ".+", _deny(_MODEL), _ALLOW)
    own = _if(_MODEL_NAME, covering((model.NO_MODEL, *client.models)), _ALLOW, named)
    refused = [name for name in fallbacks if not any(matches(pattern, name) for pattern in client.models)]
    return _tree(_header(FALLBACK_HEADER), dict.fromkeys(refused, _deny(_FALLBACK)), own)


def _header(name: str) -> dict[str, Any]:
    kind = "type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput"
    return {"name": name, "typed_config": {"@type": kind, "header_name": name}}


def _tree(
    value: dict[str, Any],
    branches: dict[str, Any],
    otherwise: dict[str, Any],
    kind: str = "exact_match_map",
) -> dict[str, Any]:
    """Empty maps are not allowed."""
    if not branches:
        return otherwise
    tree = {"input": value, kind: {"map": branches}}
    return {"matcher": {"matcher_tree": tree, "on_no_match": otherwise}}


def _if(value: dict[str, Any], regex: str, then: dict[str, Any], otherwise: dict[str, Any]) -> dict[str, Any]:
    """A value that is not there is like no expression."""
    fits = {"safe_regex": {"google_re2": {}, "regex": regex}}
    predicate = {"single_predicate": {"input": value, "value_match": fits}}
    matchers = [{"predicate": predicate, "on_match": then}]
    return {"matcher": {"matcher_list": {"matchers": matchers}, "on_no_match": otherwise}}


def _action(name: str, action: str) -> dict[str, Any]:
    config = {"@type": "type.googleapis.com/envoy.config.rbac.v3.Action", "name": name, "action": action}
    return {"action": {"name": name, "typed_config": config}}


def _deny(policy: str) -> dict[str, Any]:
    return _action(policy, "DENY")


_ALLOW = _action("allowed", "ALLOW")
_MODEL_NAME = model.state()
