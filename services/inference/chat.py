"""Chat templates: the model's own Jinja template turns messages into the prompt it was trained on.

Follows the conventions of https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jinja2 import meta
from jinja2.exceptions import TemplateError
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


class ChatTemplate:
    """A compiled template. It comes with the model, so it runs in Jinja's sandbox."""

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now(UTC).strftime(form)
        self._template = environment.from_string(source)
        self._takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))

    def render(self, turns: Sequence[Turn], tools: Sequence[Tool] = ()) -> str:
        """The prompt, ready for the assistant's answer. Raises InvalidInput if the template refuses."""
        if tools and not self._takes_tools:
            raise Unsupported("tools", "the model's chat template does not tell it of tools")
        given: dict[str, Any] = {"messages": list(map(_message, turns)), "add_generation_prompt": True}
        if tools:
            given["tools"] = list(map(_described, tools))
        try:
            return self._template.render(**given)
        except TemplateError as err:
            raise InvalidInput("messages", f"the model's chat template refuses them: {err}") from err


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


def _raise(message: str) -> None:
    raise TemplateError(message)
