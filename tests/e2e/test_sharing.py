"""Equal requests through the public port: computed once, given to all, kept, given up when nobody is left."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

import lingqu
from bench.suite import Suite
from lingqu.inference.v1 import inference_pb2 as pb
from pipeline.bundled import TEXT_MODEL
from tests.engine import idle


@pytest.fixture
async def client(suite: Suite) -> AsyncIterator[lingqu.Client]:
    async with lingqu.Client(suite.public, suite.key, timeout=30) as client:
        yield client


def fresh() -> str:
    """A prompt that nobody has sent before."""
    return f"Report {uuid.uuid4().hex}: the canal joined two rivers and"


async def collected(stream: Any) -> list[pb.GenerateChunk]:
    return [chunk async for chunk in stream]


async def test_a_hundred_identical_streams_cost_one(suite: Suite, client: lingqu.Client) -> None:
    before, prompt = await idle(suite), fresh()
    streams = [collected(client.stream(TEXT_MODEL, prompt, max_tokens=40)) for _ in range(100)]
    answers = await asyncio.gather(*streams)
    assert await idle(suite) - before == answers[0][-1].usage.completion_tokens
    assert len({"".join(chunk.text for chunk in chunks) for chunks in answers}) == 1
    assert all(chunks[-1].usage == answers[0][-1].usage for chunks in answers)
    assert sum(not chunks[-1].cached for chunks in answers) == 1
    whole = await client.generate(TEXT_MODEL, prompt, max_tokens=40)
    assert whole.cached
    assert whole.text == "".join(chunk.text for chunk in answers[0])
    assert (whole.usage, whole.finish_reason) == (answers[0][-1].usage, answers[0][-1].finish_reason)
    anew = await client.generate(TEXT_MODEL, prompt, max_tokens=40, no_cache=True)
    assert (anew.cached, anew.text) == (False, whole.text)


async def test_who_comes_late_follows_and_the_last_to_leave_stops_the_engine(
    suite: Suite, client: lingqu.Client
) -> None:
    before, prompt = await idle(suite), fresh()
    first = client.stream(TEXT_MODEL, prompt, max_tokens=4000)
    begun = [(await anext(first)).text for _ in range(5)]
    late = client.stream(TEXT_MODEL, prompt, max_tokens=4000)
    caught_up = await anext(late)
    assert caught_up.cached
    assert caught_up.text.startswith("".join(begun))
    await first.aclose()  # type: ignore[attr-defined]
    more = [(await anext(late)).text for _ in range(20)]
    assert all(more)
    await late.aclose()  # type: ignore[attr-defined]
    assert await idle(suite) - before < 400


async def test_a_seed_makes_a_drawn_answer_one_to_keep(client: lingqu.Client) -> None:
    async def cached(**fields: Any) -> list[bool]:
        prompt = fresh()
        ask = {"prompt": prompt, "max_tokens": 4, "temperature": 1.0, **fields}
        return [(await client.generate(TEXT_MODEL, **ask)).cached for _ in range(2)]

    assert await cached(seed=1) == [False, True]
    assert await cached() == [False, False]


async def test_more_than_run_at_once_wait_and_are_all_answered(client: lingqu.Client) -> None:
    """Beyond the slots (64) nobody is refused."""
    asked = [client.generate(TEXT_MODEL, f"{n}", max_tokens=1, no_cache=True) for n in range(100)]
    answers = await asyncio.gather(*asked)
    assert [answer.usage.completion_tokens for answer in answers] == [1] * 100
