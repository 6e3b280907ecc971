"""The aggregated discovery service: gives every Envoy the newest snapshot, change by change.

Incremental xDS (https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol): only what changed is
sent. Additions go in the order of xds.ORDER; removals wait until all additions are accepted, so that no
route ever points at a cluster that is gone. A refused resource is reported and not sent again until it has
changed; Envoy goes on with the one it had.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2

from services.core.interceptors import Context
from services.gateway import xds
from services.gateway.snapshot import Snapshot

log = logging.getLogger(__name__)


@dataclass
class DataPlane:
    """What one connected Envoy has."""

    node_id: str
    accepted: dict[str, str] = field(default_factory=dict)
    last_rejection: str = ""
    synced: str = ""  # newest version of which it has accepted everything


class Snapshots:
    """The newest snapshot, for all streams."""

    def __init__(self) -> None:
        self._current: Snapshot | None = None
        self._published = asyncio.Condition()

    @property
    def current(self) -> Snapshot | None:
        return self._current

    async def publish(self, snapshot: Snapshot) -> None:
        async with self._published:
            self._current = snapshot
            self._published.notify_all()

    async def newer_than(self, version: str) -> Snapshot:
        """Wait for a snapshot of another version."""
        async with self._published:
            await self._published.wait_for(lambda: self._current and self._current.version != version)
            assert self._current is not None  # noqa: S101 - what was just waited for
            return self._current


@dataclass
class _Subscription:
    """One resource type on one stream."""

    wildcard: bool = False
    names: set[str] = field(default_factory=set)
    sent: dict[str, str] = field(default_factory=dict)
    awaited: str = ""  # nonce of the response not yet answered

    def wants(self, name: str) -> bool:
        return self.wildcard or name in self.names


class Stream:
    """The protocol with one Envoy, without I/O: requests in, responses out."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._subscriptions: dict[str, _Subscription] = {}
        self._versions: dict[str, str] = {}  # nonce → snapshot version
        self._nonce = 0

    def on_request(self, request: Any) -> None:
        first = request.type_url not in self._subscriptions
        subscription = self._subscriptions.setdefault(request.type_url, _Subscription())
        if first:
            # Envoy reconnects: what it still has from before need not be sent again.
            subscription.sent.update(request.initial_resource_versions)
            subscription.wildcard = not request.resource_names_subscribe
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
        if request.response_nonce and request.response_nonce == subscription.awaited:
            subscription.awaited = ""
            version = self._versions.pop(request.response_nonce, "")
            kind = request.type_url.rpartition(".")[2]
            if request.HasField("error_detail"):
                self._plane.last_rejection = f"{kind}: {request.error_detail.message}"
                log.error("Envoy %s refuses %s", self._plane.node_id, self._plane.last_rejection)
            else:
                self._plane.accepted[kind] = version
                if self._plane.last_rejection.startswith(f"{kind}:"):
                    self._plane.last_rejection = ""

    def responses(self, snapshot: Snapshot) -> list[Any]:
        """What may be sent now. Routes wait until the clusters they name are accepted and have endpoints.
        Endpoints wait for nothing: Envoy accepts clusters only when it has got them. Removals come last."""
        found: list[Any] = []
        for kind in xds.ORDER:
            subscription = self._subscriptions.get(kind)
            if subscription is None:
                continue
            if kind == xds.ROUTES and (found or self._awaits() or not self._warm(snapshot)):
                break
            if subscription.awaited:
                continue
            changed = [
                name
                for name, version in snapshot.versions[kind].items()
                if subscription.wants(name) and subscription.sent.get(name) != version
            ]
            if changed:
                found.append(self._response(kind, snapshot, changed, []))
        if not found and not self._awaits():
            for kind in reversed(xds.ORDER):
                subscription = self._subscriptions.get(kind)
                if subscription is None:
                    continue
                gone = [name for name in subscription.sent if name not in snapshot.versions[kind]]
                if gone:
                    found.append(self._response(kind, snapshot, [], gone))
                    break
            else:
                if not self._plane.last_rejection:
                    self._plane.synced = snapshot.version
        return found

    def _awaits(self) -> bool:
        """Whether an answer is due."""
        return any(s.awaited for s in self._subscriptions.values())

    def _warm(self, snapshot: Snapshot) -> bool:
        """Whether Envoy has the endpoints of all clusters: until then it would refuse requests to them."""
        endpoints = self._subscriptions.get(xds.ENDPOINTS)
        if endpoints is None or self._plane.last_rejection.startswith("Cluster:"):
            return True
        wanted = snapshot.versions[xds.ENDPOINTS]
        return all(endpoints.sent.get(name) == version for name, version in wanted.items())

    def _response(self, kind: str, snapshot: Snapshot, changed: list[str], gone: list[str]) -> Any:
        self._nonce += 1
        subscription = self._subscriptions[kind]
        subscription.awaited = str(self._nonce)
        self._versions[subscription.awaited] = snapshot.version
        response = discovery_pb2.DeltaDiscoveryResponse(
            type_url=kind, nonce=subscription.awaited, system_version_info=snapshot.version
        )
        for name in changed:
            version = snapshot.versions[kind][name]
            subscription.sent[name] = version
            resource = response.resources.add(name=name, version=version)
            resource.resource.Pack(snapshot.resources[kind][name])
        for name in gone:
            del subscription.sent[name]
            response.removed_resources.append(name)
        if kind == xds.CLUSTER and (members := self._subscriptions.get(xds.ENDPOINTS)):
            # A cluster that has changed waits for its endpoints as a new one does, and does not ask for them.
            for name in changed:
                members.sent.pop(name, None)
        return response


class Ads(ads_pb2_grpc.AggregatedDiscoveryServiceServicer):  # type: ignore[misc]
    """`planes` are the Envoys connected now."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots
        self.planes: dict[int, DataPlane] = {}

    async def DeltaAggregatedResources(
        self, request_iterator: AsyncIterator[Any], context: Context
    ) -> AsyncIterator[Any]:
        plane = DataPlane("")
        stream = Stream(plane)
        self.planes[id(plane)] = plane
        try:
            async for snapshot in self._turns(request_iterator, stream, plane):
                for response in stream.responses(snapshot):
                    yield response
        finally:
            self.planes.pop(id(plane), None)

    async def _turns(
        self, requests: AsyncIterator[Any], stream: Stream, plane: DataPlane
    ) -> AsyncIterator[Snapshot]:
        """The snapshot to look at, after every request and every change, until Envoy hangs up."""
        version = ""
        next_request: asyncio.Future[Any] = asyncio.ensure_future(anext(requests, None))
        next_snapshot = asyncio.ensure_future(self._snapshots.newer_than(version))
        try:
            while True:
                await asyncio.wait({next_request, next_snapshot}, return_when=asyncio.FIRST_COMPLETED)
                if next_request.done():
                    request = next_request.result()
                    if request is None:
                        return
                    plane.node_id = request.node.id or plane.node_id
                    stream.on_request(request)
                    next_request = asyncio.ensure_future(anext(requests, None))
                if next_snapshot.done():
                    version = next_snapshot.result().version
                    next_snapshot = asyncio.ensure_future(self._snapshots.newer_than(version))
                if self._snapshots.current is not None:
                    yield self._snapshots.current
        finally:
            next_request.cancel()
            next_snapshot.cancel()
