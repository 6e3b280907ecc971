"""The one way in: what is refused, what becomes of counters, which series it belongs to, and to the queue."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from services.metrics.cardinality import Cardinality, good_name
from services.metrics.points import Point
from services.metrics.readings import Kind, Reading, Refusal
from services.metrics.tails import Tails
from services.metrics.totals import Totals
from services.metrics.writer import Receipt, Writer

PAST_S = 24 * 3600
FUTURE_S = 300
OWN = "collector"


@dataclass(slots=True)
class Taken:
    """`receipt` is done when all that was not refused is kept."""

    receipt: Receipt
    refused: Counter[Refusal] = field(default_factory=Counter)


class Intake:
    """Not thread-safe: for the event loop alone, but for `note`."""

    def __init__(
        self,
        writer: Writer,
        tails: Tails[Point],
        cardinality: Cardinality,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.writer = writer
        self._tails = tails
        self._cardinality = cardinality
        self._now_ns = now_ns
        self._totals = Totals(now_ns())
        self._noted: Counter[tuple[str, str]] = Counter()
        self._number = 0

    def offer(self, readings: Iterable[Reading]) -> Taken:
        """For senders that wait for the receipt, and send again if they are told to. Raises
        BackendUnavailable or QueueFull; then nothing of it was looked at."""
        self.writer.check()
        return self._put(readings, awaited=True)

    def take(self, readings: list[Reading]) -> None:
        """For sources that do not send again: what finds no room is counted."""
        if not self.writer.room:
            self.note("refused", Refusal.FULL, len(readings))
            return
        self._put(readings)

    def note(self, what: str, why: str, number: int) -> None:
        """Count for the collector's own measurement."""
        self._noted[what, str(why)] += number

    def report(self) -> None:
        """Put what was noted since the last report, and how full the queue is, with all other points."""
        now, noted = self._now_ns(), dict(self._noted)
        self._noted.subtract(noted)
        self._noted += Counter()
        own = [Reading(OWN, {"what": "queued"}, {"value": float(self.writer.queued)}, now)]
        own += [
            Reading(OWN, {"what": what, "why": why}, {"value": float(number)}, now)
            for (what, why), number in noted.items()
            if number
        ]
        if self.writer.room:
            self._put(own, count=False)
        else:
            for (what, why), number in noted.items():
                self._noted[what, why] += number

    def rotate(self) -> None:
        self._cardinality.rotate()

    def _put(self, readings: Iterable[Reading], *, awaited: bool = False, count: bool = True) -> Taken:
        now = self._now_ns()
        earliest, latest = now - PAST_S * 1_000_000_000, now + FUTURE_S * 1_000_000_000
        refused: Counter[Refusal] = Counter()
        points: list[Point] = []
        for reading in readings:
            if not earliest <= reading.time_ns <= latest:
                refused[Refusal.TIME] += 1
                continue
            found = self._point(reading)
            if isinstance(found, Refusal):
                refused[found] += 1
            elif found is not None:
                points.append(found)
        if count:
            if points:
                self.note("points", "", len(points))
            for why, number in refused.items():
                self.note("refused", why, number)
        if points and self._tails:
            self._tails.publish(points)
        return Taken(self.writer.put(points, awaited=awaited), refused)

    def _point(self, reading: Reading) -> Point | Refusal | None:
        """None: there is nothing to tell, since a counter has only begun to be watched."""
        measurement, labels, fields, time_ns, kind, _ = reading
        if not fields:
            return Refusal.NUMBER
        for value in fields.values():
            if not math.isfinite(value):
                return Refusal.NUMBER
        if not good_name(measurement):
            return Refusal.NAME
        admitted = self._cardinality.admit(measurement, labels)
        if admitted is None or not self._cardinality.admits_fields(measurement, fields):
            return Refusal.MEASUREMENTS
        if admitted.overflow:
            self.note("overflowed", measurement, 1)
            if kind is Kind.TOTAL:
                return Refusal.SERIES
        elif kind is not Kind.LEVEL:
            added = self._totals.added(reading)
            if added is None:
                return Refusal.ORDER
            if not added:
                return None
            fields = added
        if admitted.reduced:
            # Of many series at once: apart, so that no store takes one for another.
            self._number = (self._number + 1) % 1_000_000
            time_ns += self._number
        return Point(measurement, admitted.labels, fields, time_ns)
