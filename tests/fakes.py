"""A text model whose every token a test decides on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from services.core.discovery import VersionKey
from services.inference.backends.jobs import Finish
from services.inference.text import Delta, GenerateJob, Tally, TextModel

PROMPT_TOKENS = 3


@dataclass(eq=False)
class Run:
    """One call of generate. `gate` lets it go on by a token each time it is released."""

    job: GenerateJob
    gate: asyncio.Semaphore
    made: int = 0
    ended: bool = False
    cut: bool = False


@dataclass
class FakeText(TextModel):
    """Answers `max_tokens` words "0 ", "1 ", … a candidate. With `held` only as many as `go` lets through;
    with `error` it fails instead of ending."""

    key: VersionKey = field(default_factory=lambda: VersionKey("fake", 1))
    held: bool = False
    error: Exception | None = None
    runs: list[Run] = field(default_factory=list)

    async def generate(self, job: GenerateJob, tally: Tally | None = None) -> AsyncGenerator[Delta, None]:
        run = Run(job, asyncio.Semaphore(0))
        self.runs.append(run)
        tally = tally or Tally()
        tally.prompt_tokens = PROMPT_TOKENS
        length = job.max_tokens or 8
        try:
            for number in range(length):
                for index in range(job.n):
                    if self.held:
                        await run.gate.acquire()
                    else:
                        await asyncio.sleep(0)
                    run.made += 1
                    tally.completion_tokens += 1
                    end = Finish.LENGTH if number == length - 1 else Finish.NONE
                    if end and self.error is not None:
                        raise self.error
                    counts = (PROMPT_TOKENS, run.made) if end and index == job.n - 1 else (0, 0)
                    yield Delta(f"{number} ", end, *counts, index=index)
            run.ended = True
        finally:
            run.cut = not run.ended

    def go(self, tokens: int = 1, run: int = -1) -> None:
        for _ in range(tokens):
            self.runs[run].gate.release()

    @property
    def active(self) -> int:
        return sum(not (run.ended or run.cut) for run in self.runs)
