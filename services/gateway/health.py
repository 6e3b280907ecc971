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
# Envoy's own threshold holds for what does not answer, not for what answers with an error, and a server that
# is late answers by itself that the time is over: so reports are counted, and each tells of the last check.
_CHECK = {
    "interval": "1s",
    "interval_jitter": "0.1s",
    "no_traffic_interval": "1s",
    "timeout": "0.75s",
    "unhealthy_threshold": 1,
    "healthy_threshold": 1,
}
# So many reports in a row, and a replica is left out. What Envoy has not asked yet it reports as unhealthy.
SILENCES = 3

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
    """What one Envoy has reported: in how many reports in a row an endpoint did not answer."""

    silent: dict[str, int] = field(default_factory=dict)

    def hear(self, report: Report) -> None:
        self.silent = {
            address: self.silent.get(address, 0) + 1 for address, answers in report.items() if not answers
        }

    @property
    def unhealthy(self) -> frozenset[str]:
        return frozenset(address for address, count in self.silent.items() if count >= SILENCES)


def unhealthy(findings: Iterable[Findings]) -> frozenset[str]:
    """What no Envoy reaches; nothing while none reports."""
    found = [one.unhealthy for one in findings]
    return frozenset.intersection(*found) if found else frozenset()
