"""A continuous-batching text engine on a thread of its own: jobs go in, tokens come out step by step.

The scheduler (OpenVINO GenAI's) decides which sequences a step computes; this module feeds it, reads what
each step made and hands it to the sinks. It knows nothing of Triton.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, Protocol

MAX_PENDING = 1024
MAX_TOP_K = 1_000_000  # more than any vocabulary
MAX_TEMPERATURE = 2.0
MAX_REPETITION_PENALTY = 2.0
MAX_PENALTY = 2.0
IDLE_POLL_S = 0.2  # how soon a sink that gave up is noticed while nothing is computed


class Finish(IntEnum):
    """Why a sequence ended; NONE while it goes on."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    FAILED = 4


class GrammarKind(StrEnum):
    """How a Grammar's text is to be read."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the generated text has to keep to: a JSON Schema (as JSON text) or a regular expression."""

    kind: GrammarKind
    text: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 is greedy; top_p 1, top_k 0, min_p 0, penalties 1, 0 and 0 mean no such limit. Seeds are
    used with a temperature only."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: bool = False
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        """Raises ValueError naming the field: the engine itself would only say that it cannot go on."""
        for name in ("max_tokens", "top_k", "seed"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name}: a whole number is needed")
        rules = {
            "max_tokens: 1 or more": self.max_tokens >= 1,
            "temperature: 0 to 2": 0 <= self.temperature <= MAX_TEMPERATURE,
            "top_p: above 0, at most 1": 0 < self.top_p <= 1,
            f"top_k: 0 to {MAX_TOP_K}": 0 <= self.top_k <= MAX_TOP_K,
            "seed: 0 to 2^64 - 1": 0 <= self.seed < 2**64,
            "min_p: 0 to 1": 0 <= self.min_p <= 1,
            "repetition_penalty: above 0, at most 2": 0 < self.repetition_penalty <= MAX_REPETITION_PENALTY,
            "presence_penalty: -2 to 2": abs(self.presence_penalty) <= MAX_PENALTY,
            "frequency_penalty: -2 to 2": abs(self.frequency_penalty) <= MAX_PENALTY,
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(rule)


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence to generate. `key` is the sink's own name for it."""

    key: int
    input_ids: Sequence[int]
    sampling: Sampling


class Sink(Protocol):
    """Where tokens go. Called on the engine's thread only."""

    def gone(self) -> bool:
        """True when nobody reads any more: all jobs of the sink are then dropped."""

    def emit(self, key: int, tokens: Sequence[int], finish: Finish) -> None:
        """New tokens of a job; the last call for a job has a finish other than NONE."""

    def step_done(self, running: int) -> None:
        """All of one step was emitted; `running` sequences go on."""


@dataclass(slots=True)
class Counts:
    """The engine's work so far; `sequences` are in progress now."""

    sequences: int = 0
    steps: int = 0
    tokens: int = 0


class Handle(Protocol):
    """A sequence inside the engine: OpenVINO GenAI's GenerationHandle, or a test's."""

    def can_read(self) -> bool: ...
    def read(self) -> dict[int, Any]: ...
    def cancel(self) -> None: ...
    def get_status(self) -> Any: ...


class Pipeline(Protocol):
    """The part of ContinuousBatchingPipeline that is used."""

    def step(self) -> None: ...


@dataclass(slots=True)
class _Running:
    job: Job
    sink: Sink
    handle: Handle


class Engine:
    """Owns the thread that steps the pipeline. `add` turns a job into a sequence of the pipeline; it raises
    ValueError for a job that the engine refuses."""

    def __init__(
        self,
        pipeline: Pipeline,
        add: Callable[[int, Job], Handle],
        log: Callable[[str], None],
    ) -> None:
        self.counts = Counts()
        self._pipeline = pipeline
        self._add = add
        self._log = log
        self._commands: queue.Queue[tuple[str, Any]] = queue.Queue(MAX_PENDING)
        self._running: dict[int, _Running] = {}
        self._next_id = 1
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job, sink: Sink) -> None:
        """Queue a job. Raises queue.Full when MAX_PENDING commands wait already."""
        self._commands.put_nowait(("submit", (job, sink)))

    def cancel(self, sink: Sink, key: int) -> None:
        """Stop a job after the step that is running; a finished one is left alone."""
        self._commands.put(("cancel", (sink, key)))

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=5)

    def _loop(self) -> None:
        while not self._stopping.is_set():
            try:
                self._turn()
            except Exception as err:
                # Whatever it was, it must not take the engine from everybody else.
                self._log(f"engine failed, {len(self._running)} sequences lost: {err!r}")
                self._fail_all()
        self._fail_all()

    def _turn(self) -> None:
        self._take_commands()
        self._drop_abandoned()
        if self._running:
            self._pipeline.step()
            self._publish()

    def _take_commands(self) -> None:
        """All that wait; blocks a little while there is nothing to compute."""
        try:
            command = (
                self._commands.get(timeout=IDLE_POLL_S) if not self._running else self._commands.get_nowait()
            )
            while True:
                self._obey(*command)
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _obey(self, verb: str, argument: Any) -> None:
        if verb == "submit":
            job, sink = argument
            number, self._next_id = self._next_id, self._next_id + 1
            try:
                handle = self._add(number, job)
            except Exception as err:
                self._log(f"job refused by the engine: {err!r}")
                sink.emit(job.key, (), Finish.FAILED)
                sink.step_done(len(self._running))
                return
            self._running[number] = _Running(job, sink, handle)
        else:
            sink, key = argument
            for number, running in list(self._running.items()):
                if running.sink is sink and running.job.key == key:
                    self._end(number, Finish.CANCELLED)
                    sink.step_done(len(self._running))

    def _drop_abandoned(self) -> None:
        gone = {id(s) for s in {id(r.sink): r.sink for r in self._running.values()}.values() if s.gone()}
        if gone:
            for number, running in list(self._running.items()):
                if id(running.sink) in gone:
                    self._end(number, Finish.CANCELLED)

    def _publish(self) -> None:
        total = 0
        touched: dict[int, Sink] = {}
        for number, running in list(self._running.items()):
            tokens, finish = self._read(running)
            total += len(tokens)
            if tokens or finish:
                running.sink.emit(running.job.key, tokens, finish)
                touched[id(running.sink)] = running.sink
            if finish:
                del self._running[number]
        for sink in touched.values():
            sink.step_done(len(self._running))
        self.counts.steps += 1
        self.counts.tokens += total
        self.counts.sequences = len(self._running)

    def _read(self, running: _Running) -> tuple[list[int], Finish]:
        handle, tokens, finish = running.handle, [], Finish.NONE
        while handle.can_read():
            for output in handle.read().values():
                tokens += output.generated_ids
                finish = Finish(_REASONS.get(output.finish_reason.name, Finish.NONE))
        if not finish and handle.get_status().name in ("IGNORED", "CANCEL", "STOP"):
            # Dropped without a reason: the KV cache cannot hold the sequence.
            finish = Finish.FAILED
        return tokens, finish

    def _end(self, number: int, finish: Finish) -> None:
        running = self._running.pop(number)
        running.handle.cancel()
        running.sink.emit(running.job.key, (), finish)
        self.counts.sequences = len(self._running)

    def _fail_all(self) -> None:
        sinks = {id(r.sink): r.sink for r in self._running.values()}
        for number in list(self._running):
            try:
                self._end(number, Finish.FAILED)
            except Exception as err:
                self._log(f"a sequence could not be told that it failed: {err!r}")
        for sink in sinks.values():
            try:
                sink.step_done(0)
            except Exception as err:
                self._log(f"a sink could not be told of failures: {err!r}")


_REASONS = {"STOP": Finish.STOP, "LENGTH": Finish.LENGTH, "TOOL_CALL": Finish.STOP}
