"""A store that takes points while it is away: they wait on disk, and go to it in order when it is back."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from services.core.backoff import Backoff
from services.core.errors import BackendUnavailable, LingquError
from services.metrics.points import Labels, Point, fault
from services.metrics.queries import Query, Series
from services.metrics.spool import MAX_BYTES, Spool, Waiting
from services.metrics.store import PointsRefused, Store

log = logging.getLogger(__name__)

MEASUREMENT = "spool"
REPORT_S = 10.0
STOP_S = 3.0  # for a call that is in progress


class Spooled:
    """A Store, between `with` and its end. As long as something waits, new points wait behind it, so that the
    store gets everything in order and no faster than it can.

    Tells of itself by measurement "spool", every REPORT_S while there is something to tell: `bytes` and
    `points` that wait; and since the time before `spooled`, `drained` and, by the store, `refused` points,
    `corrupt` records and the points `lost` with them."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        most_bytes: int = MAX_BYTES,
        labels: Labels = (),
        report_s: float = REPORT_S,
    ) -> None:
        self._store, self._labels, self._report_s = store, labels, report_s
        self._spool = Spool(folder, most_bytes)
        self._changed = threading.Condition()
        self._stopped = False
        self._counted = dict.fromkeys(("spooled", "drained", "refused"), 0)
        self._told: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, name="metrics-spool", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What waits stays on disk for the next time."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(STOP_S)

    @property
    def waiting(self) -> Waiting:
        return self._spool.waiting

    def write(self, points: Sequence[Point], batch: str = "") -> None:
        """Raises BackendUnavailable if the store is away and the spool is full: then nothing is kept."""
        batch = batch or uuid.uuid4().hex
        if not self._spool.waiting.points:
            try:
                self._store.write(points, batch)
            except BackendUnavailable as err:
                log.warning("%s; points wait on disk until it is back", err)
            else:
                return
        good = [point for point in points if not fault(point)]
        if good:
            self._spool.append(good, batch)
        with self._changed:
            self._counted["spooled"] += len(good)
            self._changed.notify_all()
        if len(good) < len(points):
            bad = next(why for point in points if (why := fault(point)))
            raise PointsRefused(len(points) - len(good), bad)

    def query(self, query: Query) -> list[Series]:
        return self._store.query(query)

    def series(self, measurement: str = "", limit: int = 1000) -> list[tuple[str, Labels]]:
        return self._store.series(measurement, limit)

    def retain(self, seconds: int, rolled_up: int = 0) -> None:
        self._store.retain(seconds, rolled_up)

    def close(self) -> None:
        self._store.close()

    def _run(self) -> None:
        backoff = Backoff(0.1, 5.0)
        report_at = time.monotonic() + self._report_s
        while not self._stopped:
            if time.monotonic() >= report_at:
                self._report()
                report_at = time.monotonic() + self._report_s
            try:
                pause = self._drain(backoff)
            except Exception:
                log.exception("the spool cannot be drained")
                pause = backoff.delay()
            if pause:
                with self._changed:
                    if not self._stopped:
                        self._changed.wait(min(pause, self._report_s))

    def _drain(self, backoff: Backoff) -> float:
        """One record. How long to wait before the next, seconds."""
        record = self._spool.first()
        if record is None:
            return self._report_s
        refused = 0
        try:
            self._store.write(record.points, record.batch)
        except PointsRefused as err:
            refused = err.number
            log.error("%s", err)  # noqa: TRY400
        except BackendUnavailable:
            return backoff.delay()
        except LingquError as err:
            refused = len(record.points)
            log.error("%d points were refused by the store: %s", refused, err)  # noqa: TRY400
        backoff.reset()
        self._spool.taken(record)
        with self._changed:
            self._counted["refused"] += refused
            self._counted["drained"] += len(record.points)
        if not self._spool.waiting.points:
            log.info("everything that waited on disk is in the store")
        return 0.0

    def _report(self) -> None:
        waiting = self._spool.waiting
        now = {**self._counted, "corrupt": waiting.corrupt, "lost": waiting.lost}
        added = {name: float(number - self._told.get(name, 0)) for name, number in now.items()}
        if not waiting.points and not any(added.values()):
            return
        fields = {"bytes": float(waiting.size), "points": float(waiting.points), **added}
        try:
            self.write([Point(MEASUREMENT, self._labels, fields, time.time_ns())])
        except LingquError:
            return  # told the next time
        self._told = now
