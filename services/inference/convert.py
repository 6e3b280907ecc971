"""Between protobuf messages and the values inside; every rule of a request's fields is here."""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Sequence

from lingqu.inference.v1 import inference_pb2 as pb
from services.core.errors import InvalidInput, Unsupported
from services.inference.backends.jobs import (
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    Finish,
    Grammar,
    GrammarKind,
)
from services.inference.calls import CallReader, no_constant
from services.inference.chat import Call, Tool, Turn
from services.inference.keywords import unkept
from services.inference.text import Delta, GenerateJob, Logprob, Scored
from services.inference.vectors import Vectors

MAX_TEXT_BYTES = 1 << 20
MAX_INPUTS_BYTES = 4 << 20
MAX_TURNS = 1024
MAX_INPUTS = 2048
MAX_SCORED = 256
MAX_EXPONENT = 700.0  # exp() of more is no float
LEAST_TEMPERATURE = 1e-5  # engines divide by it: by less, logits become infinite and tokens nonsense
MAX_STOPS = 8
MAX_STOP_BYTES = 256
MAX_CANDIDATES = 8
MAX_NAME_BYTES = 64
MAX_TOOLS = 64
MAX_GRAMMAR_BYTES = 64 << 10
MAX_OPTIONS = 256
MAX_OPTION_BYTES = 1024
ROLES = ("system", "user", "assistant", "tool")
TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

_FINISH = {Finish.STOP: pb.FINISH_REASON_STOP, Finish.LENGTH: pb.FINISH_REASON_LENGTH}


def to_generate_job(request: pb.GenerateRequest) -> GenerateJob:
    """Raises InvalidInput, naming the field."""
    if bool(request.prompt) == bool(request.messages):
        raise InvalidInput("prompt", "exactly one of prompt and messages must be given, and not be empty")
    if request.prompt:
        _text("prompt", request.prompt)
    if request.HasField("max_tokens") and request.max_tokens < 1:
        raise InvalidInput("max_tokens", f"{request.max_tokens}, but must be 1 or more")
    temperature = _number("temperature", request.temperature, 0.0, MAX_TEMPERATURE)
    top_p = request.top_p if request.HasField("top_p") else 1.0
    if not 0 < top_p <= 1:
        raise InvalidInput("top_p", f"{top_p}, but must be above 0 and at most 1")
    if request.HasField("top_k") and not 1 <= request.top_k <= MAX_TOP_K:
        raise InvalidInput(
            "top_k", f"{request.top_k}, but must be 1 to {MAX_TOP_K}; leave it out for no limit"
        )
    repetition = request.repetition_penalty if request.HasField("repetition_penalty") else 1.0
    if not 0 < repetition <= MAX_REPETITION_PENALTY:
        raise InvalidInput(
            "repetition_penalty",
            f"{repetition:g}, but must be above 0 and at most {MAX_REPETITION_PENALTY:g}",
        )
    if request.HasField("n") and not 1 <= request.n <= MAX_CANDIDATES:
        raise InvalidInput("n", f"{request.n}, but must be 1 to {MAX_CANDIDATES}")
    if len(request.stop) > MAX_STOPS:
        raise InvalidInput("stop", f"{len(request.stop)} strings, but at most {MAX_STOPS} are allowed")
    for index, stop in enumerate(request.stop):
        if not 1 <= len(stop.encode()) <= MAX_STOP_BYTES:
            raise InvalidInput(f"stop[{index}]", f"must have 1 to {MAX_STOP_BYTES} bytes")
    if request.tools and not request.messages:
        raise InvalidInput("tools", "are for a chat: send messages instead of prompt")
    return GenerateJob(
        prompt=request.prompt or None,
        turns=turns(request.messages),
        max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
        temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
        top_p=top_p,
        top_k=request.top_k,
        min_p=_number("min_p", request.min_p, 0.0, 1.0, below=True),
        repetition_penalty=repetition,
        presence_penalty=_number("presence_penalty", request.presence_penalty, -MAX_PENALTY, MAX_PENALTY),
        frequency_penalty=_number("frequency_penalty", request.frequency_penalty, -MAX_PENALTY, MAX_PENALTY),
        seed=request.seed if request.HasField("seed") else None,
        stop=tuple(request.stop),
        n=request.n or 1,
        logprobs=request.logprobs,
        grammar=grammar(request.response_format),
        tools=tools(request.tools),
        cached=not request.no_cache,
    )


def to_texts(request: pb.EmbedRequest | pb.ClassifyRequest) -> list[str]:
    """Raises InvalidInput, naming the field."""
    return _texts(request.inputs, MAX_INPUTS)


def _texts(inputs: Sequence[str], most: int) -> list[str]:
    if not 1 <= len(inputs) <= most:
        raise InvalidInput("inputs", f"{len(inputs)} texts, but 1 to {most} are allowed")
    total = 0
    for index, text in enumerate(inputs):
        if not text:
            raise InvalidInput(f"inputs[{index}]", "is empty")
        total += _text(f"inputs[{index}]", text)
    if total > MAX_INPUTS_BYTES:
        raise InvalidInput("inputs", f"{total} bytes in all, but at most {MAX_INPUTS_BYTES} are allowed")
    return list(inputs)


def find_calls(candidates: Sequence[pb.Candidate], job: GenerateJob) -> None:
    """Where the request has tools: calls of them become calls, and leave the text."""
    if not job.tools:
        return
    for candidate in candidates:
        reader = CallReader([tool.name for tool in job.tools])
        text, calls = reader.push(candidate.text)
        rest, more = reader.finish()
        candidate.text = text + rest
        for call in (*calls, *more):
            candidate.tool_calls.add(id=call.id, name=call.name, arguments=call.arguments)


def to_score_texts(request: pb.ScoreRequest) -> list[str]:
    """Raises InvalidInput, naming the field."""
    _text("prefix", request.prefix)
    return _texts(request.inputs, MAX_SCORED)


def to_chunk(delta: Delta, version: str) -> pb.GenerateChunk:
    chunk = pb.GenerateChunk(text=delta.text, model_version=version, index=delta.index, cached=delta.cached)
    if delta.logprobs:
        chunk.logprobs.extend(map(_logprob, delta.logprobs))
    if delta.finish:
        chunk.finish_reason = _FINISH[delta.finish]
    if delta.prompt_tokens:
        chunk.usage.CopyFrom(_usage(delta))
    return chunk


def to_generate_response(
    candidates: Sequence[pb.Candidate], last: Delta, version: str
) -> pb.GenerateResponse:
    first = candidates[0]
    return pb.GenerateResponse(
        text=first.text,
        finish_reason=first.finish_reason,
        usage=_usage(last),
        model_version=version,
        candidates=candidates,
        cached=last.cached,
    )


def add_to_candidate(candidate: pb.Candidate, delta: Delta) -> None:
    """Append a piece."""
    candidate.text += delta.text
    candidate.logprobs.extend(map(_logprob, delta.logprobs))
    if delta.finish:
        candidate.finish_reason = _FINISH[delta.finish]


def to_score_response(scores: Sequence[Scored], tokens: bool, version: str) -> pb.ScoreResponse:
    """`tokens`: whether each token's log-probability is told."""
    response = pb.ScoreResponse(
        usage=pb.Usage(prompt_tokens=sum(score.read for score in scores)), model_version=version
    )
    for score in scores:
        total, number = math.fsum(one.logprob for one in score.tokens), len(score.tokens)
        response.scores.add(
            log_likelihood=total,
            scored_tokens=number,
            perplexity=math.exp(min(-total / number, MAX_EXPONENT)) if number else 0.0,
            tokens=map(_logprob, score.tokens) if tokens else (),
        )
    return response


def to_embed_response(vectors: Vectors, version: str) -> pb.EmbedResponse:
    return pb.EmbedResponse(
        # Lists: protobuf takes floats of Python several times faster than those of numpy.
        embeddings=[pb.Embedding(values=row) for row in vectors.values.tolist()],
        usage=pb.Usage(prompt_tokens=vectors.tokens),
        model_version=version,
    )


def turns(messages: Sequence[pb.Message]) -> tuple[Turn, ...]:
    """A chat. Raises InvalidInput."""
    if len(messages) > MAX_TURNS:
        raise InvalidInput("messages", f"{len(messages)} messages, but at most {MAX_TURNS} are allowed")
    total = 0
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if message.role not in ROLES:
            raise InvalidInput(f"{field}.role", f'"{message.role[:32]}" is not one of {", ".join(ROLES)}')
        if message.role == "system" and index:
            raise InvalidInput(f"{field}.role", "a system message may only come first")
        if message.tool_calls and message.role != "assistant":
            raise InvalidInput(f"{field}.tool_calls", "only the assistant calls tools")
        if message.tool_call_id and message.role != "tool":
            raise InvalidInput(f"{field}.tool_call_id", 'is for messages of role "tool"')
        if len(message.name.encode()) > MAX_NAME_BYTES:
            raise InvalidInput(f"{field}.name", f"at most {MAX_NAME_BYTES} bytes are allowed")
        total += _text(f"{field}.content", message.content)
        total += _text(f"{field}.tool_call_id", message.tool_call_id)
        for at, call in enumerate(message.tool_calls):
            arguments = _json_object(f"{field}.tool_calls[{at}].arguments", call.arguments)
            total += len(call.id.encode()) + len(call.name.encode()) + arguments
    if total > MAX_TEXT_BYTES:
        raise InvalidInput("messages", f"{total} bytes in all, but at most {MAX_TEXT_BYTES} are allowed")
    return tuple(
        Turn(
            message.role,
            message.content,
            tuple(Call(call.id, call.name, call.arguments or "{}") for call in message.tool_calls),
            message.tool_call_id,
            message.name,
        )
        for message in messages
    )


def tools(given: Sequence[pb.Tool]) -> tuple[Tool, ...]:
    """Raises InvalidInput."""
    if len(given) > MAX_TOOLS:
        raise InvalidInput("tools", f"{len(given)} tools, but at most {MAX_TOOLS} are allowed")
    total = 0
    for index, tool in enumerate(given):
        if not TOOL_NAME.fullmatch(tool.name):
            raise InvalidInput(f"tools[{index}].name", "must be 1 to 64 letters, digits, '_' and '-'")
        total += len(tool.description.encode())
        total += _json_object(f"tools[{index}].parameters", tool.parameters)
    if total > MAX_TEXT_BYTES:
        raise InvalidInput("tools", f"{total} bytes in all, but at most {MAX_TEXT_BYTES} are allowed")
    return tuple(Tool(tool.name, tool.description, tool.parameters) for tool in given)


def grammar(wanted: pb.ResponseFormat) -> Grammar | None:
    """What the text has to keep to; whether the engine can is for the model to say. Raises InvalidInput,
    Unsupported for a schema that the engine would ignore in part."""
    kind = wanted.WhichOneof("format")
    if kind is None or (kind == "json_object" and not wanted.json_object):
        return None
    if kind == "json_object":
        return Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}')
    if kind == "choice":
        return Grammar(GrammarKind.REGEX, _alternatives(wanted.choice.options))
    text = getattr(wanted, kind)
    field = f"response_format.{kind}"
    if not 1 <= len(text.encode()) <= MAX_GRAMMAR_BYTES:
        raise InvalidInput(field, f"must have 1 to {MAX_GRAMMAR_BYTES} bytes")
    if kind == "json_schema":
        schema = _json(field, text)
        if not isinstance(schema, dict):
            raise InvalidInput(field, "a JSON Schema is an object")
        if (why := unkept(schema)) is not None:
            raise Unsupported(field, why)
    return Grammar(GrammarKind(kind), text)


def _alternatives(options: Sequence[str]) -> str:
    field = "response_format.choice.options"
    if not 1 <= len(options) <= MAX_OPTIONS:
        raise InvalidInput(field, f"{len(options)} strings, but 1 to {MAX_OPTIONS} are allowed")
    for index, option in enumerate(options):
        if not 1 <= len(option.encode()) <= MAX_OPTION_BYTES:
            raise InvalidInput(f"{field}[{index}]", f"must have 1 to {MAX_OPTION_BYTES} bytes")
        if not option.isprintable() and not set(option) <= set(string.printable):
            raise InvalidInput(f"{field}[{index}]", "has control characters")
    if len(set(options)) != len(options):
        raise InvalidInput(field, "has the same string twice")
    return "|".join(f"({escaped(option)})" for option in options)


def escaped(literal: str) -> str:
    """A regular expression that matches just `literal`. Not re.escape, which escapes more than the engine
    unescapes."""
    return "".join("\\" + c if c in r"\.^$*+?()[]{}|/" else c for c in literal)


def _json_object(field: str, text: str) -> int:
    """The size of JSON text that is empty or an object. Raises InvalidInput."""
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise InvalidInput(field, f"at most {MAX_GRAMMAR_BYTES} bytes are allowed")
    if text and not isinstance(_json(field, text), dict):
        raise InvalidInput(field, "must be a JSON object")
    return len(text.encode())


def _json(field: str, text: str) -> object:
    try:
        return json.loads(text, parse_constant=no_constant)
    except (ValueError, RecursionError) as err:
        raise InvalidInput(field, f"is not JSON: {err}") from err


def _text(field: str, text: str) -> int:
    """The text's size in bytes."""
    size = len(text.encode())
    if size > MAX_TEXT_BYTES:
        raise InvalidInput(field, f"{size} bytes, but at most {MAX_TEXT_BYTES} are allowed")
    return size


def _number(field: str, value: float, low: float, high: float, *, below: bool = False) -> float:
    """`below`: `high` itself is too much."""
    if math.isnan(value) or not low <= value <= high or (below and value == high):
        limits = f"at least {low:g} and below {high:g}" if below else f"{low:g} to {high:g}"
        raise InvalidInput(field, f"{value:g}, but must be {limits}")
    return value


def _logprob(one: Logprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=one.token, bytes=one.bytes, logprob=one.logprob)


def _usage(delta: Delta) -> pb.Usage:
    return pb.Usage(prompt_tokens=delta.prompt_tokens, completion_tokens=delta.completion_tokens)
