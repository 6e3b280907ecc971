"""Tells the metrics service what was answered to copied requests and to their originals, so that a version
can be compared with the one that it is to replace. Beside the requests: what finds no room, or nobody who
takes it, is left out and counted."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import grpc
import numpy as np
import numpy.typing as npt

from lingqu.metrics.v1 import answers_pb2 as pb
from lingqu.metrics.v1.answers_pb2_grpc import AnswerServiceStub
from services.core import tls
from services.core.backoff import Backoff
from services.core.discovery import VersionKey
from services.core.lifecycle import CHANNEL_OPTIONS
from services.core.tasks import background
from services.core.tls import Identity
from services.inference.callers import Caller
from services.inference.classifier import Classes
from services.inference.figures import Outcome, Request
from services.inference.text import Delta, GenerateJob

log = logging.getLogger(__name__)

EVERY_S = 0.5
TIMEOUT_S = 2.0
MOST_WAITING, MOST_TOLD = 2_000, 200
# Of one answer; the rest of a long one tells nothing new.
TEXTS, LABEL_CHARACTERS = 16, 256
TOKENS = 1024
Content = pb.AnswerLabels | pb.Vectors | pb.AnswerTokens | pb.AnswerFailure
Digest = Callable[[], Awaitable[tuple[int, Content]]]
"""What was asked, as a number, and what was answered."""


@dataclass(frozen=True, slots=True)
class _Answer:
    key: VersionKey
    caller: Caller
    digest: Digest


class Splits(Protocol):
    """A text model, as far as its answers are compared."""

    @property
    def vocabulary(self) -> int: ...

    async def split(self, text: str) -> list[int]: ...


class Comparisons:
    """`address` is the metrics service's, empty: nobody is told. `dropped`: answers that were left out."""

    def __init__(self, address: str, identity: Identity | None = None) -> None:
        self._address, self._identity = address, identity
        self._waiting: deque[_Answer] = deque()
        self._some = asyncio.Event()
        self.dropped = 0

    def ended(self, key: VersionKey, caller: Caller, request: Request, outcome: Outcome) -> None:
        """A request that has ended, with `request.answer` if it has one."""
        digest = request.answer if outcome is Outcome.OK else _BY_FAILURE.get(outcome)
        if digest is None or not caller.pair or not self._address:
            return
        if len(self._waiting) >= MOST_WAITING:
            self.dropped += 1
            return
        self._waiting.append(_Answer(key, caller, digest))
        self._some.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with background(self._run()):
            yield

    async def _run(self) -> None:
        backoff, failing = Backoff(EVERY_S, 5.0), False
        async with tls.channel(self._address, CHANNEL_OPTIONS, self._identity) as channel:
            stub = AnswerServiceStub(channel)
            while True:
                await self._some.wait()
                await asyncio.sleep(EVERY_S)
                told = [self._waiting.popleft() for _ in range(min(len(self._waiting), MOST_TOLD))]
                if not self._waiting:
                    self._some.clear()
                request = pb.ReportAnswersRequest(answers=[await _message(answer) for answer in told])
                try:
                    await stub.ReportAnswers(request, timeout=TIMEOUT_S)
                except grpc.aio.AioRpcError as err:
                    self.dropped += len(told)
                    if not failing:
                        log.warning("answers are not compared: %s %s", self._address, err.details())
                    failing = True
                    await asyncio.sleep(backoff.delay())
                else:
                    failing = False
                    backoff.reset()


async def _message(answer: _Answer) -> pb.Answer:
    question, content = await answer.digest()
    message = pb.Answer(
        model=answer.key.model,
        version=answer.key.version,
        pair=answer.caller.pair,
        copy=answer.caller.copy,
        input=question,
    )
    match content:
        case pb.AnswerLabels():
            message.labels.CopyFrom(content)
        case pb.Vectors():
            message.vectors.CopyFrom(content)
        case pb.AnswerTokens():
            message.tokens.CopyFrom(content)
        case _:
            message.failure.CopyFrom(content)
    return message


async def _failure() -> tuple[int, Content]:
    return 0, pb.AnswerFailure()


# What is the version's own fault.
_BY_FAILURE: Mapping[Outcome, Digest] = {Outcome.FAILED: _failure, Outcome.UNAVAILABLE: _failure}


def vectors(question: object, values: npt.NDArray[np.float32]) -> Digest:
    """Of FP32 [texts, components]."""

    async def digest() -> tuple[int, Content]:
        rows = np.clip(values[:TEXTS], *_FP16).astype("<f2")
        return number(question), pb.Vectors(vectors=[pb.Vector(fp16=row.tobytes()) for row in rows])

    return digest


def labels(question: object, classes: Classes, names: Sequence[str], multi_label: bool) -> Digest:
    """The likeliest of each text; of a model that gives several, all that are likelier than not."""

    async def digest() -> tuple[int, Content]:
        found = []
        for row in classes.scores[:TEXTS]:
            likely = np.flatnonzero(row >= 0.5) if multi_label else [int(np.argmax(row))]
            found.append(" ".join(names[index] for index in likely)[:LABEL_CHARACTERS])
        return number(question), pb.AnswerLabels(labels=found)

    return digest


def extract(question: object, text: str) -> Digest:
    """Of what was found in a text; empty for nothing."""

    async def digest() -> tuple[int, Content]:
        return number(question), pb.AnswerLabels(labels=[text[:LABEL_CHARACTERS]])

    return digest


def generated(model: Splits, job: GenerateJob, deltas: Sequence[Delta]) -> Digest:
    """Of the first candidate, as the model's own tokenizer splits it; `deltas` may be still to come."""

    async def digest() -> tuple[int, Content]:
        text = "".join(delta.text for delta in deltas if delta.index == 0)
        ids = np.asarray(await model.split(text), np.uint64)[:TOKENS]
        # Multiplicative hashing (Knuth, TAOCP 3, 6.4): the upper half of the lower 32 bits.
        hashes = ((ids * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)) >> np.uint64(16)
        tokens = pb.AnswerTokens(digests=hashes.astype("<u2").tobytes(), vocabulary=model.vocabulary)
        return number(job), tokens

    return digest


def number(question: object) -> int:
    """Equal for questions that are."""
    said = repr(question).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little")


_FP16 = (float(np.finfo(np.float16).min), float(np.finfo(np.float16).max))
