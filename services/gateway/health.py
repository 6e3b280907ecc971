"""Which replicas answer, as the Envoys find by asking them: a pure function of their reports.

Each Envoy asks each replica once, whatever the number of models on it, and reports (health discovery,
https://www.envoyproxy.io/docs/envoy/latest/api-v3/service/health/v3/hds.proto). What the registry says is
believed first: a report only takes away. A replica is left out when every Envoy that reports says that it
does not answer: what one alone cannot reach, it leaves out by itself (outlier detection).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from services.gateway.clusters import socket_address
from services.gateway.descriptors import TEXT_SERVICE
from services.gateway.secrets import between_parts
from services.gateway.view import View

REPORT_S = 1
# A hang is found within 2 s + 3 × 1 s + 2 × 0.5 s; who says itself that it does not serve, at once.
_CHECK = {
    "interval": "2s",
    "interval_jitter": "0.2s",
    "no_traffic_interval": "2s",
    "timeout": "1s",
    "unhealthy_threshold": 3,
    "healthy_threshold": 2,
    "unhealthy_edge_interval": "0.5s",
    "healthy_edge_interval": "0.5s",
}
# Envoy reports what it has not asked yet as unhealthy: so many reports do not count.
SETTLING = 4

_SECURED = {"name": "parts", "match": {}, "transport_socket": between_parts("h2")}

Report = Mapping[str, bool]
"""Whether an endpoint ("host:port") answers."""


def checks(view: View, *, secured: bool = False) -> dict[str, Any]:
    """A HealthCheckSpecifier: every inference and every Triton by its own health service. `secured`: as the
    parts of a suite talk to each other there."""
    asked = {"inference": (view.texts, TEXT_SERVICE), "triton": (view.tritons, "")}
    return {
        "interval": f"{REPORT_S}s",
        "cluster_health_checks": [
            {
                "cluster_name": name,
                "health_checks": [{**_CHECK, "grpc_health_check": {"service_name": service}}],
                "locality_endpoints": [{"endpoints": [{"address": socket_address(a)} for a in addresses]}],
                **({"transport_socket_matches": [_SECURED]} if secured else {}),
            }
            for name, (addresses, service) in asked.items()
            if addresses
        ],
    }


@dataclass
class Findings:
    """What one Envoy has reported so far."""

    answering: set[str] = field(default_factory=set)
    silent: dict[str, int] = field(default_factory=dict)
    """Reports in a row in which an endpoint did not answer; those that never did count from SETTLING on."""

    def hear(self, report: Report) -> None:
        self.answering &= report.keys()
        silent = {}
        for address, answers in report.items():
            if answers:
                self.answering.add(address)
            else:
                silent[address] = self.silent.get(address, 0) + (SETTLING if address in self.answering else 1)
        self.silent = silent

    @property
    def unhealthy(self) -> frozenset[str]:
        return frozenset(address for address, count in self.silent.items() if count >= SETTLING)


def unhealthy(findings: Iterable[Findings]) -> frozenset[str]:
    """What no Envoy reaches; nothing while none reports."""
    found = [one.unhealthy for one in findings]
    return frozenset.intersection(*found) if found else frozenset()
