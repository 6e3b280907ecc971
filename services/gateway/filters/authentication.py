"""Who calls: keys are verified by Envoy itself, by the public halves of the signing keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from services.core.identity import AUDIENCE, ISSUER, MODELS_CLAIM
from services.gateway.descriptors import OPEN_PREFIXES
from services.gateway.filters.chain import typed
from services.gateway.headers import CLIENT_HEADER, KEY_HEADER, KEY_MODELS_HEADER

NAME = "authentication"
TYPE = "jwt_authn.v3.JwtAuthentication"
# Who asks, by which key: allow-lists and limits look at it, and inference is fair between clients.
_HEADERS = {CLIENT_HEADER: "sub", KEY_HEADER: "jti", KEY_MODELS_HEADER: MODELS_CLAIM}


def authentication(jwks: Mapping[str, object]) -> dict[str, Any]:
    """The configuration of `jwt_authn`."""
    provider = {
        "issuer": ISSUER,
        "audiences": [AUDIENCE],
        "local_jwks": {"inline_string": json.dumps(jwks, sort_keys=True)},
        "jwt_cache_config": {"jwt_cache_size": 1000},
        "require_expiration": True,
        "clock_skew_seconds": 1,
        # Nowhere else, above all not in a URL, which ends up in logs.
        "from_headers": [
            {"name": "authorization", "value_prefix": f"{scheme} "} for scheme in ("Bearer", "bearer")
        ],
        "claim_to_headers": [{"header_name": h, "claim_name": claim} for h, claim in _HEADERS.items()],
        "forward": True,  # the control plane checks scopes; routes to backends remove it
    }
    open_rules = [{"match": {"prefix": prefix}} for prefix in OPEN_PREFIXES]
    closed_rule = {"match": {"prefix": "/"}, "requires": {"provider_name": ISSUER}}
    return typed(TYPE, {"providers": {ISSUER: provider}, "rules": [*open_rules, closed_rule]})
