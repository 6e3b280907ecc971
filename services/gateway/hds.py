"""The health discovery service: tells every Envoy whom to ask, and hears what it finds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from functools import lru_cache
from typing import Any

from envoy.config.core.v3 import health_check_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2
from envoy.service.health.v3 import hds_pb2, hds_pb2_grpc
from google.protobuf.json_format import ParseDict

from services.core.interceptors import Context
from services.gateway.health import Findings, Report, checks, unhealthy
from services.gateway.view import View


class HealthDiscovery(hds_pb2_grpc.HealthDiscoveryServiceServicer):  # type: ignore[misc]
    """Sets `changed` whenever `unhealthy` is another."""

    def __init__(self, changed: asyncio.Event) -> None:
        self.changed = changed
        self._asked: tuple[tuple[str, ...], tuple[str, ...], bool] = ((), (), False)
        self._wanted: Any = specifier(checks(View((), ())))
        self._told: set[asyncio.Event] = set()
        self._findings: dict[int, Findings] = {}
        self.unhealthy: frozenset[str] = frozenset()

    @property
    def reports(self) -> int:
        """How many Envoys report."""
        return len(self._findings)

    def watch(self, view: View, *, secured: bool = False) -> None:
        """From now on the replicas of this view are asked."""
        asked = (view.texts, view.tritons, secured)
        if asked != self._asked:
            self._asked = asked
            self._wanted = specifier(checks(view, secured=secured))
            for told in self._told:
                told.set()

    async def StreamHealthCheck(
        self, request_iterator: AsyncIterator[Any], context: Context
    ) -> AsyncIterator[Any]:
        findings, told = Findings(), asyncio.Event()
        key = id(findings)
        self._told.add(told)
        listening = asyncio.ensure_future(self._listen(request_iterator, key, findings, told))
        try:
            while True:
                await told.wait()
                told.clear()
                if listening.done():
                    return
                yield self._wanted
        finally:
            listening.cancel()
            self._told.discard(told)
            self._findings.pop(key, None)
            self._compare()

    async def _listen(
        self, requests: AsyncIterator[Any], key: int, findings: Findings, told: asyncio.Event
    ) -> None:
        async for request in requests:
            if request.HasField("endpoint_health_response"):
                findings.hear(_report(request.endpoint_health_response))
                self._findings[key] = findings
                self._compare()
            else:
                told.set()
        told.set()

    def _compare(self) -> None:
        now = unhealthy(self._findings.values())
        if now != self.unhealthy:
            self.unhealthy = now
            self.changed.set()


def specifier(body: Mapping[str, Any]) -> Any:
    """What `checks` says as a message. A thousand addresses are parsed once, not whenever one is another."""
    made: Any = hds_pb2.HealthCheckSpecifier()
    asked = body["cluster_health_checks"]
    ParseDict({**body, "cluster_health_checks": [{**one, "locality_endpoints": []} for one in asked]}, made)
    for check, one in zip(made.cluster_health_checks, asked, strict=True):
        for locality in one["locality_endpoints"]:
            members = check.locality_endpoints.add().endpoints
            for member in locality["endpoints"]:
                at = member["address"]["socket_address"]
                members.append(_member(at["address"], at["port_value"]))
    return made


@lru_cache(maxsize=65_536)
def _member(host: str, port: int) -> Any:
    """Not to be changed."""
    made: Any = endpoint_components_pb2.Endpoint()
    made.address.socket_address.address, made.address.socket_address.port_value = host, port
    return made


def _report(response: Any) -> Report:
    found = {}
    for cluster in response.cluster_endpoints_health:
        for group in cluster.locality_endpoints_health:
            for member in group.endpoints_health:
                address = member.endpoint.address.socket_address
                host = f"[{address.address}]" if ":" in address.address else address.address
                healthy = member.health_status in (health_check_pb2.HEALTHY, health_check_pb2.UNKNOWN)
                found[f"{host}:{address.port_value}"] = healthy
    return found
