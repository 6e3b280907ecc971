"""Writing governance records: one transaction, visible to the writer's next read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from services.core.errors import BackendUnavailable, Conflict, LingquError, Restoring
from services.registry.etcd import Etcd, Put, Unchanged
from services.registry.keyspace import MARK, RESTORING
from services.registry.members import CALL_TIMEOUT_S
from services.registry.mirror import CATCH_UP_S, Mirror


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

    async def remaining_s(self, key: str) -> int | None:
        """How long a leased key still lives, at least 1; None if it is gone. etcd rounds down, and takes up
        to half a second more to delete what has expired."""
        record = self._mirror.get(key)
        left = await self._etcd.remaining(record.lease) if record is not None else -1
        return max(1, left) if left >= 0 else None

    async def caught_up(self) -> None:
        """Wait until the registry's copy has what etcd has now, and with it all that any registry has
        acknowledged. Raises BackendUnavailable."""
        _, revision = await self._etcd.read(RESTORING)
        if not await self._arrived(revision, CATCH_UP_S):
            # The newest one may be of keys that are not ours, and not come; one of our own will.
            revision = await self._etcd.commit([Put(MARK, b"")])
            if not await self._arrived(revision, CALL_TIMEOUT_S):
                raise BackendUnavailable("the registry lags behind etcd; nothing was changed")

    async def _arrived(self, revision: int, timeout_s: float) -> bool:
        await self._mirror.moved_from(revision - 1, timeout_s)
        return self._mirror.revision >= revision
