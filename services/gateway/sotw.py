"""State-of-the-world discovery, which is what gRPC's clients speak: each answer has all that was asked for of
one type (https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol#the-xds-transport-protocol)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from envoy.service.discovery.v3 import discovery_pb2

from services.gateway import xds
from services.gateway.ads import Snapshots, turns
from services.gateway.proxyless import Catalogue
from services.gateway.resources import Parser, Resource
from services.gateway.view import View

log = logging.getLogger(__name__)

KINDS = (xds.CLUSTER, xds.ENDPOINTS, xds.LISTENER, xds.ROUTES)


@dataclass
class _Subscription:
    names: frozenset[str] = frozenset()
    sent: str = ""  # the version that was sent last, for these names
    nonce: str = ""


@dataclass
class ClientStream:
    """The protocol with one client, without I/O: requests in, responses out."""

    node_id: str = ""
    _subscriptions: dict[str, _Subscription] = field(default_factory=dict)
    _nonce: int = 0

    def on_request(self, request: Any) -> None:
        self.node_id = request.node.id or self.node_id
        subscription = self._subscriptions.setdefault(request.type_url, _Subscription())
        if request.response_nonce and request.response_nonce != subscription.nonce:
            return  # it has not seen what was sent meanwhile
        names = frozenset(request.resource_names)
        if names != subscription.names:
            subscription.names, subscription.sent = names, ""
        if request.HasField("error_detail"):
            log.error(
                "client %s refuses %s: %s", self.node_id, request.type_url, request.error_detail.message
            )

    def responses(self, catalogue: Catalogue) -> list[Any]:
        """What has changed of what it asked for; clusters before the routes to them."""
        found = []
        for kind in KINDS:
            subscription = self._subscriptions.get(kind)
            if subscription is None or not subscription.names:
                continue
            resources = [
                made for name in sorted(subscription.names) if (made := catalogue.resource(kind, name))
            ]
            version = _version(resources)
            if version == subscription.sent:
                continue
            self._nonce += 1
            subscription.sent, subscription.nonce = version, str(self._nonce)
            response = discovery_pb2.DiscoveryResponse(
                type_url=kind, version_info=version, nonce=subscription.nonce
            )
            for resource in resources:
                response.resources.add(type_url=kind, value=resource.packed)
            found.append(response)
        return found


def _version(resources: list[Resource]) -> str:
    return hashlib.sha256(" ".join(r.version for r in resources).encode()).hexdigest()[:16]


class Clients:
    """Serves the clients; `view` gives the newest one. Nobody gets anything before there is a snapshot."""

    def __init__(self, snapshots: Snapshots, view: Callable[[], View]) -> None:
        self._snapshots = snapshots
        self._view = view
        self._parser = Parser()
        self._catalogue: tuple[View, Catalogue] | None = None
        self.connected = 0

    async def serve(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        stream = ClientStream()
        self.connected += 1
        try:
            async for request in turns(requests, self._snapshots):
                if request is not None:
                    stream.on_request(request)
                if self._snapshots.current is None:
                    continue
                for response in stream.responses(self._newest()):
                    yield response
        finally:
            self.connected -= 1

    def _newest(self) -> Catalogue:
        view = self._view()
        if self._catalogue is None or self._catalogue[0] is not view:
            self._parser.turn()
            self._catalogue = (view, Catalogue(view, self._parser))
        return self._catalogue[1]
