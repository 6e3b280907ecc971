"""Chat templates: the model's own Jinja template turns messages into the prompt it was trained on.

Follows the conventions of https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.core.errors import InvalidInput


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

    def render(self, turns: Sequence[Turn]) -> str:
        """The prompt, ready for the assistant's answer. Raises InvalidInput if the template refuses."""
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self._template.render(messages=messages, add_generation_prompt=True)
        except TemplateError as err:
            raise InvalidInput("messages", f"the model's chat template refuses them: {err}") from err


def _raise(message: str) -> None:
    raise TemplateError(message)
