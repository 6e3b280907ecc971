"""500 models on 1,000 replicas: nothing is left out or told twice, and a change costs what has changed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from services.core.access import Access, RevokedKey
from services.core.discovery import READY, Hosted, Model, Replica, Version, VersionKey
from services.gateway import xds
from services.gateway.listener import Entry
from services.gateway.snapshot import Builder
from services.gateway.view import View, view
from tests.unit.test_ads import connected

MODELS, REPLICAS = 500, 1_000
ENTRY = Entry("127.0.0.1:8080", "127.0.0.1:8081", {"keys": []})


def name(number: int) -> str:
    return f"model-{number}"


def models(number: int = MODELS) -> list[Model]:
    versions = [Version(VersionKey(name(n), 1), "file:///x", "0", "tensor", "x") for n in range(number)]
    return [Model(version.key.model, (version,), ((1, 100),)) for version in versions]


def address(number: int) -> str:
    return f"10.0.{number // 250}.{number % 250 + 1}:8001"


def replicas(number: int = REPLICAS) -> list[Replica]:
    """Two for each model."""
    return [
        Replica(f"r{n}", "inference", {"oip": address(n)}, (Hosted(VersionKey(name(n % MODELS), 1), READY),))
        for n in range(number)
    ]


def members(message: Any) -> list[str]:
    return [
        f"{found.address}:{found.port_value}"
        for locality in message.endpoints
        for member in locality.lb_endpoints
        for found in (member.endpoint.address.socket_address,)
    ]


def test_every_model_and_endpoint_is_there_once_and_only_what_changes_is_pushed() -> None:
    builder = Builder()
    made = builder.build(view(replicas(), models()), ENTRY)
    assert not made.refused
    wanted = {f"tensor/{name(n)}/1" for n in range(MODELS)}
    assert {cluster for cluster in made.resources[xds.CLUSTER] if "/" in cluster} == wanted
    host = made.resources[xds.ROUTES]["public"].virtual_hosts[0]  # type: ignore[attr-defined]
    service = host.matcher.matcher_tree.prefix_match_map.map["/inference.GRPCInferenceService/"].matcher
    assert set(service.matcher_tree.exact_match_map.map) == {f'["{name(n)}"]' for n in range(MODELS)}
    endpoints = made.resources[xds.ENDPOINTS]
    found = Counter((cluster, member) for cluster in wanted for member in members(endpoints[cluster]))
    assert found == Counter((f"tensor/{name(n % MODELS)}/1", address(n)) for n in range(REPLICAS))
    assert Counter(members(endpoints["tensor"])) == Counter(address(n) for n in range(REPLICAS))

    envoy = connected(made)
    assert set(envoy.has[xds.CLUSTER]) == set(made.resources[xds.CLUSTER])
    assert set(envoy.has[xds.ENDPOINTS]) == set(endpoints)

    def told(seen: View) -> dict[str, list[str]]:
        """The names of what the Envoy is told anew."""
        return {
            response.type_url: sorted(resource.name for resource in response.resources)
            for response in envoy.take(builder.build(seen, ENTRY))
        }

    assert told(view(replicas(), models())) == {}
    more = replicas(REPLICAS + 1)
    assert told(view(more, models())) == {xds.ENDPOINTS: ["tensor", f"tensor/{name(REPLICAS % MODELS)}/1"]}
    revoked = Access(revoked=(RevokedKey("a-key", "alice"),))
    assert told(view(more, models(), revoked)) == {xds.EXTENSIONS: ["access"]}
    new = f"tensor/{name(MODELS)}/1"
    assert told(view(more, models(MODELS + 1), revoked)) == {
        xds.CLUSTER: [new],
        xds.ENDPOINTS: [new],
        xds.ROUTES: ["public"],
    }
