"""What REST answers with: identifiers, usage, and a whole answer or the events of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import orjson

from services.inference.backends.jobs import Finish
from services.inference.text import Delta, Logprob

FINISH = {Finish.STOP: "stop", Finish.LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class Whole:
    """A complete answer, as JSON."""

    body: bytes


@dataclass(frozen=True, slots=True)
class Events:
    """Server-sent events, each complete with its blank line. Errors before the first become a status."""

    events: AsyncGenerator[bytes, None]


Answer = Whole | Events


def whole(value: Any) -> Whole:
    return Whole(orjson.dumps(value))


@dataclass(frozen=True, slots=True)
class Heading:
    """What all parts of an answer begin with."""

    id: str
    created: int
    model: str
    version: int

    @classmethod
    def new(cls, prefix: str, model: str, version: int) -> Heading:
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model, version)

    def of(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"{self.model.partition('@')[0]}-v{self.version}",
        }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def usage_of(last: Delta) -> dict[str, int]:
    return usage(last.prompt_tokens, last.completion_tokens)


def token_text(one: Logprob) -> str:
    """A token that is part of a character only is written as OpenAI writes it."""
    try:
        return one.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.bytes)
