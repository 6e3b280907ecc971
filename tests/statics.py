"""A snapshot as a configuration that needs no control plane: for `envoy --mode validate`, or to run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict

from services.gateway import xds
from services.gateway.snapshot import Snapshot


def as_dict(made: Snapshot, kind: str) -> dict[str, Any]:
    return {
        name: MessageToDict(message, preserving_proto_field_name=True)
        for name, message in made.resources[kind].items()
    }


def static(made: Snapshot) -> dict[str, Any]:
    """Envoy's bootstrap with all of the snapshot in it."""
    return static_of({kind: as_dict(made, kind) for kind in xds.MESSAGES})


def static_of(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The same of resources by type URL and name, which are changed."""
    listener = found[xds.LISTENER]["public"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    del manager["rds"]
    manager["route_config"] = found[xds.ROUTES]["public"]
    extensions = found[xds.EXTENSIONS]
    for each in manager["http_filters"]:
        if each.pop("config_discovery", None):
            each["typed_config"] = extensions[each["name"]]["typed_config"]
    clusters = []
    for cluster in found[xds.CLUSTER].values():
        if cluster["type"] == "EDS":
            del cluster["eds_cluster_config"]
            cluster |= {"type": "STATIC", "load_assignment": found[xds.ENDPOINTS][cluster["name"]]}
        clusters.append(cluster)
    resources = {"listeners": [listener], "clusters": clusters, "secrets": list(found[xds.SECRETS].values())}
    return {"static_resources": _named_secrets(resources)}


def _named_secrets(value: Any) -> Any:
    """Secrets are there, so that they need not be asked for."""
    if isinstance(value, list):
        return [_named_secrets(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _named_secrets(inner) for key, inner in value.items() if key != "sds_config"}
    return value
