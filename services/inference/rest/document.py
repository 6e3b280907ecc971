"""The OpenAPI document of both REST APIs: OpenAI's, which app.py serves, made from the schemas that check the
requests, and our own, which the gateway makes of gRPC (transcoded.py)."""

from __future__ import annotations

from functools import cache
from typing import Any

import orjson
from pydantic.json_schema import models_json_schema

from services.inference.rest import transcoded
from services.inference.rest.schemas import ChatRequest, CompletionRequest, EmbeddingRequest

_REF = transcoded.REF
_REQUESTS = (ChatRequest, CompletionRequest, EmbeddingRequest)


@cache
def document() -> bytes:
    """JSON text."""
    _, made = models_json_schema(
        [(model, "validation") for model in _REQUESTS], ref_template=_REF + "{model}", by_alias=True
    )
    generate = "Continue a chat; with `stream`, as server-sent events that end with `data: [DONE]`."
    schemas = made["$defs"] | _ANSWERS | transcoded.schemas()
    value = {
        "openapi": "3.1.0",
        "info": {
            "title": "Lingqu: the text API and OpenAI's, as REST",
            "version": "v1",
            "description": "The text API is POST /v1/models/{model}:verb, described by "
            "protos/lingqu/inference/v1; what of OpenAI's is supported, ignored and refused: docs/openai.md",
        },
        "security": [{"key": []}],
        "paths": {
            "/v1/chat/completions": _post("createChatCompletion", generate, "ChatRequest", "Chat"),
            "/v1/completions": _post(
                "createCompletion", "Continue prompts.", "CompletionRequest", "Completion"
            ),
            "/v1/embeddings": _post(
                "createEmbedding", "Turn texts into vectors.", "EmbeddingRequest", "Embeddings"
            ),
            "/v1/models": _get("listModels", "The models that take requests.", "Models"),
            "/v1/models/{id}": {
                **_get("retrieveModel", "One of them.", "Model"),
                "parameters": [
                    {
                        "name": "id",
                        "in": "path",
                        "required": True,
                        "schema": {"type": "string", "minLength": 1},
                    }
                ],
            },
            **transcoded.paths(),
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    return orjson.dumps(value)


def _post(operation: str, summary: str, request: str, answer: str) -> dict[str, Any]:
    streamed = {} if answer == "Embeddings" else {"text/event-stream": {"schema": {"type": "string"}}}
    return {
        "post": {
            "operationId": operation,
            "summary": summary,
            "requestBody": {"required": True, "content": _json(request)},
            "responses": _responses(answer, streamed),
        }
    }


def _get(operation: str, summary: str, answer: str) -> dict[str, Any]:
    return {"get": {"operationId": operation, "summary": summary, "responses": _responses(answer, {})}}


def _responses(answer: str, streamed: dict[str, Any]) -> dict[str, Any]:
    failed = {"description": "OpenAI's error object", "content": _json("Error")}
    return {"200": {"description": "The answer", "content": _json(answer) | streamed}, "default": failed}


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF + schema}}}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


_STRING, _INTEGER = {"type": "string"}, {"type": "integer"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_LOGPROBS = {"type": ["object", "null"]}
_USAGE = _object(prompt_tokens=_INTEGER, completion_tokens=_INTEGER, total_tokens=_INTEGER)
_HEAD = {
    "id": _STRING,
    "object": _STRING,
    "created": _INTEGER,
    "model": _STRING,
    "system_fingerprint": _STRING,
}
_CHOICE = {
    "index": _INTEGER,
    "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
    "logprobs": _LOGPROBS,
}
_MODEL = _object(id=_STRING, object={"const": "model"}, created=_INTEGER, owned_by=_STRING)
_VECTOR = {"oneOf": [_list({"type": "number"}), {**_STRING, "contentEncoding": "base64"}]}
_CALL = _object(id=_STRING, type={"const": "function"}, function=_object(name=_STRING, arguments=_STRING))
_MESSAGE = _object(role={"const": "assistant"}, content=_TEXT_OR_NULL, refusal={"type": "null"})
_MESSAGE["properties"]["tool_calls"] = _list(_CALL)
_ANSWERS = {
    "Chat": _object(**_HEAD, choices=_list(_object(**_CHOICE, message=_MESSAGE)), usage=_USAGE),
    "Completion": _object(**_HEAD, choices=_list(_object(**_CHOICE, text=_STRING)), usage=_USAGE),
    "Embeddings": _object(
        object={"const": "list"},
        model=_STRING,
        data=_list(_object(object={"const": "embedding"}, index=_INTEGER, embedding=_VECTOR)),
        usage=_object(prompt_tokens=_INTEGER, total_tokens=_INTEGER),
    ),
    "Model": _MODEL,
    "Models": _object(object={"const": "list"}, data=_list(_MODEL)),
    "Error": _object(error=_object(message=_STRING, type=_STRING, param=_TEXT_OR_NULL, code=_TEXT_OR_NULL)),
}
