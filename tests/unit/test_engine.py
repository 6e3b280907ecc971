"""The engine's thread: batching, cancelling, losing sinks, failing; with a scripted pipeline."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from services.inference.backends.engine import Engine
from services.inference.backends.jobs import NOTHING, Finish, Job, Output, Sampling

TIMEOUT_S = 5.0


class Scripted:
    """A sequence that makes 100, 101, … one a step."""

    def __init__(self, job: Job) -> None:
        self.ids = job.input_ids
        self.left = job.sampling.max_tokens
        self.made = 0
        self.cancelled = False
        self._ready: list[Output] = []

    def advance(self) -> None:
        if self.cancelled or not self.left:
            return
        self.left -= 1
        finish = Finish.NONE if self.left else Finish.LENGTH
        self._ready.append(Output([100 + self.made], [-0.5], finish))
        self.made += 1

    def take(self) -> Output:
        return self._ready.pop(0) if self._ready else NOTHING

    def cancel(self) -> None:
        self.cancelled = True

    def is_over(self) -> bool:
        return self.cancelled or not self.left


class Pipeline:
    """Steps only when told, so that tests decide what happens between two steps."""

    def __init__(self) -> None:
        self.sequences: list[Scripted] = []
        self.steps = threading.Semaphore(0)
        self.fail = False
        self.giving_up: list[tuple[int, Job]] = []

    def add(self, number: int, job: Job) -> Scripted:
        if job.input_ids == [0]:
            raise ValueError("token 0 is not allowed")
        self.sequences.append(Scripted(job))
        return self.sequences[-1]

    def step(self) -> None:
        self.steps.acquire()
        if self.fail:
            raise RuntimeError("out of memory")
        for sequence in self.sequences:
            sequence.advance()

    def displaced(self) -> Sequence[tuple[int, Job]]:
        found, self.giving_up = self.giving_up, []
        return found

    def cache(self) -> float:
        return len(self.sequences) / 10


class Sink:
    def __init__(self) -> None:
        self.events: queue.Queue[tuple[int, tuple[int, ...], Finish]] = queue.Queue()
        self.is_gone = False

    def gone(self) -> bool:
        return self.is_gone

    def emit(self, key: int, tokens: Sequence[int], finish: Finish, logprobs: Sequence[float] = ()) -> None:
        self.events.put((key, tuple(tokens), finish))

    def step_done(self, running: int) -> None:
        """Every emit is seen at once."""

    def alive(self) -> None:
        """Not looked at."""

    def next(self) -> tuple[int, tuple[int, ...], Finish]:
        return self.events.get(timeout=TIMEOUT_S)


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline()


@pytest.fixture
def engine(pipeline: Pipeline) -> Iterator[Engine]:
    engine = Engine(lambda: pipeline, lambda text: None)
    yield engine
    pipeline.steps.release(1000)
    engine.close()


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition() and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    return condition()


def job(key: int, tokens: int = 3, ids: Sequence[int] = (1, 2)) -> Job:
    return Job(key, list(ids), Sampling(max_tokens=tokens))


def test_tokens_come_step_by_step_until_the_length(engine: Engine, pipeline: Pipeline) -> None:
    sink = Sink()
    engine.submit(job(7), sink)
    pipeline.steps.release(3)
    assert [sink.next() for _ in range(3)] == [
        (7, (100,), Finish.NONE),
        (7, (101,), Finish.NONE),
        (7, (102,), Finish.LENGTH),
    ]


def test_what_the_runtime_gives_up_is_added_again(engine: Engine, pipeline: Pipeline) -> None:
    sink = Sink()
    engine.submit(job(7, 5), sink)
    pipeline.giving_up = [(1, job(7, 4, (1, 2, 100))), (99, job(8))]
    pipeline.steps.release(5)
    events = [sink.next() for _ in range(5)]
    assert [event[2] for event in events] == [Finish.NONE] * 4 + [Finish.LENGTH]
    assert list(pipeline.sequences[1].ids) == [1, 2, 100]
    assert len(pipeline.sequences) == 2, "the number 99 is nobody's"


def test_a_cancelled_sequence_stops_and_others_go_on(engine: Engine, pipeline: Pipeline) -> None:
    sink = Sink()
    engine.submit(job(1, 100), sink)
    engine.submit(job(2, 100), sink)
    pipeline.steps.release(2)
    while sink.next()[0] != 2:
        continue
    engine.cancel(sink, 1)
    pipeline.steps.release(3)
    events = [sink.next() for _ in range(6)]
    assert (1, (), Finish.CANCELLED) in events
    after = events[events.index((1, (), Finish.CANCELLED)) + 1 :]
    assert after
    assert all(key == 2 for key, _, _ in after)
    assert pipeline.sequences[0].cancelled


def test_when_nobody_reads_nothing_is_computed(engine: Engine, pipeline: Pipeline) -> None:
    sink = Sink()
    engine.submit(job(1, 1000), sink)
    pipeline.steps.release(2)
    sink.next()
    sink.is_gone = True
    pipeline.steps.release(1)
    assert sink.next()[2] in (Finish.NONE, Finish.CANCELLED)
    assert until(lambda: pipeline.sequences[0].cancelled)
    assert engine.counts.tokens <= 4
    assert engine.counts.sequences == 0
    assert engine.counts.cache == 0.1


def test_a_failed_step_ends_its_sequences_and_the_engine_goes_on(engine: Engine, pipeline: Pipeline) -> None:
    sink = Sink()
    pipeline.fail = True
    engine.submit(job(1), sink)
    pipeline.steps.release(1)
    assert sink.next() == (1, (), Finish.FAILED)
    pipeline.fail = False
    engine.submit(job(2, 1), sink)
    pipeline.steps.release(1)
    assert sink.next() == (2, (100,), Finish.LENGTH)


def test_a_sink_that_fails_does_not_take_the_engine_with_it(engine: Engine, pipeline: Pipeline) -> None:
    class Broken(Sink):
        def emit(self, key: int, tokens: Sequence[int], finish: Finish) -> None:
            raise OverflowError("no such key")

    engine.submit(job(1), Broken())
    pipeline.steps.release(1)
    assert until(lambda: bool(pipeline.sequences) and pipeline.sequences[0].cancelled)
    sink = Sink()
    engine.submit(job(2, 1), sink)
    pipeline.steps.release(1)
    assert sink.next() == (2, (100,), Finish.LENGTH)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"max_tokens": "3"},
        {"max_tokens": True},
        {"max_tokens": 1, "temperature": float("nan")},
        {"max_tokens": 1, "top_p": 0.0},
        {"max_tokens": 1, "top_k": -1},
        {"max_tokens": 1, "seed": -1},
    ],
)
def test_sampling_that_makes_no_sense_names_its_field(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(fields)[-1]):
        Sampling(**fields)


def test_a_refused_job_is_told_so(engine: Engine) -> None:
    sink = Sink()
    engine.submit(job(3, ids=[0]), sink)
    assert sink.next() == (3, (), Finish.REFUSED)


def test_closing_ends_what_runs(pipeline: Pipeline) -> None:
    engine = Engine(lambda: pipeline, lambda text: None)
    sink = Sink()
    engine.submit(job(1, 10_000), sink)
    pipeline.steps.release(1)
    assert sink.next() == (1, (100,), Finish.NONE)
    closing = threading.Thread(target=engine.close)
    closing.start()
    pipeline.steps.release(1000)
    closing.join(TIMEOUT_S)
    finishes: list[Finish] = []
    while not sink.events.empty():
        finishes.append(sink.next()[2])
    assert finishes[-1] == Finish.FAILED
