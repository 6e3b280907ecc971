"""Between protobuf messages and the values inside; every rule of a request's fields is here."""

from __future__ import annotations

import math

from lingqu.inference.v1 import inference_pb2 as pb
from services.core.errors import InvalidInput
from services.inference.backends.engine import MAX_TOP_K, Finish
from services.inference.chat import Turn
from services.inference.text import Delta, GenerateJob
from services.inference.vectors import Vectors

MAX_TEXT_BYTES = 1 << 20
MAX_INPUTS_BYTES = 4 << 20
MAX_TURNS = 1024
MAX_INPUTS = 2048
MAX_STOPS = 8
MAX_STOP_BYTES = 256
MAX_TEMPERATURE = 2.0
ROLES = ("system", "user", "assistant")

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
    if len(request.stop) > MAX_STOPS:
        raise InvalidInput("stop", f"{len(request.stop)} strings, but at most {MAX_STOPS} are allowed")
    for index, stop in enumerate(request.stop):
        if not 1 <= len(stop.encode()) <= MAX_STOP_BYTES:
            raise InvalidInput(f"stop[{index}]", f"must have 1 to {MAX_STOP_BYTES} bytes")
    return GenerateJob(
        prompt=request.prompt or None,
        turns=_turns(request),
        max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
        temperature=temperature,
        top_p=top_p,
        top_k=request.top_k,
        seed=request.seed,
        stop=tuple(request.stop),
    )


def to_texts(request: pb.EmbedRequest) -> list[str]:
    """Raises InvalidInput, naming the field."""
    if not 1 <= len(request.inputs) <= MAX_INPUTS:
        raise InvalidInput("inputs", f"{len(request.inputs)} texts, but 1 to {MAX_INPUTS} are allowed")
    total = 0
    for index, text in enumerate(request.inputs):
        if not text:
            raise InvalidInput(f"inputs[{index}]", "is empty")
        total += _text(f"inputs[{index}]", text)
    if total > MAX_INPUTS_BYTES:
        raise InvalidInput("inputs", f"{total} bytes in all, but at most {MAX_INPUTS_BYTES} are allowed")
    return list(request.inputs)


def to_chunk(delta: Delta, version: str) -> pb.GenerateChunk:
    if not delta.finish:
        return pb.GenerateChunk(text=delta.text, model_version=version)
    return pb.GenerateChunk(
        text=delta.text, finish_reason=_FINISH[delta.finish], usage=_usage(delta), model_version=version
    )


def to_generate_response(text: str, last: Delta, version: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        text=text, finish_reason=_FINISH[last.finish], usage=_usage(last), model_version=version
    )


def to_embed_response(vectors: Vectors, version: str) -> pb.EmbedResponse:
    return pb.EmbedResponse(
        embeddings=[pb.Embedding(values=row) for row in vectors.values],
        usage=pb.Usage(prompt_tokens=vectors.tokens),
        model_version=version,
    )


def _turns(request: pb.GenerateRequest) -> tuple[Turn, ...]:
    if len(request.messages) > MAX_TURNS:
        raise InvalidInput(
            "messages", f"{len(request.messages)} messages, but at most {MAX_TURNS} are allowed"
        )
    total = 0
    for index, message in enumerate(request.messages):
        if message.role not in ROLES:
            raise InvalidInput(
                f"messages[{index}].role", f'"{message.role[:32]}" is not one of {", ".join(ROLES)}'
            )
        if message.role == "system" and index:
            raise InvalidInput(f"messages[{index}].role", "a system message may only come first")
        total += _text(f"messages[{index}].content", message.content)
    if total > MAX_TEXT_BYTES:
        raise InvalidInput("messages", f"{total} bytes in all, but at most {MAX_TEXT_BYTES} are allowed")
    return tuple(Turn(message.role, message.content) for message in request.messages)


def _text(field: str, text: str) -> int:
    """The text's size in bytes."""
    size = len(text.encode())
    if size > MAX_TEXT_BYTES:
        raise InvalidInput(field, f"{size} bytes, but at most {MAX_TEXT_BYTES} are allowed")
    return size


def _number(field: str, value: float, low: float, high: float) -> float:
    if math.isnan(value) or not low <= value <= high:
        raise InvalidInput(field, f"{value:g}, but must be {low:g} to {high:g}")
    return value


def _usage(delta: Delta) -> pb.Usage:
    return pb.Usage(prompt_tokens=delta.prompt_tokens, completion_tokens=delta.completion_tokens)
