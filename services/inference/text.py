"""A text model as this service serves it: tokenise, generate in Triton, detokenise, stop."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from services.core.discovery import VersionKey
from services.core.errors import InvalidInput, Unsupported
from services.core.telemetry import current_traceparent
from services.inference.artifact import TextSpec
from services.inference.backends.jobs import Finish, Grammar, Sampling
from services.inference.chat import ChatTemplate, Tool, Turn
from services.inference.grammars import Grammars
from services.inference.session import Session, Step
from services.inference.stops import StopFilter
from services.inference.streams import interleaved
from services.inference.tokens import Detokenizer, Tokens, special_tokens, token_bytes, unblocked

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
    prompt_ids: tuple[int, ...] | None = None
    """Tokens to continue, in place of `prompt` and `turns`."""

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


@dataclass(slots=True)
class Tally:
    """What a generation has read and made so far, for who has to know it of an answer that was cut short."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Scored:
    """The scored tokens of a text, and how many were read, prefix included."""

    tokens: tuple[Logprob, ...]
    read: int


class TextModel:
    """One version of a text model in one Triton."""

    def __init__(
        self,
        key: VersionKey,
        spec: TextSpec,
        folder: Path,
        session: Session,
        unfit: Callable[[int], str | None] = lambda tokens: None,
        kv_tokens: int = 0,
    ) -> None:
        """`unfit`: why so many tokens, prompt and answer, can never be computed here; None if they can.
        `kv_tokens`: how many the KV cache has room for, 0 if that is not known."""
        self.key = key
        self.kv_tokens = kv_tokens
        self._unfit = unfit
        self.session = session
        self._spec = spec
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        template = folder / "chat_template.jinja"
        special = special_tokens(self._tokenizer, spec.eos_token_ids)
        self._template = ChatTemplate(template.read_text(), special) if template.is_file() else None
        self._grammars = Grammars(folder, folder / spec.grammar) if spec.grammar else None

    async def close(self) -> None:
        await self.session.close()
        if self._grammars is not None:
            await self._grammars.close()

    async def generate(self, job: GenerateJob, tally: Tally | None = None) -> AsyncGenerator[Delta, None]:
        """Deltas of whole characters; nothing behind a stop string. Leaving early stops the engine.

        Raises InvalidInput, QueueFull, BackendUnavailable."""
        prompt = await self._encode(job)
        sampling = self._sampling(job, len(prompt))
        if sampling.grammar is not None:
            await self._check(sampling.grammar)
        pieces = [
            self._candidate(index, prompt, replace(sampling, seed=(sampling.seed + index) % 2**64), job.stop)
            for index in range(job.n)
        ]
        tally = tally or Tally()
        tally.prompt_tokens = len(prompt)
        last: Delta | None = None
        async with aclosing(interleaved(pieces)) as deltas:
            async for delta, tokens in deltas:
                tally.completion_tokens += tokens
                if last is not None:
                    yield last
                last = delta if delta.finish else None
                if last is None and (delta.text or delta.logprobs):
                    yield delta
        if last is not None:
            yield replace(last, prompt_tokens=len(prompt), completion_tokens=tally.completion_tokens)

    async def _candidate(
        self, index: int, prompt: list[int], sampling: Sampling, stop: Sequence[str]
    ) -> AsyncGenerator[tuple[Delta, int], None]:
        """One answer: what came, and how many tokens it took."""
        detokenizer, stops = Detokenizer(self._tokenizer), StopFilter(stop)
        async with aclosing(self.session.generate(prompt, sampling, current_traceparent())) as steps:
            async for step in steps:
                text = stops.push(detokenizer.push(step.tokens))
                finish = Finish.STOP if stops.stopped else step.finish
                if step.finish and not stops.stopped:
                    text += stops.push(detokenizer.finish())
                    finish = Finish.STOP if stops.stopped else step.finish
                    text += stops.finish()
                logprobs = self._logprobs(step) if sampling.logprobs else ()
                yield Delta(text, finish, index=index, logprobs=logprobs), len(step.tokens)
                if finish:
                    return

    def _logprobs(self, step: Step) -> tuple[Logprob, ...]:
        return tuple(
            Logprob(token, token_bytes(self._tokenizer, token), logprob)
            for token, logprob in zip(step.tokens, step.logprobs, strict=False)
        )

    async def score(self, texts: Sequence[str], prefix: str = "") -> list[Scored]:
        """Each text behind `prefix`, one after the other. Raises InvalidInput naming the text, and what
        Session.score raises."""
        found = []
        for index, text in enumerate(texts):
            whole = prefix + text
            encoding = await unblocked(len(whole), lambda whole=whole: self._tokenizer.encode(whole))  # type: ignore[misc]
            ids: list[int] = encoding.ids
            if len(ids) > self._spec.context_tokens:
                raise InvalidInput(
                    f"inputs[{index}]",
                    f"{len(ids)} tokens with its prefix, but the context has {self._spec.context_tokens}",
                )
            # The first token that reaches into the text; the very first has nothing that predicts it.
            begin = next((i for i, (_, end) in enumerate(encoding.offsets) if end > len(prefix)), len(ids))
            begin = max(1, begin)
            logprobs = (await self.session.score(ids))[begin - 1 :] if len(ids) > begin else ()
            tokens = tuple(
                Logprob(token, token_bytes(self._tokenizer, token), float(logprob))
                for token, logprob in zip(ids[begin:], logprobs, strict=True)
            )
            found.append(Scored(tokens, len(ids)))
        return found

    async def _check(self, grammar: Grammar) -> None:
        """Raises InvalidInput."""
        if self._grammars is None:
            raise Unsupported("response_format", f"{self.key.model} was published without a grammar model")
        await self._grammars.check(grammar)

    async def split(self, text: str) -> list[int]:
        """The tokens of an answer."""
        encoding = await unblocked(len(text), lambda: self._tokenizer.encode(text, add_special_tokens=False))
        ids: list[int] = encoding.ids
        return ids

    @cached_property
    def vocabulary(self) -> int:
        """Equal, of 64 bits, for models whose tokens mean the same."""
        said = repr(sorted(self._tokenizer.get_vocab().items())).encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little")

    async def tokenize(self, prompt: str, turns: tuple[Turn, ...], tools: tuple[Tool, ...]) -> Tokens:
        """A text, or a chat as its template renders it, however long. Raises InvalidInput."""
        if turns and self._template is None:
            raise Unsupported("messages", f"{self.key.model} has no chat template; send text instead")
        text = self._template.render(turns, tools) if turns and self._template else prompt
        encoding = await unblocked(
            len(text), lambda: self._tokenizer.encode(text, add_special_tokens=not turns)
        )
        return Tokens(encoding.ids, encoding.tokens, self._spec.context_tokens)

    async def _encode(self, job: GenerateJob) -> list[int]:
        field, ids = await self._prompt(job)
        if len(ids) >= self._spec.context_tokens:
            raise InvalidInput(
                field,
                f"{len(ids)} tokens do not fit the context of {self._spec.context_tokens} tokens "
                f"with at least one token of answer",
            )
        return ids

    async def _prompt(self, job: GenerateJob) -> tuple[str, list[int]]:
        """The field that it is in, and its tokens. Raises InvalidInput."""
        if job.prompt_ids is not None:
            if max(job.prompt_ids) >= (size := self._tokenizer.get_vocab_size()):
                raise InvalidInput("prompt", f"a token id is not below {size}, the size of the vocabulary")
            return "prompt", list(job.prompt_ids)
        field, text, special = self._rendered(job)
        encoding = await unblocked(
            len(text), lambda: self._tokenizer.encode(text, add_special_tokens=special)
        )
        return field, encoding.ids

    def _rendered(self, job: GenerateJob) -> tuple[str, str, bool]:
        """Field of the request, the text to tokenise, and whether the tokenizer adds its special tokens."""
        if not job.turns:
            return "prompt", job.prompt or "", True
        if self._template is None:
            raise Unsupported("messages", f"{self.key.model} has no chat template; send prompt instead")
        return "messages", self._template.render(job.turns, job.tools), False

    def _sampling(self, job: GenerateJob, prompt_tokens: int) -> Sampling:
        room = self._spec.context_tokens - prompt_tokens
        wanted = min(DEFAULT_MAX_TOKENS, room) if job.max_tokens is None else job.max_tokens
        if wanted > room:
            raise InvalidInput(
                "max_tokens", f"{wanted}, but the prompt of {prompt_tokens} tokens leaves room for {room}"
            )
        if (why := self._unfit(prompt_tokens + wanted)) is not None:
            raise InvalidInput("max_tokens", f"{wanted}, but with a prompt of {prompt_tokens} tokens {why}")
        seed = job.seed if job.seed is not None else secrets.randbits(63) if job.temperature else 0
        return Sampling(
            max_tokens=wanted,
            temperature=job.temperature,
            top_p=job.top_p,
            top_k=job.top_k,
            seed=seed,
            min_p=job.min_p,
            repetition_penalty=job.repetition_penalty,
            presence_penalty=job.presence_penalty,
            frequency_penalty=job.frequency_penalty,
            logprobs=job.logprobs,
            grammar=job.grammar,
        )
