"""From the queue to the store: batches by size and time, in a thread of its own.

Points wait in one bounded queue. What the store cannot take now is tried again until it can, in order, under
the same batch name; what it refuses is counted and dropped. A receipt of `put` is done when the points, and
all that came before, are kept: then a sender may be told so.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

from services.core.backoff import Backoff
from services.core.errors import BackendUnavailable, LingquError, QueueFull
from services.metrics.points import Point
from services.metrics.store import PointsRefused, Store

log = logging.getLogger(__name__)

MAX_QUEUED = 100_000
BATCH = 10_000
WINDOW_S = 0.5
PATIENCE = 4
"""How many windows points wait that nobody waits for: a write costs 2 ms, however little is in it."""
DRAIN_S = 3.0

Receipt = Future[None]


class Writer:
    """`refused(number)` hears of points that the store did not take, in the writer's thread."""

    def __init__(
        self,
        store: Store,
        refused: Callable[[int], None] = lambda number: None,
        most: int = MAX_QUEUED,
        batch: int = BATCH,
        window_s: float = WINDOW_S,
    ) -> None:
        self._store, self._refused = store, refused
        self._most, self._batch, self._window_s = most, batch, window_s
        self._queue: deque[tuple[Sequence[Point], Receipt]] = deque()
        self._changed = threading.Condition()
        self._queued = 0
        self._due = 0.0
        self._stop_at: float | None = None
        self._name = uuid.uuid4().hex
        self.away = False
        """Whether the store did not answer the last time."""

    @property
    def queued(self) -> int:
        """Points that are not in the store yet."""
        return self._queued

    @property
    def room(self) -> int:
        return max(0, self._most - self._queued)

    def check(self) -> None:
        """Raises BackendUnavailable or QueueFull if there is no room, before anything is remembered of what
        would have to be sent again."""
        if self._queued < self._most:
            return
        if self.away:
            raise BackendUnavailable("the store of metrics is away, and the queue to it is full")
        raise QueueFull(f"{self._most} points wait for the store already; send again later", 1.0)

    def put(self, points: Sequence[Point], *, awaited: bool = True) -> Receipt:
        """Never waits. One call may go above the bound by what it brings; check() comes first. `awaited`:
        somebody waits for the receipt."""
        receipt: Receipt = Future()
        with self._changed:
            due = time.monotonic() + self._window_s * (1 if awaited else PATIENCE)
            sooner = not self._queue or due < self._due
            if sooner:
                self._due = due
            self._queue.append((points, receipt))
            self._queued += len(points)
            if sooner or self._queued >= self._batch:
                self._changed.notify_all()
        return receipt

    @contextmanager
    def running(self) -> Iterator[None]:
        """Writes until the end of the block and then, for DRAIN_S at most, what is queued."""
        thread = threading.Thread(target=self._run, name="metrics-writer", daemon=True)
        thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._stop_at = time.monotonic() + DRAIN_S
                self._changed.notify_all()
            thread.join()

    def _run(self) -> None:
        number = 0
        while taken := self._take():
            points = [point for some, _ in taken for point in some]
            number += 1
            failure = self._write(points, f"{self._name}-{number}") if points else None
            with self._changed:
                self._queued -= len(points)
            for _, receipt in taken:
                if receipt.set_running_or_notify_cancel():
                    receipt.set_exception(failure) if failure else receipt.set_result(None)

    def _take(self) -> list[tuple[Sequence[Point], Receipt]]:
        """The next batch, when it is large or old enough; none at the end."""
        with self._changed:
            while not self._queue:
                if self._stop_at is not None:
                    return []
                self._changed.wait()
            while self._stop_at is None and self._queued < self._batch:
                left = self._due - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            taken, size = [], 0
            while self._queue and size < self._batch:
                taken.append(self._queue.popleft())
                size += len(taken[-1][0])
            self._due = time.monotonic() + self._window_s
            return taken

    def _write(self, points: Sequence[Point], name: str) -> LingquError | None:
        """Until they are kept (None) or refused."""
        backoff = Backoff(0.1, 2.0)
        while True:
            try:
                self._store.write(points, name)
            except BackendUnavailable as err:
                if not self.away:
                    log.warning("%s; points are kept in memory until it is back", err)
                self.away = True
                if not self._pause(backoff.delay()):
                    log.error("%d points are lost: the store was away at the end", len(points))  # noqa: TRY400
                    self._refused(len(points))
                    return err
            except PointsRefused as err:
                log.error("%s", err)  # noqa: TRY400
                self._refused(err.number)
                return None  # all others are kept, and nobody knows whose these were
            except LingquError as err:
                log.error("%d points were refused by the store: %s", len(points), err)  # noqa: TRY400
                self._refused(len(points))
                return err
            except Exception as err:
                log.exception("%d points could not be written", len(points))
                self._refused(len(points))
                return LingquError(f"the store failed: {type(err).__name__}")
            else:
                if self.away:
                    log.info("the store is back; %d points are queued", self._queued)
                self.away = False
                return None

    def _pause(self, seconds: float) -> bool:
        """False when the time for the rest is over."""
        until = time.monotonic() + seconds
        with self._changed:
            while (left := until - time.monotonic()) > 0:
                if self._stop_at is not None:
                    left = min(left, self._stop_at - time.monotonic())
                    if left <= 0:
                        return False
                self._changed.wait(left)
        return True
