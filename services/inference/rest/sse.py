"""Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))


def event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


class Chunks:
    """Events that differ in their choices only: everything else is written as JSON once."""

    def __init__(self, heading: Mapping[str, Any], *, with_usage: bool) -> None:
        # A heading is a JSON object that is not empty, so its text ends with a brace.
        self._head = b"data: " + orjson.dumps(heading)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"

    def choice(self, value: Mapping[str, Any]) -> bytes:
        return self._head + orjson.dumps(value) + self._tail

    def usage(self, value: Mapping[str, Any]) -> bytes:
        """The last one, which has no choice."""
        return self._head + b'],"usage":' + orjson.dumps(value) + b"}\n\n"
