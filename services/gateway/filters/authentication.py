"""Who calls: keys are verified by Envoy itself, by the public halves of the signing keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from services.core.identity import AUDIENCE, ISSUER
from services.gateway.descriptors import OPEN_PREFIXES
from services.gateway.filters.chain import typed
from services.gateway.headers import CLIENT_HEADER

NAME = "authentication"
TYPE = "jwt_authn.v3.JwtAuthentication"


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
        # Who asks: inference is fair between clients by it.
        "claim_to_headers": [{"header_name": CLIENT_HEADER, "claim_name": "sub"}],
        "forward": True,  # the control plane checks scopes; routes to backends remove it
    }
    open_rules = [{"match": {"prefix": prefix}} for prefix in OPEN_PREFIXES]
    closed_rule = {"match": {"prefix": "/"}, "requires": {"provider_name": ISSUER}}
    return typed(TYPE, {"providers": {ISSUER: provider}, "rules": [*open_rules, closed_rule]})
