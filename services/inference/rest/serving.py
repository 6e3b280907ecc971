"""What the REST API needs of the rest of inference: models by name, and the two ways to run them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.core.errors import WrongTask
from services.inference import comparisons
from services.inference.admission import Admission
from services.inference.callers import Caller, answering, routed_version
from services.inference.routing import Routing
from services.inference.text import Delta, GenerateJob, TextModel
from services.inference.vectors import VectorModel, Vectors


class Generate(Protocol):
    """Deltas of whole characters. Leaving early stops the engine."""

    def __call__(self, model: TextModel, job: GenerateJob, caller: Caller) -> AsyncGenerator[Delta, None]: ...


@dataclass(frozen=True, slots=True)
class EmbedJob:
    """A checked request: texts, or rows of token ids."""

    texts: Sequence[str] = ()
    token_ids: Sequence[Sequence[int]] = ()
    dimensions: int | None = None


class Embed(Protocol):
    async def __call__(self, model: VectorModel, job: EmbedJob, caller: Caller) -> Vectors: ...


@dataclass(frozen=True, slots=True)
class Models:
    """`headers` are those of the request: the gateway tells there what it has read and chosen."""

    routing: Routing
    generate: Generate
    embed: Embed

    def text(self, name: str, headers: Mapping[str, str]) -> TextModel:
        """Raises what Routing.model raises, InvalidInput, and WrongTask."""
        model = self.routing.model(answering(name, headers), routed_version(name, headers))
        if not isinstance(model, TextModel):
            raise WrongTask("model", f'"{name}" generates no text')
        return model

    def vector(self, name: str, headers: Mapping[str, str]) -> VectorModel:
        """Raises what Routing.model raises, InvalidInput, and WrongTask."""
        model = self.routing.model(answering(name, headers), routed_version(name, headers))
        if not isinstance(model, VectorModel):
            raise WrongTask("model", f'"{name}" makes no vectors')
        return model


def admitted(admission: Admission) -> Embed:
    """Embedding behind the queue that all requests share."""

    async def embed(model: VectorModel, job: EmbedJob, caller: Caller) -> Vectors:
        async with admission.request(model.key, caller) as asked:
            if job.token_ids:
                vectors = await model.embed_tokens(
                    job.token_ids, caller.remaining, dimensions=job.dimensions, priority=caller.priority
                )
            else:
                vectors = await model.embed(
                    job.texts, caller.remaining, dimensions=job.dimensions, priority=caller.priority
                )
            asked.prompt_tokens = vectors.tokens
            asked_for = job.texts or job.token_ids
            question = (asked_for[: comparisons.TEXTS], job.dimensions)
            asked.answer = comparisons.vectors(question, vectors.values)
        return vectors

    return embed
