"""What REST answers: whole, streamed, with calls of tools, with errors, and to clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.core.access import Client, Record, RevokedKey
from services.core.errors import (
    BackendUnavailable,
    DeadlinePassed,
    InvalidInput,
    LingquError,
    QueueFull,
)
from services.inference.backends.jobs import Finish
from services.inference.rest.permits import by_records
from services.inference.rest.server import serving_http
from services.inference.text import Delta, Logprob
from tests.rest_fakes import Fakes, plain
from tests.waiting import until

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ADD = {"type": "function", "function": {"name": "add"}}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "text", "messages": [{"role": "user", "content": "hello"}], **fields}


@pytest.fixture
def fakes() -> Fakes:
    return Fakes()


@pytest.fixture
async def client(fakes: Fakes) -> AsyncIterator[httpx2.AsyncClient]:
    async with fakes.serving(keep_alive_s=0.1) as client:
        yield client


def package(client: httpx2.AsyncClient) -> Any:
    return openai.AsyncOpenAI(
        base_url=f"{client.base_url}/v1", api_key="x", http_client=httpx2.AsyncClient(trust_env=False)
    )


def events(text: str) -> list[Any]:
    """The JSON of all events; `[DONE]` as text."""
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in found]


async def test_a_stream_is_events_that_end_with_done(client: httpx2.AsyncClient) -> None:
    answer = await client.post(CHAT, json=chat(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    assert all("usage" not in chunk for chunk in chunks)
    assert [c["choices"][0]["delta"] for c in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hello"},
        {"content": " world"},
    ]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "stop"]
    assert len({(c["id"], c["created"]) for c in chunks}) == 1


async def test_candidates_and_log_probabilities(client: httpx2.AsyncClient, fakes: Fakes) -> None:
    half = (Logprob(1, "灵".encode()[:2], -0.5), Logprob(2, "灵".encode()[2:], -1.0))
    fakes.script = [
        Delta("", index=1, logprobs=half[:1]),
        Delta("one", Finish.LENGTH, index=0),
        Delta("灵", Finish.STOP, 5, 9, 1, half[1:]),
    ]
    whole = (await client.post(CHAT, json=chat(n=2, logprobs=True))).json()
    assert [c["message"]["content"] for c in whole["choices"]] == ["one", "灵"]
    assert [c["finish_reason"] for c in whole["choices"]] == ["length", "stop"]
    tokens = whole["choices"][1]["logprobs"]["content"]
    assert [t["token"] for t in tokens] == ["bytes:\\xe7\\x81", "bytes:\\xb5"]
    assert bytes(tokens[0]["bytes"] + tokens[1]["bytes"]).decode() == "灵"
    assert whole["usage"] == {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}
    streamed = events((await client.post(CHAT, json=chat(n=2, logprobs=True, stream=True))).text)
    told = [c["choices"][0] for c in streamed[:-1]]
    assert "".join(c["delta"].get("content", "") for c in told if c["index"] == 1) == "灵"
    assert sum(len((c["logprobs"] or {"content": []})["content"]) for c in told) == 2


@pytest.mark.parametrize("pieces", [[CALL], list(CALL), ['{"name": "add", ', '"arguments": {"a": 1}}']])
async def test_calls_of_tools(client: httpx2.AsyncClient, fakes: Fakes, pieces: list[str]) -> None:
    fakes.script = plain(*pieces)
    asked = chat(tools=[ADD])
    choice = (await client.post(CHAT, json=asked)).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("add", {"a": 1})
    async with package(client) as api, api.chat.completions.stream(**asked) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    assert final.choices[0].message.tool_calls[0].function.name == "add"
    assert not final.choices[0].message.content


async def test_without_tools_nothing_is_a_call(client: httpx2.AsyncClient, fakes: Fakes) -> None:
    fakes.script = plain(CALL)
    for asked in (chat(), chat(tools=[ADD], tool_choice="none")):
        choice = (await client.post(CHAT, json=asked)).json()["choices"][0]
        assert choice["message"]["content"] == CALL
        assert choice["finish_reason"] == "stop"


async def test_a_batch_of_prompts_is_counted_as_a_whole(client: httpx2.AsyncClient) -> None:
    asked = {"model": "text", "prompt": ["a", "b"], "echo": True}
    whole = (await client.post(COMPLETION, json=asked)).json()
    assert [c["text"] for c in whole["choices"]] == ["aHello world", "bHello world"]
    assert whole["usage"] == {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}
    with_usage = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, done = events((await client.post(COMPLETION, json=with_usage)).text)
    assert (last["choices"], last["usage"], done) == ([], whole["usage"], "[DONE]")
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert chunk["usage"] is None
    assert texts == ["aHello world", "bHello world"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (InvalidInput("max_tokens", "too many"), 400, "invalid_value", None),
        (QueueFull("full"), 429, "rate_limit_exceeded", "1"),
        (BackendUnavailable("away"), 503, "backend_unavailable", "1"),
        (DeadlinePassed("late"), 504, "deadline_exceeded", None),
        (LingquError("broken"), 500, "internal_error", None),
        (RuntimeError("secret"), 500, "internal_error", None),
    ],
)
async def test_errors_are_statuses_before_the_first_text(
    client: httpx2.AsyncClient,
    fakes: Fakes,
    error: Exception,
    status: int,
    code: str,
    retry_after: str | None,
    stream: bool,
) -> None:
    fakes.script = [error]
    answer = await client.post(CHAT, json=chat(stream=stream))
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.headers.get("retry-after") == retry_after
    assert "secret" not in answer.text


@pytest.mark.parametrize(("path", "asked"), [(CHAT, chat()), (COMPLETION, {"model": "text", "prompt": "a"})])
async def test_an_error_in_a_stream_is_its_last_event(
    client: httpx2.AsyncClient, fakes: Fakes, path: str, asked: dict[str, Any]
) -> None:
    fakes.script = [Delta("Hello"), BackendUnavailable("lost")]
    text = (await client.post(path, json={**asked, "stream": True})).text
    assert events(text)[-1]["error"]["code"] == "backend_unavailable"
    assert "[DONE]" not in text
    async with package(client) as api:
        with pytest.raises(openai.APIError, match="lost"):
            async for _ in await api.chat.completions.create(**chat(stream=True)):
                pass


async def test_silence_is_kept_alive(client: httpx2.AsyncClient, fakes: Fakes) -> None:
    fakes.script = [0.35, *plain("a")]
    answer = await client.post(CHAT, json=chat(stream=True))
    assert answer.text.startswith(": keep-alive\n\n")
    assert events(answer.text)[-1] == "[DONE]"
    async with package(client) as api:
        got = [c async for c in await api.chat.completions.create(**chat(stream=True))]
    assert got[-1].choices[0].delta.content == "a"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_stops_the_work(
    client: httpx2.AsyncClient, fakes: Fakes, stream: bool
) -> None:
    fakes.script = [Delta("Hello"), 60.0]
    with pytest.raises(httpx2.ReadTimeout):
        await client.post(CHAT, json=chat(stream=stream), timeout=httpx2.Timeout(5, read=0.05))
    await until(lambda: fakes.stopped == 1 and not fakes.running, "the work ends")


async def test_all_prompts_stop_when_one_fails(client: httpx2.AsyncClient, fakes: Fakes) -> None:
    fakes.script = lambda job: [QueueFull("full")] if job.prompt == "b" else [60.0]
    answer = await client.post(COMPLETION, json={"model": "text", "prompt": ["a", "b", "c"]})
    assert answer.status_code == 429
    assert fakes.running == 0


async def test_the_time_that_a_request_gives_is_kept_to(client: httpx2.AsyncClient, fakes: Fakes) -> None:
    fakes.script = [60.0]
    answer = await client.post(CHAT, json=chat(), headers={"x-request-timeout": "0.05"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    fakes.script = [Delta("a"), 60.0]
    answer = await client.post(CHAT, json=chat(stream=True), headers={"x-request-timeout": "0.05"})
    assert events(answer.text)[-1]["error"]["code"] == "deadline_exceeded"
    assert fakes.stopped == 2


async def test_a_flood_is_refused(fakes: Fakes) -> None:
    fakes.script = [60.0]
    async with fakes.serving(limit=2) as client:
        waiting = [asyncio.create_task(client.post(CHAT, json=chat())) for _ in range(2)]
        await until(lambda: fakes.running == 2, "two are in progress")
        refused = await client.post(CHAT, json=chat())
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await until(lambda: not fakes.running, "they are gone")
        fakes.script = plain("a")
        assert (await client.post(CHAT, json=chat())).status_code == 200


async def test_a_stop_lets_streams_end(fakes: Fakes) -> None:
    fakes.script = [Delta("a"), 0.3, *plain("b")]
    async with serving_http(fakes.app(), "127.0.0.1:0", 2.0) as address:
        client = httpx2.AsyncClient(trust_env=False)
        asked = asyncio.create_task(client.post(f"http://{address}{CHAT}", json=chat(stream=True)))
        await until(lambda: fakes.running == 1, "the stream runs")
    assert events((await asked).text)[-1] == "[DONE]"
    await client.aclose()


async def test_a_taken_port_is_an_error(fakes: Fakes) -> None:
    async with serving_http(fakes.app(), "127.0.0.1:0", 1.0) as address:
        with pytest.raises(OSError, match="cannot listen"):
            async with serving_http(fakes.app(), address, 1.0):
                pass


async def test_a_request_is_a_span_under_its_callers(fakes: Fakes) -> None:
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace = "0af7651916cd43dd8448eb211c80319c"
    async with fakes.serving(tracer=provider.get_tracer("test")) as client:
        await client.post(CHAT, json=chat(), headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
    (span,) = spans.get_finished_spans()
    assert span.name == f"POST {CHAT}"
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == trace


async def test_models_and_what_is_not_there(client: httpx2.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["loading", "text", "vectors"]
    assert (await client.get("/v1/models/text")).json() == listed["data"][1]
    for path, status, code in (
        ("/v1/models/missing", 404, "model_not_found"),
        ("/v1/missing", 404, "not_found"),
        (CHAT, 405, "method_not_allowed"),
    ):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("client", "key_models", "shown"),
    [
        ("", None, ["loading", "text", "vectors"]),
        ("stranger", None, ["loading", "text", "vectors"]),
        ("some", None, ["text", "vectors"]),
        ("some", "text v*s", ["text", "vectors"]),
        ("some", "l*", []),
        ("stranger", "l* text", ["loading", "text"]),
        ("none", None, []),
    ],
)
async def test_models_are_shown_to_those_who_may_call_them(
    client: str, key_models: str | None, shown: list[str]
) -> None:
    records: dict[str, Record] = {
        "client some": Client("some", ("text", "vec*")),
        "client none": Client("none"),
        "key stranger": RevokedKey("stranger"),
    }
    headers = {"x-lingqu-client": client, **({"x-lingqu-key-models": key_models} if key_models else {})}
    async with Fakes().serving(permits=by_records(lambda: records)) as api:
        listed = (await api.get("/v1/models", headers=headers)).json()["data"]
        assert [model["id"] for model in listed] == shown
        for name in ("loading", "text", "vectors"):
            answer = await api.get(f"/v1/models/{name}", headers=headers)
            assert answer.status_code == (200 if name in shown else 404)


async def test_no_models_are_shown_before_it_is_known_who_may_call_them() -> None:
    async with Fakes().serving(permits=by_records(lambda: None)) as api:
        answer = await api.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "backend_unavailable")
