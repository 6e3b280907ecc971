"""Whatever bytes come as a request: they are no message, or refused by field, or what the engine takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from lingqu.inference.v1 import inference_pb2 as pb
from services.core.errors import InvalidInput
from services.inference import convert, convert_tasks
from services.inference.backends.jobs import Sampling
from services.inference.text import GenerateJob

floats = st.floats(width=32)
ints = st.sampled_from([0, 1, -1, 8, 9, 2**31 - 1, -(2**31)]) | st.integers(-(2**31), 2**31 - 1)
texts = st.text(max_size=20) | st.sampled_from(
    ["user", "system", "tool", "assistant", "{}", '{"a": 1e999}', "["]
)


def _some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of the fields, absent ones among them."""
    return st.fixed_dictionaries({}, optional=fields)


def _of(kind: Callable[..., Any], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return _some(**fields).map(lambda given: kind(**given))


calls = st.lists(_of(pb.ToolCall, id=texts, name=texts, arguments=texts), max_size=2)
messages = st.lists(
    _of(pb.Message, role=texts, content=texts, name=texts, tool_call_id=texts, tool_calls=calls), max_size=3
)
tools = st.lists(_of(pb.Tool, name=texts, description=texts, parameters=texts), max_size=2)
forms = st.one_of(
    texts.map(lambda text: pb.ResponseFormat(json_schema=text)),
    texts.map(lambda text: pb.ResponseFormat(regex=text)),
    st.lists(texts, max_size=3).map(lambda options: pb.ResponseFormat(choice=pb.Choice(options=options))),
    st.booleans().map(lambda wanted: pb.ResponseFormat(json_object=wanted)),
)
generates = _of(
    pb.GenerateRequest,
    **dict.fromkeys(("temperature", "top_p", "min_p"), floats),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), floats),
    **dict.fromkeys(("max_tokens", "top_k", "n"), ints),
    seed=st.integers(0, 2**64 - 1),
    model=texts,
    prompt=texts,
    messages=messages,
    tools=tools,
    stop=st.lists(texts, max_size=9),
    response_format=forms,
    logprobs=st.booleans(),
)


@settings(max_examples=500)
@given(generates)
def test_what_is_taken_is_what_the_engine_takes(request: pb.GenerateRequest) -> None:
    try:
        job = convert.to_generate_job(request)
    except InvalidInput:
        return
    _sampling(job)
    assert 1 <= job.n <= convert.MAX_CANDIDATES
    assert (job.prompt is None) != (not job.turns)


def _sampling(job: GenerateJob) -> Sampling:
    """Raises ValueError for what the engine refuses."""
    same = ("temperature", "top_p", "top_k", "min_p", "logprobs", "grammar")
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    fields = {name: getattr(job, name) for name in (*same, *penalties)}
    return Sampling(max_tokens=job.max_tokens or 1, seed=job.seed or 0, **fields)


def _tokenize(request: pb.TokenizeRequest) -> None:
    convert_tasks.to_tokenize_text(request)
    convert.turns(request.messages)
    convert.tools(request.tools)


def _embed(request: pb.EmbedRequest) -> None:
    convert.to_texts(request)
    convert_tasks.to_shape(request)
    convert_tasks.to_truncation(request.truncation)


def _classify(request: pb.ClassifyRequest) -> None:
    convert.to_texts(request)
    convert_tasks.to_top(request)
    convert_tasks.to_truncation(request.truncation)


REQUESTS: Sequence[tuple[Message, Callable[[Any], object]]] = [
    (pb.GenerateRequest(model="m", prompt="x", temperature=1, stop=["a"]), convert.to_generate_job),
    (pb.EmbedRequest(model="m", inputs=["x"], dimensions=3), _embed),
    (pb.ClassifyRequest(model="m", inputs=["x"], top=1), _classify),
    (pb.AnswerRequest(model="m", question="x", context="y"), convert_tasks.to_question),
    (pb.ScoreRequest(model="m", inputs=["x"], prefix="y"), convert.to_score_texts),
    (pb.TokenizeRequest(model="m", text="x"), _tokenize),
]


@settings(max_examples=500)
@given(st.sampled_from(REQUESTS), st.integers(0, 40), st.binary(max_size=40))
def test_bytes_are_no_message_or_refused_or_taken(
    asked: tuple[Message, Callable[[Any], object]], at: int, noise: bytes
) -> None:
    good, check = asked
    raw = good.SerializeToString()
    at %= len(raw) + 1
    for spoilt in (raw[:at] + noise + raw[at:], raw[:at] + noise, raw[:at] + noise + raw[at + len(noise) :]):
        with suppress(DecodeError, InvalidInput):
            check(type(good).FromString(spoilt))
