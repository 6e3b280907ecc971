"""The queue to the store: batches, receipts, and what happens when the store cannot."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from services.core.errors import BackendUnavailable, InvalidInput, QueueFull
from services.metrics.points import Point
from services.metrics.writer import PATIENCE, Writer


@dataclass
class Stub:
    """A store as far as a writer needs one. While `away` is set, it does not answer; `error` is refused."""

    away: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    batches: dict[str, list[Point]] = field(default_factory=dict)
    tries: list[str] = field(default_factory=list)

    def write(self, points: Sequence[Point], batch: str = "") -> None:
        self.tries.append(batch)
        if self.away.is_set():
            raise BackendUnavailable("away")
        if self.error is not None:
            raise self.error
        self.batches.setdefault(batch, list(points))

    @property
    def kept(self) -> list[float]:
        return [point.fields["value"] for batch in self.batches.values() for point in batch]


def points(*values: float) -> list[Point]:
    return [Point("m", (), {"value": value}, 1) for value in values]


@contextmanager
def writing(stub: Stub, **limits: float) -> Iterator[tuple[Writer, list[int]]]:
    refused: list[int] = []
    writer = Writer(stub, refused.append, **{"window_s": 0.01, **limits})  # type: ignore[arg-type]
    with writer.running():
        yield writer, refused


def test_points_are_kept_in_order_before_their_receipt() -> None:
    stub = Stub()
    with writing(stub, batch=7) as (writer, _):
        receipts = [writer.put(points(n, n + 0.5)) for n in range(20)]
        receipts[-1].result(5)
        assert all(receipt.done() for receipt in receipts)
        assert stub.kept == sorted(stub.kept)
        assert len(stub.kept) == 40
        assert max(map(len, stub.batches.values())) <= 8
        assert writer.queued == 0


def test_what_comes_close_together_is_one_batch() -> None:
    stub = Stub()
    with writing(stub, window_s=0.3) as (writer, _):
        wait([writer.put(points(n)) for n in range(50)], 5)
    assert len(stub.batches) == 1


def test_without_points_a_receipt_waits_for_what_came_before() -> None:
    stub = Stub()
    stub.away.set()
    with writing(stub) as (writer, _):
        first, second = writer.put(points(1)), writer.put([])
        with pytest.raises(TimeoutError):
            second.result(0.2)
        stub.away.clear()
        second.result(5)
        assert first.done()


def test_a_store_that_comes_back_has_everything_once() -> None:
    stub = Stub()
    stub.away.set()
    with writing(stub, batch=10) as (writer, refused):
        receipts = [writer.put(points(n)) for n in range(50)]
        with pytest.raises(TimeoutError):
            receipts[0].result(0.3)
        assert writer.away
        assert writer.queued == 50
        stub.away.clear()
        receipts[-1].result(5)
        assert not writer.away
    assert sorted(stub.kept) == list(range(50))
    assert refused == []
    first = stub.tries[0]
    assert stub.tries.count(first) > 1  # under the same name each time


def test_a_full_queue_is_refused_and_says_when_to_come_back() -> None:
    stub = Stub()
    stub.away.set()
    with writing(stub, most=10) as (writer, _):
        writer.put(points(*range(10)))
        for error in (BackendUnavailable, QueueFull):
            writer.away = error is BackendUnavailable
            with pytest.raises(error) as refused:
                writer.check()
            assert refused.value.retry_after_s
        assert writer.room == 0
        stub.away.clear()


@pytest.mark.parametrize("error", [InvalidInput("points", "no"), RuntimeError("bug")])
def test_what_the_store_refuses_is_counted_and_holds_up_nothing(error: Exception) -> None:
    stub = Stub(error=error)
    with writing(stub) as (writer, refused):
        receipt = writer.put(points(1, 2, 3))
        assert receipt.exception(5) is not None
        stub.error = None
        writer.put(points(4)).result(5)
    assert refused == [3]
    assert stub.kept == [4]


def test_the_end_writes_what_is_queued() -> None:
    stub = Stub()
    with writing(stub, window_s=60) as (writer, _):
        receipt = writer.put(points(1, 2))
    assert receipt.done()
    assert stub.kept == [1, 2]


def test_the_end_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.metrics.writer.DRAIN_S", 0.2)
    stub = Stub()
    stub.away.set()
    begun = time.monotonic()
    with writing(stub, batch=1) as (writer, refused):
        receipts = [writer.put(points(n)) for n in range(3)]
    assert time.monotonic() - begun < 3
    assert sum(refused) == 3
    assert all(isinstance(receipt.exception(1), BackendUnavailable) for receipt in receipts)


def test_what_nobody_waits_for_goes_with_what_comes_next() -> None:
    stub = Stub()
    with writing(stub, window_s=0.05) as (writer, _):
        patient = writer.put(points(1), awaited=False)
        writer.put(points(2)).result(5)
        assert patient.done()
        assert stub.kept == [1, 2]
        begun = time.monotonic()
        writer.put(points(3), awaited=False).result(5)
        assert time.monotonic() - begun >= 0.05 * PATIENCE
    assert len(stub.batches) == 2
