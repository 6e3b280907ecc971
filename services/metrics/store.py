"""What the service needs of a store. Calls block: the service makes them in threads of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.metrics.points import Labels, Point
from services.metrics.queries import Query, Series


class Store(Protocol):
    """Errors are of two kinds: BackendUnavailable, when the same call may work later, and others of
    services.core.errors, when it will not."""

    def write(self, points: Sequence[Point], batch: str = "") -> None:
        """All of them are kept when this returns. A batch with a name may be written again, for one that is
        not known to have been kept: its points are kept once."""

    def query(self, query: Query) -> list[Series]:
        """Ordered by labels. An unknown measurement or field has no series."""

    def series(self, measurement: str = "", limit: int = 1000) -> list[tuple[str, Labels]]:
        """Measurements and labels that there are, in order; of all measurements if none is named."""

    def retain(self, seconds: int) -> None:
        """Forget what is older, by itself from now on or each time this is called."""

    def close(self) -> None: ...
