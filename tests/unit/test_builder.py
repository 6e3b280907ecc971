"""Snapshots one after the other: the same as if each were made anew, and what is bad of one model harms no
other."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.discovery import READY, Hosted, Model, Replica, Version, VersionKey
from services.gateway import xds
from services.gateway.checks import violations
from services.gateway.listener import Entry
from services.gateway.resources import Parser, Refused
from services.gateway.routes import routes
from services.gateway.snapshot import Builder, Snapshot, snapshot
from services.gateway.view import View, view
from tests.unit.test_snapshot import registries

ENTRY = Entry("127.0.0.1:8080", "127.0.0.1:8081", {"keys": []})
TOO_HIGH = {"socket_address": {"address": "a", "port_value": 70_000}}


def version(model: str, number: int = 1) -> Version:
    return Version(VersionKey(model, number), "file:///x", "0", "generate", "x")


def state(*names: str, shares: tuple[tuple[int, int], ...] = ((1, 100),)) -> View:
    """Models of two versions, of which those with a share are ready."""
    models = [Model(name, (version(name), version(name, 2)), shares) for name in names]
    hosted = tuple(Hosted(VersionKey(name, number), READY) for name in names for number, _ in shares)
    return view([Replica("r", "inference", {"grpc": "10.0.0.1:1"}, hosted)], models)


def models_of(made: Snapshot) -> set[str]:
    return {name.split("/")[1] for name in made.found[xds.CLUSTER] if "/" in name}


@settings(max_examples=10)
@given(st.lists(registries(), min_size=1, max_size=4))
def test_built_one_after_the_other_is_built_anew(states: list[tuple[list[Replica], list[Model]]]) -> None:
    builder = Builder()
    for replicas, models in [*states, *states]:
        now = view(replicas, models)
        assert builder.build(now, ENTRY) == snapshot(now, ENTRY)


@settings(max_examples=20)
@given(registries())
def test_routes_put_together_of_pieces_are_the_routes(state: tuple[list[Replica], list[Model]]) -> None:
    body = routes(view(*state))
    kind = xds.MESSAGES[xds.ROUTES]
    assert MessageToDict(Parser().resource(kind, body).message) == MessageToDict(ParseDict(body, kind()))


class _Picky(Parser):
    """Refuses whatever names one of some models, as Envoy's rules would."""

    def __init__(self, *models: str) -> None:
        super().__init__()
        self.models = models

    def resource(self, kind: Any, body: Any) -> Any:
        if any(body.get("name", "").split("/")[1:2] == [model] for model in self.models):
            raise Refused("that model")
        return super().resource(kind, body)


def test_a_model_that_would_be_refused_is_left_out_alone() -> None:
    builder = Builder()
    builder._parser = _Picky("bad", "worse")
    made = builder.build(state("a", "bad", "worse", "z"), ENTRY)
    assert models_of(made) == {"a", "z"}
    assert made.refused == {'model "bad"': "that model", 'model "worse"': "that model"}
    builder._parser.models = ()
    assert models_of(builder.build(state("a", "bad", "z", shares=((2, 100),)), ENTRY)) == {"a", "bad", "z"}


@pytest.mark.parametrize(
    "name", ["a b", "ü", "x" * 65, "x" * 10_240, "", "a/b", "a\n", "\x00", "a\x7f", "<invalid>", "../../x"]
)
def test_names_that_no_request_can_say_are_not_routed(name: str) -> None:
    models = [Model(name, (version(name),), ((1, 100),)), Model("good", (version("good"),), ((1, 100),))]
    assert models_of(snapshot(view([], models), ENTRY)) == {"good"}


ADDRESSES = ("localhost:1", "10.0.0.1", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:x", "::1:1]", "", ":1")


@pytest.mark.parametrize("address", [*ADDRESSES, "0.0.0.0:1"])
def test_addresses_that_envoy_would_refuse_are_left_out(address: str) -> None:
    one = version("m")
    replicas = [
        Replica(name, "inference", {"grpc": where, "oip": where}, (Hosted(one.key, READY),))
        for name, where in (("bad", address), ("good", "10.0.0.2:2"), ("six", "[fe80::1]:2"))
    ]
    (target,) = view(replicas, [Model("m", (one,), ((1, 100),))]).targets
    assert target.text_endpoints == ("10.0.0.2:2", "[fe80::1]:2")
    assert target.tensor_endpoints == target.text_endpoints


def test_a_cluster_that_envoy_has_refused_costs_its_model_the_change() -> None:
    builder = Builder()
    first = builder.build(state("a", "m"), ENTRY)
    builder.accepted("RouteConfiguration", first.versions[xds.ROUTES]["public"])
    changed = builder.build(state("a", "m", "new", shares=((2, 100),)), ENTRY)
    assert "text/m/2" in changed.found[xds.CLUSTER]
    assert builder.refused("Cluster", changed.versions[xds.CLUSTER]["text/m/2"], "no such thing")
    made = builder.build(state("a", "m", "new", shares=((2, 100),)), ENTRY)
    assert {"text/a/2", "text/m/1", "text/new/2"} <= made.found[xds.CLUSTER].keys()
    assert "text/m/2" not in made.found[xds.CLUSTER]
    assert made.refused == {'model "m"': "no such thing"}
    assert not builder.build(state("a", "m", "new"), ENTRY).refused


def test_a_model_of_which_all_has_been_refused_has_no_routes() -> None:
    """An Envoy of another release may refuse what the others have."""
    builder = Builder()
    made = builder.build(state("a", "m"), ENTRY)
    builder.accepted("RouteConfiguration", made.versions[xds.ROUTES]["public"])
    builder.refused("Cluster", made.versions[xds.CLUSTER]["text/m/1"], "no such thing")
    assert models_of(builder.build(state("a", "m", "new"), ENTRY)) == {"a", "new"}


def test_of_routes_that_envoy_refuses_the_model_is_found_that_is_to_blame() -> None:
    """Routes are one resource: the models that have changed are tried again, one at a time."""
    builder = Builder()

    def settle(view: View, poison: str) -> Snapshot:
        """As with an Envoy that refuses routes to that model's second version."""
        for _ in range(20):
            made = builder.build(view, ENTRY)
            version = made.versions[xds.ROUTES]["public"]
            content = made.found[xds.ROUTES]["public"].packed
            if poison.encode() in content:
                again = builder.refused("RouteConfiguration", version, "cannot be")
            else:
                again = builder.accepted("RouteConfiguration", version)
            if not again:
                return made
        raise AssertionError("it never settles")

    settle(state("a", "b", "c", "d"), poison="nothing")
    made = settle(state("a", "b", "c", "d", "e", shares=((2, 100),)), poison="text/c/2")
    assert made.refused == {'model "c"': "cannot be"}
    assert {"text/a/2", "text/b/2", "text/c/1", "text/d/2", "text/e/2"} <= made.found[xds.CLUSTER].keys()
    again = settle(state("a", "b", "c", "d", "e"), poison="nothing")
    assert not again.refused
    assert again.version == snapshot(state("a", "b", "c", "d", "e"), ENTRY).version


def test_a_taken_port_of_one_envoy_is_not_every_envoys() -> None:
    builder = Builder()
    made = builder.build(state("a"), ENTRY)
    assert not builder.refused("Listener", made.versions[xds.LISTENER]["public"], "cannot bind")
    assert builder.build(state("a", "b"), ENTRY).found[xds.LISTENER] == made.found[xds.LISTENER]


def test_what_is_wrong_with_a_filter_leaves_the_last_good_one(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = Builder()
    first = builder.build(state("a"), ENTRY)
    broken = [{"name": "authentication", "typed_config": {"@type": "type.googleapis.com/no.such.Message"}}]
    monkeypatch.setattr("services.gateway.snapshot.filters.extensions", lambda *_: broken)
    made = builder.build(state("a", "b"), ENTRY)
    assert models_of(made) == {"a", "b"}
    assert made.found[xds.EXTENSIONS]["authentication"] == first.found[xds.EXTENSIONS]["authentication"]
    assert list(made.refused) == ["TypedExtensionConfig authentication"]
    with pytest.raises(Refused):
        Builder().build(state("a"), ENTRY)


def alive(*addresses: str) -> View:
    """A model on each address."""
    models = [Model(f"m{n}", (version(f"m{n}"),), ((1, 100),)) for n in range(len(addresses))]
    replicas = [
        Replica(
            f"r{n}", "inference", {"grpc": address, "oip": address}, (Hosted(VersionKey(f"m{n}", 1), READY),)
        )
        for n, address in enumerate(addresses)
    ]
    return view(replicas, models)


def test_a_replica_that_moves_makes_nothing_of_the_others_anew() -> None:
    builder = Builder()
    before = builder.build(alive("10.0.0.1:1", "10.0.0.2:1"), ENTRY)
    after = builder.build(alive("10.0.0.1:1", "10.0.0.3:1"), ENTRY)
    assert after.found[xds.ROUTES]["public"] is before.found[xds.ROUTES]["public"]
    for kind in (xds.CLUSTER, xds.ENDPOINTS):
        anew = {n for n, made in after.found[kind].items() if made is not before.found[kind][n]}
        assert anew == ({"tensor", "text/m1/1", "tensor/m1/1"} if kind == xds.ENDPOINTS else set())


def test_endpoints_of_no_model_that_were_refused_are_told_until_they_change() -> None:
    builder = Builder()
    builder.build(alive("10.0.0.1:1"), ENTRY)
    moved = builder.build(alive("10.0.0.2:1"), ENTRY)
    builder.refused("ClusterLoadAssignment", moved.versions[xds.ENDPOINTS]["tensor"], "no such place")
    for _ in range(3):
        made = builder.build(alive("10.0.0.2:1"), ENTRY)
        assert made.refused == {"ClusterLoadAssignment tensor": "no such place"}
    again = builder.build(alive("10.0.0.3:1"), ENTRY)
    assert not again.refused
    assert again.version == snapshot(alive("10.0.0.3:1"), ENTRY).version


@pytest.mark.parametrize(
    ("kind", "body", "wrong"),
    [
        (xds.CLUSTER, {"name": ""}, "name: is 0 bytes long"),
        (xds.CLUSTER, {"name": "x", "connect_timeout": "0s"}, "connect_timeout: 0 s is out of range"),
        (xds.CLUSTER, {"name": "x", "lb_policy": 99}, "lb_policy: 99 is no known value"),
        (xds.ENDPOINTS, {"cluster_name": ""}, "cluster_name: is 0 bytes long"),
        (
            xds.ENDPOINTS,
            {"cluster_name": "x", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": TOO_HIGH}}]}]},
            "endpoints[0].lb_endpoints[0].endpoint.address.socket_address.port_value: 70000 is out of range",
        ),
        (xds.ROUTES, {"virtual_hosts": [{"name": "a"}]}, "virtual_hosts[0].domains: has 0 entries"),
        (
            xds.ROUTES,
            {
                "request_headers_to_add": [{"header": {"key": "a\nb", "value": "c"}}],
            },
            "request_headers_to_add[0].header.key: 'a\\nb' is malformed",
        ),
        (xds.EXTENSIONS, {"name": "x"}, "typed_config: is required"),
    ],
)  # fmt: skip
def test_rules_of_envoys_messages(kind: str, body: dict[str, Any], wrong: str) -> None:
    found = list(violations(ParseDict(body, xds.MESSAGES[kind]())))
    assert any(wrong.replace("entries", "") in text for text in found), found


def test_our_own_configuration_breaks_no_rule() -> None:
    made = snapshot(state("a", "b", shares=((1, 90), (2, 10))), ENTRY)
    for named in made.resources.values():
        for message in named.values():
            assert list(violations(message)) == []


def test_a_process_started_again_says_the_same() -> None:
    """Or Envoy would replace its listener, and in the end cut the streams of the one before."""
    script = (
        "from tests.unit.test_builder import ENTRY, state\n"
        "from services.gateway.snapshot import snapshot\n"
        "print(snapshot(state('a', 'b', shares=((1, 90), (2, 10))), ENTRY).version)"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        for _ in range(2)
    }
    assert told == {snapshot(state("a", "b", shares=((1, 90), (2, 10))), ENTRY).version + "\n"}
