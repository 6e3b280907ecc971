"""One call: what a handler sees of it, and how it comes to its end."""

from __future__ import annotations

import asyncio
import inspect
import logging
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio

from services.core.http2.headers import Metadata, Metadatum, encoded
from services.core.http2.messages import Reader, Refused, prefixed

log = logging.getLogger(__name__)

# Handlers that keep deadlines themselves can say more than the server can: they come first.
DEADLINE_GRACE_S = 0.1
# What a message takes besides its bytes.
MESSAGE_BYTES = 64


class Peer(Protocol):
    """The connection, as a call uses it."""

    name: str

    @property
    def certificate(self) -> bytes | None: ...

    def begin(self, stream: int, initial: bytes) -> None:
        """Send a response's headers, with that block of metadata."""

    async def send(self, stream: int, data: bytes, begun: bool) -> None:
        """Send data when there is room for it in the client's windows. `begun`: the response's headers were
        sent. Raises grpc.aio.UsageError if other data of that stream still waits."""

    def end(self, stream: int, begun: bool, code: int, details: str, trailing: bytes) -> None:
        """Send a status, which ends the call, with that block of metadata."""

    def took(self, stream: int, size: int) -> None:
        """Let the client send as many bytes again."""

    def holds(self, stream: int, size: int) -> None:
        """So many bytes of requests wait in memory."""


class Call(grpc.aio.ServicerContext[Any, Any]):
    """`found` gives the handler with what is around it; its shape is that of `handler`."""

    def __init__(
        self,
        peer: Peer,
        stream: int,
        handler: Any,
        found: Callable[[], Any],
        metadata: tuple[Metadatum, ...],
        seconds: float | None,
        reader: Reader,
    ) -> None:
        self._peer = peer
        self._stream = stream
        self._handler = handler
        self._found = found
        self._metadata = metadata
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._reader = reader
        self._requests: deque[bytes] = deque()
        self._queued = 0  # bytes of them
        self.untaken = 0  # bytes that came and may not be replaced yet
        self._more = asyncio.Event()
        self._half_closed = False
        self._begun = False
        self._over = False
        self._left = False
        self._code: Any = None
        self._details = ""
        self._trailing: Metadata = ()
        self._trailing_block = b""
        self._callbacks: list[Any] = []
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        if seconds is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(seconds + DEADLINE_GRACE_S, self._expire)
        if handler.request_streaming:
            self._start()

    # -- what comes from the client ----------------------------------------------------------------------

    def data(self, data: bytes, size: int) -> None:
        """`size` is what the client's window has shrunk by. Raises Refused."""
        self.untaken += size
        whole = self._reader.push(data)
        self._requests.extend(whole)
        self._queued += sum(map(len, whole)) + MESSAGE_BYTES * len(whole)
        if not self._handler.request_streaming:
            if len(self._requests) > 1:
                raise Refused(grpc.StatusCode.INTERNAL, "two requests, but the method takes one")
            self._take()
        elif not self._requests:
            self._take()
        self._more.set()
        self._hold()

    def half_close(self) -> None:
        """The client has said everything. Raises Refused."""
        self._half_closed = True
        if len(self._reader):
            raise Refused(grpc.StatusCode.INTERNAL, "the request ends within a message")
        if self._handler.request_streaming:
            self._more.set()
        elif not self._requests:
            raise Refused(grpc.StatusCode.INTERNAL, "no request, but the method takes one")
        else:
            self._start()

    def leave(self) -> None:
        """The client has gone, or has been told the end."""
        self._left = not self._over
        self._over = True
        self._stop()

    def cut(self, code: grpc.StatusCode | int, details: str) -> None:
        """End it with that status, whatever the handler does."""
        if not self._over:
            self._over = True
            self._code, self._details = code, details
            number = code if isinstance(code, int) else code.value[0]
            self._peer.end(self._stream, self._begun, number, details, self._trailing_block)
        self._stop()

    def _expire(self) -> None:
        self.cut(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed")

    def _take(self) -> None:
        taken, self.untaken = self.untaken, 0
        if taken:
            self._peer.took(self._stream, taken)

    def _hold(self) -> None:
        if not self._over:
            self._peer.holds(self._stream, self._queued + len(self._reader))

    # -- the handler -------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="call")

    async def _run(self) -> None:
        try:
            await self._answer(await self._found())
            code, details = self._code or grpc.StatusCode.OK, self._details
        except grpc.aio.AbortError:
            code, details = self._code or grpc.StatusCode.UNKNOWN, self._details
        except asyncio.CancelledError:
            code, details = grpc.StatusCode.CANCELLED, "cancelled by the server"
        except Exception as err:
            log.exception("a handler failed")
            code, details = grpc.StatusCode.UNKNOWN, f"unexpected {type(err).__name__}"
            if self._failed:
                code, details = self._code, self._details
        self.cut(code, details)
        for callback in self._callbacks:
            try:
                callback(self)
            except Exception:
                log.exception("a callback of a call failed")

    @property
    def _failed(self) -> bool:
        return self._code not in (None, 0, grpc.StatusCode.OK)

    async def _answer(self, handler: Any) -> None:
        decode = handler.request_deserializer
        argument: Any
        if handler.request_streaming:
            argument = self._received(decode)
        else:
            message = self._requests.popleft()  # counts as held to the end: the handler has it now
            argument = decode(message) if decode else message
        inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        answer = inner(argument, self)
        if not handler.response_streaming:
            response = await answer
            if not self._failed:
                await self.write(response)
        elif inspect.isasyncgen(answer):
            try:
                async for response in answer:
                    await self.write(response)
            finally:
                await answer.aclose()
        else:
            await answer

    async def _received(self, decode: Any) -> AsyncIterator[Any]:
        while (message := await self._next()) is not None:
            yield decode(message) if decode else message

    async def _next(self) -> bytes | None:
        while not self._requests:
            if self._half_closed:
                return None
            self._more.clear()
            await self._more.wait()
        message = self._requests.popleft()
        self._queued -= len(message) + MESSAGE_BYTES
        if not self._requests:
            self._take()
        self._hold()
        return message

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    @property
    def task(self) -> asyncio.Task[None] | None:
        """The handler's, from when the request has come."""
        return self._task

    # -- grpc.aio.ServicerContext ------------------------------------------------------------------------

    async def read(self) -> Any:
        message = await self._next()
        decode = self._handler.request_deserializer
        return grpc.aio.EOF if message is None else decode(message) if decode else message

    async def write(self, message: Any) -> None:
        if self._over:
            raise asyncio.CancelledError
        encode = self._handler.response_serializer
        data = message if encode is None else encode(message)
        begun, self._begun = self._begun, True
        await self._peer.send(self._stream, prefixed(data), begun)

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        if self._over:
            raise asyncio.CancelledError
        if self._begun:
            raise grpc.aio.UsageError("the headers of the response are sent already")
        block = encoded(initial_metadata)
        self._begun = True
        self._peer.begin(self._stream, block)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        if trailing_metadata:
            self.set_trailing_metadata(trailing_metadata)
        self.set_code(code)
        self._details = details or self._details
        raise grpc.aio.AbortError(details)

    async def abort_with_status(self, status: Any) -> NoReturn:
        await self.abort(status.code, status.details, status.trailing_metadata)

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        trailing = tuple(trailing_metadata)
        self._trailing_block = encoded(trailing)
        self._trailing = trailing

    def trailing_metadata(self) -> Any:
        return self._trailing

    def invocation_metadata(self) -> Any:
        return self._metadata

    def set_code(self, code: Any) -> None:
        if not isinstance(code, int | grpc.StatusCode):
            raise TypeError(f"{code!r} is no status")
        self._code = code

    def code(self) -> Any:
        return self._code

    def set_details(self, details: str) -> None:
        self._details = details

    def details(self) -> str:
        return self._details

    def set_compression(self, compression: grpc.Compression) -> None:
        """Answers are never compressed."""

    def disable_next_message_compression(self) -> None:
        """Answers are never compressed."""

    def peer(self) -> str:
        return self._peer.name

    def peer_identities(self) -> Iterable[bytes] | None:
        return None

    def peer_identity_key(self) -> str | None:
        return None

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """The client's certificate, if it has shown one; no other of gRPC's properties."""
        certificate = self._peer.certificate
        if certificate is None:
            return {}
        return {"x509_pem_cert": [ssl.DER_cert_to_PEM_cert(certificate).encode()]}

    def time_remaining(self) -> Any:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def add_done_callback(self, callback: Any) -> None:
        self._callbacks.append(callback)

    def cancelled(self) -> bool:
        return self._left or self._code == grpc.StatusCode.CANCELLED

    def done(self) -> bool:
        return self._over
