"""What was added to counters of which sources tell the total since their start, each addition once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from services.metrics.readings import Kind, Reading

MAX_SERIES = 20_000


class Totals:
    """Remembers the last totals of `most` series, and as many additions; the oldest go first.

    The first total of a series counts as added if the series began after `began_ns`, when this object was
    made: of others nobody knows how much was told to a predecessor, and theirs is only what the next total is
    compared with. A series with another start is another series, so that senders with the same labels do not
    take each other for one that begins anew; where there is no start, a total that fell tells the same."""

    def __init__(self, began_ns: int, most: int = MAX_SERIES) -> None:
        self._began_ns = began_ns
        self._most = most
        self._totals: OrderedDict[int, tuple[int, Mapping[str, float]]] = OrderedDict()
        self._additions: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._totals) + len(self._additions)

    def added(self, reading: Reading) -> Mapping[str, float] | None:
        """What the reading adds: empty if that is not known, None if it was told before."""
        if reading.kind is Kind.ADDED:
            return reading.fields if self._is_new(reading) else None
        key = _identity(reading)
        before = self._totals.get(key)
        if before is not None and reading.time_ns <= before[0]:
            return None
        self._totals[key] = (reading.time_ns, reading.fields)
        if before is None:
            if len(self._totals) > self._most:
                _, (last_ns, _) = self._totals.popitem(last=False)
                # Should it come back, it is not to be taken for one that has just begun.
                self._began_ns = max(self._began_ns, last_ns + 1)
            return reading.fields if reading.start_ns >= self._began_ns else {}
        self._totals.move_to_end(key)
        old = before[1]
        if any(value < old.get(name, 0.0) for name, value in reading.fields.items()):
            return reading.fields
        return {name: value - old.get(name, 0.0) for name, value in reading.fields.items()}

    def _is_new(self, reading: Reading) -> bool:
        if not reading.start_ns:
            return True
        key = hash((_identity(reading), reading.time_ns))
        if key in self._additions:
            return False
        self._additions[key] = None
        if len(self._additions) > self._most:
            self._additions.popitem(last=False)
        return True


def _identity(reading: Reading) -> int:
    """A number, not the labels: they are of any length."""
    return hash((reading.measurement, frozenset(reading.labels.items()), reading.start_ns))
