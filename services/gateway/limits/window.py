"""An exact sliding window: how much was counted in the time that ends now."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right

# So many entries that have left the window may stay before their memory is given back.
STALE = 512


class Window:
    """A log of amounts by time. All times are milliseconds of one steady clock, rounded down.

    What is counted at `now` stays for all of [now, now + length): entries are kept with their time rounded up
    to `step_ms`, so that rounding never lets one go too early. At most length / step + 1 entries count,
    whatever the traffic."""

    __slots__ = ("_first", "_gone", "_length", "_step", "_sums", "_times")

    def __init__(self, length_ms: int, step_ms: int = 1) -> None:
        self._length = length_ms
        self._step = step_ms
        self._times = array("q")
        self._sums = array("q")  # of all up to and with this entry, ever
        self._first = 0  # index of the first entry that counts
        self._gone = 0  # sum of all before it

    def used(self, now: int) -> int:
        times, first = self._times, self._first
        over = now - self._length
        if first < len(times) and times[first] <= over:
            first = bisect_right(times, over, first)
            self._gone = self._sums[first - 1]
            self._first = first
            if first > STALE and first * 2 > len(times):
                del self._times[:first], self._sums[:first]
                self._first = 0
        return self._sums[-1] - self._gone if self._first < len(self._times) else 0

    def add(self, now: int, amount: int) -> None:
        """Count; `now` may be later than the clock says, and what comes next is then counted there, too."""
        at = -(-(now + 1) // self._step) * self._step
        if self._times and self._times[-1] >= at:
            self._sums[-1] += amount
        else:
            self._times.append(at)
            self._sums.append((self._sums[-1] if self._sums else self._gone) + amount)

    def remove(self, then: int, amount: int) -> None:
        """Do not count what was added at `then`; nothing happens if it does not count any more."""
        at = -(-(then + 1) // self._step) * self._step
        index = bisect_left(self._times, at)  # that entry, or a later one it was counted with
        if index >= len(self._times) or index < self._first:
            return
        before = self._sums[index - 1] if index else self._gone
        amount = min(amount, self._sums[index] - before)
        for later in range(index, len(self._sums)):
            self._sums[later] -= amount

    def wait(self, now: int, limit: int, amount: int = 1) -> int:
        """Milliseconds until `amount` more fit under `limit`, if nothing else comes; 0 if they do."""
        surplus = self.used(now) + amount - limit
        if surplus <= 0:
            return 0
        if amount > limit:
            return self._length
        index = bisect_left(self._sums, self._gone + surplus, self._first)
        return self._times[index] + self._length - now
