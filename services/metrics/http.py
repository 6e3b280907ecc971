"""OTLP over HTTP: the same messages in the body of a POST, as protobuf or as JSON."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from google.protobuf.json_format import MessageToJson, ParseDict, ParseError
from google.protobuf.message import DecodeError, Message
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from services.core.errors import InvalidInput, LingquError, QueueFull, to_rpc_status
from services.core.rest import to_http
from services.metrics.intake import Intake
from services.metrics.receivers import Exports, count_spans
from services.metrics.wire import MetricsData

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 << 20
MAX_AT_ONCE = 64
MAX_DEPTH = 40
# A larger one is parsed in a thread, so that others are answered meanwhile.
LARGE_BYTES = 256 << 10
PROTOBUF, JSON = "application/x-protobuf", "application/json"
Accept = Callable[[Any], Awaitable[Message]]


def otlp_app(intake: Intake) -> Starlette:
    exports = Exports(intake)

    async def metrics(request: Any) -> Message:
        return await exports.accept(request)  # type: ignore[no-any-return]

    async def traces(request: Any) -> Message:
        return count_spans(intake, request)  # type: ignore[no-any-return]

    return Starlette(
        routes=[
            Route(
                "/v1/metrics",
                _Endpoint(metrics_service_pb2.ExportMetricsServiceRequest, metrics, MetricsData),
                methods=["POST"],
            ),
            Route(
                "/v1/traces", _Endpoint(trace_service_pb2.ExportTraceServiceRequest, traces), methods=["POST"]
            ),
        ]
    )


class _Endpoint:
    """An export of one signal. Statuses are those of OTLP: 400 never to be sent again, 429 and 503 with
    Retry-After to be; bodies of errors are google.rpc.Status in the format of the request."""

    def __init__(self, kind: type[Message], accept: Accept, read_as: type[Message] | None = None) -> None:
        """`read_as`: what is the same on the wire, for `accept`."""
        self._kind, self._accept, self._read_as = kind, accept, read_as or kind
        self._at_once = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            response = await self._answer(request, kind)
        except ClientDisconnect:
            return
        await response(scope, receive, send)

    async def _answer(self, request: Request, kind: str) -> Response:
        if kind not in (PROTOBUF, JSON):
            return Response(f"content-type has to be {PROTOBUF} or {JSON}\n", 415, media_type="text/plain")
        if self._at_once >= MAX_AT_ONCE:
            return _failed(QueueFull(f"{MAX_AT_ONCE} exports are in progress already"), kind)
        self._at_once += 1
        try:
            body = await _body(request)
            if len(body) > LARGE_BYTES:
                parsed = await asyncio.to_thread(self._parsed, body, kind)
            else:
                parsed = self._parsed(body, kind)
            return _sent(await self._accept(parsed), kind, 200)
        except LingquError as error:
            return _failed(error, kind)
        except HTTPException as error:
            return Response(f"{error.detail}\n", error.status_code, media_type="text/plain")
        except Exception:
            log.exception("%s failed", request.url.path)
            return _failed(LingquError("internal error; the service's log has the details"), kind)
        finally:
            self._at_once -= 1

    def _parsed(self, body: bytes, content_type: str) -> Message:
        if content_type == JSON and self._read_as is not self._kind:
            body = _parsed(self._kind, body, JSON).SerializeToString()
            content_type = PROTOBUF
        return _parsed(self._read_as, body, content_type)


async def _body(request: Request) -> bytes:
    """At most MAX_BODY_BYTES, packed and unpacked. Raises HTTPException."""
    packed = bytearray()
    async for chunk in request.stream():
        packed += chunk
        if len(packed) > MAX_BODY_BYTES:
            raise HTTPException(413, f"an export has at most {MAX_BODY_BYTES >> 20} MiB")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        return bytes(packed)
    if encoding != "gzip":
        raise HTTPException(415, "content-encoding has to be gzip, or none")
    unpacker = zlib.decompressobj(wbits=31)
    try:
        body = unpacker.decompress(bytes(packed), MAX_BODY_BYTES + 1)
    except zlib.error as err:
        raise HTTPException(400, "the body is not gzip") from err
    if len(body) > MAX_BODY_BYTES:
        raise HTTPException(413, f"an export has at most {MAX_BODY_BYTES >> 20} MiB unpacked")
    return body


def _parsed(kind: type[Message], body: bytes, content_type: str) -> Message:
    """Raises InvalidInput."""
    try:
        if content_type == PROTOBUF:
            return kind.FromString(body)
        found = orjson.loads(body)
        if not isinstance(found, dict):
            raise ParseError("the body is no JSON object")
        return ParseDict(_with_ids(found), kind(), ignore_unknown_fields=True, max_recursion_depth=MAX_DEPTH)
    except (DecodeError, ParseError, orjson.JSONDecodeError, ValueError) as err:
        raise InvalidInput("body", f"is no {kind.DESCRIPTOR.name}: {err}"[:300]) from err


def _with_ids(found: Any, depth: int = 0) -> Any:
    """OTLP's JSON has ids in hexadecimal, where protobuf's has base64. Raises ParseError."""
    if depth > MAX_DEPTH:
        raise ParseError(f"it is nested deeper than {MAX_DEPTH}")
    if isinstance(found, dict):
        return {k: _id(v) if k in _IDS else _with_ids(v, depth + 1) for k, v in found.items()}
    if isinstance(found, list):
        return [_with_ids(value, depth + 1) for value in found]
    return found


_IDS = frozenset({"traceId", "spanId", "parentSpanId", "trace_id", "span_id", "parent_span_id"})


def _id(value: Any) -> Any:
    try:
        return base64.b64encode(bytes.fromhex(value)).decode() if isinstance(value, str) else value
    except (ValueError, binascii.Error) as err:
        raise ParseError(f"an id is not hexadecimal: {value[:40]!r}") from err


def _failed(error: LingquError, kind: str) -> Response:
    found = to_http(error)
    response = _sent(to_rpc_status(error), kind, found.status)
    if found.retry_after_s is not None:
        response.headers["retry-after"] = str(found.retry_after_s)
    return response


def _sent(message: Any, kind: str, status: int) -> Response:
    body = message.SerializeToString() if kind == PROTOBUF else MessageToJson(message, indent=None).encode()
    return Response(body, status, media_type=kind)
