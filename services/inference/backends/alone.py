"""A stream that is alone is computed with guesses; as soon as there are others, it joins them.

Guesses (prompt lookup: what followed the last tokens before) make several tokens a step where texts repeat
themselves. They cost where streams share a step, and the pipeline for many cannot guess for one of them: so
there are two runtimes of the same weights, and a stream moves from one to the other. Only greedy streams
guess: other ones would draw other tokens alone than in company. A stream that moves is computed again up to
where it is, as a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from services.inference.backends.jobs import NOTHING, Handle, Job, Output, Runtime, Sampling

MIN_TOKENS = 8  # shorter answers are not worth another runtime
PROMPT_TOKENS = 320  # longer ones are computed in slices, which takes the prefix cache
MOST_TOKENS = 4096  # of prompt and answer; what grows beyond moves
QUIET_S = 0.25  # without company, before a stream counts as alone: a long prompt pauses between its slices


class Alone:
    """A runtime over two: `shared` for all, `guessing` for one stream at a time, the guest."""

    def __init__(
        self, shared: Runtime, guessing: Runtime, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._shared = shared
        self._guessing = guessing
        self._clock = clock
        self._guest: _Guest | None = None
        self._company: list[Handle] = []
        self._company_at = -QUIET_S  # when there last was some

    def add(self, number: int, job: Job) -> Handle:
        guest = self._present()
        if guest is None and suits(job) and self._is_quiet():
            self._guest = _Guest(number, job, self._guessing.add(number, job))
            return self._guest
        handle = self._shared.add(number, job)
        self._company.append(handle)
        if guest is not None:
            guest.is_leaving = True
        return handle

    def step(self) -> None:
        """One of each that has something to compute. A guest that leaves is not waited for."""
        guest = self._present()
        if guest is not None and not guest.is_leaving:
            self._guessing.step()
        if self._has_company():
            self._shared.step()

    def displaced(self) -> Sequence[tuple[int, Job]]:
        guest = self._present()
        if guest is None or not (guest.is_leaving or guest.length() >= MOST_TOKENS):
            return ()
        self._guest = None
        guest.cancel()
        return ((guest.number, guest.rest()),)

    def cache(self) -> float | None:
        """Of the one for all: a guest has a cache that grows."""
        return self._shared.cache()

    def _present(self) -> _Guest | None:
        if self._guest is not None and self._guest.is_over():
            self._guest = None
        return self._guest

    def _is_quiet(self) -> bool:
        return not self._has_company() and self._clock() - self._company_at >= QUIET_S

    def _has_company(self) -> bool:
        self._company = [handle for handle in self._company if not handle.is_over()]
        if self._company:
            self._company_at = self._clock()
        return bool(self._company)


def suits(job: Job) -> bool:
    """Whether guesses change nothing about the answer but when it comes."""
    plain = Sampling(job.sampling.max_tokens)
    greedy = replace(job.sampling, seed=0, top_p=1.0, top_k=0, min_p=0.0)  # of no effect at temperature 0
    return greedy == plain and plain.max_tokens >= MIN_TOKENS and len(job.input_ids) <= PROMPT_TOKENS


@dataclass(slots=True)
class _Guest:
    """The Handle of a stream that is alone."""

    number: int
    job: Job
    handle: Handle
    tokens: list[int] = field(default_factory=list)
    is_leaving: bool = False

    def take(self) -> Output:
        made = NOTHING if self.is_over() else self.handle.take()
        self.tokens += made.tokens
        return made

    def cancel(self) -> None:
        if not self.is_over():
            self.handle.cancel()

    def is_over(self) -> bool:
        return self.handle.is_over()

    def length(self) -> int:
        return len(self.job.input_ids) + len(self.tokens)

    def rest(self) -> Job:
        """What is left to compute, when all that was made has been read."""
        left = replace(self.job.sampling, max_tokens=self.job.sampling.max_tokens - len(self.tokens))
        return replace(self.job, input_ids=[*self.job.input_ids, *self.tokens], sampling=left)
