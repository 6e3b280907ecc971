"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from lingqu.inference.v1 import inference_pb2 as pb
from services.core.errors import InvalidInput, Unsupported
from services.inference import convert
from services.inference.callers import Caller
from services.inference.rest import answers, jobs
from services.inference.rest.answers import Answer, Events, Heading, whole
from services.inference.rest.bodies import parsed
from services.inference.rest.endpoint import Asked
from services.inference.rest.merging import merged
from services.inference.rest.schemas import MAX_CHOICES, CompletionRequest
from services.inference.rest.serving import Models
from services.inference.rest.sse import DONE, Chunks
from services.inference.text import Delta, GenerateJob, Logprob, TextModel

OBJECT = "text_completion"
DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True, slots=True)
class _Run:
    """A request on its way: a job for each prompt."""

    request: CompletionRequest
    jobs: Sequence[GenerateJob]
    model: TextModel
    heading: Heading
    caller: Caller

    @property
    def n(self) -> int:
        return self.jobs[0].n

    @property
    def choices(self) -> int:
        return self.n * len(self.jobs)

    def echoed(self, choice: int) -> str:
        return (self.jobs[choice // self.n].prompt or "") if self.request.echo else ""


class Completions:
    def __init__(self, models: Models) -> None:
        self._models = models

    async def __call__(self, asked: Asked) -> Answer:
        request = parsed(asked.body, CompletionRequest)
        made = to_jobs(request)
        model = self._models.text(request.model, asked.headers)
        heading = Heading.new("cmpl", request.model, model.key.version)
        caller = asked.caller(jobs.priority(request), stream=bool(request.stream))
        run = _Run(request, made, model, heading, caller)
        return Events(self._events(run)) if request.stream else await self._whole(run)

    async def _deltas(self, run: _Run) -> AsyncGenerator[tuple[int, Delta], None]:
        """Deltas with the choice they belong to, of all prompts at once."""

        async def one(at: int, job: GenerateJob) -> AsyncGenerator[tuple[int, Delta], None]:
            with jobs.openai_names(run.request, f"prompt[{at}]" if len(run.jobs) > 1 else "prompt"):
                async with aclosing(self._models.generate(run.model, job, run.caller)) as deltas:
                    async for delta in deltas:
                        yield at * run.n + delta.index, delta

        async with aclosing(merged([one(at, job) for at, job in enumerate(run.jobs)])) as deltas:
            async for found in deltas:
                yield found

    async def _whole(self, run: _Run) -> Answer:
        texts = [[run.echoed(choice)] for choice in range(run.choices)]
        logprobs: list[list[Logprob]] = [[] for _ in texts]
        finishes: list[str | None] = [None] * len(texts)
        read, written = [0] * len(run.jobs), [0] * len(run.jobs)
        async with aclosing(self._deltas(run)) as deltas:
            async for choice, delta in deltas:
                texts[choice].append(delta.text)
                logprobs[choice] += delta.logprobs
                finishes[choice] = answers.FINISH.get(delta.finish, finishes[choice])
                _count(choice // run.n, delta, read, written)
        choices = [
            _choice(
                at,
                "".join(texts[at]),
                finishes[at],
                _logprobs(logprobs[at], 0) if run.jobs[0].logprobs else None,
            )
            for at in range(run.choices)
        ]
        used = answers.usage(sum(read), sum(written))
        return whole({**run.heading.of(OBJECT), "choices": choices, "usage": used})

    async def _events(self, run: _Run) -> AsyncGenerator[bytes, None]:
        with_usage = jobs.wants_usage(run.request)
        chunks = Chunks(run.heading.of(OBJECT), with_usage=with_usage)
        begun, lengths = set[int](), [0] * run.choices
        read, written = [0] * len(run.jobs), [0] * len(run.jobs)
        async with aclosing(self._deltas(run)) as deltas:
            async for choice, delta in deltas:
                text = delta.text if choice in begun else run.echoed(choice) + delta.text
                begun.add(choice)
                _count(choice // run.n, delta, read, written)
                logprobs = _logprobs(delta.logprobs, lengths[choice]) if run.jobs[0].logprobs else None
                lengths[choice] += sum(len(answers.token_text(one)) for one in delta.logprobs)
                if text or delta.finish or delta.logprobs:
                    yield chunks.choice(_choice(choice, text, answers.FINISH.get(delta.finish), logprobs))
        used = answers.usage(sum(read), sum(written))
        yield (chunks.usage(used) if with_usage else b"") + DONE


def to_jobs(request: CompletionRequest) -> list[GenerateJob]:
    """One for each prompt. Raises InvalidInput, naming OpenAI's parameter."""
    if request.suffix is not None:
        raise Unsupported("suffix", "text can only be continued, not filled in")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise Unsupported("best_of", "must be n: candidates are not chosen among")
    if request.logprobs is not None and request.logprobs > 1:
        raise Unsupported("logprobs", "the engine tells the chosen token's log-probability only: at most 1")
    prompts = _prompts(request.prompt)
    if request.echo and not isinstance(prompts[0], str):
        raise Unsupported("echo", "is for prompts that are text")
    if request.echo and request.logprobs is not None:
        raise Unsupported("echo", "the prompt's log-probabilities cannot be told: leave logprobs out")
    if len(prompts) * (request.n or 1) > MAX_CHOICES:
        raise InvalidInput(
            "prompt", f"{len(prompts)} prompts × n, but at most {MAX_CHOICES} answers are made"
        )
    fields = jobs.common(request)
    fields["max_tokens"] = request.max_tokens or DEFAULT_MAX_TOKENS
    made = []
    for at, prompt in enumerate(prompts):
        name = f"prompt[{at}]" if len(prompts) > 1 else "prompt"
        with jobs.openai_names(request, name):
            text = prompt if isinstance(prompt, str) else " "
            if not prompt:
                raise InvalidInput("prompt", "is empty")
            job = convert.to_generate_job(
                pb.GenerateRequest(**fields, prompt=text, logprobs=request.logprobs is not None)
            )
        made.append(job if isinstance(prompt, str) else replace(job, prompt=None, prompt_ids=tuple(prompt)))
    return made


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidInput("prompt", "is empty")
    if isinstance(given[0], int):
        return [given]
    return given


def _count(at: int, delta: Delta, read: list[int], written: list[int]) -> None:
    """The counts of a prompt's very last piece are final."""
    if delta.prompt_tokens:
        read[at], written[at] = delta.prompt_tokens, delta.completion_tokens


def _choice(at: int, text: str, finish: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": at, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _logprobs(found: Sequence[Logprob], offset: int) -> dict[str, Any]:
    """`offset`: where the first token begins in the answer, in characters."""
    tokens = [answers.token_text(one) for one in found]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [one.logprob for one in found],
        "top_logprobs": None,
        "text_offset": offsets,
    }
