"""Dictionaries, as Envoy's documentation shows them, into its messages: checked, serialised, and remembered.

Most of a suite stays as it was when something changes, and parsing is what a snapshot's time goes into. So a
piece is parsed once for each value it has; without the memory the results are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from envoy.config.core.v3 import extension_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2
from google.protobuf.any_pb2 import Any as Any_
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import Message
from xds.type.matcher.v3 import matcher_pb2

from services.gateway.checks import inner_messages, unpacked, violations

M = TypeVar("M", bound=Message)
_Key = tuple[type[Message], bytes]


class Refused(Exception):
    """Envoy would refuse this; the text says why."""


@dataclass(frozen=True, slots=True)
class Resource:
    """`version` is the digest of the content, `packed` the message serialised, once for all data planes."""

    message: Message
    version: str
    packed: bytes


@dataclass(frozen=True, slots=True)
class _Known:
    """`parts`: what it was put together of, to be remembered as long as the whole."""

    value: Any
    parts: Sequence[_Key] = ()


class Parser:
    """Remembers what the last two builds asked for."""

    def __init__(self) -> None:
        self._recent: dict[_Key, _Known] = {}
        self._older: dict[_Key, _Known] = {}
        self._parts: list[_Key] = []
        self._same: dict[int, tuple[Any, Message]] = {}
        self._same_before: dict[int, tuple[Any, Message]] = {}

    def turn(self) -> None:
        """A build is complete: forget what it did not ask for."""
        self._older, self._recent = self._recent, {}
        if self._same:  # routes were put together
            self._same_before, self._same = self._same, {}

    def resource(self, kind: type[Message], body: Mapping[str, Any]) -> Resource:
        """Raises Refused."""
        key = (kind, orjson.dumps(body))
        known = self._known(key)
        if known is None:
            self._parts = []
            made = to_resource(self._put_together(kind, body))
            known = self._recent[key] = _Known(made, self._parts)
        return known.value  # type: ignore[no-any-return]

    def _piece(self, kind: type[M], body: Mapping[str, Any]) -> M:
        """A part of a resource; not to be changed. Raises Refused."""
        key = (kind, orjson.dumps(body))
        self._parts.append(key)
        known = self._known(key)
        if known is None:
            known = self._recent[key] = _Known(parsed(kind, body))
        return known.value  # type: ignore[no-any-return]

    def _known(self, key: _Key) -> _Known | None:
        found = self._recent.get(key)
        if found is None and (found := self._older.get(key)) is not None:
            self._recent[key] = found
            for part in found.parts:
                if part not in self._recent and part in self._older:
                    self._recent[part] = self._older[part]
        return found

    def _put_together(self, kind: type[Message], body: Mapping[str, Any]) -> Any:
        if kind is route_pb2.RouteConfiguration:
            return self._routes(body)
        if kind is endpoint_pb2.ClusterLoadAssignment:
            return self._members(body)
        if kind is extension_pb2.TypedExtensionConfig and "matcher" in body["typed_config"]:
            return self._access(body)
        return parsed(kind, body)

    def _members(self, body: Mapping[str, Any]) -> Any:
        made: Any = parsed(endpoint_pb2.ClusterLoadAssignment, {**body, "endpoints": []})
        for locality in body.get("endpoints", []):
            bare = {key: value for key, value in locality.items() if key != "lb_endpoints"}
            added = made.endpoints.add()
            added.CopyFrom(self._piece(endpoint_components_pb2.LocalityLbEndpoints, bare))
            for member in locality["lb_endpoints"]:
                added.lb_endpoints.append(self._piece(endpoint_components_pb2.LbEndpoint, member))
        return made

    def _access(self, body: Mapping[str, Any]) -> Any:
        """Allow-lists are one resource, too: of a thousand clients, one has changed."""
        config: Any = rbac_pb2.RBAC()
        self._matcher(body["typed_config"]["matcher"], config.matcher)
        made = extension_pb2.TypedExtensionConfig(name=body["name"])
        made.typed_config.type_url = body["typed_config"]["@type"]
        made.typed_config.value = config.SerializeToString(deterministic=True)
        return made

    def _routes(self, body: Mapping[str, Any]) -> Any:
        """All routes are one resource: it is put together of pieces, a branch of the tree each."""
        hosts = body.get("virtual_hosts", [])
        made: Any = parsed(route_pb2.RouteConfiguration, {**body, "virtual_hosts": []})
        for host in hosts:
            bare = {key: value for key, value in host.items() if key != "matcher"}
            added = made.virtual_hosts.add()
            added.CopyFrom(self._piece(route_components_pb2.VirtualHost, bare))
            if "matcher" in host:
                self._matcher(host["matcher"], added.matcher)
        return made

    def _matcher(self, body: Mapping[str, Any], made: Any) -> None:
        tree = body.get("matcher_tree", {})
        kind = next((k for k in ("exact_match_map", "prefix_match_map") if k in tree), "")
        if not kind:
            made.CopyFrom(self._piece(matcher_pb2.Matcher, body))
            return
        rest = {key: value for key, value in body.items() if key not in ("matcher_tree", "on_no_match")}
        made.CopyFrom(parsed(matcher_pb2.Matcher, rest, check=False))
        source = {key: value for key, value in tree.items() if key != kind}
        made.matcher_tree.CopyFrom(parsed(matcher_pb2.Matcher.MatcherTree, source, check=False))
        branches = getattr(made.matcher_tree, kind).map
        for key, branch in tree[kind]["map"].items():
            self._branch(branch, branches[key])
        if "on_no_match" in body:
            self._branch(body["on_no_match"], made.on_no_match)

    def _branch(self, body: Mapping[str, Any], made: Any) -> None:
        """The same dictionary as before, not an equal one, is what it was as a whole."""
        known = self._same.get(id(body)) or self._same_before.get(id(body))
        if known is None or known[0] is not body:
            if set(body) == {"matcher"}:
                self._matcher(body["matcher"], made.matcher)
            else:
                made.CopyFrom(self._piece(matcher_pb2.Matcher.OnMatch, body))
            whole = matcher_pb2.Matcher.OnMatch()
            whole.CopyFrom(made)
            known = (body, whole)
        else:
            made.CopyFrom(known[1])
        self._same[id(body)] = known


def to_resource(message: Message) -> Resource:
    packed = message.SerializeToString(deterministic=True)
    return Resource(message, hashlib.sha256(packed).hexdigest()[:16], packed)


def parsed(kind: type[M], body: Mapping[str, Any], *, check: bool = True) -> M:
    """Raises Refused, naming the field."""
    try:
        made = ParseDict(dict(body), kind())
    except (ParseError, ValueError, TypeError) as err:
        raise Refused(str(err)) from err
    _settle(made)
    if check and (wrong := next(violations(made), "")):
        raise Refused(wrong)
    return made


def _settle(message: Message) -> None:
    """Write what is in every Any in one and the same order: maps have another in each process, and with it a
    listener another digest, for which Envoy would replace it and in the end cut its streams."""
    for field, value in message.ListFields():
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            continue
        for _, inner in inner_messages(field, value):
            if isinstance(inner, Any_) and (content := unpacked(inner)) is not None:
                _settle(content)
                inner.value = content.SerializeToString(deterministic=True)
            else:
                _settle(inner)
