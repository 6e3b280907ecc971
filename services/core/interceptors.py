"""The layers around every RPC handler, and the one function that orders them.

A layer is an async context manager around one call. Where it applies is decided in `server_stack`.
"""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from inspect import isawaitable
from typing import Any, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.propagate import extract
from opentelemetry.trace import SpanKind, Status, StatusCode

from services.core.errors import InvalidInput, LingquError, QueueFull, Stopping, to_rpc_status

log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
# On copies for a version in the shadow, whose answers nobody sees.
SHADOW_HEADER = "x-lingqu-shadow"
# Reflection and health are asked often and tell nothing about the service's work.
UNTRACED = ("/grpc.reflection.", "/grpc.health.")
# Of a few microseconds each, thousands a second; the spans of the requests they are for tell how long they
# took.
FREQUENT = ("/envoy.service.ratelimit.", "/lingqu.gateway.v1.LimiterService/")


def server_stack(
    tracer: trace.Tracer, max_in_flight: int, *further: Layer
) -> list[grpc.aio.ServerInterceptor]:
    """All layers, outermost first; `further` are those of one service."""
    return [
        Tracing(tracer),  # sees the final status
        StatusMapper(),  # below here, raise domain errors
        *further,
        InFlightLimit(max_in_flight),
    ]


class Layer(grpc.aio.ServerInterceptor):
    """Wraps handlers of every shape in `around`. A layer that `decodes` parses the requests inside of it, so
    that it sees what is no message at all; a handler may answer bytes, encoded once for many callers."""

    decodes = False

    @abstractmethod
    def around(self, method: str, context: Context) -> AbstractAsyncContextManager[None]: ...

    def handled(self, method: str, request: Any, context: Context) -> AbstractAsyncContextManager[None]:
        """For layers that look at the request, or the iterator of them, as well."""
        return self.around(method, context)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        decode = handler.request_deserializer if self.decodes else None
        inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        async def unary(request: Any, context: Context) -> Any:
            async with self.handled(method, request, context):
                return await inner(_decoded(decode, request), context)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            async with self.handled(method, request, context), AsyncExitStack() as stack:
                responses = inner(_decoded(decode, request), context)
                if isawaitable(responses):  # it writes its answers itself
                    await responses
                    return
                await stack.enter_async_context(aclosing(responses))
                async for response in responses:
                    yield response

        make: Any = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[bool(handler.request_streaming), bool(handler.response_streaming)]
        wrapper: Any = stream if handler.response_streaming else unary
        encode = handler.response_serializer
        if decode is None:
            return cast(Handler, make(wrapper, handler.request_deserializer, encode))
        return cast(Handler, make(wrapper, None, lambda r: r if isinstance(r, bytes) else encode(r)))


def _decoded(decode: Any, request: Any) -> Any:
    """The parsed request, or the iterator of them. Raises InvalidInput."""
    if decode is None:
        return request
    if not isinstance(request, bytes):
        return _all_decoded(decode, request)
    try:
        return decode(request)
    except DecodeError as err:
        raise InvalidInput("request", "is not a well-formed message of this method") from err


async def _all_decoded(decode: Any, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _decoded(decode, request)


class Tracing(Layer):
    """One server span per call, a child of the caller's span (W3C trace context in the metadata)."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        if method.startswith((*UNTRACED, *FREQUENT)):
            yield
            return
        metadata = {k: v for k, v in context.invocation_metadata() or () if isinstance(v, str)}
        service, _, rpc = method.lstrip("/").partition("/")
        caller = extract(metadata)
        span = self._tracer.start_span(
            method.lstrip("/"),
            caller,
            SpanKind.SERVER,
            {"rpc.system": "grpc", "rpc.service": service, "rpc.method": rpc},
        )
        if SHADOW_HEADER in metadata:
            span.set_attribute("lingqu.shadow", True)
        # Never detached: every call has a task, and with it a context, of its own.
        otel_context.attach(trace.set_span_in_context(span, caller))
        try:
            yield
        finally:
            code = context.code()
            number = code if isinstance(code, int) else code.value[0] if code else 0
            span.set_attribute("rpc.grpc.status_code", number)
            if number:
                span.set_status(Status(StatusCode.ERROR, context.details() or ""))
            span.end()


class StatusMapper(Layer):
    """Turns what handlers raise into the status and details that clients see."""

    decodes = True

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        try:
            yield
        except LingquError as error:
            await context.abort_with_status(rpc_status.to_status(to_rpc_status(error)))
        except (grpc.aio.AbortError, grpc.aio.UsageError):
            raise
        except Exception:
            log.exception("%s failed", method)
            unknown = LingquError("internal error; the service's log has the details")
            await context.abort_with_status(rpc_status.to_status(to_rpc_status(unknown)))


class LongCalls(Layer):
    """Ends calls that go on for as long as somebody wants them, of `methods` (paths), before a server stops
    that would wait for them: whoever made them goes elsewhere."""

    def __init__(self, methods: Collection[str]) -> None:
        self._methods = frozenset(methods)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ended: set[asyncio.Task[Any]] | None = None

    def end(self) -> None:
        """All of them, and those that come from now on."""
        self._ended = set(self._tasks)
        for task in self._ended:
            task.cancel()

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        if method not in self._methods:
            yield
            return
        if self._ended is not None:
            raise Stopping
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - each call has one
        self._tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if self._ended is None or task not in self._ended:
                raise
            task.uncancel()
            raise Stopping from None
        finally:
            self._tasks.discard(task)


class InFlightLimit(Layer):
    """Refuses calls above a bound, so that a flood costs memory only up to it. Health is always answered."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_flight = 0

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        if method.startswith(UNTRACED):
            yield
            return
        if self._in_flight >= self._limit:
            raise QueueFull(f"{self._limit} calls are in progress already; try again later")
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
