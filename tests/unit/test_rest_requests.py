"""What REST clients may send: what becomes of it, and how what is wrong is named."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.rest import MAX_BODY_BYTES
from services.inference.backends.jobs import GrammarKind
from services.inference.callers import Priority
from services.inference.chat import Call, Tool, Turn
from services.inference.text import GenerateJob
from tests.rest_fakes import Fakes

CHAT, COMPLETION, EMBEDDING = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
USER = {"role": "user", "content": "hello"}
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "sums", "parameters": {"type": "object"}},
}
LOOK = {"type": "function", "function": {"name": "look"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
NAMED_SCHEMA = {"name": "x", "schema": SCHEMA, "strict": True}


@pytest.fixture
def fakes() -> Fakes:
    return Fakes()


@pytest.fixture
async def client(fakes: Fakes) -> AsyncIterator[httpx2.AsyncClient]:
    async with inside(fakes) as client:
        yield client


def inside(fakes: Fakes) -> httpx2.AsyncClient:
    """A client without a network."""
    transport = httpx2.ASGITransport(app=fakes.app())
    return httpx2.AsyncClient(transport=transport, base_url="http://rest")


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "text", "messages": [USER], **fields}


async def job(
    client: httpx2.AsyncClient, fakes: Fakes, body: dict[str, Any], path: str = CHAT
) -> GenerateJob:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return fakes.jobs[-1]


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, {"temperature": 1.0, "max_tokens": None, "seed": None, "n": 1, "cached": True, "grammar": None}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": None, "n": None, "stop": None, "tools": None}, {"temperature": 1.0, "stop": ()}),
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 8}, {"max_tokens": 8}),
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop": ["x", "yz"]}, {"stop": ("x", "yz")}),
        ({"stop": []}, {"stop": ()}),
        ({"seed": 0}, {"seed": 0}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({"top_p": 0.5, "top_k": 3, "min_p": 0.25}, {"top_p": 0.5, "top_k": 3, "min_p": 0.25}),
        ({"presence_penalty": -2, "frequency_penalty": 2}, {"presence_penalty": -2, "frequency_penalty": 2}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"no_cache": True}, {"cached": False}),
        ({"user": "u", "metadata": {"a": "b"}, "store": True, "verbosity": "low"}, {}),
        ({"logit_bias": {}, "modalities": ["text"], "top_logprobs": 0, "logprobs": True}, {"logprobs": True}),
        ({"tools": [ADD, LOOK]}, {"tools": (Tool("add", "sums", '{"type":"object"}'), Tool("look"))}),
        ({"tools": [ADD], "tool_choice": "none"}, {"tools": (), "grammar": None}),
        ({"response_format": {"type": "text"}}, {"grammar": None}),
    ],
)  # fmt: skip
async def test_parameters_arrive(
    client: httpx2.AsyncClient, fakes: Fakes, fields: dict[str, Any], found: dict[str, Any]
) -> None:
    made = await job(client, fakes, chat(**fields))
    assert {name: getattr(made, name) for name in found} == found


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, GrammarKind.JSON_SCHEMA, {"type": "object"}),
        (
            {"response_format": {"type": "json_schema", "json_schema": NAMED_SCHEMA}},
            GrammarKind.JSON_SCHEMA, SCHEMA,
        ),
        ({"guided_json": SCHEMA}, GrammarKind.JSON_SCHEMA, SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, GrammarKind.JSON_SCHEMA, SCHEMA),
        ({"structured_outputs": {"json": SCHEMA}}, GrammarKind.JSON_SCHEMA, SCHEMA),
        ({"guided_regex": "a+"}, GrammarKind.REGEX, "a+"),
        ({"structured_outputs": {"regex": "a+"}}, GrammarKind.REGEX, "a+"),
        ({"guided_choice": ["a", "b."]}, GrammarKind.REGEX, "(a)|(b\\.)"),
        ({"structured_outputs": {"choice": ["a"]}}, GrammarKind.REGEX, "(a)"),
    ],
)  # fmt: skip
async def test_forms_arrive(
    client: httpx2.AsyncClient, fakes: Fakes, fields: dict[str, Any], kind: GrammarKind, text: Any
) -> None:
    grammar = (await job(client, fakes, chat(**fields))).grammar
    assert grammar is not None
    assert grammar.kind == kind
    assert (json.loads(grammar.text) if kind == GrammarKind.JSON_SCHEMA else grammar.text) == text


async def test_messages_arrive(client: httpx2.AsyncClient, fakes: Fakes) -> None:
    called = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "one"},
        {
            "role": "developer",
            "content": [{"type": "text", "text": "two"}, {"type": "text", "text": "three"}],
        },
        {"role": "user", "content": "灵 👩‍👩‍👧‍👦", "name": "Li"},
        {"role": "assistant", "content": None, "tool_calls": [called], "refusal": None, "annotations": []},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]
    assert (await job(client, fakes, chat(messages=messages))).turns == (
        Turn("system", "one\n\ntwo\nthree"),
        Turn("user", "灵 👩‍👩‍👧‍👦", name="Li"),
        Turn("assistant", "", (Call("c1", "add", '{"a": 1}'),)),
        Turn("tool", "2", (), "c1"),
    )


async def test_a_tool_that_must_be_called_is_a_grammar(client: httpx2.AsyncClient, fakes: Fakes) -> None:
    named = {"type": "function", "function": {"name": "look"}}
    made = await job(client, fakes, chat(tools=[ADD, LOOK], tool_choice=named))
    assert [tool.name for tool in made.tools] == ["look"]
    assert made.grammar is not None
    assert '"look"' in made.grammar.text
    broken = {"type": "function", "function": {"name": "a b"}}
    refused = await client.post(CHAT, json=chat(tools=[ADD, broken, LOOK], tool_choice=named))
    assert refused.json()["error"]["param"] == "tools[1].function.name"
    made = await job(client, fakes, chat(tools=[ADD, LOOK], tool_choice="required"))
    assert made.grammar is not None
    assert "anyOf" in made.grammar.text
    assert (await job(client, fakes, chat(tools=[ADD], tool_choice="auto"))).grammar is None


async def test_who_asks_arrives(client: httpx2.AsyncClient, fakes: Fakes) -> None:
    for tier, priority in (
        ("priority", Priority.INTERACTIVE), ("flex", Priority.BATCH), ("auto", Priority.NORMAL),
        (None, Priority.NORMAL),
    ):  # fmt: skip
        body = chat(service_tier=tier)
        headers = {"x-lingqu-client": "me", "x-lingqu-model": str(body["model"])}
        await client.post(CHAT, json=body, headers=headers)
        assert (fakes.callers[-1].client, fakes.callers[-1].priority) == ("me", priority)
    assert fakes.callers[-1].deadline is None
    await client.post(CHAT, json=chat(), headers={"x-request-timeout": "60"})
    remaining = fakes.callers[-1].remaining
    assert remaining is not None
    assert 50 < remaining <= 60


async def test_the_read_timeout_of_the_package_says_nothing_about_streams(
    client: httpx2.AsyncClient, fakes: Fakes
) -> None:
    headers = {"x-stainless-read-timeout": "600"}
    await client.post(CHAT, json=chat(), headers=headers)
    assert fakes.callers[-1].deadline is not None
    await client.post(CHAT, json=chat(stream=True), headers=headers)
    assert fakes.callers[-1].deadline is None


async def test_prompts_arrive(client: httpx2.AsyncClient, fakes: Fakes) -> None:
    for prompt, found in (
        ("a", [("a", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        ([1, 2], [(None, (1, 2))]),
        ([[1], [2, 3]], [(None, (1,)), (None, (2, 3))]),
    ):
        fakes.jobs.clear()
        made = await job(client, fakes, {"model": "text", "prompt": prompt}, COMPLETION)
        assert [(j.prompt, j.prompt_ids) for j in fakes.jobs] == found
        assert made.max_tokens == 16
        assert made.temperature == 1.0


async def test_inputs_arrive(client: httpx2.AsyncClient, fakes: Fakes) -> None:
    for sent, texts, ids in (
        ("a", ["a"], ()), (["a", "b"], ["a", "b"], ()), ([1, 2], (), [[1, 2]]), ([[1], [2]], (), [[1], [2]])
    ):  # fmt: skip
        answer = (await client.post(EMBEDDING, json={"model": "vectors", "input": sent})).json()
        assert (fakes.embeds[-1].texts, fakes.embeds[-1].token_ids) == (texts, ids)
        assert len(answer["data"]) == len(texts) or len(ids)
    body = {"model": "vectors", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 3}
    data = (await client.post(EMBEDDING, json=body)).json()["data"]
    assert [list(np.frombuffer(base64.b64decode(d["embedding"]), "<f4")) for d in data] == [
        [0, 1, 2],
        [4, 5, 6],
    ]


BROKEN_CALL = {"id": "a", "function": {"name": "f", "arguments": "["}}
PARTS = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:"}}]


@pytest.mark.parametrize(
    ("path", "fields", "param", "code"),
    [
        (CHAT, {"topp": 1}, "topp", "unknown_parameter"),
        (CHAT, {"stream_options": {"x": 1}, "stream": True}, "stream_options.x", "unknown_parameter"),
        (CHAT, {"messages": [{**USER, "x": 1}]}, "messages[0].x", "unknown_parameter"),
        (CHAT, {"model": "missing"}, None, "model_not_found"),
        (CHAT, {"model": "vectors"}, "model", "wrong_task"),
        (CHAT, {"model": "numbers"}, "model", "wrong_task"),
        (CHAT, {"model": ""}, "model", "invalid_value"),
        (CHAT, {"model": 7}, "model", "invalid_value"),
        (CHAT, {"messages": []}, "messages", "invalid_value"),
        (CHAT, {"messages": "hello"}, "messages", "invalid_value"),
        (CHAT, {"messages": [{"role": "function", "content": ""}]}, "messages[0].role", "invalid_value"),
        (CHAT, {"messages": [USER, {"role": "system", "content": "x"}]}, "messages[1].role", "invalid_value"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
        (CHAT, {"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "invalid_value"),
        (
            CHAT, {"messages": [{"role": "user", "content": PARTS}]},
            "messages[0].content[1].type", "unsupported_parameter",
        ),
        (
            CHAT, {"messages": [{"role": "user", "content": "x" * (1 << 20) + "x"}]},
            "messages[0].content", "invalid_value",
        ),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "invalid_value"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [BROKEN_CALL]}]},
            "messages[0].tool_calls[0].function.arguments", "invalid_value",
        ),
        (CHAT, {"temperature": -0.1}, "temperature", "invalid_value"),
        (CHAT, {"temperature": 2.1}, "temperature", "invalid_value"),
        (CHAT, {"temperature": "1"}, "temperature", "invalid_value"),
        (CHAT, {"temperature": True}, "temperature", "invalid_value"),
        (CHAT, {"top_p": 0}, "top_p", "invalid_value"),
        (CHAT, {"top_k": 0}, "top_k", "invalid_value"),
        (CHAT, {"top_k": 2**31}, "top_k", "invalid_value"),
        (CHAT, {"min_p": 1.1}, "min_p", "invalid_value"),
        (CHAT, {"n": 0}, "n", "invalid_value"),
        (CHAT, {"n": 9}, "n", "invalid_value"),
        (CHAT, {"seed": 2**63}, "seed", "invalid_value"),
        (CHAT, {"seed": 1.5}, "seed", "invalid_value"),
        (CHAT, {"max_tokens": 0}, "max_tokens", "invalid_value"),
        (CHAT, {"max_tokens": 2**31}, "max_tokens", "invalid_value"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
        (CHAT, {"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens", "invalid_value"),
        (CHAT, {"stop": ["x"] * 9}, "stop", "invalid_value"),
        (CHAT, {"stop": [""]}, "stop[0]", "invalid_value"),
        (CHAT, {"stop": [1]}, "stop[0]", "invalid_value"),
        (CHAT, {"presence_penalty": 3}, "presence_penalty", "invalid_value"),
        (CHAT, {"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        (CHAT, {"logit_bias": {"1": 2}}, "logit_bias", "unsupported_parameter"),
        (CHAT, {"logprobs": True, "top_logprobs": 1}, "top_logprobs", "unsupported_parameter"),
        (CHAT, {"top_logprobs": 0}, "top_logprobs", "invalid_value"),
        (CHAT, {"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        (CHAT, {"audio": {"voice": "x"}}, "audio", "invalid_value"),
        (CHAT, {"functions": []}, "functions", "invalid_value"),
        (CHAT, {"service_tier": "fast"}, "service_tier", "invalid_value"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        (CHAT, {"tool_choice": "auto"}, "tool_choice", "invalid_value"),
        (CHAT, {"tools": [ADD], "tool_choice": "x"}, "tool_choice", "invalid_value"),
        (
            CHAT, {"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name", "invalid_value",
        ),
        (
            CHAT, {"tools": [ADD], "tool_choice": "required", "guided_regex": "a"},
            "tool_choice", "invalid_value",
        ),
        (
            CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name", "invalid_value",
        ),
        (CHAT, {"tools": [ADD] * 65}, "tools", "invalid_value"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "invalid_value"),
        (CHAT, {"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "invalid_value"),
        (CHAT, {"guided_regex": ""}, "guided_regex", "invalid_value"),
        (CHAT, {"guided_json": "{"}, "guided_json", "invalid_value"),
        (CHAT, {"guided_json": {"x" * 70_000: 1}}, "guided_json", "invalid_value"),
        (CHAT, {"guided_choice": []}, "guided_choice", "invalid_value"),
        (COMPLETION, {"prompt": ""}, "prompt", "invalid_value"),
        (COMPLETION, {"prompt": []}, "prompt", "invalid_value"),
        (COMPLETION, {"prompt": [[]]}, "prompt", "invalid_value"),
        (COMPLETION, {"prompt": ["a", ""]}, "prompt[1]", "invalid_value"),
        (COMPLETION, {"prompt": [-1]}, "prompt[0]", "invalid_value"),
        (COMPLETION, {"prompt": {"a": 1}}, "prompt", "invalid_value"),
        (COMPLETION, {"prompt": ["a"] * 65, "n": 2}, "prompt", "invalid_value"),
        (COMPLETION, {"suffix": "x"}, "suffix", "unsupported_parameter"),
        (COMPLETION, {"best_of": 2}, "best_of", "unsupported_parameter"),
        (COMPLETION, {"logprobs": 2}, "logprobs", "unsupported_parameter"),
        (COMPLETION, {"echo": True, "logprobs": 1}, "echo", "unsupported_parameter"),
        (COMPLETION, {"echo": True, "prompt": [1]}, "echo", "unsupported_parameter"),
        (COMPLETION, {"messages": []}, "messages", "unknown_parameter"),
        (EMBEDDING, {"input": ""}, "input", "invalid_value"),
        (EMBEDDING, {"input": []}, "input", "invalid_value"),
        (EMBEDDING, {"input": ["a", ""]}, "input[1]", "invalid_value"),
        (EMBEDDING, {"input": [[1], []]}, "input[1]", "invalid_value"),
        (EMBEDDING, {"input": ["a"] * 2049}, "input", "invalid_value"),
        (EMBEDDING, {"input": ["a", 1]}, None, "invalid_value"),
        (EMBEDDING, {"model": "text"}, "model", "wrong_task"),
        (EMBEDDING, {"encoding_format": "hex"}, "encoding_format", "invalid_value"),
        (EMBEDDING, {"dimensions": 0}, "dimensions", "invalid_value"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
async def test_what_is_wrong_is_named(
    client: httpx2.AsyncClient, path: str, fields: dict[str, Any], param: str | None, code: str
) -> None:
    good: dict[str, dict[str, Any]] = {
        CHAT: chat(),
        COMPLETION: {"model": "text", "prompt": "hello"},
        EMBEDDING: {"model": "vectors", "input": "hello"},
    }
    answer = await client.post(path, json={**good[path], **fields})
    error = answer.json()["error"]
    assert answer.status_code == (404 if code == "model_not_found" else 400)
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"
    if fields != {"input": ["a", 1]}:  # of no kind more than of another
        assert error["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b"null", "body"),
        (b'{"model": "text", "temperature": NaN}', "body"),
        (b'{"model": "text", "temperature": Infinity}', "body"),
        (b'{"model": "text", "temperature": 1e999}', "body"),
        (b'{"model": "\xff"}', "body"),
        (b'{"model": "\xed\xa0\x80"}', "body"),
        (b'{"model": "\\ud800"}', "model"),
        (b'{"model": "text", "messages": [{"role": "user", "content": "a\\udc00b"}]}', "messages[0].content"),
        (b'{"\\ud800": 1}', "body"),
        (b"[" * 100_000, "body"),
        (b'{"a":' * 100_000, "body"),
        (b'{"guided_json": ' + b'{"a":' * 100 + b"1" + b"}" * 101, "model"),
        (b'{"model": "text", "messages": [{"role": "user", "content": "x"}], "guided_json": '
         + b'{"a":' * 100 + b"1" + b"}" * 101, "guided_json"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
async def test_what_is_no_json_is_refused(client: httpx2.AsyncClient, body: bytes, param: str) -> None:
    answer = await client.post(CHAT, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_of_two_values_the_last_one_counts(client: httpx2.AsyncClient, fakes: Fakes) -> None:
    body = b'{"model": "x", "messages": [{"role": "user", "content": "a"}], "n": 9, "n": 1, "model": "text"}'
    assert (await client.post(CHAT, content=body)).status_code == 200
    routed = await client.post(
        CHAT, content=body, headers={"x-lingqu-model": "x", "x-lingqu-model-version": "1"}
    )
    assert routed.status_code == 400
    assert routed.json()["error"]["param"] == "model"


async def test_a_body_has_a_bound(client: httpx2.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * (1 << 20)

    for content in (b" " * (MAX_BODY_BYTES + 1), endless()):
        answer = await client.post(CHAT, content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    assert (await client.post(CHAT, content=b" " * MAX_BODY_BYTES)).status_code == 400


async def test_a_timeout_that_is_none_is_refused(client: httpx2.AsyncClient) -> None:
    for value in ("soon", "-1", "nan", ""):
        answer = await client.post(CHAT, json=chat(), headers={"x-request-timeout": value})
        assert answer.json()["error"]["param"] == "x-request-timeout"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
known = st.sampled_from(
    ["messages", "prompt", "input", "temperature", "stop", "n", "tools", "tool_choice", "stream",
     "stream_options",
     "response_format", "logit_bias", "seed", "max_tokens", "guided_json", "guided_choice", "logprobs",
     "structured_outputs", "encoding_format", "dimensions", "service_tier", "echo", "best_of", "modalities"]
)  # fmt: skip


@settings(max_examples=300)
@given(
    st.sampled_from([CHAT, COMPLETION, EMBEDDING]),
    st.dictionaries(known, json_values, max_size=4),
    st.booleans(),
)
async def test_no_json_is_an_internal_error(path: str, fields: dict[str, Any], complete: bool) -> None:
    model = "vectors" if path == EMBEDDING else "text"
    base = {CHAT: {"messages": [USER]}, COMPLETION: {"prompt": "x"}, EMBEDDING: {"input": "x"}}[path]
    body = {"model": model, **(base if complete else {}), **fields}
    async with inside(Fakes()) as client:
        answer = await client.post(path, content=json.dumps(body).encode())
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=200)
@given(st.binary(max_size=200))
async def test_no_bytes_are_an_internal_error(body: bytes) -> None:
    async with inside(Fakes()) as client:
        assert (await client.post(CHAT, content=body)).status_code == 400
