"""Floods, deadlines and vanishing clients at a real gRPC server with the service's own layers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry.trace import NoOpTracer

from lingqu.client import LingquError
from lingqu.inference.v1 import inference_pb2 as pb
from lingqu.inference.v1.inference_pb2_grpc import (
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from services.core import http2
from services.core.discovery import Model, VersionKey
from services.core.interceptors import server_stack
from services.core.settings import Settings
from services.inference import figures as names
from services.inference.admission import Admission
from services.inference.answers import Answers
from services.inference.figures import Figures
from services.inference.generation import Generation
from services.inference.routing import Routing
from services.inference.service import Inference
from services.inference.vectors import VectorModel, Vectors
from tests.fakes import FakeText
from tests.waiting import until


class Served:
    """The service over a fake model, and a client of it."""

    def __init__(self, slots: int, queue: int) -> None:
        self.figures = Figures()
        self.model = FakeText()
        self.admission = Admission(slots, queue, self.figures)
        self.generation = Generation(self.admission, Answers(1 << 20), self.figures)
        self.vectors = FakeVectors()
        here = (self.model, self.vectors)
        models = {one.key.model: Model(one.key.model, (), ((1, 100),)) for one in here}
        self.routing = Routing(lambda: models, {one.key: one for one in here})
        self.channel: grpc.aio.Channel
        self.stub: Any

    def count(self, name: str, **labels: str) -> float:
        return self.figures.total(name, **labels)

    def stream(self, prompt: str = "x", timeout: float | None = None, **fields: Any) -> Any:
        request = pb.GenerateRequest(model="fake", prompt=prompt, **{"max_tokens": 5, **fields})
        return self.stub.StreamGenerate(request, timeout=timeout)

    @property
    def idle(self) -> bool:
        busy = (names.RUNNING, names.QUEUE_LENGTH)
        return not (self.model.active or self.generation._live or any(map(self.count, busy)))


@asynccontextmanager
async def served(slots: int = 4, queue: int = 100) -> AsyncIterator[Served]:
    it = Served(slots, queue)
    server = http2.Server(server_stack(NoOpTracer(), Settings().max_in_flight))
    service = Inference(it.routing, it.generation, it.admission)
    add_InferenceServiceServicer_to_server(service, server)
    port = server.listen("127.0.0.1:0")
    await server.start()
    async with it.generation.serving(lambda: {it.model.key}):
        it.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        it.stub = InferenceServiceStub(it.channel)
        try:
            yield it
        finally:
            await it.channel.close()
            await server.stop(0)


async def read(call: Any, errors: list[LingquError] | None = None) -> str:
    """The whole text of a stream, or the name of the error's reason."""
    try:
        return "".join([chunk.text async for chunk in call])
    except grpc.aio.AioRpcError as err:
        error = LingquError(err)
        if errors is not None:
            errors.append(error)
        return error.reason or error.code.name


async def test_two_thousand_at_once_on_a_queue_of_two_hundred() -> None:
    """Every one is answered: what slots and queue hold is computed, all others are told when to come back."""
    async with served(slots=50, queue=200) as it:
        it.model.held = True
        errors: list[LingquError] = []
        calls = [it.stream(f"{n}", max_tokens=2) for n in range(2000)]
        reading = [asyncio.ensure_future(read(call, errors)) for call in calls]
        await until(lambda: len(errors) == 1750, "all others are refused", 30)
        assert (it.count(names.RUNNING), it.count(names.QUEUE_LENGTH)) == (50, 200)
        it.model.held = False
        for run in range(len(it.model.runs)):
            it.model.go(2, run)
        async with asyncio.timeout(30):
            texts = Counter(await asyncio.gather(*reading))
        assert texts == {"0 1 ": 250, "QUEUE_FULL": 1750}
        assert {error.code for error in errors} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert all(0.1 <= (error.retry_after_s or 0) <= 30 for error in errors)
        await until(lambda: it.idle, "nothing is left")
        assert it.count(names.REQUESTS) == 2000
        assert await read(it.stream("again")) == "0 1 2 3 4 "


async def test_two_hundred_deadlines_at_once_end_at_once() -> None:
    async with served(slots=100, queue=200) as it:
        it.model.held = True
        began = time.monotonic()
        calls = [it.stream(f"{n}", timeout=1.0) for n in range(200)]
        reading = [asyncio.ensure_future(read(call)) for call in calls]
        await until(lambda: len(it.model.runs) == 100 and it.count(names.QUEUE_LENGTH) == 100, "all came")
        assert Counter(await asyncio.gather(*reading)) == {"DEADLINE_EXCEEDED": 200}
        await until(lambda: it.idle, "nothing is left", 2)
        assert time.monotonic() - began < 2.5
        assert it.count(names.REQUESTS, outcome="deadline") == 200


@pytest.mark.parametrize("timeout", [None, 0.3])
async def test_a_client_that_vanishes_at_any_stage_leaves_nothing(timeout: float | None) -> None:
    async with served(slots=1) as it:
        it.model.held = True
        running = it.stream("running", timeout=timeout)
        await until(lambda: it.count(names.RUNNING) == 1, "one runs")
        queued = it.stream("queued", timeout=timeout)
        following = it.stream("running", timeout=timeout)
        await until(lambda: it.count(names.QUEUE_LENGTH) == 1, "one waits")
        await until(lambda: it.count(names.CACHE_JOINED) == 1, "one follows")
        it.model.go(2)
        assert (await running.read()).text
        if timeout is None:
            calls = [queued, running, following]
            early = it.stream("early")
            early.cancel()
            for call in calls:
                call.cancel()
        outcome = "cancelled" if timeout is None else "deadline"
        await until(lambda: it.count(names.REQUESTS, outcome=outcome) >= 3, f"all are {outcome}", 3)
        await until(lambda: it.idle, "nothing is left", 2)
        assert it.count(names.WASTED_TOKENS, outcome=outcome) == 2
        assert it.model.runs[0].cut


async def test_a_client_that_stops_reading_and_then_vanishes_leaves_nothing() -> None:
    """The handler waits for the connection's flow control, not for the model."""
    async with served(slots=1) as it:
        call = it.stream(max_tokens=100_000)
        await call.read()
        run = it.model.runs[0]
        await until(lambda: run.made > 5000, "it goes on while nobody reads")
        call.cancel()
        await until(lambda: it.idle, "nothing is left", 2)
        assert run.cut
        assert it.count(names.WASTED_TOKENS, outcome="cancelled") == run.made


async def test_a_connection_that_breaks_leaves_nothing() -> None:
    async with served(slots=2) as it:
        it.model.held = True
        calls = [it.stream(f"{n}") for n in range(5)]
        await until(lambda: it.count(names.QUEUE_LENGTH) == 3, "three wait")
        await it.channel.close(grace=None)
        await until(lambda: it.idle, "nothing is left", 3)
        assert it.count(names.REQUESTS, outcome="cancelled") == len(calls)


class FakeVectors(VectorModel):
    """One vector a text, when it is told."""

    def __init__(self) -> None:
        self.key = VersionKey("vectors", 1)
        self.go = asyncio.Event()

    async def embed(self, texts: Sequence[str], timeout: float | None = None, **_options: Any) -> Vectors:
        await self.go.wait()
        return Vectors(np.ones((len(texts), 2), np.float32), 3 * len(texts))


async def test_embed_waits_is_refused_and_is_counted_alike() -> None:
    async with served(slots=1, queue=1) as it:
        request = pb.EmbedRequest(model="vectors", inputs=["a", "b"], priority=pb.PRIORITY_BATCH)
        first, second = it.stub.Embed(request), it.stub.Embed(request, timeout=0.3)
        await until(lambda: it.count(names.QUEUE_LENGTH, priority="batch") == 1, "one waits")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await it.stub.Embed(request)
        assert LingquError(refused.value).reason == "QUEUE_FULL"
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await second
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        it.vectors.go.set()
        assert len((await first).embeddings) == 2
        await until(lambda: it.idle, "nothing is left")
        outcomes = {o: it.count(names.REQUESTS, outcome=o) for o in ("ok", "refused", "deadline")}
        assert outcomes == {"ok": 1, "refused": 1, "deadline": 1}
        assert it.count(names.PROMPT_TOKENS) == 6


async def test_vanishing_while_the_cache_replays_leaves_nothing() -> None:
    async with served() as it:
        await read(it.stream(n=8))
        calls = [it.stream(n=8) for _ in range(20)]
        for call in calls:
            await asyncio.sleep(0)
            call.cancel()
        await until(lambda: it.idle, "nothing is left")
        assert len(it.model.runs) == 1
        assert it.count(names.WASTED_TOKENS) == 0


async def test_a_hundred_identical_streams_cost_one_run() -> None:
    async with served() as it:
        texts = await asyncio.gather(*[read(it.stream()) for _ in range(100)])
        assert set(texts) == {"0 1 2 3 4 "}
        assert len(it.model.runs) == 1
        chunks = [chunk async for chunk in it.stream()]
        assert [(c.cached, c.usage.completion_tokens, c.finish_reason) for c in chunks] == [
            (True, 5, pb.FINISH_REASON_LENGTH)
        ]
        answer = await it.stub.Generate(pb.GenerateRequest(model="fake", prompt="x", max_tokens=5))
        assert (answer.text, answer.cached) == ("0 1 2 3 4 ", True)
