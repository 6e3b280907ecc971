"""One request from its bytes to its answer: read, bounded, given up when the client is gone or its time is
over, answered whole or as events, with errors as OpenAI writes them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from services.core.errors import DeadlinePassed, InvalidInput, LingquError, MessageTooLarge
from services.core.interceptors import SHADOW_HEADER
from services.core.rest import MAX_BODY_BYTES, to_http
from services.inference.callers import CLIENT_HEADER, PAIR_HEADER, Caller, Priority, capped
from services.inference.rest import sse
from services.inference.rest.answers import Answer, Whole

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 15.0
TIMEOUT_HEADER = "x-request-timeout"
# How long the openai package waits for the next byte: of an answer that comes whole, for all of it. Of a
# stream it says nothing, as keep-alives come in between.
READ_TIMEOUT_HEADER = "x-stainless-read-timeout"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was read; `limit` ends the work on it when its time is over."""

    headers: Mapping[str, str]
    body: bytes
    path: Mapping[str, str]
    limit: asyncio.Timeout

    def caller(self, priority: Priority, *, stream: bool = False) -> Caller:
        """Who asks; from now on the time that the caller gives is kept to. Raises InvalidInput."""
        seconds = self._seconds(stream=stream)
        deadline = None
        if seconds is not None:
            deadline = time.monotonic() + seconds
            self.limit.reschedule(asyncio.get_running_loop().time() + seconds)
        return Caller(
            self.headers.get(CLIENT_HEADER, "")[:128],
            capped(priority, self.headers),
            deadline,
            self.headers.get(PAIR_HEADER, "")[:128],
            SHADOW_HEADER in self.headers,
        )

    def _seconds(self, *, stream: bool) -> float | None:
        if (given := self.headers.get(TIMEOUT_HEADER)) is not None:
            seconds = _number(given)
            if seconds is None:
                raise InvalidInput(TIMEOUT_HEADER, "must be a number of seconds, 0 or more")
            return seconds
        return None if stream else _number(self.headers.get(READ_TIMEOUT_HEADER, ""))


Handler = Callable[[Asked], Awaitable[Answer]]


class Endpoint:
    """An ASGI application around a handler. A stream that has nothing to say for `keep_alive_s` says so."""

    def __init__(self, handler: Handler, keep_alive_s: float = KEEP_ALIVE_S) -> None:
        self._handler = handler
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        responder = _Responder(send, self._keep_alive_s)
        headers, path = Headers(scope=scope), scope.get("path_params", {})
        try:
            asked = Asked(headers, await _body(headers, receive), path, asyncio.timeout(None))
            await _unless_gone(receive, self._answer(asked, responder))
        except _Gone:
            return
        except LingquError as err:
            await responder.fail(err)
        except Exception:
            log.exception("%s failed", scope["path"])
            await responder.fail(LingquError("internal error; the service's log has the details"))

    async def _answer(self, asked: Asked, responder: _Responder) -> None:
        try:
            async with asked.limit:
                answer = await self._handler(asked)
                if isinstance(answer, Whole):
                    await responder.whole(200, answer.body)
                else:
                    async with aclosing(answer.events) as events:
                        await responder.events(events)
        except TimeoutError as err:
            if not asked.limit.expired():
                raise
            raise DeadlinePassed("the time that the request gave was over before the answer was") from err


async def refuse(send: Send, error: LingquError) -> None:
    """Answer with an error before anything was read."""
    await _Responder(send, KEEP_ALIVE_S).fail(error)


class _Gone(Exception):
    """The client has closed the connection."""


async def _body(headers: Headers, receive: Receive) -> bytes:
    """Raises MessageTooLarge, _Gone."""
    too_large = MessageTooLarge(f"bodies have at most {MAX_BODY_BYTES >> 20} MiB")
    if int(headers.get("content-length", "0")) > MAX_BODY_BYTES:
        raise too_large
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > MAX_BODY_BYTES:
            raise too_large
        if not message.get("more_body"):
            return b"".join(pieces)


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Raises _Gone, and stops the work, when the client closes the connection."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Gone
        await working
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Responder:
    """Sends one answer, as a whole or piece by piece."""

    def __init__(self, send: Send, keep_alive_s: float) -> None:
        self._send = send
        self._keep_alive_s = keep_alive_s
        self._streaming = False
        self._spoke = time.monotonic()

    async def whole(self, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, (b"content-type", b"application/json"), length, *headers)
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, events: AsyncGenerator[bytes, None]) -> None:
        beat = asyncio.ensure_future(self._beat())
        try:
            async for event in events:
                await self._piece(event)
        finally:
            beat.cancel()
        await self._send({"type": "http.response.body"})

    async def fail(self, error: LingquError) -> None:
        """As a status; in the middle of a stream as its last event."""
        made = to_http(error)
        if self._streaming:
            await self._piece(sse.event(made.body))
            await self._send({"type": "http.response.body"})
            return
        headers = [] if made.retry_after_s is None else [(b"retry-after", str(made.retry_after_s).encode())]
        if isinstance(error, MessageTooLarge):
            headers.append((b"connection", b"close"))  # nobody reads the rest
        await self.whole(made.status, orjson.dumps(made.body), *headers)

    async def _beat(self) -> None:
        while True:
            wait = self._spoke + self._keep_alive_s - time.monotonic()
            if wait <= 0:
                await self._piece(sse.KEEP_ALIVE)
            else:
                await asyncio.sleep(wait)

    async def _piece(self, piece: bytes) -> None:
        if not self._streaming:
            self._streaming = True
            await self._start(200, *sse.HEADERS)
        self._spoke = time.monotonic()
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def _start(self, status: int, *headers: tuple[bytes, bytes]) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


def _number(text: str) -> float | None:
    """A finite number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
