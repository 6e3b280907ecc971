"""Chat templates: the model's own Jinja template turns messages into the prompt it was trained on.

Follows the conventions of https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from jinja2 import meta, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.core.errors import InvalidInput, Unsupported


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool that the assistant asked for; `arguments` is JSON text of an object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One message; role is system, user, assistant or tool."""

    role: str
    content: str
    calls: tuple[Call, ...] = ()
    call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may ask for; `parameters` is JSON text of a JSON Schema, or empty."""

    name: str
    description: str = ""
    parameters: str = ""


# What Python raises where a template meets values that it was not written for, such as a tool's.
REFUSALS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)


class _Generation(Extension):
    """{% generation %} … {% endgeneration %} marks, for training, what the assistant said."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. It comes with the model, so it runs in Jinja's sandbox. `special_tokens` are what
    templates call bos_token and eos_token (tokens.py)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] = MappingProxyType({})) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
        )
        environment.filters["tojson"] = _json  # Jinja's own escapes for HTML and sorts
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now(UTC).strftime(form)
        environment.globals.update(special_tokens)
        self._template = environment.from_string(source)
        self._takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))

    def render(self, turns: Sequence[Turn], tools: Sequence[Tool] = ()) -> str:
        """The prompt, ready for the assistant's answer. Raises InvalidInput if the template refuses."""
        if tools and not self._takes_tools:
            raise Unsupported("tools", "the model's chat template does not tell it of tools")
        try:
            text = self._template.render(
                messages=list(map(_message, turns)),
                tools=list(map(_described, tools)) or None,
                documents=None,
                add_generation_prompt=True,
            )
            text.encode()
        except UnicodeEncodeError as err:
            raise InvalidInput("messages", "JSON in them has half a surrogate pair") from err
        except REFUSALS as err:
            raise InvalidInput("messages", f"the model's chat template refuses them: {err}") from err
        return text


def _message(turn: Turn) -> dict[str, Any]:
    """As templates know messages: OpenAI's form, with arguments as objects."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in turn.calls
        ]
    if turn.call_id:
        message["tool_call_id"] = turn.call_id
    if turn.name:
        message["name"] = turn.name
    return message


def _described(tool: Tool) -> dict[str, Any]:
    parameters = json.loads(tool.parameters) if tool.parameters else {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`, with transformers' arguments."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise TemplateError(message)
