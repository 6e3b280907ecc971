"""What a request can ask of the sampler: candidates, seeds, penalties, log-probabilities, grammars, tools."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

import lingqu
from bench.suite import Suite
from lingqu.inference.v1 import inference_pb2 as pb
from pipeline.bundled import TEXT_MODEL
from tests.waiting import until

PROMPT = "The canal joined two rivers and"


@pytest.fixture
async def client(suite: Suite) -> AsyncIterator[lingqu.Client]:
    async with lingqu.Client(suite.public, suite.key, timeout=60) as client:
        yield client


async def refused(client: lingqu.Client, **fields: Any) -> lingqu.LingquError:
    with pytest.raises(lingqu.LingquError) as caught:
        await client.generate(**{"model": TEXT_MODEL, "prompt": "hello", "max_tokens": 4, **fields})
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
    return caught.value


async def test_the_same_seed_gives_the_same_text(client: lingqu.Client) -> None:
    """Beside other sequences the engine rounds differently, and texts may part after some tokens; what a seed
    draws from the same probabilities does not depend on who else draws."""

    async def seeded(seed: int) -> str:
        answer = await client.generate(
            TEXT_MODEL, PROMPT, max_tokens=24, temperature=1.0, seed=seed, no_cache=True
        )
        return answer.text

    alone = await seeded(7)
    crowd = await asyncio.gather(*(seeded(seed) for seed in (7, 8, 9, 7, 10, 11, 12, 7)))
    assert {crowd[at][:12] for at in (0, 3, 7)} == {alone[:12]}
    assert len({text[:12] for text in crowd}) >= 5
    assert await seeded(7) == alone


async def test_without_a_seed_texts_differ(client: lingqu.Client) -> None:
    asked = {"max_tokens": 24, "temperature": 1.0}
    answers = await asyncio.gather(*(client.generate(TEXT_MODEL, PROMPT, **asked) for _ in range(3)))
    assert len({answer.text for answer in answers}) == 3


def alike(some: list[str], others: list[str]) -> int:
    """How many are the same, place by place."""
    return sum(one == other for one, other in zip(some, others, strict=True))


async def test_candidates_are_what_their_seeds_give(client: lingqu.Client) -> None:
    asked = {"max_tokens": 16, "temperature": 1.0, "no_cache": True}
    answer = await client.generate(TEXT_MODEL, PROMPT, n=3, seed=100, **asked)
    alone = [await client.generate(TEXT_MODEL, PROMPT, seed=100 + i, **asked) for i in range(3)]
    # Only the beginnings, and not all: what is computed beside it changes probabilities in the last bits, and
    # a draw may lie between two tokens.
    assert alike([c.text[:4] for c in answer.candidates], [one.text[:4] for one in alone]) >= 2
    assert answer.text == answer.candidates[0].text
    assert answer.usage.prompt_tokens == alone[0].usage.prompt_tokens
    # Each was computed to its end; one may say of itself that it is done before the sixteenth token.
    ended = [c.finish_reason for c in answer.candidates].count(pb.FINISH_REASON_LENGTH)
    assert 16 * ended + (3 - ended) <= answer.usage.completion_tokens <= 48
    texts = ["", "", ""]
    chunks = [c async for c in client.stream(TEXT_MODEL, PROMPT, n=3, seed=100, **asked)]
    for chunk in chunks:
        texts[chunk.index] += chunk.text
    assert alike([text[:12] for text in texts], [c.text[:12] for c in answer.candidates]) >= 2
    assert sum(chunk.finish_reason != 0 for chunk in chunks) == 3
    assert [chunk.HasField("usage") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage == answer.usage


async def test_log_probabilities_belong_to_the_tokens(client: lingqu.Client) -> None:
    answer = await client.generate(TEXT_MODEL, PROMPT + " 日本", max_tokens=12, logprobs=True)
    told = answer.candidates[0].logprobs
    assert len(told) == answer.usage.completion_tokens
    assert b"".join(one.bytes for one in told).decode(errors="replace").startswith(answer.text)
    assert all(-20 < one.logprob < 0 for one in told)
    without = await client.generate(TEXT_MODEL, PROMPT + " 日本", max_tokens=12)
    assert without.text == answer.text
    assert not without.candidates[0].logprobs


async def test_penalties_keep_from_repeating(client: lingqu.Client) -> None:
    prompt = "a b a b a b a b a b a b a b"
    plain = (await client.generate(TEXT_MODEL, prompt, max_tokens=24)).text
    assert plain.count("a b") > 5
    for penalty in ({"repetition_penalty": 1.8}, {"presence_penalty": 2.0, "frequency_penalty": 2.0}):
        text = (await client.generate(TEXT_MODEL, prompt, max_tokens=24, **penalty)).text
        assert text.count("a b") < plain.count("a b")


async def test_min_p_near_one_is_greedy(client: lingqu.Client) -> None:
    prompt = "1, 2, 3, 4, 5, 6, 7, 8,"
    greedy = await client.generate(TEXT_MODEL, prompt, max_tokens=16)
    narrow = await client.generate(TEXT_MODEL, prompt, max_tokens=16, temperature=1.0, min_p=0.99, seed=3)
    assert narrow.text == greedy.text


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-40}])
async def test_only_the_likeliest_is_greedy(client: lingqu.Client, fields: dict[str, Any]) -> None:
    greedy = await client.generate(TEXT_MODEL, "The sky", max_tokens=8)
    for seed in range(3):
        asked = {"temperature": 1.5, "seed": seed, "no_cache": True, **fields}
        assert (await client.generate(TEXT_MODEL, "The sky", max_tokens=8, **asked)).text == greedy.text


@pytest.mark.parametrize("regex", ["[😀🚀👍🏽]{16}", "[灵渠沟通湘江]{16}", "[א-ת]{16}"])
async def test_streams_of_all_scripts_are_whole_characters(client: lingqu.Client, regex: str) -> None:
    """The grammar makes characters of several tokens each."""
    asked = {"max_tokens": 80, "logprobs": True, "response_format": pb.ResponseFormat(regex=regex)}
    chunks = [chunk async for chunk in client.stream(TEXT_MODEL, "Write:", **asked)]
    text = "".join(chunk.text for chunk in chunks)
    assert re.fullmatch(regex, text)
    assert sum(len(chunk.logprobs) for chunk in chunks) > len(text) + 1
    assert b"".join(one.bytes for chunk in chunks for one in chunk.logprobs).startswith(text.encode())


@pytest.mark.parametrize(
    ("wanted", "matches"),
    [
        (pb.ResponseFormat(regex=r"(red|green), [0-9]{3}"), r"(red|green), [0-9]{3}"),
        (pb.ResponseFormat(choice=pb.Choice(options=["(a)", "b.c", "ü日"])), r"\(a\)|b\.c|ü日"),
    ],
)
async def test_text_keeps_to_its_grammar(
    client: lingqu.Client, wanted: pb.ResponseFormat, matches: str
) -> None:
    for temperature in (0.0, 1.5):
        answer = await client.generate(
            TEXT_MODEL, "Pick:", max_tokens=32, temperature=temperature, seed=1, response_format=wanted
        )
        assert re.fullmatch(matches, answer.text)
        assert answer.finish_reason == pb.FINISH_REASON_STOP


async def test_json_keeps_to_its_schema_while_others_stream(client: lingqu.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    wanted = pb.ResponseFormat(json_schema=json.dumps(schema))
    asked = {"max_tokens": 64, "response_format": wanted}
    whole = await client.generate(TEXT_MODEL, PROMPT, max_tokens=48, no_cache=True)
    answers = await asyncio.gather(
        client.generate(TEXT_MODEL, PROMPT, max_tokens=48, no_cache=True),
        *(client.generate(TEXT_MODEL, f"Tom is {age}. JSON:", **asked) for age in (12, 30, 41)),
    )
    assert answers[0].text == whole.text
    for answer in answers[1:]:
        found = json.loads(answer.text)
        assert set(found) == {"name", "age"}
        assert isinstance(found["age"], int)


@pytest.mark.parametrize(
    ("field", "wanted"),
    [
        ("response_format.json_schema", pb.ResponseFormat(json_schema='{"type": "string", "enum": []}')),
        ("response_format.json_schema", pb.ResponseFormat(json_schema='{"$ref": "#/nowhere"}')),
        ("response_format.json_schema", pb.ResponseFormat(json_schema='{"$ref": "#"}')),
        ("response_format.json_schema", pb.ResponseFormat(json_schema='{"type": "integer", "not": {}}')),
        (
            "response_format.json_schema",
            pb.ResponseFormat(json_schema=f'{{"type": "integer", "minimum": {"9" * 400}}}'),
        ),
        ("response_format.json_schema", pb.ResponseFormat(json_schema="[1]")),
        ("response_format.json_schema", pb.ResponseFormat(json_schema="{not json")),
        ("response_format.regex", pb.ResponseFormat(regex="(?=a)b")),
        ("response_format.regex", pb.ResponseFormat(regex="((((a|b){100}){100}){100})")),
        ("response_format.choice.options", pb.ResponseFormat(choice=pb.Choice(options=["a", "a"]))),
        ("response_format.choice.options[0]", pb.ResponseFormat(choice=pb.Choice(options=[""]))),
    ],
)
async def test_what_no_text_can_satisfy_is_refused_and_harms_nobody(
    client: lingqu.Client, field: str, wanted: pb.ResponseFormat
) -> None:
    running = asyncio.create_task(client.generate(TEXT_MODEL, PROMPT, max_tokens=48, no_cache=True))
    error = await refused(client, response_format=wanted)
    assert error.field == field
    assert "more memory" not in str(error)  # its process died
    answer = await running
    assert answer.usage.completion_tokens > 20
    assert answer.finish_reason


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("min_p", (-0.01, 1.0, math.nan)),
        ("repetition_penalty", (0.0, -1.0, 2.01, math.nan, math.inf)),
        ("presence_penalty", (-2.01, 2.01, math.nan)),
        ("frequency_penalty", (-2.01, 2.01, -math.inf)),
        ("temperature", (-0.01, 2.01, math.nan)),
        ("top_p", (0.0, 1.01, math.nan)),
        ("n", (0, -1, 9)),
    ],
)
async def test_numbers_out_of_range_are_named(
    client: lingqu.Client, field: str, values: tuple[float, ...]
) -> None:
    for value in values:
        assert (await refused(client, **{field: value})).field == field


@pytest.mark.parametrize(
    "fields",
    [
        {"min_p": 0.0, "repetition_penalty": 2.0, "presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"min_p": 0.999, "repetition_penalty": 0.01, "presence_penalty": 2.0, "frequency_penalty": -2.0},
        {"temperature": 2.0, "top_p": 1.0, "top_k": 1, "n": 8, "seed": 2**64 - 1},
    ],
)
async def test_numbers_at_their_bounds_are_taken(client: lingqu.Client, fields: dict[str, Any]) -> None:
    answer = await client.generate(TEXT_MODEL, PROMPT, max_tokens=2, **fields)
    assert len(answer.candidates) == fields.get("n", 1)


async def test_tools_need_a_template_that_knows_them(client: lingqu.Client) -> None:
    tool = pb.Tool(name="weather", description="The weather", parameters='{"type": "object"}')
    error = await refused(client, prompt="", messages=[("user", "hello")], tools=[tool])
    assert (error.reason, error.field) == ("UNSUPPORTED", "tools")
    assert (await refused(client, tools=[tool])).field == "tools"


async def test_a_long_prompt_does_not_stall_the_streams_of_others(client: lingqu.Client) -> None:
    """While thousands of tokens are read, a stream goes on, and a new short request is answered first."""
    long = " ".join(f"word{i}" for i in range(1500))
    came: list[float] = []

    async def stream() -> None:
        async for _ in client.stream(TEXT_MODEL, PROMPT, max_tokens=60, no_cache=True):
            came.append(time.monotonic())

    streaming = asyncio.create_task(stream())
    await until(lambda: len(came) >= 5, "a stream begins")
    begun = time.monotonic()
    reading = asyncio.create_task(client.generate(TEXT_MODEL, long, max_tokens=1))
    await client.generate(TEXT_MODEL, "Name a river:", max_tokens=4, no_cache=True)
    short = time.monotonic() - begun
    assert not reading.done()
    answer = await reading
    assert answer.usage.prompt_tokens > 3000
    read = time.monotonic() - begun
    assert short < read / 2
    await streaming
    during = [t for t in came if begun < t < begun + read]
    assert len(during) >= 5
