"""Writing governance records: one transaction, visible to the writer's next read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from services.core.errors import Conflict, LingquError, Restoring
from services.registry.etcd import Etcd, Put, Unchanged
from services.registry.keyspace import RESTORING
from services.registry.mirror import Mirror


class Commits:
    """All or nothing, and nothing while a restore is in progress."""

    def __init__(self, etcd: Etcd, mirror: Mirror) -> None:
        self._etcd = etcd
        self._mirror = mirror

    def unchanged(self, *keys: str) -> list[Unchanged]:
        """The condition that these keys are as the registry's copy has them; absent ones stay absent."""
        known = ((key, self._mirror.get(key)) for key in keys)
        return [Unchanged(key, record.mod_revision if record else 0) for key, record in known]

    async def commit(
        self, puts: Iterable[Put], only_if: Iterable[Unchanged], deletes: Iterable[str] = ()
    ) -> int:
        """The revision. Raises Conflict if a condition does not hold, Restoring, and what etcd raises."""
        if self._mirror.get(RESTORING) is not None:
            raise Restoring("a restore is in progress or was interrupted: repeat `lingqu registry restore`")
        conditions = [*only_if, Unchanged(RESTORING, 0)]
        revision = await self._etcd.commit(list(puts), conditions, list(deletes))
        if not revision:
            raise Conflict("somebody else changed the same thing first; look again")
        await self._mirror.reached(revision)
        return revision

    def present(self, key: str) -> bool:
        return self._mirror.get(key) is not None

    async def lease(self, ttl_s: int) -> int:
        """For records that go by themselves."""
        return await self._etcd.grant(ttl_s)

    async def release(self, lease: int) -> None:
        """End a lease that came to nothing; if that fails, it ends by itself."""
        with contextlib.suppress(LingquError):
            await self._etcd.revoke(lease)

    async def remaining_s(self, key: str) -> int:
        """How long a leased key still lives; 0 if it is gone."""
        record = self._mirror.get(key)
        return max(0, await self._etcd.remaining(record.lease)) if record is not None else 0

    async def caught_up(self) -> None:
        """Wait until the registry's copy has what etcd has now."""
        _, revision = await self._etcd.read(RESTORING)
        await self._mirror.reached(revision)
