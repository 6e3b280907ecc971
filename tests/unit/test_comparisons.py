"""What is told of answers to copied requests, to whom, and what happens when nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest

from lingqu.metrics.v1 import answers_pb2
from lingqu.metrics.v1.answers_pb2_grpc import AnswerServiceServicer, add_AnswerServiceServicer_to_server
from services.core.discovery import VersionKey
from services.core.errors import BackendUnavailable, InvalidInput, QueueFull
from services.inference import comparisons
from services.inference.callers import Caller
from services.inference.classifier import Classes
from services.inference.comparisons import Comparisons
from services.inference.figures import Figures
from services.inference.text import Delta, GenerateJob
from tests.waiting import until

KEY = VersionKey("m", 2)
ORIGINAL, COPY = Caller(pair="p"), Caller(pair="p", copy=True)


class Listener(AnswerServiceServicer):
    def __init__(self) -> None:
        self.answers: list[Any] = []

    async def ReportAnswers(self, request: Any, context: Any) -> Any:
        self.answers += request.answers
        return answers_pb2.ReportAnswersResponse()


@asynccontextmanager
async def listening(address: str = "127.0.0.1:0") -> AsyncIterator[tuple[Listener, str]]:
    server, listener = grpc.aio.server(), Listener()
    add_AnswerServiceServicer_to_server(listener, server)
    port = server.add_insecure_port(address)
    await server.start()
    try:
        yield listener, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


class Model:
    """Splits at spaces; the tokens are lengths."""

    vocabulary = 7

    async def split(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparisons, "EVERY_S", 0.02)


async def told(*requests: tuple[Caller, Any]) -> list[Any]:
    """What the metrics service hears of requests that end with an answer, or with an error."""
    async with listening() as (listener, address):
        made = Comparisons(address)
        figures = Figures(ended=made.ended)
        async with made.running():
            for caller, result in (*requests, (ORIGINAL, comparisons.extract("last", "last"))):
                try:
                    with figures.request(KEY, caller) as request:
                        if isinstance(result, Exception):
                            raise result
                        request.answer = result
                except Exception:  # noqa: S110 - it is the caller's
                    pass
            await until(lambda: any(a.labels.labels == ["last"] for a in listener.answers), "the last one")
        return listener.answers[:-1]


async def test_what_two_versions_answered_can_be_compared() -> None:
    classes = Classes(np.asarray([[0.1, 0.9], [0.7, 0.8]], np.float32), 2)
    rows = np.asarray([[1.5, -2.0], [1e6, 0.0]], np.float32)
    job = GenerateJob("Hi", ())
    deltas = [Delta("a bb", index=0), Delta("zzz", index=1), Delta(" ccc", index=0)]
    found = await told(
        (ORIGINAL, comparisons.labels("q", classes, ("no", "yes"), False)),
        (COPY, comparisons.labels("q", classes, ("no", "yes"), True)),
        (COPY, comparisons.vectors(("q", None), rows)),
        (COPY, comparisons.generated(Model(), job, deltas)),
    )
    assert [(a.model, a.version, a.pair, a.copy) for a in found] == [
        ("m", 2, "p", copy) for copy in (False, True, True, True)
    ]
    assert list(found[0].labels.labels) == ["yes", "yes"]
    assert list(found[1].labels.labels) == ["yes", "no yes"]
    read = np.frombuffer(b"".join(v.fp16 for v in found[2].vectors.vectors), "<f2")
    assert list(read) == [1.5, -2.0, 65504.0, 0.0]
    assert len(found[3].tokens.digests) == 3 * 2
    assert found[3].tokens.vocabulary == 7
    assert found[0].input == found[1].input != found[2].input


async def test_equal_tokens_have_equal_digests_and_others_do_not() -> None:
    made = [
        comparisons.generated(Model(), GenerateJob("Hi", ()), [Delta(text)]) for text in ("a bb c", "a b c")
    ]
    one, other = [np.frombuffer(a.tokens.digests, "<u2") for a in await told(*((COPY, d) for d in made))]
    assert list(one == other) == [True, False, True]


async def test_what_is_the_versions_fault_is_told_and_what_is_not_is_not() -> None:
    found = await told(
        (COPY, RuntimeError("broken")),
        (COPY, BackendUnavailable("the engine died")),
        (COPY, QueueFull("full")),
        (COPY, InvalidInput("prompt", "is empty")),
        (Caller(), RuntimeError("not compared")),
        (Caller(), comparisons.extract("q", "not compared")),
        (COPY, None),
    )
    assert [a.WhichOneof("content") for a in found] == ["failure", "failure"]


async def test_who_does_not_listen_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparisons, "MOST_WAITING", 5)
    async with listening() as (_, address):
        pass
    made = Comparisons(address)
    figures = Figures(ended=made.ended)

    def ask() -> None:
        with figures.request(KEY, COPY) as request:
            request.answer = comparisons.extract("q", "a")

    for _ in range(50):
        ask()
    assert made.dropped == 45
    async with made.running():
        await until(lambda: made.dropped == 50, "the others are given up")
        async with listening(address) as (listener, _):

            def heard() -> bool:
                ask()
                return bool(listener.answers)

            await until(heard, "it is told again")


async def test_without_a_metrics_service_nothing_is_kept() -> None:
    made = Comparisons("")
    with Figures(ended=made.ended).request(KEY, COPY) as request:
        request.answer = comparisons.extract("q", "a")
    await asyncio.sleep(0)
    assert not made._waiting
