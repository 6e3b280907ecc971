"""From names to versions, and what the registry says of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lingqu.registry.v1 import models_pb2
from services.core.discovery import Model, VersionKey
from services.core.errors import BackendUnavailable, InvalidInput, ModelNotFound, VersionNotServed
from services.core.records import to_model
from services.inference.routing import Routing
from tests.fakes import FakeText


def model() -> Model:
    """Two versions; the second takes the traffic and is marked."""
    record = models_pb2.Model(name="fake")
    for number in (1, 2):
        record.versions.add(model="fake", version=number)
    record.versions[1].labels["lingqu.cache"] = "shared"
    record.traffic.weights.add(version=2, percent=100)
    return to_model(record)


def test_labels_are_the_versions_own() -> None:
    routing = Routing(lambda: {"fake": model()}, {})
    assert routing.labels(VersionKey("fake", 2)) == {"lingqu.cache": "shared"}
    for key in (VersionKey("fake", 1), VersionKey("fake", 3), VersionKey("other", 2)):
        assert routing.labels(key) == {}
    assert Routing(lambda: None, {}).labels(VersionKey("fake", 2)) == {}


def test_the_gateways_version_goes_before_the_traffic() -> None:
    served = {VersionKey("fake", n): FakeText(VersionKey("fake", n)) for n in (1, 2)}
    routing = Routing(lambda: {"fake": model()}, served)
    assert routing.model("fake") is served[VersionKey("fake", 2)]
    assert routing.model("fake", "1") is served[VersionKey("fake", 1)]


def test_a_version_behind_the_name_counts_where_no_gateway_has_chosen() -> None:
    served = {VersionKey("fake", n): FakeText(VersionKey("fake", n)) for n in (1, 2)}
    routing = Routing(lambda: {"fake": replace(model(), aliases={"stable": 1})}, served)
    assert routing.model("fake@1") is routing.model("fake@stable") is served[VersionKey("fake", 1)]
    assert routing.model("fake@stable", "2") is served[VersionKey("fake", 2)]
    with pytest.raises(VersionNotServed):
        routing.model("fake@nightly")
    with pytest.raises(InvalidInput):
        routing.model("@1")


def test_what_is_not_there_is_said_precisely() -> None:
    routing = Routing(lambda: {"fake": model()}, {})
    for name, error in (("", InvalidInput), ("other", ModelNotFound), ("fake", BackendUnavailable)):
        with pytest.raises(error):
            routing.model(name)
    with pytest.raises(BackendUnavailable):
        Routing(lambda: None, {}).model("fake")
