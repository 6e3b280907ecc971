"""The filters that every request passes, one concern a module, and their order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from services.gateway.filters import (
    access,
    authentication,
    certificates,
    global_limits,
    local_limits,
    model,
    versions,
    web,
)
from services.gateway.filters.chain import CHOICE, COMPOSITE, NOTHING, discovered, fixed, typed

if TYPE_CHECKING:
    from services.gateway.listener import Entry
    from services.gateway.view import View


def stack(entry: Entry) -> list[dict[str, Any]]:
    """Outermost first."""
    by_certificate = bool(entry.secrets.clients)
    return [
        # Before keys are asked for: browsers send none when they ask what they may send.
        *([web.cors()] if entry.cors_origins else []),
        web.grpc_web(),
        _health(),
        *([certificates.named()] if by_certificate else []),
        discovered(authentication.NAME, authentication.TYPE),
        *([certificates.as_client()] if by_certificate else []),
        web.transcoder(),
        model.of_grpc(),
        model.of_rest(),
        model.as_state(),
        versions.reference(),
        discovered(access.NAME, access.TYPE),
        access.key_models(),
        # A client that is refused by its own limit takes nothing from what others share.
        discovered(local_limits.CLIENTS, CHOICE, NOTHING),
        discovered(local_limits.MODELS, COMPOSITE, NOTHING),
        # Last, since it costs a call: what is refused for nothing is not asked for.
        discovered(global_limits.NAME, COMPOSITE, NOTHING),
        model.scripts(),
        _router(),
    ]


def _health() -> dict[str, Any]:
    """Answers 503 to who asks whether the entry is well, once Envoy was told to fail its health check
    (`lingqu drain gateway`); otherwise the question goes on to the control plane. On only where routes.py
    says so."""
    path = {"name": ":path", "string_match": {"exact": "/grpc.health.v1.Health/Check"}}
    config = typed("health_check.v3.HealthCheck", {"pass_through_mode": True, "headers": [path]})
    return fixed("health_check", config, disabled=True)


def _router() -> dict[str, Any]:
    """Statuses of gRPC's answers are counted once (`external.upstream_rq_*`), not twice."""
    settings = {"suppress_envoy_headers": True, "suppress_grpc_request_failure_code_stats": True}
    return fixed("router", typed("router.v3.Router", settings))


def extensions(view: View, entry: Entry) -> list[dict[str, Any]]:
    """The configurations that may change while the listener stays."""
    fallbacks = {model.protection.fallback for model in view.models} - {""}
    made = {
        authentication.NAME: authentication.authentication(
            entry.jwks, entry.issuers, by_certificate=bool(entry.secrets.clients)
        ),
        access.NAME: access.allowed(
            view.access, tuple(sorted(fallbacks)), known_only=entry.known_clients_only
        ),
    }
    found = [{"name": name, "typed_config": config} for name, config in made.items()]
    return [*found, *local_limits.local_limits(view), global_limits.global_limits(view, entry)]
