"""What the service has done and does now, as numbers: read here by tests and endpoints, and by OpenTelemetry.

Their labels are model, version, priority, outcome and level, never a client or a request: the number
of series is bounded by what one replica serves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from opentelemetry.metrics import CallbackOptions, Meter, NoOpMeterProvider, Observation

from services.core.discovery import VersionKey
from services.core.errors import BackendUnavailable, DeadlinePassed, InvalidInput, LingquError, QueueFull
from services.inference.callers import Caller, Priority

REQUESTS = "lingqu.inference.requests"
PROMPT_TOKENS = "lingqu.inference.tokens.prompt"
GENERATED_TOKENS = "lingqu.inference.tokens.generated"
WASTED_TOKENS = "lingqu.inference.tokens.wasted"
QUEUE_LENGTH = "lingqu.inference.queue.length"
QUEUE_TIME = "lingqu.inference.queue.time"
ADMITTED = "lingqu.inference.queue.admitted"
QUEUE_SECONDS = "lingqu.inference.queue.seconds"
RUNNING = "lingqu.inference.running"
ENGINE_STEPS = "lingqu.inference.engine.steps"
ENGINE_TOKENS = "lingqu.inference.engine.tokens"
ENGINE_WASTED = "lingqu.inference.engine.wasted"
ENGINE_SEQUENCES = "lingqu.inference.engine.sequences"
ENGINE_CACHE = "lingqu.inference.engine.cache"
SLOTS = "lingqu.inference.slots"
TOKENS_IN_FLIGHT = "lingqu.inference.tokens.in_flight"
KV_TOKENS = "lingqu.inference.kv.tokens"
LEVEL_SECONDS = "lingqu.inference.level.seconds"
LEVEL_SLOTS = "lingqu.inference.level.slots"
LEVEL_WORK = "lingqu.inference.level.work"
WORK_SQUARED = "lingqu.inference.work.squared"
CACHE_HITS = "lingqu.inference.cache.hits"
CACHE_MISSES = "lingqu.inference.cache.misses"
CACHE_JOINED = "lingqu.inference.cache.joined"
CACHE_BYTES = "lingqu.inference.cache.bytes"
UP = "lingqu.inference.up"

COUNTERS = {
    REQUESTS: ("{request}", "Requests, by how they ended"),
    PROMPT_TOKENS: ("{token}", "Tokens of prompts that were computed"),
    GENERATED_TOKENS: ("{token}", "Tokens that were generated"),
    WASTED_TOKENS: ("{token}", "Of these, tokens of answers that nobody got, by what ended them"),
    ADMITTED: ("{request}", "Runs that got their slots"),
    QUEUE_SECONDS: ("s", "Time that admitted runs have waited, in all"),
    ENGINE_STEPS: ("{step}", "Steps of the engine"),
    ENGINE_TOKENS: ("{token}", "Tokens that the engine made; by its steps: how many a step"),
    ENGINE_WASTED: ("{token}", "Of these, tokens of sequences that were cancelled or abandoned"),
    LEVEL_SECONDS: ("s", "Time with so many slots held"),
    LEVEL_SLOTS: ("s", "Of this time, the slots that were held, each for itself"),
    LEVEL_WORK: ("{token}", "Tokens made meanwhile, or read by models that make none"),
    WORK_SQUARED: ("{token}2", "Squares of the tokens of each run, for how unlike they are"),
    CACHE_HITS: ("{request}", "Requests answered from the cache"),
    CACHE_MISSES: ("{request}", "Requests that might have been in the cache and were computed"),
    CACHE_JOINED: ("{request}", "Requests that followed a run of somebody else"),
}
GAUGES = {
    QUEUE_LENGTH: ("{request}", "Runs that wait for slots"),
    RUNNING: ("{slot}", "Slots that are taken"),
    ENGINE_SEQUENCES: ("{sequence}", "Sequences that the engine computes side by side"),
    ENGINE_CACHE: ("1", "Share of the engine's KV cache that is taken, 0 to 1"),
    SLOTS: ("{slot}", "Slots that there are"),
    TOKENS_IN_FLIGHT: ("{token}", "Tokens of the sequences that are being generated, prompts included"),
    KV_TOKENS: ("{token}", "Tokens that the KV cache has room for"),
    CACHE_BYTES: ("By", "Memory of the answers that are kept"),
    UP: ("1", "1 while the process lives, whatever it serves"),
}
QUEUE_TIME_BOUNDS = (0.001, 0.005, 0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
MAX_VERSIONS = 128
GONE_S = 0.02  # a caller whose deadline is nearer than this has left because of it

Labels = tuple[tuple[str, str], ...]
Gauge = Callable[[], Iterable[tuple[Mapping[str, str], float]]]
# Tokens that a client has used of a model: (client, model, tokens).
Charge = Callable[[str, str, int], None]


class Outcome(StrEnum):
    """How a request ended."""

    OK = "ok"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    REFUSED = "refused"
    INVALID = "invalid"
    UNAVAILABLE = "unavailable"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Figure:
    """The value of a counter (since the start) or of a gauge (now)."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(slots=True)
class Request:
    """What is told of a request while it lasts. `complete`: the caller has been given everything, whatever
    becomes of the call now. `prompt_tokens`: what was read for it, where no run counts that. `answer`: makes
    what it is compared by, if it can be."""

    complete: bool = False
    prompt_tokens: int = 0
    answer: Callable[[], Awaitable[Any]] | None = None


Ended = Callable[[VersionKey, Caller, Request, Outcome], None]


class Figures:
    """Counters of the last MAX_VERSIONS versions that were served, and gauges asked when they are read. What
    is computed for a client goes to `charge`, too; `ended` hears of every request."""

    def __init__(
        self, meter: Meter | None = None, charge: Charge | None = None, ended: Ended | None = None
    ) -> None:
        self.charge = charge or (lambda client, model, tokens: None)
        self._ended = ended
        self._counters: dict[VersionKey, dict[tuple[str, Labels], float]] = {}
        self._gauges: dict[str, Gauge] = {}
        meter = meter or NoOpMeterProvider().get_meter("")
        for name, (unit, text) in COUNTERS.items():
            meter.create_observable_counter(name, [self._observer(name)], unit, text)
        for name, (unit, text) in GAUGES.items():
            meter.create_observable_gauge(name, [self._observer(name)], unit, text)
        self._queue_time = meter.create_histogram(
            QUEUE_TIME,
            "s",
            "How long runs wait for their slots",
            explicit_bucket_boundaries_advisory=QUEUE_TIME_BOUNDS,
        )

    def add(self, name: str, key: VersionKey, value: float = 1, **labels: str) -> None:
        """Count. Labels beside model and version are `priority`, `outcome` and `level` only."""
        counters = self._counters.get(key)
        if counters is None:
            while len(self._counters) >= MAX_VERSIONS:
                del self._counters[next(iter(self._counters))]
            counters = self._counters[key] = {}
        series = (name, tuple(sorted(labels.items())))
        counters[series] = counters.get(series, 0) + value

    def admitted(self, key: VersionKey, priority: Priority, waited_s: float) -> None:
        label = priority.name.lower()
        self.add(ADMITTED, key, priority=label)
        self.add(QUEUE_SECONDS, key, waited_s, priority=label)
        self._queue_time.record(waited_s, {**_version(key), "priority": label})

    @contextmanager
    def request(self, key: VersionKey, caller: Caller) -> Iterator[Request]:
        """Counts the request of the block by how it ends."""
        request, outcome = Request(), Outcome.OK
        try:
            yield request
        except BaseException as err:
            outcome = Outcome.OK if request.complete else outcome_of(err, caller)
            raise
        finally:
            self.add(REQUESTS, key, priority=caller.priority.name.lower(), outcome=outcome)
            if request.prompt_tokens:
                self.add(PROMPT_TOKENS, key, request.prompt_tokens)
                self.charge(caller.client, key.model, request.prompt_tokens)
            if self._ended is not None:
                self._ended(key, caller, request, outcome)

    def gauge(self, name: str, values: Gauge) -> None:
        """Ask `values` for labels and values of a gauge whenever it is read, from whatever thread."""
        self._gauges[name] = values

    def snapshot(self, only: str | None = None) -> list[Figure]:
        """Everything, counters first, or all series of one figure. From any thread: what it reads
        is copied in one go."""
        counters = [
            Figure(name, MappingProxyType({**_version(key), **dict(labels)}), value)
            for key, found in list(self._counters.items())
            for (name, labels), value in list(found.items())
            if only in (None, name)
        ]
        return counters + [
            Figure(name, MappingProxyType(dict(labels)), value)
            for name, values in list(self._gauges.items())
            if only in (None, name)
            for labels, value in values()
        ]

    def total(self, name: str, **labels: str) -> float:
        """The sum of all series of a figure that have these labels."""
        return sum(figure.value for figure in self.snapshot(name) if labels.items() <= figure.labels.items())

    def _observer(self, name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observed(options: CallbackOptions) -> Iterable[Observation]:
            return [Observation(f.value, f.labels) for f in self.snapshot(name)]

        return observed


def gauge_labels(key: VersionKey, priority: Priority | None = None) -> Mapping[str, str]:
    """The labels of a version's gauge."""
    return _version(key) if priority is None else {**_version(key), "priority": priority.name.lower()}


def outcome_of(err: BaseException, caller: Caller) -> Outcome:
    """How a request ended that ended with `err`."""
    kinds = {
        DeadlinePassed: Outcome.DEADLINE,
        QueueFull: Outcome.REFUSED,
        InvalidInput: Outcome.INVALID,
        BackendUnavailable: Outcome.UNAVAILABLE,
        LingquError: Outcome.FAILED,
    }
    for kind, outcome in kinds.items():
        if isinstance(err, kind):
            return outcome
    if isinstance(err, asyncio.CancelledError | GeneratorExit):
        remaining = caller.remaining
        return Outcome.CANCELLED if remaining is None or remaining > GONE_S else Outcome.DEADLINE
    return Outcome.FAILED


def _version(key: VersionKey) -> dict[str, str]:
    return {"model": key.model, "version": str(key.version)}
