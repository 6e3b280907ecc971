"""From a view of the suite to everything Envoy has to know: one pure function.

Resources are written as the dictionaries that Envoy's documentation shows and parsed into its messages, so
that a misspelt field fails here and not in a data plane. Names of clusters carry model and version; a
cluster's configuration never changes, only its endpoints do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from services.gateway import clusters, filters, xds
from services.gateway.filters import versions
from services.gateway.listener import Entry, listener
from services.gateway.routes import routes
from services.gateway.view import View


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Resources by type URL and name, each with a version that is the digest of its content."""

    resources: Mapping[str, Mapping[str, Message]]
    versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    version: str = ""


def snapshot(view: View, entry: Entry) -> Snapshot:
    """Everything for one state of the suite. The same arguments give the same snapshot."""
    made = [clusters.fixed(clusters.CONTROL, entry.control)]
    made.append(clusters.limiter())
    members = [clusters.endpoints(clusters.LIMITER, view.limiters)]
    if entry.traces:
        made.append(clusters.fixed(clusters.TRACES, entry.traces))
    for cluster, addresses in _clusters(view):
        made.append(cluster)
        members.append(clusters.endpoints(cluster["name"], addresses, view.zones, view.unhealthy))
    found = {
        xds.CLUSTER: _named(xds.CLUSTER, "name", made),
        xds.ENDPOINTS: _named(xds.ENDPOINTS, "cluster_name", members),
        xds.SECRETS: {},
        xds.LISTENER: _named(xds.LISTENER, "name", [listener(entry)]),
        xds.EXTENSIONS: _named(xds.EXTENSIONS, "name", filters.extensions(view, entry)),
        xds.ROUTES: _named(xds.ROUTES, "name", [routes(view, entry.cors_origins)]),
    }
    versions = {kind: {name: _digest([m]) for name, m in named.items()} for kind, named in found.items()}
    return Snapshot(found, versions, _digest(m for named in found.values() for m in named.values()))


def _clusters(view: View) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Those whose endpoints come from the registry, with their addresses."""
    yield clusters.discovered(clusters.ANY_TRITON), view.tritons
    yield clusters.discovered(clusters.ANY_REST), view.rest
    shadows = {(model.name, model.shadow) for model in view.models if model.shadow and model.weights}
    for target in (*view.targets, *view.named):
        for name, addresses in clusters.backends(target).items():
            yield clusters.discovered(name, target.affinity), addresses
            if (target.model, target.version) in shadows:
                appending = versions.appending(target.version) if name.startswith("tensor/") else None
                yield clusters.shadow(name, appending), addresses


def _named(kind: str, key: str, bodies: Iterable[dict[str, Any]]) -> dict[str, Message]:
    return {body[key]: ParseDict(body, xds.MESSAGES[kind]()) for body in bodies}


def _digest(messages: Iterable[Message]) -> str:
    hasher = hashlib.sha256()
    for message in messages:
        hasher.update(message.SerializeToString(deterministic=True))
    return hasher.hexdigest()[:16]
