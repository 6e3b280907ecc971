"""Data planes that are to go: first their health says so, so that nobody new is sent to them, then their port
closes, connections are told to go elsewhere, and what is in progress has Envoy's drain time to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from typing import Any

from google.protobuf.message import Message
from xds.type.matcher.v3 import matcher_pb2

from services.core.errors import BackendUnavailable
from services.gateway import xds
from services.gateway.descriptors import HEALTH_PREFIX
from services.gateway.resources import parsed, to_resource
from services.gateway.routes import ROUTES, local_reply
from services.gateway.snapshot import Snapshot
from services.gateway.splits import action


class State(IntEnum):
    """Of a data plane; the numbers are those of the API."""

    SERVING = 1
    LEAVING = 2  # its health fails, its port is open
    CLOSED = 3  # its port is closed


class Drains:
    """By node id, as long as this process lives: an Envoy that reconnects is still on its way out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._closes: dict[str, float] = {}
        self._made: tuple[Snapshot, dict[State, Snapshot]] | None = None

    def begin(self, node_id: str, grace_s: float) -> None:
        """Its health fails now, its port closes in `grace_s`."""
        self._closes.setdefault(node_id, self._clock() + grace_s)

    def undo(self, node_id: str) -> None:
        self._closes.pop(node_id, None)

    def state(self, node_id: str) -> State:
        closes = self._closes.get(node_id)
        if closes is None:
            return State.SERVING
        return State.LEAVING if self._clock() < closes else State.CLOSED

    def waits(self, node_id: str) -> float | None:
        """Seconds until the next state, if there is one."""
        if self.state(node_id) is not State.LEAVING:
            return None
        return max(0.0, self._closes[node_id] - self._clock())

    def told(self, node_id: str, snapshot: Snapshot) -> Snapshot:
        """What this data plane is told instead of the snapshot."""
        state = self.state(node_id)
        if state is State.SERVING:
            return snapshot
        if self._made is None or self._made[0] is not snapshot:
            self._made = (snapshot, {})
        made = self._made[1]
        if state not in made:
            made[state] = _leaving(snapshot) if state is State.LEAVING else _closed(snapshot)
        return made[state]


def _leaving(snapshot: Snapshot) -> Snapshot:
    """Health is answered by Envoy, and it is not well."""
    route = local_reply(BackendUnavailable("this gateway is going; others take its place"))
    answer = parsed(matcher_pb2.Matcher.OnMatch, action(route))
    known: Message = snapshot.found[xds.ROUTES][ROUTES].message
    made: Any = type(known)()
    made.CopyFrom(known)
    made.virtual_hosts[0].matcher.matcher_tree.prefix_match_map.map[HEALTH_PREFIX].CopyFrom(answer)
    routes = {ROUTES: to_resource(made)}
    return replace(
        snapshot, version=f"{snapshot.version}-leaving", found={**snapshot.found, xds.ROUTES: routes}
    )


def _closed(snapshot: Snapshot) -> Snapshot:
    leaving = _leaving(snapshot)
    return replace(leaving, version=f"{snapshot.version}-closed", found={**leaving.found, xds.LISTENER: {}})
