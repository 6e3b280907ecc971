"""The incremental xDS protocol with one Envoy, without a network."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf.wrappers_pb2 import StringValue
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.core.discovery import READY, Hosted, Model, Replica, Version, VersionKey
from services.gateway import xds
from services.gateway.ads import Ads, Snapshots
from services.gateway.deltas import DataPlane, Rejection, Stream
from services.gateway.listener import Entry
from services.gateway.progress import Progress
from services.gateway.resources import to_resource
from services.gateway.snapshot import Snapshot, snapshot
from services.gateway.view import view

ENTRY = Entry("127.0.0.1:8080", "127.0.0.1:8081", {"keys": []})
STORE = "abcdefgh"


def made(*names: str, replicas: int = 1) -> Snapshot:
    versions = [Version(VersionKey(n, 1), "file:///x", "0", "tensor", "python") for n in names]
    alive = [
        Replica(f"r{i}", "inference", {"oip": f"10.0.0.{i}:1"}, tuple(Hosted(v.key, READY) for v in versions))
        for i in range(1, replicas + 1)
    ]
    return snapshot(view(alive, [Model(v.key.model, (v,), ((1, 100),)) for v in versions]), ENTRY)


def small(models: Mapping[str, int], revision: int = 0) -> Snapshot:
    """A snapshot that says only what depends on what: each model has a cluster of its generation, which has
    endpoints, and the routes name all clusters."""

    def named(*names: str, generation: int = 0) -> dict[str, Any]:
        return {name: to_resource(StringValue(value=f"{name} {generation}")) for name in names}

    clusters = {f"tensor/{name}/{generation}": generation for name, generation in models.items()}
    found = {kind: {} for kind in xds.ORDER}
    for name, generation in clusters.items():
        found[xds.CLUSTER] |= named(name)
        found[xds.ENDPOINTS] |= named(name, generation=generation)
    found[xds.LISTENER] = named("public")
    found[xds.EXTENSIONS] = named("access")
    found[xds.RUNTIME] = named("shares", generation=sum(models.values()))
    found[xds.ROUTES] = {"public": to_resource(StringValue(value=json.dumps(sorted(clusters))))}
    return Snapshot(
        found, str(sorted(models.items())), at=Progress(revision, STORE) if revision else Progress()
    )


class Envoy:
    """Subscribes as Envoy does and answers what it gets: clusters only when it has their endpoints. `refuses`
    are names of resources, or kinds."""

    def __init__(self, *, tunable: bool = True) -> None:
        self.starts_with = (xds.RUNTIME,) if tunable else ()
        self.has: dict[str, dict[str, str]] = {kind: {} for kind in xds.ORDER}
        self.content: dict[tuple[str, str], bytes] = {}
        self.log: list[tuple[str, list[str], list[str]]] = []
        self.heard: list[Rejection] = []
        self.refuses: set[str] = set()
        self.connect()

    def connect(self) -> None:
        """On a new stream; what was not answered is lost."""
        self.plane = DataPlane("test")
        self.stream = Stream(self.plane, self)
        self.outstanding: list[Any] = []
        self.warming: list[tuple[Any, set[str]]] = []
        for kind in (*self.starts_with, xds.CLUSTER, xds.ENDPOINTS, xds.LISTENER, xds.EXTENSIONS, xds.ROUTES):
            wildcard = kind in (xds.CLUSTER, xds.LISTENER)
            names = [] if wildcard else self._named(kind)
            if wildcard or names:
                request = discovery_pb2.DeltaDiscoveryRequest(type_url=kind, resource_names_subscribe=names)
                request.initial_resource_versions.update(self.has[kind])
                self.stream.on_request(request)

    def _named(self, kind: str) -> list[str]:
        if kind == xds.RUNTIME:
            return ["shares"]
        if kind == xds.ENDPOINTS:
            return [name for name in self.has[xds.CLUSTER] if is_discovered(name)]
        if not self.has[xds.LISTENER]:
            return []
        return ["public"] if kind == xds.ROUTES else ["access", "authentication"]

    def subscribe(self, kind: str, *names: str) -> None:
        request = discovery_pb2.DeltaDiscoveryRequest(type_url=kind, resource_names_subscribe=names)
        self.stream.on_request(request)

    def nack(self, kind: str) -> None:
        """Counted elsewhere."""

    def accepted(self, kind: str, version: str) -> None:
        assert version

    def behind(self) -> None:
        raise AssertionError("that is for the service to say")

    def refused(self, rejection: Rejection) -> None:
        self.heard.append(rejection)

    def receive(self, snapshot: Snapshot) -> int:
        """Takes what is sent, without an answer; how many responses there were."""
        sent = self.stream.responses(snapshot)
        self.outstanding += sent
        return len(sent)

    def answer(self) -> None:
        """Applies the next response and says so. A cluster that waits for endpoints is answered later."""
        response = self.outstanding.pop(0)
        kind = response.type_url
        names = [resource.name for resource in response.resources]
        self.log.append((kind, names, list(response.removed_resources)))
        bad = {name for name in names if name in self.refuses or kind in self.refuses}
        # Envoy takes what is good of clusters that are refused together, and nothing of other kinds.
        if not bad or kind == xds.CLUSTER:
            for resource in response.resources:
                if resource.name not in bad:
                    self.has[kind][resource.name] = resource.version
                    self.content[kind, resource.name] = resource.resource.value
        for name in response.removed_resources:
            self.has[kind].pop(name, None)
            if kind == xds.CLUSTER and is_discovered(name):
                self.has[xds.ENDPOINTS].pop(name, None)
                self.unsubscribe(xds.ENDPOINTS, name)
        reply = discovery_pb2.DeltaDiscoveryRequest(type_url=kind, response_nonce=response.nonce)
        if bad:
            reply.error_detail.message = f"no {sorted(bad)[0]}"
        # A cluster that has changed waits for its endpoints as a new one does, and does not ask for them.
        wanting = {n for n in names if kind == xds.CLUSTER and is_discovered(n) and n not in bad}
        if fresh := wanting - self.has[xds.ENDPOINTS].keys():
            self.subscribe(xds.ENDPOINTS, *sorted(fresh))
        if wanting:
            self.warming.append((reply, wanting))
            return
        self.stream.on_request(reply)
        if kind == xds.ENDPOINTS:
            told = {*names, *response.removed_resources}
            waits = [(reply, wanting - told) for reply, wanting in self.warming]
            self.warming = [(reply, left) for reply, left in waits if left]
            for reply, left in waits:
                if not left:
                    self.stream.on_request(reply)
        if kind == xds.LISTENER and names:
            self.subscribe(xds.ROUTES, "public")
            self.subscribe(xds.EXTENSIONS, "access", "authentication")

    def unsubscribe(self, kind: str, name: str) -> None:
        request = discovery_pb2.DeltaDiscoveryRequest(type_url=kind, resource_names_unsubscribe=[name])
        self.stream.on_request(request)

    def take(self, snapshot: Snapshot) -> list[Any]:
        """All responses until nothing more comes, each answered."""
        taken: list[Any] = []
        while self.receive(snapshot) or self.outstanding:
            taken += self.outstanding[:1]
            self.answer()
        return taken

    @property
    def routed(self) -> set[str]:
        """The clusters that its routes name."""
        content = self.content.get((xds.ROUTES, "public"))
        return set(json.loads(StringValue.FromString(content).value)) if content else set()


def is_discovered(cluster: str) -> bool:
    return cluster.startswith(("tensor", "rest", "control", "limiter"))


def connected(snapshot: Snapshot) -> Envoy:
    envoy = Envoy()
    envoy.take(snapshot)
    return envoy


def test_a_new_envoy_gets_everything() -> None:
    state = made("a", "b")
    envoy = connected(state)
    for kind in (xds.CLUSTER, xds.ENDPOINTS, xds.LISTENER, xds.ROUTES):
        assert set(envoy.has[kind]) == set(state.resources[kind])
    assert set(envoy.plane.accepted.values()) == {state.version}
    assert envoy.plane.synced == state.version


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
    state = small({"a": 1})
    envoy = connected(state)
    envoy.log.clear()
    clusters = {"tensor/a/1": to_resource(StringValue(value="with other settings"))}
    envoy.take(replace(state, version="x", found={**state.found, xds.CLUSTER: clusters}))
    assert [kind for kind, added, _ in envoy.log if "tensor/a/1" in added] == [xds.CLUSTER, xds.ENDPOINTS]


def test_a_rejection_is_reported_and_not_repeated() -> None:
    envoy = connected(made("a"))
    state = made("a", "b")
    envoy.refuses = {xds.ROUTES}
    envoy.take(state)
    assert envoy.plane.last_rejection == "RouteConfiguration: no public"
    assert [(r.kind, r.name) for r in envoy.heard] == [("RouteConfiguration", "public")]
    assert envoy.plane.synced != state.version
    assert envoy.take(state) == []
    envoy.refuses = set()
    envoy.take(made("a", "b", "c"))
    assert envoy.plane.last_rejection == ""
    assert not envoy.plane.rejections


def test_one_bad_cluster_of_many_is_found_and_the_others_arrive() -> None:
    envoy = connected(small({}))
    envoy.refuses = {"tensor/m7/1"}
    state = small({f"m{n}": 1 for n in range(20)})
    envoy.take(state)
    assert [r.name for r in envoy.heard] == ["tensor/m7/1"]
    assert set(envoy.has[xds.CLUSTER]) == set(state.found[xds.CLUSTER]) - {"tensor/m7/1"}
    assert not envoy.routed  # they would name what is not there
    without = small({f"m{n}": 1 for n in range(20) if n != 7})
    envoy.take(without)
    assert envoy.routed == set(without.found[xds.CLUSTER])


def test_while_routes_are_refused_what_the_old_ones_name_stays() -> None:
    envoy = connected(small({"a": 1}))
    envoy.refuses = {xds.ROUTES}
    envoy.take(small({"b": 1}))
    assert "tensor/a/1" in envoy.has[xds.CLUSTER]
    envoy.refuses = set()
    envoy.take(small({"b": 2}))
    assert set(envoy.has[xds.CLUSTER]) == {"tensor/b/2"}


def test_endpoints_of_a_cluster_that_has_gone_meanwhile_are_answered() -> None:
    """Or Envoy would wait for them, and hold back the answer to all clusters."""
    envoy = connected(small({"a": 1}))
    envoy.receive(small({"a": 1, "b": 1}))
    envoy.take(small({"a": 1}))
    assert not envoy.warming
    assert set(envoy.has[xds.CLUSTER]) == {"tensor/a/1"}


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


def test_a_control_plane_that_is_behind_rolls_nobody_back() -> None:
    envoy = connected(small({"a": 2}, revision=20))
    envoy.connect()
    assert envoy.take(small({"a": 1}, revision=19)) == []
    assert envoy.plane.ahead
    assert envoy.take(small({"a": 2}, revision=21)) == []  # the same content needs no sending
    assert not envoy.plane.ahead
    assert envoy.plane.synced
    envoy.take(small({"a": 3}, revision=22))
    assert envoy.routed == {"tensor/a/3"}


def test_revisions_of_another_store_say_nothing() -> None:
    envoy = connected(small({"a": 2}, revision=20))
    envoy.connect()
    restored = small({"a": 1}, revision=3)
    object.__setattr__(restored, "at", Progress(3, "zyxwvuts"))
    envoy.take(restored)
    assert envoy.routed == {"tensor/a/1"}


def kinds(envoy: Envoy) -> list[str]:
    return [kind for kind, added, _ in envoy.log if added]


def test_runtime_values_of_routes_are_forgotten_after_the_routes() -> None:
    envoy = connected(small({"a": 1}))
    envoy.log.clear()
    envoy.take(small({"a": 2}))
    assert kinds(envoy) == [xds.CLUSTER, xds.ENDPOINTS, xds.ROUTES, xds.RUNTIME]


def test_while_routes_are_refused_their_runtime_values_stay() -> None:
    envoy = connected(small({"a": 1}))
    values = envoy.has[xds.RUNTIME]["shares"]
    envoy.refuses = {xds.ROUTES}
    envoy.take(small({"b": 2}))
    assert envoy.has[xds.RUNTIME]["shares"] == values
    envoy.refuses = set()
    envoy.take(small({"b": 3}))
    assert envoy.has[xds.RUNTIME]["shares"] != values


def test_an_envoy_that_comes_from_another_control_plane_keeps_its_values_until_it_has_routes() -> None:
    """It asks for runtime values first."""
    envoy = connected(small({"a": 1}))
    envoy.connect()
    stream = Stream(DataPlane("test"))
    request = discovery_pb2.DeltaDiscoveryRequest(type_url=xds.RUNTIME, resource_names_subscribe=["shares"])
    request.initial_resource_versions.update(envoy.has[xds.RUNTIME])
    stream.on_request(request)
    assert stream.responses(small({"a": 2})) == []
    envoy.log.clear()
    envoy.take(small({"a": 2}))
    assert kinds(envoy)[-2:] == [xds.ROUTES, xds.RUNTIME]


def test_a_new_envoy_gets_its_runtime_values_at_once_since_it_waits_for_them() -> None:
    stream = Stream(DataPlane("test"))
    stream.on_request(
        discovery_pb2.DeltaDiscoveryRequest(type_url=xds.RUNTIME, resource_names_subscribe=["shares"])
    )
    assert [r.type_url for r in stream.responses(small({"a": 1}))] == [xds.RUNTIME]


def test_an_envoy_without_runtime_values_is_noticed() -> None:
    envoy = Envoy(tunable=False)
    envoy.take(small({"a": 1}))
    assert not envoy.plane.tunable
    assert connected(small({"a": 1})).plane.tunable
    refusing = Envoy()
    refusing.refuses = {xds.RUNTIME}
    refusing.take(small({"a": 1}))
    assert not refusing.plane.tunable


class Told:
    """Hears of data planes what the control plane hears."""

    def __init__(self) -> None:
        self.all_tunable: list[bool] = []

    def tunable(self, all_are: bool) -> None:
        self.all_tunable.append(all_are)

    def accepted(self, kind: str, version: str) -> None:
        """Not looked at here."""


async def test_the_control_plane_is_told_while_an_envoy_takes_no_runtime_values() -> None:
    async def requests(*kinds: str) -> AsyncIterator[Any]:
        for kind in kinds:
            yield discovery_pb2.DeltaDiscoveryRequest(type_url=kind)

    snapshots, heard = Snapshots(), Told()
    await snapshots.publish(small({"a": 1}))
    ads: Any = Ads(snapshots, heard)  # type: ignore[arg-type]
    for kinds in ((xds.RUNTIME, xds.ROUTES), (xds.CLUSTER, xds.ROUTES)):
        async for _ in ads.DeltaAggregatedResources(requests(*kinds), None):
            pass
    # In the end none is connected.
    assert heard.all_tunable == [True, True, True, True, False, True]


class Exchange(RuleBasedStateMachine):
    """Changes, answers in any order, refusals, lost connections: whatever happens, no route names a cluster
    that Envoy does not have; and when it is quiet again, Envoy has it all."""

    @initialize(models=st.dictionaries(st.sampled_from("abc"), st.integers(1, 3)))
    def begin(self, models: dict[str, int]) -> None:
        self.models, self.revision = models, 1
        self.envoy = Envoy()

    @property
    def snapshot(self) -> Snapshot:
        """Without what Envoy refused: this is what becomes of it in a control plane."""
        bad = {r.name for r in self.envoy.heard}
        good = {name: g for name, g in self.models.items() if f"tensor/{name}/{g}" not in bad}
        return small(good, self.revision)

    @rule(models=st.dictionaries(st.sampled_from("abc"), st.integers(1, 3)))
    def change(self, models: dict[str, int]) -> None:
        self.models, self.revision = models, self.revision + 1

    @rule(name=st.sampled_from("abc"), generation=st.integers(1, 3))
    def poison(self, name: str, generation: int) -> None:
        self.envoy.refuses.add(f"tensor/{name}/{generation}")

    @rule()
    def receive(self) -> None:
        self.envoy.receive(self.snapshot)

    @precondition(lambda self: self.envoy.outstanding)
    @rule()
    def answer(self) -> None:
        self.envoy.answer()

    @rule()
    def reconnect(self) -> None:
        self.envoy.connect()

    @invariant()
    def routes_name_what_is_there(self) -> None:
        if hasattr(self, "envoy"):
            assert self.envoy.routed <= set(self.envoy.has[xds.CLUSTER])

    def teardown(self) -> None:
        if not hasattr(self, "envoy"):
            return
        while True:
            before = len(self.envoy.heard)
            self.envoy.take(self.snapshot)
            if len(self.envoy.heard) == before:
                break
        state = self.snapshot
        assert set(self.envoy.has[xds.CLUSTER]) == set(state.found[xds.CLUSTER])
        assert self.envoy.routed == set(state.found[xds.CLUSTER])
        assert not self.envoy.warming


TestExchange = Exchange.TestCase
TestExchange.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
