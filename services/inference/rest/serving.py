"""What the REST API needs of the rest of inference: models by name, and the two ways to run them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.core.errors import InvalidInput, WrongTask
from services.inference.admission import Admission
from services.inference.callers import Caller
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
    """`routed` is what the gateway says: the model it has read, and the version it has chosen."""

    routing: Routing
    generate: Generate
    embed: Embed

    def text(self, name: str, routed: tuple[str, str]) -> TextModel:
        """Raises what Routing.model raises, and WrongTask."""
        model = self.routing.model(name, _version(name, routed))
        if not isinstance(model, TextModel):
            raise WrongTask("model", f'"{name}" generates no text')
        return model

    def vector(self, name: str, routed: tuple[str, str]) -> VectorModel:
        """Raises what Routing.model raises, and WrongTask."""
        model = self.routing.model(name, _version(name, routed))
        if not isinstance(model, VectorModel):
            raise WrongTask("model", f'"{name}" makes no vectors')
        return model


def _version(name: str, routed: tuple[str, str]) -> str:
    """Raises InvalidInput where the gateway has read another name than this service: a body may name two, and
    which version may be asked for, and by whom, is decided by what the gateway has read."""
    model, version = routed
    if model and model != name:
        raise InvalidInput("model", "is given twice, with different names")
    return version


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
        return vectors

    return embed
