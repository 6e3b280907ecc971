"""From a REST request to the job the text API knows. The rules are the text API's own (convert.py); this
module only says what is called what."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import orjson

from lingqu.inference.v1 import inference_pb2 as pb
from services.core.errors import InvalidInput, Unsupported
from services.inference.callers import Priority
from services.inference.rest.bodies import dumped
from services.inference.rest.schemas import Generating

DEFAULT_TEMPERATURE = 1.0  # OpenAI's; the text API's own is 0
PRIORITIES = {"priority": Priority.INTERACTIVE, "flex": Priority.BATCH}

_ARGUMENTS = re.compile(r"(messages\[\d+\]\.tool_calls\[\d+\])\.(arguments|name)$")
_TOOL = re.compile(r"^(tools\[\d+\])\.(name|description|parameters)$")


def priority(request: Generating) -> Priority:
    return PRIORITIES.get(request.service_tier or "", Priority.NORMAL)


def common(request: Generating) -> dict[str, Any]:
    """Fields of a GenerateRequest. Raises InvalidInput, Unsupported."""
    if request.logit_bias:
        raise Unsupported("logit_bias", "the engine cannot bias single tokens")
    if request.stream_options is not None and not request.stream:
        raise InvalidInput("stream_options", "is for streams only: set stream to true")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    given: dict[str, Any] = {
        "model": request.model,
        "temperature": DEFAULT_TEMPERATURE if request.temperature is None else request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "n": request.n,
        "seed": None if request.seed is None else request.seed % 2**64,
        "stop": stop,
        "response_format": response_format(request),
        "no_cache": bool(request.no_cache),
    }
    return {name: value for name, value in given.items() if value is not None}


def wants_usage(request: Generating) -> bool:
    return bool(request.stream_options and request.stream_options.include_usage)


def response_format(request: Generating) -> pb.ResponseFormat | None:
    """At most one of all the ways to ask for a form. Raises InvalidInput."""
    wanted = list(_formats(request))
    if len(wanted) > 1:
        names = " and ".join(name for name, _ in wanted)
        raise InvalidInput(wanted[1][0], f"only one of {names} may be given")
    return wanted[0][1] if wanted else None


def _formats(request: Generating) -> Iterator[tuple[str, pb.ResponseFormat]]:
    form = request.response_format
    if form is not None and form.type == "json_object":
        yield "response_format", pb.ResponseFormat(json_object=True)
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise InvalidInput("response_format.json_schema", "is required")
        if form.json_schema.schema_ is None:
            yield "response_format", pb.ResponseFormat(json_object=True)
        else:
            field = "response_format.json_schema.schema"
            yield "response_format", _schema(field, form.json_schema.schema_)
    yield from _guided("guided_json", request.guided_json, "guided_regex", request.guided_regex)
    if request.guided_choice is not None:
        yield "guided_choice", _choice(request.guided_choice)
    if (outputs := request.structured_outputs) is not None:
        name = "structured_outputs"
        yield from _guided(f"{name}.json", outputs.json_, f"{name}.regex", outputs.regex)
        if outputs.choice is not None:
            yield f"{name}.choice", _choice(outputs.choice)
        if outputs.json_object:
            yield f"{name}.json_object", pb.ResponseFormat(json_object=True)


def _guided(
    json_name: str, schema: dict[str, Any] | str | None, regex_name: str, regex: str | None
) -> Iterator[tuple[str, pb.ResponseFormat]]:
    if schema is not None:
        yield json_name, _schema(json_name, _parsed(json_name, schema))
    if regex is not None:
        yield regex_name, pb.ResponseFormat(regex=regex)


def _parsed(field: str, schema: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(schema, dict):
        return schema
    try:
        value = orjson.loads(schema)
    except orjson.JSONDecodeError as err:
        raise InvalidInput(field, f"is not JSON: {err}") from None
    if not isinstance(value, dict):
        raise InvalidInput(field, "a JSON Schema is an object")
    return value


def _schema(field: str, schema: dict[str, Any]) -> pb.ResponseFormat:
    return pb.ResponseFormat(json_schema=dumped(field, schema))


def _choice(options: Sequence[str]) -> pb.ResponseFormat:
    return pb.ResponseFormat(choice=pb.Choice(options=options))


@contextmanager
def openai_names(request: Generating, prompt: str = "prompt") -> Iterator[None]:
    """Errors that name a field of the text API name OpenAI's parameter instead; `prompt` is what the prompt
    is called."""
    try:
        yield
    except InvalidInput as err:
        field = _openai_name(err.field, request, prompt)
        if field == err.field:
            raise
        raise type(err)(field, err.description) from err


def _openai_name(field: str, request: Generating, prompt: str) -> str:
    if field == "max_tokens" and getattr(request, "max_completion_tokens", None) is not None:
        return "max_completion_tokens"
    if field == "prompt":
        return prompt
    if field.startswith("response_format") and "." in field:
        return next((name for name, _ in _formats(request)), "response_format")
    field = _ARGUMENTS.sub(r"\1.function.\2", field)
    return _TOOL.sub(r"\1.function.\2", field)
