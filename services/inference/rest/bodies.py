"""From the bytes of a request to a checked value: JSON, then types. Whatever is wrong raises InvalidInput
with OpenAI's name of the parameter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from services.core.errors import InvalidInput
from services.core.rest import UnknownParameter

MAX_DEPTH = 64
_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]*")
# What pydantic puts into the path of an error for a branch of a union.
_BRANCHES = frozenset({"str", "int", "float", "bool", "none", "dict", "list", "nullable"})
_SURROGATE = re.compile("[\ud800-\udfff]")

T = TypeVar("T", bound=BaseModel)


def parsed(body: bytes, kind: type[T]) -> T:
    """Raises InvalidInput, UnknownParameter among them."""
    value = _json(body)
    if not isinstance(value, dict):
        raise InvalidInput("body", "must be a JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as refused:
        raise _worst(refused) from None


def dumped(field: str, value: Mapping[str, Any]) -> str:
    """JSON text of an object inside a request. Raises InvalidInput where it is nested too deeply."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in level if isinstance(inner, dict | list)]
        if not level:
            return orjson.dumps(value).decode()
    raise InvalidInput(field, f"is nested more than {MAX_DEPTH} levels deep")


def _json(body: bytes) -> object:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as err:
        # Two mistakes have a place that can be named; orjson only counts characters.
        try:
            body.decode()
        except UnicodeDecodeError as bad:
            raise InvalidInput("body", f"is not UTF-8: byte {bad.start} cannot be decoded") from None
        if (where := _lone_surrogate(body)) is not None:
            raise InvalidInput(where or "body", "has half a surrogate pair, which is no character") from None
        raise InvalidInput("body", f"is not JSON: {err}") from None


def _lone_surrogate(body: bytes) -> str | None:
    """The path of a string that has half a surrogate pair in it."""
    try:
        waiting: list[tuple[str, Any]] = [("", json.loads(body))]
    except (ValueError, RecursionError):
        return None
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str) and _SURROGATE.search(value):
            return path
        if isinstance(value, list):
            waiting += [(f"{path}[{at}]", inner) for at, inner in enumerate(value)]
        elif isinstance(value, dict):
            if any(_SURROGATE.search(key) for key in value):
                return path
            waiting += [(f"{path}.{key}" if path else key, inner) for key, inner in value.items()]
    return None


def _worst(refused: ValidationError) -> InvalidInput:
    """The first error; of a union's branches the one that got furthest."""
    errors = refused.errors(include_url=False, include_context=False, include_input=False)
    first = errors[0]["loc"][0] if errors[0]["loc"] else ""
    found = max(
        (e for e in errors if e["loc"][:1] == (first,)), key=lambda e: len(_path(e["loc"], e["type"]))
    )
    path = _path(found["loc"], found["type"])
    if found["type"] == "extra_forbidden":
        return UnknownParameter(path)
    if found["type"] == "missing":
        return InvalidInput(path, "is required")
    return InvalidInput(path, found["msg"][:1].lower() + found["msg"][1:])


def _path(loc: tuple[int | str, ...], kind: str) -> str:
    """messages[0].content, without the names that pydantic gives to branches of a union."""
    path = ""
    for at, part in enumerate(loc):
        last = kind == "extra_forbidden" and at == len(loc) - 1
        if isinstance(part, int):
            path += f"[{part}]"
        elif last or (_IDENTIFIER.fullmatch(part) and part not in _BRANCHES):
            path += f".{part[:64]}" if path else part[:64]
    return path
