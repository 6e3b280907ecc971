"""How many requests a key may be admitted in each second, as the ledger has it: written before they are used.

A key that asks gets what it lacks, and ahead as much as it has used in this second or the one before; in the
second half of a second the next one is written, so that steady traffic never waits. When a second is over,
what was really used is written over what was reserved.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.gateway.limits.cells import REQUESTS_MS, Cell, CellName
from services.gateway.limits.clock import Moment

# So much of a limit is reserved at once for a key of which nothing is known: a second's share of a minute.
SHARE = 60


@dataclass(slots=True)
class _Second:
    """Counts by key. `reserved` is on record, `wanted` is to be."""

    reserved: dict[str, int] = field(default_factory=dict)
    wanted: dict[str, int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)


class Reservations:
    """Seconds are those of the wall clock, which never goes back here."""

    def __init__(self, tenure: str) -> None:
        self._tenure = tenure
        self._seconds: dict[int, _Second] = {}
        self._now = 0
        self.urgent = False
        """Whether somebody waits for `due` to be written."""

    def covers(self, key: str, now: Moment) -> bool:
        """Whether one more may be admitted."""
        second = self._current(now)
        return second.used.get(key, 0) < second.reserved.get(key, 0)

    def use(self, key: str, now: Moment) -> None:
        used = self._current(now).used
        used[key] = used.get(key, 0) + 1

    def ask(self, key: str, limit: int, left: int, now: Moment) -> None:
        """More for this second: one for whoever asks, and some ahead, but no more than is `left` of
        `limit`."""
        second = self._current(now)
        used = second.used.get(key, 0)
        before = self._seconds[self._now - 1].used.get(key, 0) if self._now - 1 in self._seconds else 0
        ahead = used + max(limit // SHARE, used, before - used)
        asked = max(second.wanted.get(key, 0), second.reserved.get(key, 0)) + 1
        second.wanted[key] = min(max(asked, ahead), used + left)
        self.urgent = True

    def due(self, now: Moment) -> dict[CellName, Cell]:
        second = self._current(now)
        made: dict[int, Cell] = {}
        following = self._seconds.get(self._now + 1)
        late = now.wall % REQUESTS_MS >= REQUESTS_MS // 2
        if self.urgent and second.wanted:
            made[self._now] = Cell({**second.reserved, **second.wanted})
        if late and second.used and (following is None or self.urgent):
            known = following.reserved if following else {}
            made[self._now + 1] = Cell(
                {**known, **{k: max(n, known.get(k, 0)) for k, n in second.used.items()}}
            )
        if late or made:
            # The second before this one is left: what comes late is written over it first.
            made |= {n: Cell(s.used) for n, s in self._seconds.items() if n < self._now - 1 and s.reserved}
        self.urgent = False
        return {CellName("r", number, self._tenure): cell for number, cell in made.items()}

    def written(self, name: CellName, cell: Cell, now: Moment) -> None:
        self._current(now)
        second = self._seconds.get(name.index)
        if name.index < self._now - 1:
            if second is not None and second.used == cell.counts:
                del self._seconds[name.index]
            return
        if second is None:
            second = self._seconds[name.index] = _Second()
        second.reserved = cell.counts
        for key, count in cell.counts.items():
            if second.wanted.get(key, 0) <= count:
                second.wanted.pop(key, None)

    def settled(self) -> dict[CellName, Cell]:
        """What was used of all that was reserved; nothing may be used any more."""
        found = self._seconds.items()
        return {CellName("r", n, self._tenure): Cell(s.used) for n, s in found if s.reserved or s.wanted}

    def _current(self, now: Moment) -> _Second:
        index = now.wall // REQUESTS_MS
        if index > self._now:
            self._now = index
            for number in [n for n, s in self._seconds.items() if n < index - 1 and not s.reserved]:
                del self._seconds[number]
        second = self._seconds.get(self._now)
        if second is None:
            second = self._seconds[self._now] = _Second()
        return second
