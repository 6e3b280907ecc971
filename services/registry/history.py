"""The latest changes of the mirror, in etcd's order, for watchers that resume."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from services.registry.etcd import Change

MOST_CHANGES = 8192
MOST_BYTES = 16 << 20


class History:
    """Every change after the revision `floor`, bounded in number and in bytes."""

    def __init__(self, most_changes: int = MOST_CHANGES, most_bytes: int = MOST_BYTES) -> None:
        self._most_changes = most_changes
        self._most_bytes = most_bytes
        self._bytes = 0
        self._changes: deque[Change] = deque()
        self.floor = 0

    def restart(self, revision: int) -> None:
        """Nothing is known about changes up to `revision`."""
        self._changes.clear()
        self._bytes = 0
        self.floor = revision

    def add(self, changes: Iterable[Change]) -> None:
        """Append changes that are newer than all before."""
        for change in changes:
            self._changes.append(change)
            self._bytes += _size(change)
        while len(self._changes) > self._most_changes or self._bytes > self._most_bytes:
            oldest = self._changes.popleft()
            self._bytes -= _size(oldest)
            self.floor = oldest.revision

    def since(self, revision: int, prefix: str) -> list[Change] | None:
        """The changes under `prefix` after `revision`; None if that is further back than `floor`."""
        if revision < self.floor:
            return None
        found = []
        for change in reversed(self._changes):
            if change.revision <= revision:
                break
            if change.key.startswith(prefix):
                found.append(change)
        return found[::-1]


def folded(changes: Iterable[Change]) -> tuple[Change, ...]:
    """One change for each key: what it was before the first, and what it is after the last."""
    latest: dict[str, Change] = {}
    for change in changes:
        if earlier := latest.pop(change.key, None):
            change = Change(change.key, change.record, change.revision, earlier.before)
        latest[change.key] = change
    return tuple(c for c in latest.values() if c.record is not None or c.before is not None)


def _size(change: Change) -> int:
    return sum(len(record.value) for record in (change.record, change.before) if record is not None)
