"""Every field of a request at, below and above its bounds; errors name the field."""

from __future__ import annotations

from typing import Any

import pytest

from lingqu.inference.v1 import inference_pb2 as pb
from services.core.errors import InvalidInput
from services.inference import convert

CHAT = [pb.Message(role="user", content="hello")]


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"model": "m", "prompt": "hello", **fields})


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"messages": CHAT}, "prompt"),
        ({"prompt": "x" * (convert.MAX_TEXT_BYTES + 1)}, "prompt"),
        ({"prompt": "灵" * (convert.MAX_TEXT_BYTES // 3 + 1)}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2**31 - 1}, "top_k"),
        (
            {"response_format": pb.ResponseFormat(json_schema='{"multipleOf": 7}')},
            "response_format.json_schema",
        ),
        ({"stop": ["x"] * 9}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["ok", "x" * 257]}, "stop[1]"),
        ({"prompt": "", "messages": [pb.Message(role="oracle", content="x")]}, "messages[0].role"),
        ({"prompt": "", "messages": [*CHAT, pb.Message(role="system")]}, "messages[1].role"),
        ({"prompt": "", "messages": CHAT * (convert.MAX_TURNS + 1)}, "messages"),
        (
            {"prompt": "", "messages": [pb.Message(role="tool", tool_call_id="灵" * 400_000)]},
            "messages[0].tool_call_id",
        ),
        (
            {"prompt": "", "messages": [pb.Message(role="tool", tool_call_id="x" * 600_000)] * 2},
            "messages",
        ),
        (
            {"prompt": "", "messages": CHAT, "tools": [pb.Tool(name="f", parameters='{"a": NaN}')]},
            "tools[0].parameters",
        ),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        convert.to_generate_job(request(**fields))
    assert refused.value.field == field


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 1},
        {"temperature": 0.0},
        {"temperature": 2.0},
        {"top_p": 1.0},
        {"top_p": 1e-6},
        {"top_k": 1},
        {"seed": 2**64 - 1},
        {"stop": ["x" * 256] * 8},
        {"prompt": "x" * convert.MAX_TEXT_BYTES},
    ],
)
def test_bounds_are_allowed(fields: dict[str, Any]) -> None:
    assert convert.to_generate_job(request(**fields)).prompt


def test_defaults_are_greedy_and_unbounded() -> None:
    job = convert.to_generate_job(request())
    assert (job.temperature, job.top_p, job.top_k, job.max_tokens, job.stop) == (0.0, 1.0, 0, None, ())


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ([], "inputs"),
        (["x"] * (convert.MAX_INPUTS + 1), "inputs"),
        (["ok", ""], "inputs[1]"),
        (["x" * (convert.MAX_TEXT_BYTES + 1)], "inputs[0]"),
    ],
)
def test_wrong_inputs_are_named(inputs: list[str], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        convert.to_texts(pb.EmbedRequest(model="m", inputs=inputs))
    assert refused.value.field == field


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 9e-6])
def test_a_temperature_that_nothing_can_be_divided_by_is_greedy(temperature: float) -> None:
    job = convert.to_generate_job(request(temperature=temperature))
    assert job.temperature == 0
    assert job.deterministic
    assert convert.to_generate_job(request(temperature=1e-4)).temperature > 0


def test_calls_of_the_requests_tools_leave_the_text() -> None:
    job = convert.to_generate_job(
        pb.GenerateRequest(
            model="m", messages=[pb.Message(role="user", content="hi")], tools=[pb.Tool(name="weather")]
        )
    )
    called = pb.Candidate(text='So: <tool_call>{"name": "weather", "arguments": {"at": "sea"}}</tool_call>')
    other = pb.Candidate(text='<tool_call>{"name": "unknown", "arguments": {}}</tool_call>')
    convert.find_calls([called, other], job)
    assert [(c.name, c.arguments) for c in called.tool_calls] == [("weather", '{"at": "sea"}')]
    assert called.text.strip() == "So:"
    assert not other.tool_calls
    assert other.text.startswith("<tool_call>")
