"""The layers around every REST request, as interceptors.py has them for RPCs, and the function that orders
them."""

from __future__ import annotations

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.propagate import extract
from opentelemetry.trace import SpanKind, Status, StatusCode
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.core.errors import QueueFull
from services.core.interceptors import SHADOW_HEADER
from services.inference.rest.endpoint import refuse


def rest_stack(tracer: trace.Tracer, max_in_flight: int) -> list[Middleware]:
    """All layers, outermost first."""
    return [
        Middleware(Tracing, tracer=tracer),  # sees the final status
        Middleware(InFlightLimit, limit=max_in_flight),
    ]


class Tracing:
    """One server span per request, a child of the caller's span (W3C trace context in the headers)."""

    def __init__(self, app: ASGIApp, tracer: trace.Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        caller = extract(headers)
        attributes: dict[str, str | bool] = {
            "http.request.method": scope["method"],
            "url.path": scope["path"],
        }
        if SHADOW_HEADER in headers:
            attributes["lingqu.shadow"] = True
        span = self._tracer.start_span(f"{scope['method']} REST", caller, SpanKind.SERVER, attributes)
        # Never detached: every request has a task, and with it a context, of its own.
        otel_context.attach(trace.set_span_in_context(span, caller))

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                # Known once a route was found; whatever a stranger asks for makes no name of its own.
                if (route := scope.get("route")) is not None:
                    span.update_name(f"{scope['method']} {route.path}")
                span.set_attribute("http.response.status_code", status)
                if status >= 500:
                    span.set_status(Status(StatusCode.ERROR))
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            span.end()


class InFlightLimit:
    """Refuses requests above a bound, so that a flood costs memory only up to it."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._in_flight >= self._limit:
            await refuse(send, QueueFull(f"{self._limit} requests are in progress already; try again later"))
            return
        self._in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight -= 1
