"""RESTORING: which of several restores is the one that writes.

Its value is a phase and a random text. CLAIMED: somebody is looking whether there is state already, which is
whole. Any other: state is being replaced, or that was interrupted. A restore that finds it takes it over,
whoever drives it: the one before fails at its next write, so exactly one finishes, and its backup is what is
there then.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from services.core.errors import Conflict
from services.registry.etcd import Etcd, Put, Unchanged
from services.registry.keyspace import MARK, RESTORING

CLAIMED, WRITING = b"claimed ", b"writing "


class Claim:
    """Held by one restore. Every write raises Conflict once another restore has taken over."""

    def __init__(self, etcd: Etcd, revision: int, *, interrupted: bool) -> None:
        self._etcd = etcd
        self._revision = revision
        self.interrupted = interrupted
        """Whether the state may be half of one: then there is nothing to be careful with."""

    @classmethod
    async def made(cls, etcd: Etcd) -> Claim:
        """Raises Conflict if somebody else's came first."""
        found = await etcd.get(RESTORING)
        interrupted = found is not None and not found.value.startswith(CLAIMED)
        claim = cls(etcd, found.mod_revision if found else 0, interrupted=interrupted)
        await claim._become(WRITING if interrupted else CLAIMED)
        return claim

    async def begun(self) -> None:
        """From here on state is replaced."""
        await self._become(WRITING)

    async def write(self, puts: Sequence[Put] = (), deletes: Sequence[str] = ()) -> int:
        """The revision."""
        revision = await self._etcd.commit(puts, [Unchanged(RESTORING, self._revision)], deletes)
        if not revision:
            raise Conflict("another restore has taken over; this one ends here")
        return revision

    async def ended(self) -> int:
        """Other writes may go on; the revision. The mark tells our end from somebody else's, if the answer is
        lost."""
        return await self.write([Put(MARK, _random())], [RESTORING])

    async def _become(self, phase: bytes) -> None:
        self._revision = await self.write([Put(RESTORING, phase + _random())])


def _random() -> bytes:
    return uuid.uuid4().hex.encode()
