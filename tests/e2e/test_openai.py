"""The unmodified openai package against the public port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

import lingqu
from bench.suite import Suite
from pipeline.bundled import TEXT_MODEL, VECTOR_MODEL
from tests.e2e.test_text import PROMPT, idle

CHAT: Any = [
    {"role": "developer", "content": "Answer in one word."},
    {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]},
]


@pytest.fixture
async def client(suite: Suite) -> AsyncIterator[openai.AsyncOpenAI]:
    async with of(suite, suite.key) as client:
        yield client


def of(suite: Suite, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"http://{suite.public}/v1",
        api_key=key,
        max_retries=0,
        timeout=60,
        http_client=httpx2.AsyncClient(trust_env=False),
    )


async def test_a_chat_is_the_text_apis(client: openai.AsyncOpenAI, suite: Suite) -> None:
    answer = await client.chat.completions.create(
        model=TEXT_MODEL, messages=CHAT, temperature=0, max_tokens=60
    )
    async with lingqu.Client(suite.public, suite.key) as own:
        same = await own.generate(
            TEXT_MODEL, messages=[("system", CHAT[0]["content"]), ("user", CHAT[1]["content"][0]["text"])],
            max_tokens=60,
        )  # fmt: skip
    choice = answer.choices[0]
    assert "Paris" in (choice.message.content or "")
    assert choice.message.content == same.text
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == same.usage.prompt_tokens
    assert answer.usage.completion_tokens == same.usage.completion_tokens
    assert answer.system_fingerprint == f"{TEXT_MODEL}-v1"


async def test_a_version_can_be_asked_for(client: openai.AsyncOpenAI, suite: Suite) -> None:
    answer = await client.completions.create(model=f"{TEXT_MODEL}@1", prompt="The canal", max_tokens=2)
    assert answer.system_fingerprint == f"{TEXT_MODEL}-v1"
    with pytest.raises(openai.NotFoundError) as refused:
        await client.completions.create(model=f"{TEXT_MODEL}@99", prompt="The canal", max_tokens=2)
    assert refused.value.code == "version_not_served"
    async with lingqu.Client(suite.public, suite.key) as own:
        assert (await own.generate(f"{TEXT_MODEL}@1", "The canal", max_tokens=2)).model_version == "1"


async def test_a_stream_adds_up_and_ends_with_its_usage(client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": TEXT_MODEL, "messages": CHAT[1:], "temperature": 0, "max_completion_tokens": 30}
    whole = await client.chat.completions.create(**asked)
    stream: Any = await client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    *said, last = chunks
    assert said[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in said) == whole.choices[0].message.content
    assert said[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in said)
    assert last.choices == []
    assert last.usage == whole.usage


async def test_completions_continue_texts_and_tokens(client: openai.AsyncOpenAI, tokenizer: Any) -> None:
    asked: Any = {"model": TEXT_MODEL, "temperature": 0, "max_tokens": 12}
    text = await client.completions.create(prompt=PROMPT, **asked)
    ids = await client.completions.create(prompt=[tokenizer.encode(PROMPT).ids] * 2, echo=False, **asked)
    assert [choice.text for choice in ids.choices] == [text.choices[0].text] * 2
    assert text.usage is not None
    assert text.usage.completion_tokens == 12
    stream: Any = await client.completions.create(prompt=PROMPT, stream=True, **asked)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == text.choices[0].text


async def test_vectors_are_the_text_apis(client: openai.AsyncOpenAI, suite: Suite) -> None:
    texts = ["灵渠", "a canal", "long " * 100]
    async with lingqu.Client(suite.public, suite.key) as own:
        same = await own.embed(VECTOR_MODEL, texts)
    for form in ({}, {"encoding_format": "float"}):  # the package asks for base64 by itself
        answer = await client.embeddings.create(model=VECTOR_MODEL, input=texts, **form)  # type: ignore[arg-type]
        for ours, theirs in zip(same.embeddings, answer.data, strict=True):
            assert float(np.dot(ours.values, theirs.embedding)) > 0.9999
        assert answer.usage.prompt_tokens == same.usage.prompt_tokens
    short = await client.embeddings.create(model=VECTOR_MODEL, input=texts[0], dimensions=8)
    cut = np.array(same.embeddings[0].values[:8])
    np.testing.assert_allclose(short.data[0].embedding, cut / np.linalg.norm(cut), atol=1e-3)


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    listed = {model.id: model async for model in client.models.list()}
    assert {TEXT_MODEL, VECTOR_MODEL} <= set(listed)
    one = await client.models.retrieve(TEXT_MODEL)
    assert one == listed[TEXT_MODEL]
    assert one.created > 1_700_000_000


async def test_errors_are_openais(client: openai.AsyncOpenAI, suite: Suite) -> None:
    async def refused(kind: type[openai.APIStatusError], **changes: Any) -> Any:
        asked = {"model": TEXT_MODEL, "messages": CHAT, **changes}
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(**asked)
        return caught.value

    missing = await refused(openai.NotFoundError, model="missing")
    assert missing.code == "model_not_found"
    wrong = await refused(openai.BadRequestError, model=VECTOR_MODEL)
    assert (wrong.param, wrong.code) == ("model", "wrong_task")
    assert (await refused(openai.BadRequestError, temperature=3)).param == "temperature"
    assert (await refused(openai.BadRequestError, extra_body={"topp": 1})).code == "unknown_parameter"
    long = await refused(openai.BadRequestError, messages=[{"role": "user", "content": "long " * 20_000}])
    assert long.param == "messages"
    async with of(suite, "nonsense") as stranger:
        with pytest.raises(openai.AuthenticationError) as caught:
            await stranger.models.list()
    assert caught.value.code == "invalid_api_key"


async def test_a_deadline_ends_the_work(client: openai.AsyncOpenAI, suite: Suite) -> None:
    before = await idle(suite)
    with pytest.raises(openai.InternalServerError) as caught:
        await client.completions.create(
            model=TEXT_MODEL,
            prompt="Count: 1 2 3 4 5 6 7",
            max_tokens=4000,
            temperature=0,
            extra_headers={"x-request-timeout": "0.3"},
        )
    assert caught.value.status_code == 504
    assert await idle(suite) - before < 1000


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_stops_the_engine(suite: Suite, stream: bool) -> None:
    before = await idle(suite)
    body = {"model": TEXT_MODEL, "prompt": "Count: 1 2 3 4 5 6 7", "max_tokens": 4000, "temperature": 0}
    async with httpx2.AsyncClient(
        trust_env=False, headers={"authorization": f"Bearer {suite.key}"}
    ) as client:
        url = f"http://{suite.public}/v1/completions"
        if stream:
            async with client.stream("POST", url, json={**body, "stream": True}) as answer:
                lines = answer.aiter_lines()
                for _ in range(5):
                    await anext(lines)
        else:
            with pytest.raises(httpx2.ReadTimeout):
                await client.post(url, json=body, timeout=0.5)
    assert await idle(suite) - before < 200


async def test_thirty_two_streams_at_once(client: openai.AsyncOpenAI) -> None:
    async def one(n: int) -> str:
        stream: Any = await client.completions.create(
            model=TEXT_MODEL, prompt=f"{PROMPT} {n % 4}", max_tokens=24, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    texts = await asyncio.gather(*(one(n) for n in range(32)))
    assert all(texts)
