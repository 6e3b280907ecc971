"""How many slots of a version were held, for how long, and what was done meanwhile.

The seconds spent, and the tokens made, at each number of held slots are the engine's service function as
operational analysis measures it (P. J. Denning, J. P. Buzen: The operational analysis of queueing network
models, ACM Computing Surveys 10 (3), 1978): tokens a second as a function of concurrency, which is what
continuous batching makes of a model. services/metrics/capacity reads it.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable

from services.core.discovery import VersionKey
from services.inference.figures import LEVEL_SECONDS, LEVEL_SLOTS, LEVEL_WORK, Figures

LEVELS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Label `level`: at least so many slots, and fewer than the next of these."""
TELL_S = 0.5  # figures are told when the level changes, or after so long


class Occupancy:
    """Of one version. Not thread-safe: for the event loop alone."""

    def __init__(
        self, figures: Figures, key: VersionKey, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._figures, self._key, self._clock = figures, key, clock
        self._held = 0
        self._since = self._told = clock()
        self._seconds = self._slots = self._work = 0.0

    def hold(self, slots: int) -> None:
        """From now on so many slots are held."""
        if slots == self._held:
            return
        self._pass()
        if level_of(slots) != level_of(self._held) or self._since - self._told > TELL_S:
            self._tell()
        self._held = slots

    def work(self, tokens: int) -> None:
        """So many tokens were made, or read where none are made, since the last time."""
        self._work += tokens
        if self._clock() - self._told > TELL_S:
            self._pass()
            self._tell()

    def _pass(self) -> None:
        now = self._clock()
        if self._held:
            self._seconds += now - self._since
            self._slots += self._held * (now - self._since)
        self._since = now

    def _tell(self) -> None:
        self._told = self._since
        if self._held and self._seconds > 0:
            level = str(level_of(self._held))
            self._figures.add(LEVEL_SECONDS, self._key, self._seconds, level=level)
            self._figures.add(LEVEL_SLOTS, self._key, self._slots, level=level)
            self._figures.add(LEVEL_WORK, self._key, self._work, level=level)
            self._seconds = self._slots = self._work = 0.0


def level_of(slots: int) -> int:
    """The greatest of LEVELS that is not above; 0 for none."""
    return LEVELS[bisect_right(LEVELS, slots) - 1] if slots > 0 else 0
