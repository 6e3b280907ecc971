"""A text model as this service serves it: tokenise, generate in Triton, detokenise, stop."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from services.core.discovery import VersionKey
from services.core.errors import InvalidInput, Unsupported
from services.core.telemetry import current_traceparent
from services.inference.artifact import TextSpec
from services.inference.backends.engine import Finish, Grammar, Sampling
from services.inference.chat import ChatTemplate, Tool, Turn
from services.inference.session import Session
from services.inference.stops import StopFilter
from services.inference.tokens import Detokenizer, Tokens, unblocked

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class GenerateJob:
    """A checked request: `prompt` or `turns`; `max_tokens` None leaves it to the model. `seed` None: nobody
    chose one. `cached` False: neither from the cache nor into it."""

    prompt: str | None
    turns: tuple[Turn, ...]
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: bool = False
    grammar: Grammar | None = None
    tools: tuple[Tool, ...] = ()
    cached: bool = True

    @property
    def deterministic(self) -> bool:
        """Whether the same job has the same answer."""
        return self.temperature == 0 or self.seed is not None


@dataclass(frozen=True, slots=True)
class Logprob:
    """A generated token and the natural logarithm of its probability."""

    token: int
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of candidate `index`. `finish` is set on the last piece of a candidate; the counts, over all
    candidates, are final in the very last piece. `cached`: it was not computed for this request."""

    text: str
    finish: Finish = Finish.NONE
    prompt_tokens: int = 0
    completion_tokens: int = 0
    index: int = 0
    logprobs: tuple[Logprob, ...] = ()
    cached: bool = False


class TextModel:
    """One version of a text model in one Triton."""

    def __init__(self, key: VersionKey, spec: TextSpec, folder: Path, session: Session) -> None:
        self.key = key
        self.session = session
        self._spec = spec
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        template = folder / "chat_template.jinja"
        self._template = ChatTemplate(template.read_text()) if template.is_file() else None

    async def close(self) -> None:
        await self.session.close()

    async def generate(self, job: GenerateJob) -> AsyncGenerator[Delta, None]:
        """Deltas of whole characters; nothing behind a stop string. Leaving early stops the engine.

        Raises InvalidInput, QueueFull, BackendUnavailable."""
        prompt = await self._encode(job)
        sampling = self._sampling(job, len(prompt))
        detokenizer, stops = Detokenizer(self._tokenizer), StopFilter(job.stop)
        produced = 0
        async with aclosing(self.session.generate(prompt, sampling, current_traceparent())) as steps:
            async for step in steps:
                produced += len(step.tokens)
                text = stops.push(detokenizer.push(step.tokens))
                finish = Finish.STOP if stops.stopped else step.finish
                if step.finish and not stops.stopped:
                    text += stops.push(detokenizer.finish())
                    finish = Finish.STOP if stops.stopped else step.finish
                    text += stops.finish()
                if finish:
                    yield Delta(text, finish, len(prompt), produced)
                    return
                if text:
                    yield Delta(text)

    async def tokenize(self, prompt: str, turns: tuple[Turn, ...], tools: tuple[Tool, ...]) -> Tokens:
        """A text, or a chat as its template renders it, however long. Raises InvalidInput."""
        if turns and self._template is None:
            raise InvalidInput("messages", f"{self.key.model} has no chat template; send text instead")
        if tools:
            raise Unsupported("tools", f"the chat template of {self.key.model} knows no tools")
        text = self._template.render(turns) if turns and self._template else prompt
        encoding = await unblocked(
            len(text), lambda: self._tokenizer.encode(text, add_special_tokens=not turns)
        )
        return Tokens(encoding.ids, encoding.tokens, self._spec.context_tokens)

    async def _encode(self, job: GenerateJob) -> list[int]:
        if job.turns:
            if self._template is None:
                raise InvalidInput("messages", f"{self.key.model} has no chat template; send prompt instead")
            field, text, special = "messages", self._template.render(job.turns), False
        else:
            field, text, special = "prompt", job.prompt or "", True
        encoding = await unblocked(
            len(text), lambda: self._tokenizer.encode(text, add_special_tokens=special)
        )
        ids: list[int] = encoding.ids
        if len(ids) >= self._spec.context_tokens:
            raise InvalidInput(
                field,
                f"{len(ids)} tokens do not fit the context of {self._spec.context_tokens} tokens "
                f"with at least one token of answer",
            )
        return ids

    def _sampling(self, job: GenerateJob, prompt_tokens: int) -> Sampling:
        room = self._spec.context_tokens - prompt_tokens
        wanted = min(DEFAULT_MAX_TOKENS, room) if job.max_tokens is None else job.max_tokens
        if wanted > room:
            raise InvalidInput(
                "max_tokens", f"{wanted}, but the prompt of {prompt_tokens} tokens leaves room for {room}"
            )
        return Sampling(wanted, job.temperature, job.top_p, job.top_k, job.seed or 0)
