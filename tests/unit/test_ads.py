"""The incremental xDS protocol with one Envoy, without a network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from envoy.service.discovery.v3 import discovery_pb2

from services.core.discovery import READY, Hosted, Model, Replica, Version, VersionKey
from services.gateway import xds
from services.gateway.ads import DataPlane, Stream
from services.gateway.listener import Entry
from services.gateway.snapshot import Snapshot, snapshot
from services.gateway.view import view

ENTRY = Entry("127.0.0.1:8080", "127.0.0.1:8081", {"keys": []})


def made(*names: str, replicas: int = 1) -> Snapshot:
    versions = [Version(VersionKey(n, 1), "file:///x", "0", "tensor", "python") for n in names]
    alive = [
        Replica(f"r{i}", "inference", {"oip": f"10.0.0.{i}:1"}, tuple(Hosted(v.key, READY) for v in versions))
        for i in range(1, replicas + 1)
    ]
    return snapshot(view(alive, [Model(v.key.model, (v,), ((1, 100),)) for v in versions]), ENTRY)


class Envoy:
    """Subscribes as Envoy does and answers what it gets: clusters only when it has their endpoints."""

    def __init__(self) -> None:
        self.plane = DataPlane("test")
        self.stream = Stream(self.plane)
        self.has: dict[str, set[str]] = {kind: set() for kind in xds.ORDER}
        self.log: list[tuple[str, list[str], list[str]]] = []

    def subscribe(self, kind: str, *names: str) -> None:
        request = discovery_pb2.DeltaDiscoveryRequest(type_url=kind, resource_names_subscribe=names)
        self.stream.on_request(request)

    def take(self, snapshot: Snapshot, reject: str = "") -> list[Any]:
        """All responses until nothing more comes; each is accepted, but those of type `reject`."""
        taken: list[Any] = []
        warming: list[Any] = []
        while responses := self.stream.responses(snapshot):
            for response in responses:
                taken.append(response)
                kind = response.type_url
                names = [resource.name for resource in response.resources]
                self.log.append((kind, names, list(response.removed_resources)))
                answer = discovery_pb2.DeltaDiscoveryRequest(type_url=kind, response_nonce=response.nonce)
                if kind == reject:
                    answer.error_detail.message = "no such filter"
                else:
                    self.has[kind] |= set(names)
                    self.has[kind] -= set(response.removed_resources)
                discovered = [n for n in names if n.startswith(("tensor", "rest", "limiter"))]
                if kind == xds.CLUSTER and discovered:
                    warming.append(answer)
                    self.subscribe(xds.ENDPOINTS, *discovered)
                    continue
                self.stream.on_request(answer)
                if kind == xds.ENDPOINTS:
                    for delayed in warming:
                        self.stream.on_request(delayed)
                    warming.clear()
                if kind == xds.LISTENER and xds.ROUTES not in [k for k, _, _ in self.log]:
                    self.subscribe(xds.ROUTES, "public")
                    self.subscribe(xds.EXTENSIONS, *snapshot.resources[xds.EXTENSIONS])
        return taken


def connected(snapshot: Snapshot) -> Envoy:
    envoy = Envoy()
    envoy.subscribe(xds.CLUSTER)
    envoy.subscribe(xds.LISTENER)
    envoy.take(snapshot)
    return envoy


def test_a_new_envoy_gets_everything() -> None:
    state = made("a", "b")
    envoy = connected(state)
    assert envoy.has == {kind: set(named) for kind, named in state.resources.items()}
    assert set(envoy.plane.accepted.values()) == {state.version}


def test_only_what_changed_is_sent() -> None:
    envoy = connected(made("a"))
    taken = envoy.take(made("a", replicas=2))
    assert {response.type_url for response in taken} == {xds.ENDPOINTS}
    assert envoy.take(made("a", replicas=2)) == []


def test_clusters_come_before_the_routes_to_them_and_go_after() -> None:
    envoy = connected(made("a"))
    envoy.log.clear()
    envoy.take(made("b"))
    events = [(kind, "+" if added else "-") for kind, added, removed in envoy.log if added or removed]
    assert events[:3] == [(xds.CLUSTER, "+"), (xds.ENDPOINTS, "+"), (xds.ROUTES, "+")]
    assert set(events[3:]) == {(xds.ENDPOINTS, "-"), (xds.CLUSTER, "-")}
    assert "tensor/a/1" not in envoy.has[xds.CLUSTER]


def test_a_cluster_that_changes_is_sent_its_endpoints_again() -> None:
    """Envoy waits for them, and does not ask."""
    envoy = connected(made("a"))
    state = made("a")
    envoy.log.clear()
    envoy.take(
        replace(
            state, versions={**state.versions, xds.CLUSTER: dict.fromkeys(state.versions[xds.CLUSTER], "x")}
        )
    )
    assert {kind for kind, added, _ in envoy.log if "tensor/a/1" in added} == {xds.CLUSTER, xds.ENDPOINTS}


def test_a_rejection_is_reported_and_not_repeated() -> None:
    envoy = connected(made("a"))
    state = made("a", "b")
    envoy.take(state, reject=xds.ROUTES)
    assert envoy.plane.last_rejection == "RouteConfiguration: no such filter"
    assert envoy.take(state) == []
    envoy.take(made("a", "b", "c"))
    assert envoy.plane.last_rejection == ""


def test_nothing_is_sent_while_an_answer_is_awaited() -> None:
    stream = Stream(DataPlane("test"))
    stream.on_request(discovery_pb2.DeltaDiscoveryRequest(type_url=xds.CLUSTER))
    assert len(stream.responses(made("a"))) == 1
    assert stream.responses(made("b")) == []


def test_a_reconnected_envoy_gets_only_what_it_lacks() -> None:
    state = made("a", "b")
    stream = Stream(DataPlane("test"))
    known = {n: v for n, v in state.versions[xds.CLUSTER].items() if "/b/" not in n}
    stream.on_request(
        discovery_pb2.DeltaDiscoveryRequest(
            type_url=xds.CLUSTER, initial_resource_versions={**known, "tensor/gone/1": "x"}
        )
    )
    (added,) = stream.responses(state)
    assert [r.name for r in added.resources] == ["tensor/b/1"]
    stream.on_request(discovery_pb2.DeltaDiscoveryRequest(type_url=xds.CLUSTER, response_nonce=added.nonce))
    (removed,) = stream.responses(state)
    assert list(removed.removed_resources) == ["tensor/gone/1"]
