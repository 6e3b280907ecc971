"""What an Envoy says of its endpoints: health, ejections, requests in progress. Its admin interface is on its
own loopback: only a control plane on the same machine can ask, and makes sure that it asks the right one."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 2.0
# Straight, whatever the environment says of proxies.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Condition:
    """An endpoint in one cluster of one Envoy. `ejected`: it failed, and is left out for a while."""

    healthy: bool
    ejected: bool
    in_progress: int


Conditions = Mapping[str, Mapping[str, Condition]]
"""By cluster, then by endpoint ("host:port")."""


async def conditions(node_id: str, admin: str) -> Conditions | None:
    """None if that Envoy is not to be reached there."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await asyncio.to_thread(_read, node_id, admin)
    except (OSError, ValueError, TimeoutError):
        return None


def _read(node_id: str, admin: str) -> Conditions | None:
    if _get(admin, "/server_info")["node"]["id"] != node_id:
        return None
    return parsed(_get(admin, "/clusters?format=json"))


def _get(admin: str, path: str) -> Any:
    with _OPENER.open(f"http://{admin}{path}", timeout=TIMEOUT_S) as answer:
        return json.load(answer)


def parsed(clusters: Mapping[str, Any]) -> Conditions:
    """What /clusters?format=json says."""
    found: dict[str, dict[str, Condition]] = {}
    for cluster in clusters.get("cluster_statuses", ()):
        members = found.setdefault(cluster["name"], {})
        for host in cluster.get("host_statuses", ()):
            at = host["address"]["socket_address"]
            name = f"[{at['address']}]" if ":" in at["address"] else at["address"]
            state = host.get("health_status", {})
            gauges = {stat["name"]: int(stat.get("value", 0)) for stat in host.get("stats", ())}
            members[f"{name}:{at['port_value']}"] = Condition(
                healthy=state.get("eds_health_status", "HEALTHY") in ("HEALTHY", "UNKNOWN")
                and not state.get("failed_active_health_check", False),
                ejected=bool(state.get("failed_outlier_check", False)),
                in_progress=gauges.get("rq_active", 0),
            )
    return found
