"""The store as rules see it: what waits on disk is not missing, and how much waits is known without it."""

from __future__ import annotations

from typing import Protocol

from services.core.errors import BackendUnavailable
from services.metrics import spooled
from services.metrics.queries import Query, Series
from services.metrics.spool import Waiting


class Asked(Protocol):
    """Of a Store, what rules need."""

    def query(self, query: Query) -> list[Series]: ...


class Spool(Asked, Protocol):
    @property
    def waiting(self) -> Waiting: ...


class Fresh:
    """While points wait, the newest are not in the store yet: then it does not answer, so that nothing counts
    as absent. Of the measurement "spool", `bytes` and `points` are what they are now."""

    def __init__(self, store: Spool) -> None:
        self._store = store

    def query(self, query: Query) -> list[Series]:
        """Raises BackendUnavailable."""
        waiting = self._store.waiting
        if query.measurement == spooled.MEASUREMENT:
            now = {"bytes": float(waiting.size), "points": float(waiting.points)}
            if query.field in now:
                labels = tuple((label, "") for label in sorted(query.group_by))
                return [Series(labels, ((query.start_ns, now[query.field]),))]
        elif waiting.points:
            raise BackendUnavailable(f"{waiting.points} points wait on disk for the store")
        return self._store.query(query)
