"""Models that say what a test wants them to say, and the REST API in front of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
import numpy as np
from opentelemetry.trace import NoOpTracerProvider, Tracer
from starlette.applications import Starlette

from services.core.discovery import Model, Version, VersionKey
from services.inference.backends.jobs import Finish
from services.inference.callers import Caller
from services.inference.rest.app import rest_app
from services.inference.rest.permits import Permits, everything
from services.inference.rest.server import serving_http
from services.inference.rest.serving import EmbedJob, Models
from services.inference.routing import Routing
from services.inference.served import TensorModel
from services.inference.text import Delta, GenerateJob, TextModel
from services.inference.vectors import VectorModel, Vectors
from tests.waiting import pause


class FakeText(TextModel):
    """A text model of a name only."""

    def __init__(self, name: str, version: int = 1) -> None:
        self.key = VersionKey(name, version)


class FakeVectors(VectorModel):
    def __init__(self, name: str) -> None:
        self.key = VersionKey(name, 1)


Script = Sequence[Delta | Exception | float]


def plain(*texts: str, finish: Finish = Finish.STOP) -> list[Delta]:
    """Deltas of one candidate."""
    last = Delta(texts[-1], finish, prompt_tokens=5, completion_tokens=len(texts))
    return [*(Delta(text) for text in texts[:-1]), last]


@dataclass
class Fakes:
    """What `generate` and `embed` were asked, and what they answer: deltas, errors, or seconds of silence."""

    script: Script | Callable[[GenerateJob], Script] = field(default_factory=lambda: plain("Hello", " world"))
    jobs: list[GenerateJob] = field(default_factory=list)
    embeds: list[EmbedJob] = field(default_factory=list)
    callers: list[Caller] = field(default_factory=list)
    running: int = 0
    stopped: int = 0

    async def generate(
        self, model: TextModel, job: GenerateJob, caller: Caller
    ) -> AsyncGenerator[Delta, None]:
        self.jobs.append(job)
        self.callers.append(caller)
        self.running += 1
        whole = False
        try:
            for item in self.script(job) if callable(self.script) else self.script:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, Delta):
                    yield item
                else:
                    await pause(item, "the script says so")
            whole = True
        finally:
            self.running -= 1
            self.stopped += not whole

    async def embed(self, model: VectorModel, job: EmbedJob, caller: Caller) -> Vectors:
        self.embeds.append(job)
        self.callers.append(caller)
        count = len(job.token_ids) or len(job.texts)
        values = np.arange(count * 4, dtype=np.float32).reshape(count, 4)
        return Vectors(values[:, : job.dimensions], 3 * count)

    def app(
        self,
        tracer: Tracer | None = None,
        limit: int = 64,
        keep_alive_s: float = 15.0,
        permits: Permits = everything,
    ) -> Starlette:
        names = {"text": "generate", "vectors": "embed", "numbers": "tensor"}
        versions = {
            name: Version(VersionKey(name, 1), "", "", task, "", created=7) for name, task in names.items()
        }
        models = {name: Model(name, (version,), ((1, 100),)) for name, version in versions.items()}
        models["loading"] = Model("loading", (versions["text"],), ((1, 100),))
        served: Any = {
            VersionKey("text", 1): FakeText("text"),
            VersionKey("text", 2): FakeText("text", 2),
            VersionKey("vectors", 1): FakeVectors("vectors"),
            VersionKey("numbers", 1): TensorModel(VersionKey("numbers", 1)),
        }
        routing = Routing(lambda: models, served)
        tracer = tracer or NoOpTracerProvider().get_tracer("test")
        return rest_app(Models(routing, self.generate, self.embed), tracer, limit, keep_alive_s, permits)

    @asynccontextmanager
    async def serving(self, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
        """A client of the API on a real port."""
        async with (
            serving_http(self.app(**options), "127.0.0.1:0", 1.0) as address,
            httpx.AsyncClient(base_url=f"http://{address}", timeout=20, trust_env=False) as client,
        ):
            yield client
