"""What the service needs of a store. Calls block: the service makes them in threads of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import grpc

from services.core.errors import BackendUnavailable, LingquError
from services.metrics.points import Labels, Point
from services.metrics.queries import Query, Series

ROLL_UP_NS = 60_000_000_000
"""A roll-up is what is left of the raw points of a series in a minute: number, sum, least, greatest, last."""


class PointsRefused(LingquError):
    """`number` points of a write will never be kept, whoever writes them again. All others are kept."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "POINTS_REFUSED"

    def __init__(self, number: int, why: str) -> None:
        super().__init__(f"{number} points were refused: {why}")
        self.number = number


class StoreRefusesAccess(BackendUnavailable):
    """The store does not accept our credentials. It may when somebody has corrected them."""

    reason = "STORE_REFUSES_ACCESS"


class Store(Protocol):
    """Errors are of two kinds: BackendUnavailable, when the same call may work later, and others of
    services.core.errors, when it will not."""

    def write(self, points: Sequence[Point], batch: str = "") -> None:
        """All of them are kept when this returns. Raises PointsRefused for those that no try will keep, when
        all others are kept. A batch with a name may be written again, for one that is not known to have been
        kept: its points are kept once."""

    def query(self, query: Query) -> list[Series]:
        """Ordered by labels. An unknown measurement or field has no series. What is rolled up counts at the
        beginning of its minute. Raises InvalidInput for a percentile of what is rolled up."""

    def series(self, measurement: str = "", limit: int = 1000) -> list[tuple[str, Labels]]:
        """Measurements and labels that there are, in order; of all measurements if none is named."""

    def retain(self, seconds: int, rolled_up: int = 0) -> None:
        """Keep points for so many seconds, and what they are rolled up to for `rolled_up` seconds (0: not at
        all). To be called again and again, more often than every two hours."""

    def close(self) -> None: ...
