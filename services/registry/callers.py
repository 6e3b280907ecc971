"""Who calls the registry: keys that are revoked, or whose client is disabled, do not count."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lingqu.registry.v1 import access_pb2
from services.core.errors import ClientDisabled, KeyRevoked
from services.core.identity import Caller, Callers
from services.registry.keyspace import CLIENTS, REVOKED
from services.registry.mirror import Mirror


class AdmittedCallers(Callers):
    """Callers by a key set, less those that the registry's own records refuse. While etcd is away the last
    known records count."""

    def __init__(self, jwks: Path | None, mirror: Mirror) -> None:
        super().__init__(jwks)
        self._mirror = mirror

    def of(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> Caller:
        """Raises Unauthenticated, or KeyRevoked or ClientDisabled, which are two of its kinds."""
        caller = super().of(metadata)
        if caller.key_id and self._mirror.get(REVOKED + caller.key_id) is not None:
            raise KeyRevoked(f'the key {caller.key_id} of client "{caller.client}" is revoked')
        record = self._mirror.get(CLIENTS + caller.client) if caller.client else None
        if record is not None and access_pb2.Client.FromString(record.value).disabled:
            raise ClientDisabled(f'client "{caller.client}" is disabled')
        return caller
