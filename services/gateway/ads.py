"""The aggregated discovery service: gives every Envoy the newest snapshot, change by change (deltas.py)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, Protocol

from envoy.service.discovery.v3 import ads_pb2_grpc

from services.core.errors import BackendUnavailable, NotFound, Unimplemented
from services.core.interceptors import Context
from services.gateway.deltas import DataPlane, Listener, Stream
from services.gateway.drains import Drains
from services.gateway.snapshot import Snapshot

# How long an Envoy stays with a control plane that knows less than it does, or nothing: another may know.
HOLD_S = 2.0
RECHECK_S = 0.5


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

    async def look_again(self) -> None:
        """Wake all streams: what one of them is told has changed."""
        if self._current is not None:
            await self.publish(replace(self._current))

    async def other_than(self, known: Snapshot | None) -> Snapshot:
        """Wait for another snapshot."""
        async with self._published:
            await self._published.wait_for(lambda: self._current is not None and self._current is not known)
            assert self._current is not None  # noqa: S101 - what was just waited for
            return self._current


class Clients(Protocol):
    """Whoever serves clients that are no Envoys."""

    def serve(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]: ...


class Ads(ads_pb2_grpc.AggregatedDiscoveryServiceServicer):  # type: ignore[misc]
    """`planes` are the Envoys connected now."""

    def __init__(
        self, snapshots: Snapshots, heard: Listener | None = None, clients: Clients | None = None
    ) -> None:
        self._snapshots = snapshots
        self._heard = heard
        self._clients = clients
        self.drains = Drains()
        self.planes: dict[int, DataPlane] = {}

    async def DeltaAggregatedResources(
        self, request_iterator: AsyncIterator[Any], context: Context
    ) -> AsyncIterator[Any]:
        plane = DataPlane("")
        stream = Stream(plane, self._heard)
        self.planes[id(plane)] = plane
        ignorant_since = 0.0

        def wait_s() -> float | None:
            if plane.ahead or self._snapshots.current is None:
                return RECHECK_S
            return self.drains.waits(plane.node_id)

        try:
            async for request in turns(request_iterator, self._snapshots, wait_s):
                if request is not None:
                    plane.introduced(request.node)
                    stream.on_request(request)
                    self._tell_tunable()
                if self._snapshots.current is not None:
                    told = self.drains.told(plane.node_id, self._snapshots.current)
                    for response in stream.responses(told):
                        yield response
                    if not plane.ahead:
                        ignorant_since = 0.0
                        continue
                    if self._heard is not None:
                        self._heard.behind()
                ignorant_since = ignorant_since or time.monotonic()
                if time.monotonic() - ignorant_since > HOLD_S:
                    raise BackendUnavailable("this control plane has not come as far as the data plane")
        finally:
            self.planes.pop(id(plane), None)
            self._tell_tunable()

    def _tell_tunable(self) -> None:
        if self._heard is not None:
            self._heard.tunable(all(plane.tunable for plane in self.planes.values()))

    async def drain(self, node_id: str, grace_s: float) -> None:
        """Have a data plane leave: its health fails now, its port closes in `grace_s`. Raises NotFound."""
        if all(plane.node_id != node_id for plane in self.planes.values()):
            raise NotFound(f'no Envoy "{node_id}" is connected to this control plane')
        self.drains.begin(node_id, grace_s)
        await self._snapshots.look_again()

    async def undo_drain(self, node_id: str) -> None:
        self.drains.undo(node_id)
        await self._snapshots.look_again()

    async def StreamAggregatedResources(
        self, request_iterator: AsyncIterator[Any], context: Context
    ) -> AsyncIterator[Any]:
        if self._clients is None:
            raise Unimplemented("there is incremental discovery only")
        async for response in self._clients.serve(request_iterator):
            yield response


async def turns(
    requests: AsyncIterator[Any], snapshots: Snapshots, wait_s: Callable[[], float | None] = lambda: None
) -> AsyncIterator[Any | None]:
    """Every request, and None whenever there is a new snapshot or nothing has come for `wait_s`, until the
    other side hangs up."""
    next_request: asyncio.Future[Any] = asyncio.ensure_future(anext(requests, None))
    next_snapshot = asyncio.ensure_future(snapshots.other_than(None))
    try:
        while True:
            await asyncio.wait(
                {next_request, next_snapshot}, timeout=wait_s(), return_when=asyncio.FIRST_COMPLETED
            )
            if next_snapshot.done():
                next_snapshot = asyncio.ensure_future(snapshots.other_than(next_snapshot.result()))
            if not next_request.done():
                yield None
                continue
            if (request := next_request.result()) is None:
                return
            next_request = asyncio.ensure_future(anext(requests, None))
            yield request
    finally:
        next_request.cancel()
        next_snapshot.cancel()
