"""Calls of tools in generated text: <tool_call>{"name": …, "arguments": {…}}</tool_call> as Hermes, Qwen and
SmolLM write them, or a bare JSON object, or a list of them."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Sequence
from enum import Enum, auto

from services.inference.backends.jobs import Grammar, GrammarKind
from services.inference.chat import Call, Tool
from services.inference.stops import overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_SURROGATE = re.compile("[\ud800-\udfff]")


class _In(Enum):
    START = auto()
    TEXT = auto()
    TAG = auto()
    BARE = auto()


class CallReader:
    """Separates calls of the tools with `names` from text, piece by piece. What may yet turn out to be a call
    is held back: an answer that begins as JSON does until it ends."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._held = ""
        self._in = _In.START
        self._behind_call = False  # white space there is nobody's text

    def push(self, piece: str) -> tuple[str, list[Call]]:
        """Text that is certain to be text, and the calls that are complete."""
        self._held += piece
        text: list[str] = []
        calls: list[Call] = []
        while self._step(text, calls):
            pass
        return "".join(text), calls

    def finish(self) -> tuple[str, list[Call]]:
        """The same for what was held back when generation ended."""
        held, self._held = self._held, ""
        if self._in is _In.START and self._behind_call:
            return held.lstrip(), []
        if self._in in (_In.TAG, _In.BARE) and (calls := parse(held, self._names)):
            return "", calls
        return (OPEN + held if self._in is _In.TAG else held), []

    def _step(self, text: list[str], calls: list[Call]) -> bool:
        """Whether there may be more to do."""
        match self._in:
            case _In.START:
                return self._start()
            case _In.TEXT:
                before, tag, behind = self._held.partition(OPEN)
                keep = 0 if tag else overlap(self._held, OPEN)
                text.append(before[: len(before) - keep])
                self._held = behind if tag else before[len(before) - keep :]
                self._in = _In.TAG if tag else _In.TEXT
                return bool(tag)
            case _In.TAG:
                body, tag, behind = self._held.partition(CLOSE)
                if not tag:
                    return False
                if found := parse(body, self._names):
                    calls += found
                else:
                    text.append(OPEN + body + CLOSE)
                self._held, self._in, self._behind_call = behind, _In.START, bool(found)
                return True
            case _In.BARE:
                return False

    def _start(self) -> bool:
        begun = self._held.lstrip()
        if self._behind_call:
            self._held = begun
        if not begun or (OPEN.startswith(begun) and begun != OPEN):
            return False
        if begun.startswith(OPEN):
            self._held, self._in = begun[len(OPEN) :], _In.TAG
        else:
            self._in = _In.BARE if begun[0] in "{[" else _In.TEXT
        return True


def parse(text: str, names: Collection[str]) -> list[Call]:
    """The calls that `text` is; none if it is anything else, or calls what is no tool."""
    try:
        value = json.loads(text, parse_constant=no_constant)
    except (ValueError, RecursionError):
        return []
    calls = [_call(item, names) for item in (value if isinstance(value, list) else [value])]
    return [call for call in calls if call] if all(calls) else []


def _call(value: object, names: Collection[str]) -> Call | None:
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or name not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=no_constant)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    written = json.dumps(arguments, ensure_ascii=False)
    if _SURROGATE.search(written):  # half a character, which has no UTF-8: as the model wrote it, escaped
        written = json.dumps(arguments)
    return Call(f"call_{uuid.uuid4().hex[:24]}", name, written)


def no_constant(name: str) -> None:
    """For json.loads, which takes NaN and Infinity for JSON. Raises ValueError."""
    raise ValueError(f"{name} is no JSON")


def forced(tools: Sequence[Tool]) -> Grammar:
    """What makes the text one call of one of these tools."""
    branches = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.name},
                "arguments": json.loads(tool.parameters) if tool.parameters else {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema = branches[0] if len(branches) == 1 else {"anyOf": branches}
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema, ensure_ascii=False))
