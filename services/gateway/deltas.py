"""Incremental xDS with one Envoy, without I/O (https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol).

Only what changed is sent. Additions go in the order of xds.ORDER; removals wait until all additions are
accepted, so that no route ever points at a cluster that is gone. Of what is refused together, each half is
tried again by itself, until it is known which resource it is: that one is reported and not sent again until
it has changed, Envoy goes on with the one it had, and the others arrive.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from envoy.service.discovery.v3 import discovery_pb2

from services.gateway import xds
from services.gateway.locality import near
from services.gateway.progress import NOTHING, label, parsed
from services.gateway.snapshot import Snapshot

log = logging.getLogger(__name__)

_UNKNOWN = "?"  # the version of what was refused with others: Envoy may have it or not


@dataclass(frozen=True, slots=True)
class Rejection:
    """A resource that an Envoy has refused. `kind` is the message's name, `at` in seconds since 1970."""

    kind: str
    name: str
    version: str
    message: str
    at: float


@dataclass
class DataPlane:
    """What one connected Envoy has."""

    node_id: str
    accepted: dict[str, str] = field(default_factory=dict)
    last_rejection: str = ""
    synced: str = ""  # newest version of which it has accepted everything
    rejections: dict[tuple[str, str], Rejection] = field(default_factory=dict)
    ahead: bool = False  # it has seen more of the registry than we have
    tunable: bool = True  # it takes runtime values, which routes rely on
    zone: str = ""
    admin: str = ""  # "host:port" of its admin interface, on its own machine

    def introduced(self, node: Any) -> None:
        """It says who it is in its first request only."""
        self.node_id = node.id or self.node_id
        self.zone = node.locality.zone or self.zone
        self.admin = node.metadata.fields["admin"].string_value if node.id else self.admin


class Listener(Protocol):
    """Hears what data planes say of what they were sent."""

    def nack(self, kind: str) -> None:
        """A response was refused."""

    def refused(self, rejection: Rejection) -> None:
        """It is this resource."""

    def accepted(self, kind: str, version: str) -> None:
        """The resource with this version was accepted."""

    def behind(self) -> None:
        """A data plane has seen more of the registry than the snapshot shows."""

    def tunable(self, all_are: bool) -> None:
        """Whether all data planes take runtime values."""


@dataclass
class _Subscription:
    """One resource type on one stream. Versions are digests; "" of a name in `sent`: Envoy was told that
    there is no such resource."""

    wildcard: bool = False
    names: set[str] = field(default_factory=set)
    sent: dict[str, str] = field(default_factory=dict)
    has: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    awaited: str = ""  # nonce of the response not yet answered
    in_flight: list[str] = field(default_factory=list)
    suspects: list[list[str]] = field(default_factory=list)  # groups to be sent by themselves

    def wants(self, name: str) -> bool:
        return self.wildcard or name in self.names

    def changed(self, named: Any) -> list[str]:
        return [
            name for name, resource in named.items()
            if self.sent.get(name) != resource.version and self.wants(name)
        ]  # fmt: skip


class Stream:
    """The protocol with one Envoy, without I/O: requests in, responses out."""

    def __init__(self, plane: DataPlane, heard: Listener | None = None) -> None:
        self._plane = plane
        self._heard = heard
        self._subscriptions: dict[str, _Subscription] = {}
        self._versions: dict[str, str] = {}  # nonce → snapshot version
        self._nonce = 0
        self._seen = NOTHING

    def on_request(self, request: Any) -> None:
        first = request.type_url not in self._subscriptions
        subscription = self._subscriptions.setdefault(request.type_url, _Subscription())
        if first:
            # Envoy reconnects: what it still has from before need not be sent again.
            for name, version in request.initial_resource_versions.items():
                subscription.sent[name], progress = parsed(version)
                self._seen = max(self._seen, progress)
            subscription.has |= subscription.sent.keys()
            subscription.wildcard = not request.resource_names_subscribe
            if request.type_url == xds.ROUTES and xds.RUNTIME not in self._subscriptions:
                self._plane.tunable = False  # its bootstrap is that of an earlier release
        for name in request.resource_names_subscribe:
            if name == "*":
                subscription.wildcard = True
            else:
                subscription.names.add(name)
                if not first:
                    subscription.sent.pop(name, None)  # asked again: answered again
        for name in request.resource_names_unsubscribe:
            subscription.names.discard(name)
            subscription.sent.pop(name, None)
            subscription.has.discard(name)
        if request.response_nonce and request.response_nonce == subscription.awaited:
            self._answered(request, subscription)

    def _answered(self, request: Any, subscription: _Subscription) -> None:
        subscription.awaited = ""
        version = self._versions.pop(request.response_nonce, "")
        kind = request.type_url.rpartition(".")[2]
        names, subscription.in_flight = subscription.in_flight, []
        if not request.HasField("error_detail"):
            self._plane.accepted[kind] = version
            if self._heard is not None and request.type_url == xds.ROUTES:
                for name in names:
                    self._heard.accepted(kind, subscription.sent.get(name, ""))
            subscription.has |= {name for name in names if subscription.sent.get(name)}
            for name in names:
                subscription.refused.pop(name, None)
                self._plane.rejections.pop((kind, name), None)
            if not any(of == kind for of, _ in self._plane.rejections) and not subscription.suspects:
                self._forget_rejection(kind)
            return
        if request.type_url == xds.RUNTIME:
            self._plane.tunable = False  # routes have to say what it does not hear
        self._plane.last_rejection = f"{kind}: {request.error_detail.message}"
        if self._heard is not None:
            self._heard.nack(kind)
        if len(names) > 1:
            for name in names:
                subscription.sent[name] = _UNKNOWN
            half = len(names) // 2
            subscription.suspects += [names[:half], names[half:]]
            return
        for name in names:
            subscription.refused[name] = subscription.sent.get(name, "")
            rejection = Rejection(
                kind, name, subscription.refused[name], request.error_detail.message, time.time()
            )
            self._plane.rejections[kind, name] = rejection
            log.error(
                "Envoy %s refuses %s %s: %s", self._plane.node_id, kind, name, request.error_detail.message
            )
            if self._heard is not None:
                self._heard.refused(rejection)

    def _forget_rejection(self, kind: str) -> None:
        if self._plane.last_rejection.startswith(f"{kind}:"):
            left = list(self._plane.rejections.values())
            self._plane.last_rejection = f"{left[-1].kind}: {left[-1].message}" if left else ""

    def responses(self, snapshot: Snapshot) -> list[Any]:
        """What may be sent now. Routes wait until the clusters they name are accepted and have endpoints.
        Endpoints wait for nothing: Envoy accepts clusters only when it has got them. Removals come last."""
        self._plane.ahead = self._seen.is_beyond(snapshot.at)
        if self._plane.ahead:
            return []
        found: list[Any] = []
        for kind in xds.ORDER:
            subscription = self._subscriptions.get(kind)
            if subscription is None:
                continue
            if kind == xds.ROUTES and (found or self._awaits() or not self._warm(snapshot)):
                break
            if subscription.awaited or (kind == xds.RUNTIME and self._routes_are_due(snapshot)):
                continue
            named = snapshot.found[kind]
            changed = subscription.changed(named)
            while subscription.suspects:
                group = [name for name in subscription.suspects.pop(0) if name in named]
                if group:
                    changed = group
                    break
            absent = self._absent(kind, subscription, snapshot)
            if changed or absent:
                found.append(self._response(kind, snapshot, changed, absent))
        if not found and not self._awaits():
            found += self._removal(snapshot)
        return found

    def _routes_are_due(self, snapshot: Snapshot) -> bool:
        """Whether Envoy has other routes than these: it still needs the runtime values for those. An Envoy
        that has values from before will ask for its routes next."""
        routes = self._subscriptions.get(xds.ROUTES)
        if routes is None:
            return bool(self._subscriptions[xds.RUNTIME].sent)
        return bool(routes.awaited or routes.refused or routes.changed(snapshot.found[xds.ROUTES]))

    def _removal(self, snapshot: Snapshot) -> list[Any]:
        """The next kind of which something has to go. While Envoy keeps routes that it was to replace, what
        they name has to stay."""
        routes = self._subscriptions.get(xds.ROUTES)
        if routes is not None and (routes.refused or routes.changed(snapshot.found[xds.ROUTES])):
            return []
        for kind in reversed(xds.ORDER):
            subscription = self._subscriptions.get(kind)
            if subscription is None:
                continue
            named = snapshot.found[kind]
            gone = [name for name, version in subscription.sent.items() if version and name not in named]
            if gone:
                return [self._response(kind, snapshot, [], gone)]
        if not self._plane.rejections:
            self._plane.synced = snapshot.version
        return []

    def _awaits(self) -> bool:
        """Whether an answer is due."""
        return any(s.awaited or s.suspects for s in self._subscriptions.values())

    def _warm(self, snapshot: Snapshot) -> bool:
        """Whether Envoy has all clusters and their endpoints: until then it would refuse requests to them."""
        clusters, endpoints = (self._subscriptions.get(kind) for kind in (xds.CLUSTER, xds.ENDPOINTS))
        if clusters is not None and not snapshot.found[xds.CLUSTER].keys() <= clusters.has:
            return False
        if endpoints is None:
            return True
        named = snapshot.found[xds.ENDPOINTS]
        return all(endpoints.sent.get(name) == resource.version for name, resource in named.items())

    def _absent(self, kind: str, subscription: _Subscription, snapshot: Snapshot) -> list[str]:
        """Endpoints it asks for in vain: Envoy would wait for them, and with them for all clusters."""
        if kind != xds.ENDPOINTS:
            return []
        named = snapshot.found[kind]
        return [name for name in subscription.names if name not in named and name not in subscription.sent]

    def _response(self, kind: str, snapshot: Snapshot, changed: list[str], gone: list[str]) -> Any:
        self._nonce += 1
        subscription = self._subscriptions[kind]
        subscription.awaited = str(self._nonce)
        subscription.in_flight = changed
        self._versions[subscription.awaited] = snapshot.version
        response = discovery_pb2.DeltaDiscoveryResponse(
            type_url=kind, nonce=subscription.awaited, system_version_info=snapshot.version
        )
        for name in changed:
            resource = snapshot.found[kind][name]
            subscription.sent[name] = resource.version
            sent = response.resources.add(name=name, version=label(resource.version, snapshot.at))
            packed = near(resource.packed, self._plane.zone) if kind == xds.ENDPOINTS else resource.packed
            sent.resource.type_url, sent.resource.value = kind, packed
        for name in gone:
            if subscription.wants(name) and name in subscription.names:
                subscription.sent[name] = ""
            else:
                subscription.sent.pop(name, None)
            subscription.has.discard(name)
            subscription.refused.pop(name, None)
            self._plane.rejections.pop((kind.rpartition(".")[2], name), None)
            response.removed_resources.append(name)
        if kind == xds.CLUSTER and (members := self._subscriptions.get(xds.ENDPOINTS)):
            # A cluster that has changed waits for its endpoints as a new one does, and does not ask for them.
            for name in changed:
                members.sent.pop(name, None)
        return response
