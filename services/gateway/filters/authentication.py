"""Who calls: keys are verified by Envoy itself, by the public halves of the signing keys."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.core.identity import AUDIENCE, ISSUER, MODELS_CLAIM
from services.gateway.descriptors import OPEN_PREFIXES
from services.gateway.filters import certificates
from services.gateway.filters.chain import typed
from services.gateway.headers import CLIENT_HEADER, KEY_HEADER, KEY_MODELS_HEADER

NAME = "authentication"
TYPE = "jwt_authn.v3.JwtAuthentication"
# Who asks, by which key: allow-lists and limits look at it, and inference is fair between clients.
_OF_OURS = {CLIENT_HEADER: "sub", KEY_HEADER: "jti", KEY_MODELS_HEADER: MODELS_CLAIM}


@dataclass(frozen=True, slots=True)
class Issuer:
    """Somebody else who signs keys. `jwks` is a JSON Web Key Set of public keys; `client_claim` names the
    client; clocks may differ by `clock_skew_s` seconds."""

    name: str
    issuer: str
    audiences: tuple[str, ...]
    jwks: str
    client_claim: str = "sub"
    clock_skew_s: int = 30


def authentication(
    jwks: Mapping[str, object], others: Sequence[Issuer] = (), *, by_certificate: bool = False
) -> dict[str, Any]:
    """The configuration of `jwt_authn`. The keys of an issuer verify tokens that say they are its own.
    `by_certificate`: who is known by a certificate needs none."""
    ours = json.dumps(jwks, sort_keys=True)
    providers = {ISSUER: _provider(ISSUER, (AUDIENCE,), ours, _OF_OURS, 1)}
    for other in others:
        claims = {CLIENT_HEADER: other.client_claim, KEY_HEADER: "jti"}
        found = _provider(other.issuer, other.audiences, other.jwks, claims, other.clock_skew_s)
        providers[f"issuer-{other.name}"] = found
    requirements = [{"provider_name": name} for name in providers]
    needed = {"requires_any": {"requirements": requirements}} if others else requirements[0]
    rules: list[dict[str, Any]] = [{"match": {"prefix": prefix}} for prefix in OPEN_PREFIXES]
    rules += [certificates.KNOWN] if by_certificate else []
    return typed(
        TYPE, {"providers": providers, "rules": [*rules, {"match": {"prefix": "/"}, "requires": needed}]}
    )


def _provider(
    issuer: str, audiences: Sequence[str], jwks: str, claims: Mapping[str, str], skew_s: int
) -> dict[str, Any]:
    return {
        "issuer": issuer,
        "audiences": list(audiences),
        "local_jwks": {"inline_string": jwks},
        "jwt_cache_config": {"jwt_cache_size": 1000},
        "require_expiration": True,
        "clock_skew_seconds": skew_s,
        # Nowhere else, above all not in a URL, which ends up in logs.
        "from_headers": [
            {"name": "authorization", "value_prefix": f"{scheme} "} for scheme in ("Bearer", "bearer")
        ],
        "claim_to_headers": [{"header_name": h, "claim_name": claim} for h, claim in claims.items()],
        "forward": True,  # the control plane checks scopes; routes to backends remove it
    }
