"""From the registry's state to Envoy's configuration: complete, consistent, and accepted by Envoy."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.local.layout import Layout
from deploy.local.parts import envoy
from services.core.access import RATES, Access, Client, Limits, SharedLimits
from services.core.discovery import FAILED, LOADING, READY, Hosted, Model, Replica, Version, VersionKey
from services.gateway import xds
from services.gateway.keys import KeyRing
from services.gateway.listener import Entry
from services.gateway.snapshot import Snapshot, snapshot
from services.gateway.splits import thresholds
from services.gateway.view import View, view
from tests.statics import as_dict, static

ENTRY = Entry("127.0.0.1:8080", "127.0.0.1:8081", {"keys": []}, "127.0.0.1:4317", metrics="127.0.0.1:4317")

names = st.sampled_from(["a", "b.c", "d-e_f"])


@st.composite
def registries(draw: st.DrawFn) -> tuple[list[Replica], list[Model]]:
    """Any state the registry can be in, dead replicas and missing traffic included."""
    models = []
    for name in draw(st.sets(names)):
        count = draw(st.integers(1, 3))
        task = draw(st.sampled_from(["generate", "embed", "tensor"]))
        versions = tuple(
            Version(VersionKey(name, n), "file:///x", "0", task, "python") for n in range(1, count + 1)
        )
        weighted = draw(st.lists(st.integers(1, count), unique=True, max_size=3))
        shares = {0: (), 1: (100,), 2: (90, 10), 3: (50, 30, 20)}[len(weighted)]
        aliases = draw(st.dictionaries(st.sampled_from(["stable", "canary"]), st.integers(1, count)))
        shadow = draw(st.sampled_from([0, *({*range(1, count + 1)} - {*weighted})]))
        traffic = tuple(zip(weighted, shares, strict=True))
        models.append(Model(name, versions, traffic, shadow=shadow, aliases=aliases))
    replicas = []
    for number in range(draw(st.integers(0, 3))):
        hosted = tuple(
            Hosted(v.key, draw(st.sampled_from([READY, LOADING, FAILED]))) for m in models for v in m.versions
        )
        protocols = {"grpc": 8083, "oip": 8001, "http": 8093}
        endpoints = {name: f"10.0.0.{number + 1}:{port}" for name, port in protocols.items()}
        replicas.append(Replica(f"r{number}", "inference", endpoints, hosted))
    return replicas, models


def lua_of(route: dict[str, Any]) -> dict[str, Any]:
    """What a route tells routing.lua."""
    found: dict[str, Any] = route.get("metadata", {}).get("filter_metadata", {})
    return dict(found.get("envoy.filters.http.lua", {}))


def routes_of(made: Snapshot, *, named: bool = False) -> list[dict[str, Any]]:
    """All routes, wherever they are in the matcher: those for who asks for a version, or the others."""

    def walk(node: Any) -> Iterator[dict[str, Any]]:
        if isinstance(node, dict):
            if "matcher_list" in node:  # by what asks for a version
                node = {"of": node["matcher_list" if named else "on_no_match"]}
            if node.get("@type", "").endswith("route.v3.Route"):
                yield node
            if node.get("@type", "").endswith("route.v3.RouteList"):
                yield from node["routes"]
            for value in node.values():
                yield from walk(value)
        if isinstance(node, list):
            for value in node:
                yield from walk(value)

    routes = list(walk(as_dict(made, xds.ROUTES)["public"]["virtual_hosts"][0]["matcher"]))
    return [r for r in routes if "route" in r] if named else routes


@settings(deadline=None, max_examples=25)
@given(registries())
def test_every_route_has_its_cluster_and_every_cluster_its_endpoints(
    state: tuple[list[Replica], list[Model]],
) -> None:
    made = snapshot(view(*state), ENTRY)
    clusters = made.resources[xds.CLUSTER]
    for route in (*routes_of(made), *routes_of(made, named=True)):
        if "route" in route:
            assert route["route"]["cluster"] in clusters
        for mirror in route.get("route", {}).get("request_mirror_policies", ()):
            assert mirror["cluster"] in clusters
    discovered = {name for name, c in clusters.items() if MessageToDict(c)["type"] == "EDS"}
    assert discovered == set(made.resources[xds.ENDPOINTS])


@settings(deadline=None, max_examples=25)
@given(registries())
def test_only_ready_replicas_of_versions_with_traffic_get_requests(
    state: tuple[list[Replica], list[Model]],
) -> None:
    replicas, models = state
    targets = {(t.model, t.version): t for t in view(replicas, models).targets}
    weighted = {(m.name, version): percent for m in models for version, percent in m.weights}
    able = {
        key: sorted(r.endpoints["oip"] for r in replicas if Hosted(VersionKey(*key), READY) in r.models)
        for key in weighted
    }
    for key, target in targets.items():
        assert target.percent == weighted[key]
        assert sorted(target.tensor_endpoints) == able[key]
    for model, version in weighted.keys() - targets.keys():  # it left its share to those that can answer
        assert not able[model, version]
        assert any(able[key] for key in targets if key[0] == model)


@settings(deadline=None, max_examples=25)
@given(registries())
def test_the_order_of_the_registry_does_not_matter(state: tuple[list[Replica], list[Model]]) -> None:
    replicas, models = state
    assert (
        snapshot(view(replicas, models), ENTRY).version
        == snapshot(view(replicas[::-1], models[::-1]), ENTRY).version
    )


def test_a_newer_version_without_traffic_pins_tensor_requests_to_the_one_that_has_it() -> None:
    versions = tuple(Version(VersionKey("m", n), "file:///x", "0", "tensor", "python") for n in (1, 2))
    for traffic, pin in ((1, "1"), (2, None)):
        made = snapshot(view([], [Model("m", versions, ((traffic, 100),))]), ENTRY)
        route = next(
            r for r in routes_of(made) if r.get("route", {}).get("cluster", "").startswith("tensor/m")
        )
        assert lua_of(route).get("pin") == pin


def test_a_split_compares_one_random_number_with_growing_sums() -> None:
    versions = tuple(Version(VersionKey("m", n), "file:///x", "0", "tensor", "python") for n in (1, 2, 3))
    made = snapshot(view([], [Model("m", versions, ((1, 50), (2, 30), (3, 20)))]), ENTRY)
    shares = [
        (r["route"]["cluster"], r["match"]["runtime_fraction"]["default_value"]["numerator"])
        for r in routes_of(made)
        if "runtime_fraction" in r["match"]
    ]
    # For single requests and for streams.
    assert shares == [("tensor/m/1", 500_000), ("tensor/m/2", 800_000), ("tensor/m/3", 1_000_000)] * 2


def test_a_version_without_replicas_leaves_its_share_to_the_others_on_every_path() -> None:
    versions = tuple(Version(VersionKey("m", n), "file:///x", "0", "generate", "x") for n in (1, 2))
    at = {"grpc": "10.0.0.1:1", "oip": "10.0.0.1:2", "http": "10.0.0.1:3"}
    replica = Replica("r", "inference", at, (Hosted(versions[0].key, READY),))
    made = snapshot(view([replica], [Model("m", versions, ((1, 50), (2, 50)))]), ENTRY)
    shared = [
        r["route"]["cluster"] for r in routes_of(made) if "/m/" in r.get("route", {}).get("cluster", "")
    ]
    assert {cluster.rpartition("/")[2] for cluster in shared} == {"1"}
    named = {r["route"]["cluster"] for r in routes_of(made, named=True)}
    assert "text/m/2" in named  # who asks for it is told that it is away


def test_rest_is_split_as_grpc_is_and_told_its_version() -> None:
    versions = tuple(Version(VersionKey("m", n), "file:///x", "0", "generate", "x") for n in (1, 2))
    made = snapshot(view([], [Model("m", versions, ((1, 90), (2, 10)))]), ENTRY)
    routes = [r for r in routes_of(made) if r.get("route", {}).get("cluster", "").startswith("rest/m/")]
    assert len(routes) == 6  # two versions on three paths
    for route in routes:
        version = route["route"]["cluster"].rpartition("/")[2]
        added = {h["header"]["key"]: h["header"]["value"] for h in route["request_headers_to_add"]}
        assert added == {"x-lingqu-model": "m", "x-lingqu-model-version": version}
        assert route["request_headers_to_remove"] == ["authorization"]
    shares = [r["match"]["runtime_fraction"]["default_value"]["numerator"] for r in routes]
    assert shares == [900_000, 1_000_000] * 3


@settings(deadline=None, max_examples=25)
@given(registries())
def test_who_asks_for_a_version_gets_that_one_or_none(state: tuple[list[Replica], list[Model]]) -> None:
    """Of a model with traffic: every version that is weighted, named, shadowing or ready somewhere."""
    replicas, models = state
    made = view(replicas, models)
    found = {(t.model, t.version) for t in (*made.targets, *made.named)}
    for model in models:
        ready = {
            h.key.version
            for r in replicas
            for h in r.models
            if h.state == READY and h.key.model == model.name
        }
        wanted = {v for v, _ in model.weights} | {*model.aliases.values()} | ({model.shadow} - {0}) | ready
        assert {v for m, v in found if m == model.name} == (wanted if model.weights else set())
    tree = as_dict(snapshot(made, ENTRY), xds.ROUTES)["public"]["virtual_hosts"][0]["matcher"]["matcher_tree"]
    tensor = tree["prefix_match_map"]["map"]["/inference.GRPCInferenceService/"]
    branches = tensor["matcher"]["matcher_tree"].get("exact_match_map", {"map": {}})["map"]
    assert set(branches) == {f'["{model.name}"]' for model in models if model.weights}
    for model in models:
        if model.weights:
            by_header, _ = branches[f'["{model.name}"]']["matcher"]["matcher_list"]["matchers"]
            asked = by_header["on_match"]["matcher"]["matcher_tree"]["exact_match_map"]["map"]
            chosen = {n: leaf["action"]["typed_config"]["route"]["cluster"] for n, leaf in asked.items()}
            assert chosen == {
                **{str(v): f"tensor/{m}/{v}" for m, v in found if m == model.name},
                **{name: f"tensor/{model.name}/{v}" for name, v in model.aliases.items()},
            }


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30))
def test_thresholds_grow_to_the_whole_and_give_each_its_share(percents: list[int]) -> None:
    found = thresholds(percents)
    assert found[-1] == 1_000_000
    shares = [b - a for a, b in zip([0, *found], found, strict=False)]
    for share, percent in zip(shares, percents, strict=True):
        assert abs(share - 1_000_000 * percent / sum(percents)) <= 1


def test_copies_go_to_the_shadow_and_say_so() -> None:
    versions = tuple(Version(VersionKey("m", n), "file:///x", "0", "generate", "x") for n in (1, 2))
    model = Model("m", versions, ((1, 100),), shadow=2, shadow_percent=25)
    made = snapshot(view([], [model]), ENTRY)
    mirrored = [r["route"] for r in routes_of(made) if "request_mirror_policies" in r.get("route", {})]
    assert len(mirrored) == 6  # text, tensors one by one and in streams, and three paths of REST
    for route in mirrored:
        (mirror,) = route["request_mirror_policies"]
        assert mirror["cluster"] == "shadow/" + route["cluster"].replace("/1", "/2")
        assert mirror["runtime_fraction"]["default_value"]["numerator"] == 250_000
        changes = [m["append"]["header"] for m in mirror["request_headers_mutations"]]
        assert {"key": "x-lingqu-model-version", "value": "2"} in changes
    assert not any("request_mirror_policies" in r.get("route", {}) for r in routes_of(made, named=True))


def test_json_is_read_only_where_rest_is_served() -> None:
    made = snapshot(view([], []), ENTRY)
    manager = as_dict(made, xds.LISTENER)["public"]["filter_chains"][0]["filters"][0]["typed_config"]
    reads = [f for f in manager["http_filters"] if f["name"].endswith("json_to_metadata")]
    assert [f.get("disabled") for f in reads] == [True]
    reading = "envoy.filters.http.json_to_metadata"
    on = [r["route"]["cluster"] for r in routes_of(made) if reading in r.get("typed_per_filter_config", {})]
    assert on == ["rest"] * 3


def test_what_browsers_and_json_need_is_off_unless_a_route_switches_it_on() -> None:
    made = snapshot(view([], []), ENTRY)
    manager = as_dict(made, xds.LISTENER)["public"]["filter_chains"][0]["filters"][0]["typed_config"]
    off = {f["name"].rpartition(".")[2] for f in manager["http_filters"] if f.get("disabled")}
    assert off >= {"grpc_web", "grpc_json_transcoder", "json_to_metadata", "health_check"}
    assert not any(f["name"].endswith(".cors") for f in manager["http_filters"])
    asked = replace(ENTRY, cors_origins=("https://app.example",))
    manager = as_dict(snapshot(view([], []), asked), xds.LISTENER)["public"]["filter_chains"][0]["filters"][0]
    # Browsers send no key when they ask what they may send.
    assert manager["typed_config"]["http_filters"][0]["name"] == "envoy.filters.http.cors"


def test_tensor_models_have_no_rest() -> None:
    version = Version(VersionKey("m", 1), "file:///x", "0", "tensor", "python")
    made = snapshot(view([], [Model("m", (version,), ((1, 100),))]), ENTRY)
    assert not any(name.startswith("rest/") for name in made.resources[xds.CLUSTER])


def test_endpoints_alone_change_when_a_replica_comes() -> None:
    version = Version(VersionKey("m", 1), "file:///x", "0", "embed", "onnxruntime")
    models = [Model("m", (version,), ((1, 100),))]
    replica = Replica(
        "r", "inference", {"grpc": "10.0.0.1:1", "oip": "10.0.0.1:2"}, (Hosted(version.key, READY),)
    )
    before, after = snapshot(view([], models), ENTRY), snapshot(view([replica], models), ENTRY)
    for kind in (xds.CLUSTER, xds.LISTENER, xds.ROUTES):
        assert before.versions[kind] == after.versions[kind]
    assert before.versions[xds.ENDPOINTS] != after.versions[xds.ENDPOINTS]


@pytest.mark.parametrize(
    ("traces", "weights"), [("", ((1, 100),)), ("127.0.0.1:4317", ((1, 100),)), ("", ((1, 90), (2, 10)))]
)
def test_envoy_accepts_a_snapshot(tmp_path: Path, traces: str, weights: tuple[tuple[int, int], ...]) -> None:
    """`envoy --mode validate`, with the snapshot as a static configuration."""
    versions = tuple(Version(VersionKey("m", n), "file:///x", "0", "generate", "x") for n in (1, 2))
    entry = Entry("127.0.0.1:0", "127.0.0.1:1", KeyRing.at(tmp_path / "key.pem").jwks(), traces)
    limits = Limits(5, 50, 2, local=RATES)
    client = Client("c", ("*",), limits, (("*", limits),))
    access = Access((client,), shared=(SharedLimits("m", limits),))
    shadow = 2 if len(weights) == 1 else 0
    models = [Model("m", versions, weights, shadow=shadow, aliases={"stable": 1})]
    made = snapshot(view([], models, access), entry)
    config = tmp_path / "envoy.json"
    config.write_text(json.dumps(static(made)))
    binary = envoy(Layout(tmp_path)).argv[0]
    checked = subprocess.run(
        [binary, "--mode", "validate", "-c", str(config)], capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, checked.stderr[-2000:]


def test_nothing_is_a_view_too() -> None:
    assert snapshot(View((), ()), ENTRY).version == snapshot(view([], []), ENTRY).version
