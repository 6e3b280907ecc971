"""Generation as callers see it: answered from the cache, together with others who ask the same, or admitted
and computed; until the caller's deadline; counted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from services.core.discovery import VersionKey
from services.core.errors import DeadlinePassed
from services.inference.admission import Admission
from services.inference.answers import AnswerKey, Answers, answer_key, complete
from services.inference.callers import Caller
from services.inference.comparisons import Splits, generated
from services.inference.fairqueue import Ticket
from services.inference.figures import (
    CACHE_BYTES,
    CACHE_HITS,
    CACHE_JOINED,
    CACHE_MISSES,
    GENERATED_TOKENS,
    PROMPT_TOKENS,
    TOKENS_IN_FLIGHT,
    WASTED_TOKENS,
    Figures,
    gauge_labels,
)
from services.inference.runs import Run
from services.inference.text import Delta, GenerateJob, Tally

SHARED_LABEL = ("lingqu.cache", "shared")
"""Of a version in the registry: its answers do not depend on who asks, and clients may share them."""
TIDY_S = 1.0


class Generates(Splits, Protocol):
    """A text model."""

    key: VersionKey

    def generate(self, job: GenerateJob, tally: Tally) -> AsyncGenerator[Delta, None]: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Computation:
    """What is known of a run. `key`: where its answer is kept, None for nowhere."""

    version: VersionKey
    key: AnswerKey | None
    n: int
    ticket: Ticket
    tally: Tally


class Generation:
    """`labels` are those of a version in the registry. Owns the runs: `serving` ends them."""

    def __init__(
        self,
        admission: Admission,
        answers: Answers,
        figures: Figures,
        labels: Callable[[VersionKey], Mapping[str, str]] = lambda key: {},
    ) -> None:
        self._admission = admission
        self._answers = answers
        self._figures = figures
        self._labels = labels
        self._live: dict[Run, _Computation] = {}
        self._joinable: dict[AnswerKey, Run] = {}
        figures.gauge(CACHE_BYTES, self._cache_bytes)
        figures.gauge(TOKENS_IN_FLIGHT, self._in_flight)

    async def generate(
        self, model: Generates, job: GenerateJob, caller: Caller
    ) -> AsyncGenerator[Delta, None]:
        """Deltas of the answer; the last has the counts. Leaving early stops the engine, unless somebody else
        waits for the same answer.

        Raises what the model raises, QueueFull when too many wait, DeadlinePassed at the deadline."""
        with self._figures.request(model.key, caller) as request:
            if caller.remaining == 0:
                raise DeadlinePassed(f"the deadline had passed before {model.key} was asked")
            key = answer_key(model.key, job, None if self._shared(model.key) else caller.client)
            if key is not None and (kept := self._answers.get(key)) is not None:
                self._figures.add(CACHE_HITS, model.key)
                request.answer = generated(model, job, kept)
                for place, delta in enumerate(kept, 1):
                    request.complete = place == len(kept)
                    yield delta
                return
            run = None if key is None else self._joinable.get(key)
            joined = run is not None
            if run is None:
                run = self._begin(model, job, caller, key)
            else:
                self._admission.hasten(model.key, self._live[run].ticket, caller.priority)
            if key is not None:
                self._figures.add(CACHE_JOINED if joined else CACHE_MISSES, model.key)
            if job.deterministic:
                request.answer = generated(model, job, run.deltas)
            with run.followed(caller):
                async with aclosing(run.follow(caller, joined)) as deltas:
                    async for delta in deltas:
                        request.complete = run.delivered
                        yield delta

    @asynccontextmanager
    async def serving(self, served: Callable[[], Collection[VersionKey]]) -> AsyncIterator[None]:
        """For the block, forget what belongs to versions that are not served any more; end all runs at its
        end."""
        tidy = asyncio.create_task(self._tidy(served), name="tidy")
        try:
            yield
        finally:
            tidy.cancel()
            await asyncio.gather(tidy, *(run.close() for run in self._live), return_exceptions=True)

    def keep_only(self, versions: Collection[VersionKey]) -> None:
        """Forget the answers and queues of all others; what runs goes on."""
        self._answers.keep_only(versions)
        self._admission.keep_only(versions)

    async def _tidy(self, served: Callable[[], Collection[VersionKey]]) -> None:
        while True:
            await asyncio.sleep(TIDY_S)
            self.keep_only(served())

    def _shared(self, key: VersionKey) -> bool:
        label, value = SHARED_LABEL
        return self._labels(key).get(label) == value

    def _begin(self, model: Generates, job: GenerateJob, caller: Caller, key: AnswerKey | None) -> Run:
        ticket, tally = Ticket(caller.client, caller.priority, job.n), Tally()
        run = Run(self._compute(model, job, ticket, tally), self._ended, self._settled)
        self._live[run] = _Computation(model.key, key, job.n, ticket, tally)
        if key is not None:
            self._joinable[key] = run
        return run

    async def _compute(
        self, model: Generates, job: GenerateJob, ticket: Ticket, tally: Tally
    ) -> AsyncGenerator[Delta, None]:
        # No deadline here: each caller's own ends its following, and the last one's leaving ends this.
        async with (
            self._admission.held(model.key, ticket) as hold,
            aclosing(model.generate(job, tally)) as deltas,
        ):
            async for delta in deltas:
                hold.work(tally.completion_tokens - hold.tokens)
                yield delta

    def _ended(self, run: Run) -> None:
        """Nobody can join any more: it is complete, has failed, or was left by all. May be called twice."""
        known = self._live[run]
        if known.key is None or self._joinable.get(known.key) is not run:
            return
        del self._joinable[known.key]
        if complete(run.deltas, known.n):
            self._answers.put(known.key, run.deltas)

    def _settled(self, run: Run) -> None:
        """Count what was computed, and for whom."""
        known = self._live.pop(run)
        generated = max(known.tally.completion_tokens, run.deltas[-1].completion_tokens if run.deltas else 0)
        self._figures.add(PROMPT_TOKENS, known.version, known.tally.prompt_tokens)
        self._figures.add(GENERATED_TOKENS, known.version, generated)
        # Whoever asked first: those who joined, or were given a kept answer, made nobody compute.
        self._figures.charge(known.ticket.client, known.version.model, known.tally.prompt_tokens + generated)
        if not run.delivered:
            self._figures.add(WASTED_TOKENS, known.version, generated, outcome=run.left_as)

    def _in_flight(self) -> Iterator[tuple[Mapping[str, str], float]]:
        tokens: Counter[VersionKey] = Counter(dict.fromkeys(self._admission.versions, 0))
        for run, known in list(self._live.items()):
            if not run.ended:
                tokens[known.version] += known.tally.prompt_tokens + known.tally.completion_tokens
        for key, number in tokens.items():
            yield gauge_labels(key), number

    def _cache_bytes(self) -> Iterator[tuple[Mapping[str, str], float]]:
        yield {}, self._answers.bytes
