"""What of JSON Schema the engine does not keep to: its grammars (xgrammar) pass over these without a word, so
they are refused by name. What it cannot compile it says itself (grammars.py).

`oneOf` counts as `anyOf`. `format` is kept where the engine knows it, and may let a 30th of February pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

IGNORED = (
    *("not", "if", "multipleOf", "contains", "uniqueItems"),
    *("dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef"),
)
ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
    | {"$comment", "$schema", "$id", "$anchor", "$defs", "definitions", "discriminator"}
)
FORMATS = frozenset(
    {"date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
    | {"uri-reference", "uri-template", "json-pointer", "relative-json-pointer"}
)
LENGTHS = ("minLength", "maxLength")
MAPS = ("properties", "patternProperties", "$defs", "definitions")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLES = ("items", "additionalProperties", "propertyNames", "unevaluatedItems", "unevaluatedProperties")
KINDS: Mapping[str, type | tuple[type, ...]] = {
    "string": str, "boolean": bool, "null": type(None), "array": list, "object": dict,
    "number": (int, float), "integer": (int, float),
}  # fmt: skip


def unkept(schema: Mapping[str, Any]) -> str | None:
    """Where and why the engine's answer may not be what `schema` allows; None if nothing is known."""
    waiting: list[tuple[str, Mapping[str, Any]]] = [("#", schema)]
    while waiting:
        path, part = waiting.pop()
        for why in (_ignored(part), _alone(part), _reference(part, schema), _bounds(part), _values(part)):
            if why is not None:
                return f"{path}: {why}"
        waiting += ((f"{path}/{name}", inner) for name, inner in _inner(part) if isinstance(inner, dict))
    return None


def _inner(part: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in SINGLES:
        yield name, part.get(name)
    for name in LISTS:
        if isinstance(found := part.get(name), list):
            yield from ((f"{name}/{at}", inner) for at, inner in enumerate(found))
    for name in MAPS:
        if isinstance(found := part.get(name), dict):
            yield from ((f"{name}/{key[:64]}", inner) for key, inner in found.items())


def _ignored(part: Mapping[str, Any]) -> str | None:
    for name in IGNORED:
        if part.get(name, False) is not False:
            return f'"{name}" is not kept to'
    required, properties = part.get("required"), part.get("properties", {})
    if isinstance(required, list) and isinstance(properties, dict):
        for name in required:
            if isinstance(name, str) and name not in properties:
                return f'"required" names "{name[:64]}", which is not in "properties"'
    return None


def _alone(part: Mapping[str, Any]) -> str | None:
    """What makes the engine pass over everything beside it."""
    for name in ("$ref", "allOf", "anyOf", "oneOf"):
        if name in part and (beside := part.keys() - ANNOTATIONS - {name}):
            return f'"{min(beside)}" is not kept to beside "{name}"'
    if isinstance(found := part.get("allOf"), list) and len(found) > 1:
        return '"allOf" is kept to with one schema only'
    return None


def _reference(part: Mapping[str, Any], root: Mapping[str, Any]) -> str | None:
    """References that lead out of the schema, or to nothing but references."""
    seen: set[str] = set()
    while isinstance(to := part.get("$ref"), str):
        if to != "#" and not to.startswith("#/"):
            return '"$ref" is kept to within the schema only, as "#/$defs/name"'
        if to in seen:
            return f'"$ref" to "{to[:64]}" leads back to itself'
        seen.add(to)
        found: Any = root
        for step in to.split("/")[1:]:
            found = found.get(step) if isinstance(found, dict) else None
        if not isinstance(found, dict):
            return None  # the engine says so itself
        part = found
    return None


def _bounds(part: Mapping[str, Any]) -> str | None:
    kinds = part.get("type")
    if kinds == "number" or (isinstance(kinds, list) and "number" in kinds):
        for name in ("exclusiveMinimum", "exclusiveMaximum"):
            if name in part:
                return f'"{name}" is kept to for integers only'
        bounds = [part[name] for name in ("minimum", "maximum") if name in part]
        if len(bounds) > 1:
            return '"minimum" together with "maximum" is kept to for integers only'
        if any(isinstance(bound, float) and not bound.is_integer() for bound in bounds):
            return "a bound that is no whole number is not kept to"
    if "pattern" in part or part.get("format") in FORMATS:
        by = "pattern" if "pattern" in part else "format"
        for name in LENGTHS:
            if name in part:
                return f'"{name}" is not kept to beside "{by}"'
    return None


def _values(part: Mapping[str, Any]) -> str | None:
    """Values beside a type that they do not have: the engine would write them."""
    given = part.get("type")
    kinds = [kind for kind in (given if isinstance(given, list) else [given]) if isinstance(kind, str)]
    values = part.get("enum", [part["const"]] if "const" in part else [])
    if kinds and isinstance(values, list):
        for value in values:
            if not any(_is(value, kind) for kind in kinds):
                return f'a value of "{"enum" if "enum" in part else "const"}" is not of its "type"'
    return None


def _is(value: object, kind: str) -> bool:
    if isinstance(value, bool) and kind in ("number", "integer"):
        return False
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return kind not in KINDS or isinstance(value, KINDS[kind])
