"""What reports of Envoys make of replicas, and how endpoints look from a zone."""

from __future__ import annotations

import pytest
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.service.health.v3 import hds_pb2
from google.protobuf.json_format import ParseDict
from hypothesis import given
from hypothesis import strategies as st

from services.core.discovery import Replica
from services.gateway.clusters import endpoints
from services.gateway.hds import specifier
from services.gateway.health import SILENCES, Findings, checks, unhealthy
from services.gateway.locality import near
from services.gateway.view import View, view

addresses = st.sampled_from(["a:1", "b:1", "c:1"])
reports = st.lists(st.dictionaries(addresses, st.booleans()), max_size=12)


def heard(found: list[dict[str, bool]]) -> Findings:
    made = Findings()
    for report in found:
        made.hear(report)
    return made


@given(reports)
def test_only_who_is_silent_in_report_after_report_is_left_out(found: list[dict[str, bool]]) -> None:
    made = heard(found)
    for address in ("a:1", "b:1", "c:1"):
        last = found[-SILENCES:]
        silent = len(last) == SILENCES and all(report.get(address) is False for report in last)
        assert (address in made.unhealthy) == silent


@given(st.lists(reports, max_size=4))
def test_a_replica_is_out_only_when_no_envoy_reaches_it(all_reports: list[list[dict[str, bool]]]) -> None:
    findings = [heard(found) for found in all_reports]
    out = unhealthy(findings)
    assert out <= {address for one in findings for address in one.unhealthy}
    for one in findings:
        assert out <= one.unhealthy


def test_nobody_is_out_while_nobody_reports() -> None:
    assert unhealthy([]) == frozenset()


def test_every_replica_is_asked_once_however_many_models_it_has() -> None:
    replicas = [
        Replica(f"r{n}", "inference", {"grpc": f"10.0.0.{n}:1", "oip": f"10.0.0.{n}:2"}) for n in (1, 2)
    ]
    made = checks(view(replicas, []))
    assert [len(c["locality_endpoints"][0]["endpoints"]) for c in made["cluster_health_checks"]] == [2, 2]
    assert checks(View((), ()))["cluster_health_checks"] == []


@pytest.mark.parametrize("secured", [False, True])
def test_what_envoys_are_told_is_what_has_to_be_asked(secured: bool) -> None:
    """It is put together of addresses that are remembered."""
    at = [{"grpc": f"10.0.0.{n}:1", "oip": f"[fe80::{n}]:2"} for n in (1, 2)]
    body = checks(view([Replica(f"r{n}", "inference", e) for n, e in enumerate(at)], []), secured=secured)
    assert specifier(body) == ParseDict(body, hds_pb2.HealthCheckSpecifier())
    assert specifier(checks(View((), ()))) == ParseDict({"interval": "1s"}, hds_pb2.HealthCheckSpecifier())


def test_a_silent_triton_takes_its_replica_with_it_and_a_silent_inference_what_it_serves() -> None:
    at = {"grpc": "10.0.0.1:1", "oip": "10.0.0.1:2", "http": "10.0.0.1:3"}
    replicas = [Replica("r", "inference", at)]
    assert view(replicas, [], unhealthy=["10.0.0.1:2"]).unhealthy == set(at.values())
    assert view(replicas, [], unhealthy=["10.0.0.1:1"]).unhealthy == {at["grpc"], at["http"]}
    assert view(replicas, [], unhealthy=["10.0.0.9:1"]).unhealthy == set()


@given(
    st.dictionaries(st.integers(1, 20), st.sampled_from(["", "a", "b", "c"])), st.sampled_from(["", "a", "b"])
)
def test_a_zone_comes_first_and_nobody_is_lost(found: dict[int, str], zone: str) -> None:
    zones = {f"10.0.0.{n}:1": name for n, name in found.items()}
    made = ParseDict(endpoints("m", zones, zones), endpoint_pb2.ClusterLoadAssignment())
    seen = endpoint_pb2.ClusterLoadAssignment.FromString(near(made.SerializeToString(), zone))
    priorities = {group.locality.zone: group.priority for group in seen.endpoints}
    assert sum(len(g.lb_endpoints) for g in seen.endpoints) == len(found)
    assert set(priorities) == set(found.values())
    if zone and zone in priorities:
        assert all((priority == 0) == (name == zone) for name, priority in priorities.items())
    else:
        assert set(priorities.values()) <= {0}  # Envoy wants the first priority to have members
