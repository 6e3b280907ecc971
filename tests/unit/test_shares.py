"""Releases as runtime values: what routes and values say together is what the registry says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.discovery import READY, Hosted, Model, Protection, Replica, Version, VersionKey
from services.gateway import xds
from services.gateway.listener import Entry
from services.gateway.snapshot import Builder, Snapshot
from services.gateway.view import View, view
from tests.unit.test_snapshot import routes_of

ENTRY = Entry("127.0.0.1:8080", "127.0.0.1:8081", {"keys": []})


def state(shares: dict[int, int], served: int = 2, **settings: Any) -> View:
    """A model m whose first `served` versions are ready, and one that has but one."""
    names = {"m": served, "other": 1}
    found = {
        n: tuple(Version(VersionKey(n, v + 1), "", "", "tensor", "x") for v in range(k))
        for n, k in names.items()
    }
    models = [
        Model("m", found["m"], tuple(shares.items()), **settings),
        Model("other", found["other"], ((1, 100),)),
    ]
    hosted = tuple(Hosted(version.key, READY) for versions in found.values() for version in versions)
    return view([Replica("r", "inference", {"oip": "10.0.0.1:1"}, hosted)], models)


def shared(made: Snapshot) -> dict[str, float]:
    """Of how many requests in a hundred that ask for no version m's get each, as Envoy would reckon."""
    values = MessageToDict(made.found[xds.RUNTIME]["shares"].message).get("layer", {})
    found: dict[str, float] = {}
    before = 0.0
    for route in routes_of(made):
        cluster = route.get("route", {}).get("cluster", "")
        if not cluster.startswith("tensor/m/") or cluster in found:
            continue
        drawn = route["match"].get("runtime_fraction", {})
        upto = values.get(drawn.get("runtime_key"), drawn.get("default_value", {"numerator": 1_000_000}))
        at = max(before, upto.get("numerator", 0) / 10_000)
        found[cluster], before = at - before, at
    return {cluster.rpartition("/")[2]: share for cluster, share in found.items() if share}


shares = st.integers(0, 100).map(lambda p: {v: s for v, s in ((1, p), (2, 100 - p)) if s})


@settings(max_examples=15, deadline=None)
@given(st.lists(shares, min_size=1, max_size=5))
def test_whatever_was_released_before_shares_are_those_of_the_registry(found: list[dict[int, int]]) -> None:
    builder = Builder()
    routes = set()
    for weights in found:
        made = builder.build(state(weights), ENTRY)
        assert shared(made) == {str(v): float(p) for v, p in weights.items()}
        routes.add(made.versions[xds.ROUTES]["public"])
    assert len(routes) == 1


def test_other_routes_have_other_keys_and_the_shares_of_now() -> None:
    builder = Builder()
    builder.build(state({1: 100}), ENTRY)
    released = builder.build(state({2: 100}), ENTRY)
    three = builder.build(state({2: 100}, served=3), ENTRY)
    assert three.versions[xds.ROUTES] != released.versions[xds.ROUTES]
    assert shared(three) == {"2": 100.0}
    assert not MessageToDict(three.found[xds.RUNTIME]["shares"].message).get("layer")

    def keys(made: Snapshot) -> set[str]:
        return {
            r["match"]["runtime_fraction"]["runtime_key"]
            for r in routes_of(made)
            if "runtime_fraction" in r["match"]
        }

    assert not keys(released) & keys(three)


@pytest.mark.parametrize(
    "protection", [Protection(fallback="other"), Protection()], ids=["falls back", "an open breaker"]
)
def test_what_changes_more_than_shares_is_said_by_routes(protection: Protection) -> None:
    builder = Builder()
    found = []
    for weights in ({1: 60, 2: 40}, {1: 20, 2: 80}):
        now = state(weights, protection=protection)
        if not protection.fallback:
            now = replace(
                now, targets=tuple(replace(t, admits=20) if t.version == 2 else t for t in now.targets)
            )
        made = builder.build(now, ENTRY)
        assert not MessageToDict(made.found[xds.RUNTIME]["shares"].message).get("layer")
        found.append(made.versions[xds.ROUTES]["public"])
    assert found[0] != found[1]


def test_while_an_envoy_takes_no_values_routes_say_all() -> None:
    builder = Builder()
    builder.build(state({1: 100}), ENTRY)
    builder.build(state({1: 10, 2: 90}), ENTRY)
    builder.tunes = False
    made = builder.build(state({1: 10, 2: 90}), ENTRY)
    assert shared(made) == {"1": 10.0, "2": 90.0}
    assert not MessageToDict(made.found[xds.RUNTIME]["shares"].message).get("layer")
    builder.tunes = True
    assert shared(builder.build(state({1: 10, 2: 90}), ENTRY)) == {"1": 10.0, "2": 90.0}
