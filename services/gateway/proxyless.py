"""What gRPC clients inside the cluster get that resolve `xds:///SERVICE/MODEL` by themselves and pass no
Envoy: a model's replicas, their health and zones, and the shares of its versions.

gRPC understands a part of what Envoy does (https://grpc.io/docs/guides/custom-load-balancing, gRFCs A27, A28,
A31, A32, A44, A50): no matcher trees, no filters of ours, no added headers. So there are resources of their
own, made when somebody asks for them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Any

from services.gateway import xds
from services.gateway.clusters import ADS, socket_address
from services.gateway.descriptors import TENSOR_SERVICE, TEXT_SERVICE
from services.gateway.headers import VERSION_HEADER
from services.gateway.resources import Parser, Refused, Resource
from services.gateway.view import Target, View

log = logging.getLogger(__name__)

MAX_REQUESTS = 4096  # of one client and one version, in progress
_RETRIES = {
    "retry_on": "unavailable,cancelled",
    "num_retries": 3,
    "retry_back_off": {"base_interval": "0.1s", "max_interval": "1s"},
}


class Catalogue:
    """The resources of one view, by type and name; those of versions are called "SERVICE/MODEL/VERSION"."""

    def __init__(self, view: View, parser: Parser) -> None:
        self._view = view
        self._parser = parser
        self._targets: dict[str, list[Target]] = {}
        for target in (*view.targets, *view.named):
            self._targets.setdefault(target.model, []).append(target)

    def resource(self, kind: str, name: str) -> Resource | None:
        """None if there is no such thing, or it would be refused."""
        makers: dict[str, Callable[[str, str, list[Target]], dict[str, Any] | None]] = {
            xds.LISTENER: _listener,
            xds.ROUTES: _routes,
            xds.CLUSTER: _cluster,
            xds.ENDPOINTS: self._endpoints,
        }
        service, _, rest = name.partition("/")
        model = rest.partition("/")[0]
        targets = self._targets.get(model, [])
        if service == TEXT_SERVICE:
            targets = [target for target in targets if target.task != "tensor"]
        if kind not in makers or service not in (TEXT_SERVICE, TENSOR_SERVICE) or not targets:
            return None
        body = makers[kind](name, service, targets)
        try:
            return None if body is None else self._parser.resource(xds.MESSAGES[kind], body)
        except Refused as err:
            log.error("nothing for clients of %s: %s", name, err)  # noqa: TRY400 - it says all
            return None

    def _endpoints(self, name: str, service: str, targets: list[Target]) -> dict[str, Any] | None:
        target = _version(name, targets)
        if target is None:
            return None
        addresses = target.text_endpoints if service == TEXT_SERVICE else target.tensor_endpoints

        def zone(address: str) -> str:
            return self._view.zones.get(address, "")

        def member(address: str) -> dict[str, Any]:
            made: dict[str, Any] = {"endpoint": {"address": socket_address(address)}}
            return {**made, "health_status": "UNHEALTHY"} if address in self._view.unhealthy else made

        grouped = itertools.groupby(sorted(addresses, key=zone), key=zone)
        groups = [(name, list(found)) for name, found in grouped]
        return {
            "cluster_name": name,
            "endpoints": [
                # gRPC shares by the weights of localities: each replica counts the same.
                {
                    "locality": {"zone": name or "any"},
                    "load_balancing_weight": len(found),
                    "lb_endpoints": [member(address) for address in found],
                }
                for name, found in groups
            ],
        }


def _version(name: str, targets: Iterable[Target]) -> Target | None:
    return next((t for t in targets if str(t.version) == name.rpartition("/")[2]), None)


def _listener(name: str, service: str, targets: list[Target]) -> dict[str, Any] | None:
    if name.count("/") != 1:
        return None
    router = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network."
        "http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "client",
        "rds": {"config_source": ADS, "route_config_name": name},
        "http_filters": [{"name": "router", "typed_config": {"@type": router}}],
    }
    return {"name": name, "api_listener": {"api_listener": manager}}


def _routes(name: str, service: str, targets: list[Target]) -> dict[str, Any] | None:
    """Whoever asks for a version by header gets it; the others are split by share."""
    if name.count("/") != 1:
        return None

    def route(match: dict[str, Any], to: dict[str, Any]) -> dict[str, Any]:
        return {"match": {"prefix": "", **match}, "route": {"timeout": "0s", "retry_policy": _RETRIES, **to}}

    asked = [
        route(
            {"headers": [{"name": VERSION_HEADER, "string_match": {"exact": str(target.version)}}]},
            {"cluster": f"{name}/{target.version}"},
        )
        for target in targets
    ]
    shares = [
        {"name": f"{name}/{target.version}", "weight": target.percent} for target in targets if target.percent
    ]
    split = [route({}, {"weighted_clusters": {"clusters": shares}})] if shares else []
    host = {"name": "all", "domains": ["*"], "routes": [*asked, *split]}
    return {"name": name, "virtual_hosts": [host]}


def _cluster(name: str, service: str, targets: list[Target]) -> dict[str, Any] | None:
    if _version(name, targets) is None:
        return None
    return {
        "name": name,
        "type": "EDS",
        "eds_cluster_config": {"eds_config": ADS},
        "lb_policy": "ROUND_ROBIN",
        "circuit_breakers": {"thresholds": [{"max_requests": MAX_REQUESTS}]},
        "outlier_detection": {
            "interval": "1s",
            "base_ejection_time": "2s",
            "max_ejection_percent": 50,
            "failure_percentage_threshold": 50,
            "enforcing_failure_percentage": 100,
            "failure_percentage_minimum_hosts": 2,
            "failure_percentage_request_volume": 5,
            "enforcing_success_rate": 0,
        },
    }
