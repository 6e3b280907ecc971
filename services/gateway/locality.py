"""Endpoints as an Envoy in a zone is to see them: its own zone's first."""

from __future__ import annotations

from envoy.config.endpoint.v3 import endpoint_pb2


def near(packed: bytes, zone: str) -> bytes:
    """A serialised ClusterLoadAssignment in which the endpoints of other zones have the second priority:
    Envoy sends them what those of its own cannot take, a growing share once less than 71 % of them are
    healthy. As it is where no endpoint is in the zone, or nobody knows in which zone the Envoy is."""
    if not zone:
        return packed
    made = endpoint_pb2.ClusterLoadAssignment.FromString(packed)
    zones = {group.locality.zone for group in made.endpoints}
    if zone not in zones or len(zones) == 1:
        return packed
    for group in made.endpoints:
        group.priority = int(group.locality.zone != zone)
    return bytes(made.SerializeToString(deterministic=True))
