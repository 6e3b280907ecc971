"""Which JSON Schemas the engine keeps to; each refusal below was seen to be ignored by it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.keywords import unkept

KEPT = [
    {},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"type": "integer", "minimum": 0, "exclusiveMaximum": 9},
    {"type": "number", "minimum": 0},
    {"type": "number", "maximum": 2.0},
    {"type": ["string", "null"], "enum": ["a", None]},
    {"type": "string", "pattern": "^[a-z]+$"},
    {"type": "string", "format": "password", "minLength": 8},
    {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": False},
    {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Name"},
    {"allOf": [{"$ref": "#/$defs/a"}], "description": "…", "$defs": {"a": {"type": "null"}}},
    {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
    {"properties": {"not": {"type": "string"}, "if": {"type": "integer"}}, "required": ["not"]},
    {"const": {"not": 1}},
    {"type": "integer", "const": 3.0},
]
IGNORED = [
    ({"not": {}}, '#: "not"'),
    ({"type": "integer", "multipleOf": 7}, '"multipleOf"'),
    ({"type": "integer", "if": True, "then": {"minimum": 5}}, '"if"'),
    ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
    ({"type": "array", "contains": {"const": 1}}, '"contains"'),
    ({"dependentRequired": {"a": ["b"]}}, '"dependentRequired"'),
    ({"type": "object", "required": ["a"]}, '"required" names "a"'),
    ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, '"allOf"'),
    ({"allOf": [{"type": "integer"}], "minimum": 3}, '"minimum" is not kept to beside "allOf"'),
    ({"type": "object", "anyOf": [{"required": []}]}, '"type" is not kept to beside "anyOf"'),
    ({"$ref": "http://example.com/schema"}, '"$ref"'),
    ({"$ref": "#name"}, '"$ref"'),
    ({"$ref": "#"}, "leads back to itself"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "leads back"),
    ({"type": "number", "minimum": 0, "maximum": 1}, "integers only"),
    ({"type": ["number", "null"], "exclusiveMinimum": 0}, "integers only"),
    ({"type": "number", "minimum": 0.5}, "whole number"),
    ({"type": "string", "pattern": "a+", "maxLength": 3}, '"maxLength"'),
    ({"type": "string", "format": "date", "minLength": 3}, '"minLength"'),
    ({"type": "string", "const": 5}, '"const"'),
    ({"type": "integer", "enum": [1, True]}, '"enum"'),
]


@pytest.mark.parametrize("schema", KEPT)
def test_what_is_kept_to_is_taken(schema: dict[str, Any]) -> None:
    assert unkept(schema) is None


@pytest.mark.parametrize(("schema", "why"), IGNORED)
def test_what_would_be_ignored_is_named_wherever_it_stands(schema: dict[str, Any], why: str) -> None:
    assert why in str(unkept(schema))
    if "$ref" in schema:
        return  # leads elsewhere from elsewhere
    for outer in (
        {"properties": {"x": schema}},
        {"items": schema},
        {"anyOf": [{}, schema]},
        {"$defs": {"x": schema}},
        {"additionalProperties": schema},
    ):
        assert str(unkept(outer)).startswith(f"#/{next(iter(outer))}")


words = st.sampled_from(
    ["type", "properties", "required", "items", "anyOf", "allOf", "$ref", "$defs", "enum", "const", "minimum"]
) | st.text(max_size=3)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["number", "#", "#/$defs/a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(words, values, max_size=5))
def test_no_json_is_too_odd(schema: dict[str, Any]) -> None:
    assert isinstance(unkept(json.loads(json.dumps(schema))), str | None)
