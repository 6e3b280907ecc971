"""The rules that Envoy's messages carry about their own fields (protoc-gen-validate), checked before anything
is sent: Envoy would refuse what breaks one, and all that came with it.

https://github.com/bufbuild/protoc-gen-validate#constraint-rules. What a message means as a whole only Envoy
knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.symbol_database import Default
from validate import validate_pb2

Rule = Callable[[Any], str]
"""What is wrong with a value; empty: nothing."""

_WRAPPERS = "google/protobuf/wrappers.proto"
_HEADER_NAME = r"^:?[0-9a-zA-Z!#$%&'*+\-.^_|~`]+$"
_HEADER_VALUE = r"^[^\x00-\x08\x0a-\x1f\x7f]*$"
_LOOSE_HEADER = r"^[^\x00\n\r]*$"


def violations(message: Message, path: str = "") -> Iterator[str]:
    """Each as "field.of.field: what is wrong with it"."""
    if message.DESCRIPTOR.full_name == "google.protobuf.Any":
        inner = unpacked(message)
        if inner is not None:
            yield from violations(inner, path)
        return
    for name in _required_oneofs(message.DESCRIPTOR):
        if message.WhichOneof(name) is None:
            yield f"{path}{name}: one of its fields is required"
    for field, required, rules in _ruled(message.DESCRIPTOR):
        if field.has_presence and not message.HasField(field.name):
            if required and field.containing_oneof is None:
                yield f"{path}{field.name}: is required"
            continue
        for rule in rules:
            if wrong := rule(_value(message, field)):
                yield f"{path}{field.name}: {wrong}"
    for field, value in message.ListFields():
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            continue
        for key, inner in inner_messages(field, value):
            yield from violations(inner, f"{path}{field.name}{key}.")


def _value(message: Message, field: FieldDescriptor) -> Any:
    value = getattr(message, field.name)
    wrapped = field.message_type is not None and field.message_type.file.name == _WRAPPERS
    return value.value if wrapped and not field.is_repeated else value


def unpacked(message: Any) -> Message | None:
    """What is in an Any; None if its type is not known here."""
    try:
        inner: Message = Default().GetSymbol(message.type_url.rpartition("/")[2])()
    except KeyError:
        return None
    inner.ParseFromString(message.value)
    return inner


def inner_messages(field: FieldDescriptor, value: Any) -> Iterable[tuple[str, Message]]:
    """The messages in a field that is one, a list or a map of them, each with its place in it."""
    if not field.is_repeated:
        return [("", value)]
    entry: Any = field.message_type
    if not entry.GetOptions().map_entry:
        return [(f"[{number}]", inner) for number, inner in enumerate(value)]
    if entry.fields_by_name["value"].type != FieldDescriptor.TYPE_MESSAGE:
        return []
    return [(f"[{key}]", inner) for key, inner in value.items()]


@cache
def _required_oneofs(descriptor: Descriptor) -> tuple[str, ...]:
    return tuple(o.name for o in descriptor.oneofs if o.GetOptions().Extensions[validate_pb2.required])


@cache
def _ruled(descriptor: Descriptor) -> tuple[tuple[FieldDescriptor, bool, tuple[Rule, ...]], ...]:
    """The fields that have rules, whether they must be there, and what their values must be."""
    found = []
    for field in descriptor.fields:
        if not field.GetOptions().HasExtension(validate_pb2.rules):
            continue
        rules = field.GetOptions().Extensions[validate_pb2.rules]
        kind = rules.WhichOneof("type") or ""
        required = rules.message.required or getattr(getattr(rules, kind, None), "required", False)
        found.append((field, required, tuple(_rules(field, kind, rules))))
    return tuple(found)


def _rules(field: FieldDescriptor, kind: str, rules: Any) -> Iterator[Rule]:
    if not kind:
        return
    given = getattr(rules, kind)
    if kind == "repeated":
        yield _sized(given, "min_items", "max_items", "items")
        inner = given.items.WhichOneof("type") if given.HasField("items") else None
        for rule in _rules(field, inner or "", given.items):
            yield _each(rule)
    elif kind == "map":
        yield _sized(given, "min_pairs", "max_pairs", "entries")
        inner = given.keys.WhichOneof("type") if given.HasField("keys") else None
        for rule in _rules(field, inner or "", given.keys):
            yield _each(rule)
    elif kind == "string":
        yield from _text(given)
    elif kind == "enum" and given.defined_only:
        kinds: Any = field.enum_type
        known = {value.number for value in kinds.values}
        yield lambda value: "" if value in known else f"{value} is no known value"
    elif kind not in ("message", "any", "bytes", "bool", "timestamp", "enum"):
        yield from _numbers(given, kind)


def _each(rule: Rule) -> Rule:
    return lambda values: next((wrong for value in values if (wrong := rule(value))), "")


def _sized(given: Any, least: str, most: str, what: str) -> Rule:
    low = getattr(given, least) if given.HasField(least) else 0
    high = getattr(given, most) if given.HasField(most) else 1 << 62
    return lambda value: "" if low <= len(value) <= high else f"has {len(value)} {what}"


def _text(given: Any) -> Iterator[Rule]:
    low = max(given.min_len, given.min_bytes)
    high = (
        min(getattr(given, name) for name in ("max_len", "max_bytes") if given.HasField(name))
        if (given.HasField("max_len") or given.HasField("max_bytes"))
        else 1 << 62
    )
    skip = given.ignore_empty

    def sized(value: str) -> str:
        if skip and not value:
            return ""
        return "" if low <= len(value.encode()) <= high else f"is {len(value.encode())} bytes long"

    yield sized
    if given.prefix:
        yield lambda value: "" if value.startswith(given.prefix) else f"does not begin with {given.prefix}"
    pattern = given.pattern
    if given.well_known_regex:
        name = given.well_known_regex == validate_pb2.HTTP_HEADER_NAME
        strict = not given.HasField("strict") or given.strict
        pattern = (_HEADER_NAME if name else _HEADER_VALUE) if strict else _LOOSE_HEADER
    if pattern:
        compiled = re.compile(pattern)
        yield (
            lambda value: "" if (skip and not value) or compiled.search(value) else f"{value!r} is malformed"
        )


def _numbers(given: Any, kind: str) -> Iterator[Rule]:
    """Of numbers, their wrappers and durations."""
    of_duration = kind == "duration"

    def plain(value: Any) -> float:
        if hasattr(value, "nanos"):
            return float(value.seconds + value.nanos / 1e9)
        return float(value)

    bounds = {
        name: plain(getattr(given, name)) for name in ("lt", "lte", "gt", "gte") if given.HasField(name)
    }
    allowed = {plain(one) for one in getattr(given, "in")}
    upper = min(bounds.get("lt", float("inf")), bounds.get("lte", float("inf")))
    lower = max(bounds.get("gt", float("-inf")), bounds.get("gte", float("-inf")))
    if lower > upper:  # what lies between is forbidden: no rule of Envoy's is like that
        return

    def within(value: Any) -> str:
        number = plain(value)
        good = (
            number < bounds.get("lt", float("inf"))
            and lower <= number <= upper
            and number > bounds.get("gt", float("-inf"))
            and (not allowed or number in allowed)
        )
        return "" if good else f"{number:g}{' s' if of_duration else ''} is out of range"

    yield within
